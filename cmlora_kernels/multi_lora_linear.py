"""The base GEMM with every row's low-rank update inside it: shrink in the K loop, expand into the accumulator.

y[r] = x[r] W^T + bias + scale (x[r] A^T) B^T, with A, B and scale of row r's slot. x is read once; y is written once.
"""

from __future__ import annotations

import functools

from torch import Tensor

from cmlora_kernels.launch import POINTER, Launch, arch_of
from cmlora_kernels.primitives import grouped_tile, load_2d
from cmlora_kernels.tiles import Problem, cdiv, dot_precision, linear_tile, rank_bucket
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
    y_ptr,  # [rows, tokens, parts * out]
    tokens,
    inner,
    out,
    rank,
    x_row,
    x_token,
    x_inner,
    w_out,
    a_slot,
    a_rank,
    b_slot,
    b_out,
    y_row,
    y_token,
    y_out,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A tile never crosses a row of the batch nor a part: one slot, one slice of A.
    tiles_n = tl.cdiv(out, BLOCK_N)
    tile_m, tile_n = grouped_tile(PARTS * tiles_n, GROUP)
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    row, first_m = tile_m // tiles_m, tile_m % tiles_m * BLOCK_M
    part, first_n = tile_n // tiles_n, tile_n % tiles_n * BLOCK_N
    slot = tl.load(slots_ptr + row)
    width = tl.where(slot < 0, 0, rank)  # slot -1: A and B read as zeros
    slot = tl.maximum(slot, 0)

    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k, r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = first_m + m < tokens, first_n + n < out, r < width
    column = part * out + first_n
    x_ptrs = x_ptr + row * x_row + first_m * x_token + (m[:, None] * x_token + k[None, :] * x_inner)  # [BM, BK]
    w_ptrs = w_ptr + column * w_out + (n[None, :] * w_out + k[:, None])  # [BK, BN]
    a_ptrs = a_ptr + slot * a_slot + part * rank * a_rank + (r[None, :] * a_rank + k[:, None])  # [BK, BR]

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

    b_ptrs = b_ptr + slot * b_slot + column * b_out + (n[None, :] * b_out + r[:, None])  # [BR, BN]
    b = tl.load(b_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)
    scaled = (down * tl.load(scales_ptr + slot * PARTS + part)).to(b.dtype)
    acc = tl.dot(scaled, b, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + row * y_row + first_m * y_token + column * y_out + (m[:, None] * y_token + n[None, :] * y_out)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


_STRIDES = ("x_row", "x_token", "x_inner", "w_out", "a_slot", "a_rank", "b_slot", "b_out", "y_row", "y_token", "y_out")


@functools.lru_cache(maxsize=4096)
def linear_launch(problem: Problem, arch: str, strides: tuple[int, ...] = ()) -> Launch:
    """The launch for one shape.

    Args:
        problem: sizes and dtype.
        arch: the target, e.g. "sm_90" or "gfx942".
        strides: x (row, token, inner), weight (out), a (slot, rank), b (slot, out), y (row, token, out), in elements;
            () for contiguous tensors.
    """
    p, rank = problem, rank_bucket(problem.rank)
    tile, out, size = linear_tile(p, arch), p.outer // p.parts, p.dtype.itemsize
    tiles_m, tiles_n = p.rows * cdiv(p.tokens, tile.block_m), p.parts * cdiv(out, tile.block_n)
    pointer = POINTER[p.dtype]
    flops, once, issued = _counts(p, tiles_m, tiles_n, out)
    return Launch(
        kernel=linear_kernel,
        name=f"linear {p.describe()}",
        tensors={"x_ptr": pointer, "w_ptr": pointer}
        | {"bias_ptr": pointer if p.bias else None, "slots_ptr": "*i64", "a_ptr": pointer, "b_ptr": pointer}
        | {"scales_ptr": "*fp32", "y_ptr": pointer},
        scalars={
            "tokens": p.tokens,
            "inner": p.inner,
            "out": out,
            "rank": p.rank,
            **dict(zip(_STRIDES, strides or contiguous_strides(p), strict=True)),
        },
        constexprs={
            "PARTS": p.parts,
            **tile.blocks(),
            "BLOCK_R": rank,
            "GROUP": tile.group,
            "EVEN_K": p.inner % tile.block_k == 0,
            "PRECISION": dot_precision(p.dtype, arch),
        },
        grid=(tiles_m * tiles_n, 1, 1),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=size * issued + 12 * tiles_m * tiles_n,
        unique_bytes=size * once + 8 * p.rows + 4 * p.adapters * p.parts,
        flops=flops,
    )


def _counts(p: Problem, tiles_m: int, tiles_n: int, out: int) -> tuple[int, int, int]:
    """Flops; elements counted once; elements loaded and stored by all programs."""
    m = p.rows * p.tokens
    flops = 2 * m * p.inner * p.outer + 2 * m * p.rank * (p.inner * p.parts + p.outer)
    bias = p.outer if p.bias else 0
    lora = p.rank * (p.inner * p.parts + p.outer)
    once = m * (p.inner + p.outer) + p.outer * p.inner + bias + p.adapters * lora
    # x once per tile along n; W, B and bias once per tile along m; A once per tile of either.
    issued = m * p.inner * tiles_n + tiles_m * (p.outer * (p.inner + p.rank) + bias) + m * p.outer
    return flops, once, issued + tiles_m * tiles_n * p.rank * p.inner


def contiguous_strides(p: Problem) -> tuple[int, ...]:
    """The strides of `linear_launch` for contiguous tensors."""
    x = (p.tokens * p.inner, p.inner, 1)
    a = (p.parts * p.rank * p.inner, p.inner)
    return (*x, p.inner, *a, p.outer * p.rank, p.rank, p.tokens * p.outer, p.outer, 1)


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, y: Tensor
) -> Tensor:
    """Run the kernel into y; x [rows, tokens, in] and y [rows, tokens, out] may have any strides."""
    weight, a, b = inner_contiguous(weight), inner_contiguous(a), inner_contiguous(b)
    bias = bias if bias is None else bias.contiguous()
    problem = Problem.of(x, slots, b, scales, bias is not None)
    strides = (*x.stride(), weight.stride(0), *a.stride()[:2], *b.stride()[:2], *y.stride())
    linear_launch(problem, arch_of(x.device), strides)(
        x, weight, bias, slots.contiguous(), a, b, scales.contiguous(), y
    )
    return y


def inner_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is strided: weights are read along it in 16-byte pieces."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
