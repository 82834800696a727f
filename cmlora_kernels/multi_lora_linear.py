"""The base GEMM with every row's low-rank update inside it: shrink in the K loop, expand into the accumulator.

y[r] = x[r] W^T + bias + scale (x[r] A^T) B^T, with A, B and scale of row r's slot. x is read once; y is written once.
Gated, the columns are value and gate of a GEGLU (arXiv 2002.05202), and value * gelu(gate) is what is written.
"""

from __future__ import annotations

import functools

from torch import Tensor

from cmlora_kernels.launch import POINTER, Launch, arch_of
from cmlora_kernels.primitives import gated, load_2d, tile_of_row, weigh
from cmlora_kernels.tiles import Problem, cdiv, dot_precision, linear_tile, rank_bucket, rank_chunks
from cmlora_kernels.triton_shim import tl, triton


@triton.jit
def linear_kernel(
    x_ptr,  # [rows, tokens, inner]
    w_ptr,  # [parts * out, inner]
    bias_ptr,  # [parts * out] or None
    slots_ptr,  # [rows]
    a_ptr,  # [slots, parts * rank, inner]
    b_ptr,  # [slots, parts * out, rank]
    scales_ptr,  # [slots, parts]
    y_ptr,  # [rows, tokens, parts * out]; gated: half of the columns
    groups_ptr,  # [slots, parts * part_rank] or None
    weights_ptr,  # [rows, weights, tokens] or None
    tokens,
    inner,
    out,
    rank,  # of this launch; A holds part_rank rows a part
    x_row,
    x_token,
    x_inner,
    w_out,
    part_rank,
    a_slot,
    a_rank,
    b_slot,
    b_out,
    y_row,
    y_token,
    y_out,
    weights_row,
    weights_group,
    weights_token,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GATED: tl.constexpr,
):
    tiles_n = tl.cdiv(out, BLOCK_N)
    row, first_m, tile_n = tile_of_row(tokens, PARTS * tiles_n, BLOCK_M, GROUP)
    part, first_n = tile_n // tiles_n, tile_n % tiles_n * BLOCK_N  # nor does it cross a part: one slice of A
    slot = tl.load(slots_ptr + row)
    width = tl.where(slot < 0, 0, rank)  # slot -1: A and B read as zeros
    slot = tl.maximum(slot, 0)

    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k, r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = first_m + m < tokens, first_n + n < out, r < width
    column, order = part * out + first_n, n
    if GATED:  # value and gate of one output side by side, so that one thread has both
        column, order = first_n // 2, n % 2 * (out // 2) + n // 2
    x_ptrs = x_ptr + row * x_row + first_m * x_token + (m[:, None] * x_token + k[None, :] * x_inner)  # [BM, BK]
    w_ptrs = w_ptr + column * w_out + (order[None, :] * w_out + k[:, None])  # [BK, BN]
    a_ptrs = a_ptr + slot * a_slot + part * part_rank * a_rank + (r[None, :] * a_rank + k[:, None])  # [BK, BR]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    down = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, inner, BLOCK_K):
        mask_k = start + k < inner
        x = load_2d(x_ptrs, mask_m[:, None], mask_k[None, :], EVEN_K)
        w = load_2d(w_ptrs, mask_n[None, :], mask_k[:, None], EVEN_K)
        a = load_2d(a_ptrs, mask_r[None, :], mask_k[:, None], EVEN_K)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        down = tl.dot(x, a, down, input_precision=PRECISION)
        x_ptrs += BLOCK_K * x_inner
        w_ptrs += BLOCK_K
        a_ptrs += BLOCK_K

    if weights_ptr is not None:
        groups_ptr += (slot * PARTS + part) * part_rank
        weights_ptr += row * weights_row + first_m * weights_token
        down = weigh(down, groups_ptr, weights_ptr, m, mask_m, mask_r, weights_group, weights_token)
    b_ptrs = b_ptr + slot * b_slot + column * b_out + (order[None, :] * b_out + r[:, None])  # [BR, BN]
    b = tl.load(b_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)
    scaled = (down * tl.load(scales_ptr + slot * PARTS + part)).to(b.dtype)
    acc = tl.dot(scaled, b, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column + order, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        value, gate = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        acc = gated(value, gate)
        n = tl.arange(0, BLOCK_N // 2)
        mask_n = column + n < out // 2
    y_ptrs = y_ptr + row * y_row + first_m * y_token + column * y_out + (m[:, None] * y_token + n[None, :] * y_out)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


WEIGHTS_STRIDES = ("weights_row", "weights_group", "weights_token")
_X_STRIDES = ("x_row", "x_token", "x_inner", "w_out", "part_rank", "a_slot", "a_rank", "b_slot", "b_out")
_STRIDES = (*_X_STRIDES, "y_row", "y_token", "y_out", *WEIGHTS_STRIDES)


@functools.lru_cache(maxsize=4096)
def linear_launch(problem: Problem, arch: str, strides: tuple[int, ...] = ()) -> Launch:
    """The launch for one shape; of a rank that takes several chunks, for the first of them.

    Args:
        problem: sizes and dtype.
        arch: the target, e.g. "sm_90" or "gfx942".
        strides: x (row, token, inner), weight (out), ranks of a from part to part, a (slot, rank), b (slot, out),
            y (row, token, out), token weights (row, group, token), in elements; () for contiguous tensors.
    """
    strides = strides or contiguous_strides(problem)
    p = problem._replace(rank=rank_chunks(problem.rank, problem.dtype, arch)[0][1])
    rank = rank_bucket(p.rank)
    tile, out, size = linear_tile(p, arch), p.outer // p.parts, p.dtype.itemsize
    tiles_m, tiles_n = p.rows * cdiv(p.tokens, tile.block_m), p.parts * cdiv(out, tile.block_n)
    pointer = POINTER[p.dtype]
    flops, once, issued = _counts(p, tiles_m, tiles_n, out)
    return Launch(
        kernel=linear_kernel,
        name=f"linear {p.describe()}",
        tensors={"x_ptr": pointer, "w_ptr": pointer}
        | {"bias_ptr": pointer if p.bias else None, "slots_ptr": "*i64", "a_ptr": pointer, "b_ptr": pointer}
        | {"scales_ptr": "*fp32", "y_ptr": pointer, **weights_pointers(p)},
        scalars={
            "tokens": p.tokens,
            "inner": p.inner,
            "out": out,
            "rank": p.rank,
            **dict(zip(_STRIDES, strides, strict=True)),
        },
        constexprs={
            "PARTS": p.parts,
            **tile.blocks(),
            "BLOCK_R": rank,
            "GROUP": tile.group,
            "EVEN_K": p.inner % tile.block_k == 0,
            "PRECISION": dot_precision(p.dtype, arch),
            "GATED": p.gated,
        },
        grid=(tiles_m * tiles_n, 1, 1),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=size * issued + 12 * tiles_m * tiles_n + weights_issued(p, tiles_m, tiles_n),
        unique_bytes=size * once + 8 * p.rows + 4 * p.adapters * p.parts + weights_once(p),
        flops=flops,
    )


def _counts(p: Problem, tiles_m: int, tiles_n: int, out: int) -> tuple[int, int, int]:
    """Flops; elements counted once; elements loaded and stored by all programs."""
    m = p.rows * p.tokens
    flops = 2 * m * p.inner * p.outer + 2 * m * p.rank * (p.inner * p.parts + p.outer)
    bias = p.outer if p.bias else 0
    lora = p.rank * (p.inner * p.parts + p.outer)
    once = m * (p.inner + p.written) + p.outer * p.inner + bias + p.adapters * lora
    # x once per tile along n; W, B and bias once per tile along m; A once per tile of either.
    issued = m * p.inner * tiles_n + tiles_m * (p.outer * (p.inner + p.rank) + bias) + m * p.written
    return flops, once, issued + tiles_m * tiles_n * p.rank * p.inner


def contiguous_strides(p: Problem) -> tuple[int, ...]:
    """The strides of `linear_launch` for contiguous tensors."""
    x, y = (p.tokens * p.inner, p.inner, 1), (p.tokens * p.written, p.written, 1)
    a = (part_rank(p), p.parts * p.rank * p.inner, p.inner)
    weights = (p.weights * p.tokens, p.tokens, 1) if p.weights else NO_WEIGHTS
    return (*x, p.inner, *a, p.outer * p.rank, p.rank, *y, *weights)


NO_WEIGHTS = (1, 1, 1)
"""Strides of absent token weights: a 1 is a constant to the compiler and no argument of the launch."""


def part_rank(p: Problem) -> int:
    """Ranks of A from one part to the next; a constant where the kernel does not ask."""
    return p.rank if p.parts > 1 or p.weights else 1


def weights_pointers(p: Problem) -> dict[str, str | None]:
    """The pointer parameters of token weights."""
    return {"groups_ptr": "*i32", "weights_ptr": "*fp32"} if p.weights else {"groups_ptr": None, "weights_ptr": None}


def weights_issued(p: Problem, tiles_m: int, tiles_n: int) -> int:
    """Bytes of token weights and groups that `tiles_n` programs per tile of tokens load, no group being -1."""
    return 4 * p.rank * tiles_n * (p.rows * p.tokens + tiles_m) if p.weights else 0


def weights_once(p: Problem) -> int:
    """Bytes of token weights and groups, every element once."""
    return 4 * (p.rows * p.weights * p.tokens + p.adapters * p.parts * p.rank) if p.weights else 0


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    y: Tensor,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Run the kernel into y; x [rows, tokens, in] and y [rows, tokens, out] may have any strides.

    Of a rank that takes several chunks the first is inside; `triton_add(..., done=1)` adds the others.
    """
    weight, a, b = inner_contiguous(weight), inner_contiguous(a), inner_contiguous(b)
    bias = bias if bias is None else bias.contiguous()
    problem = Problem.of(x, slots, b, scales, bias is not None, token_weights)
    lora = (weight.stride(0), part_rank(problem), *a.stride()[:2], *b.stride()[:2])
    strides = (*x.stride(), *lora, *y.stride(), *weights_strides(token_weights))
    groups = groups if groups is None else groups.contiguous()
    linear_launch(problem, arch_of(x.device), strides)(
        x, weight, bias, slots.contiguous(), a, b, scales.contiguous(), y, groups, token_weights
    )
    return y


def weights_strides(token_weights: Tensor | None) -> tuple[int, ...]:
    """As a launch wants them."""
    return NO_WEIGHTS if token_weights is None else token_weights.stride()


def inner_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is strided: weights are read along it in 16-byte pieces."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
