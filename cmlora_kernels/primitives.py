"""Small @triton.jit pieces that several kernels share."""

from __future__ import annotations

from cmlora_kernels.triton_shim import tl, triton


@triton.jit
def tile_of_row(tokens, tiles_n, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """(row, first token, tile along n) of this program, int64: a tile never crosses a row, so it has one slot.

    GROUP tiles of tokens walk along n together, so they share W in L2.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles_m = tl.num_programs(0) // tiles_n
    in_group = GROUP * tiles_n
    first = pid // in_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m, tile_n = first + pid % in_group % height, pid % in_group // height
    of_row = tl.cdiv(tokens, BLOCK_M)
    return tile_m // of_row, tile_m % of_row * BLOCK_M, tile_n


@triton.jit
def load_2d(ptrs, mask_m, mask_k, EVEN_K: tl.constexpr):
    """A tile with zeros outside; without a K tail the mask is constant over the K loop."""
    if EVEN_K:
        return tl.load(ptrs, mask=mask_m, other=0.0)
    return tl.load(ptrs, mask=mask_m & mask_k, other=0.0)


@triton.jit
def product(
    x_ptrs,  # [BM, BK]
    w_ptrs,  # [BK, BN], contiguous along inner
    inner,
    x_inner,
    mask_m,  # [BM]
    mask_n,  # [BN]
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x w over the whole inner dimension, [BM, BN] in float32."""
    BLOCK_K: tl.constexpr = x_ptrs.shape[1]
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((x_ptrs.shape[0], w_ptrs.shape[1]), tl.float32)
    for start in range(0, inner, BLOCK_K):
        mask_k = start + k < inner
        x = load_2d(x_ptrs, mask_m[:, None], mask_k[None, :], EVEN_K)
        w = load_2d(w_ptrs, mask_n[None, :], mask_k[:, None], EVEN_K)
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
        x_ptrs += BLOCK_K * x_inner
        w_ptrs += BLOCK_K
    return sums


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
def gated(value, gate):
    """value * gelu(gate) in float32, gelu by the error function."""
    return value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))


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
