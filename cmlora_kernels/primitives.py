"""Small @triton.jit pieces that several kernels share."""

from __future__ import annotations

from cmlora_kernels.triton_shim import tl, triton


@triton.jit
def grouped_tile(tiles_n, GROUP: tl.constexpr):
    """(tile along m, tile along n) of this program, int64: GROUP m tiles walk n together, so they share W in L2."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_m = tl.num_programs(0) // tiles_n
    in_group = GROUP * tiles_n
    first_m = pid // in_group * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    return first_m + pid % in_group % height, pid % in_group // height


@triton.jit
def load_2d(ptrs, mask_m, mask_k, EVEN_K: tl.constexpr):
    """A tile with zeros outside; without a K tail the mask is constant over the K loop."""
    if EVEN_K:
        return tl.load(ptrs, mask=mask_m, other=0.0)
    return tl.load(ptrs, mask=mask_m & mask_k, other=0.0)


@triton.jit
def weigh(
    down,  # [BM, BR]
    groups_ptr,  # at this slot and part, int32
    weights_ptr,  # at this row, float32
    token,  # [BM]
    mask_m,  # [BM]
    mask_r,  # [BR]
    w_group,
    w_token,
):
    """Every column of `down` times its group's weight at each token; a group of -1 leaves its column as it is."""
    group = tl.load(groups_ptr + tl.arange(0, down.shape[1]), mask=mask_r, other=-1)
    ptrs = weights_ptr + token[:, None] * w_token + group[None, :] * w_group
    return down * tl.load(ptrs, mask=mask_m[:, None] & (group >= 0)[None, :], other=1.0)


@triton.jit
def expand_add(
    scaled,  # [BM, BR], in the dtype of B
    b_ptr,  # at this slot and part
    y_ptr,  # at this row, tile of m and part
    y_offsets,  # [BM]
    mask_m,  # [BM]
    first,
    last,
    rank,
    b_out,
    y_out,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y += scaled B^T over the columns first .. last - 1."""
    n, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    for start in range(first, last, BLOCK_N):
        column = start + n
        mask_n = column < last
        b_ptrs = b_ptr + column[None, :] * b_out + r[:, None]  # [BR, BN]
        b = tl.load(b_ptrs, mask=mask_n[None, :] & (r < rank)[:, None], other=0.0)
        y_ptrs = y_ptr + y_offsets[:, None] + column[None, :] * y_out  # [BM, BN]
        mask = mask_m[:, None] & mask_n[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        y = tl.dot(scaled, b, y, input_precision=PRECISION)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
