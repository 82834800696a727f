"""y[r] += scale (x[r] A^T) B^T in place, in one kernel: for layers whose base GEMM stays with cuBLAS.

A program shrinks one tile of tokens, keeps the result in registers and expands it over a piece of y's columns. Rows
with slot -1 return at once, so their y is not touched.
"""

from __future__ import annotations

import functools

from torch import Tensor

from cmlora_kernels.launch import POINTER, Launch, arch_of
from cmlora_kernels.multi_lora_linear import contiguous_strides, inner_contiguous
from cmlora_kernels.primitives import expand_add, grouped_tile, load_2d
from cmlora_kernels.tiles import Problem, add_tile, cdiv, dot_precision, expand_piece, rank_bucket
from cmlora_kernels.triton_shim import tl, triton


@triton.jit
def add_kernel(
    y_ptr,  # [rows, tokens, parts * out]
    x_ptr,  # [rows, tokens, inner]
    slots_ptr,  # [rows]
    a_ptr,  # [slots, parts * rank, inner]
    b_ptr,  # [slots, parts * out, rank]
    scales_ptr,  # [slots, parts]
    tokens,
    inner,
    out,
    rank,
    piece,  # columns of a part that one program expands
    x_row,
    x_token,
    x_inner,
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
    pieces = tl.cdiv(out, piece)
    tile_m, tile_n = grouped_tile(PARTS * pieces, GROUP)
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    row, first_m = tile_m // tiles_m, tile_m % tiles_m * BLOCK_M
    part, first_n = tile_n // pieces, tile_n % pieces * piece
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return

    m, k, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m, mask_r = first_m + m < tokens, r < rank
    x_ptrs = x_ptr + row * x_row + first_m * x_token + (m[:, None] * x_token + k[None, :] * x_inner)  # [BM, BK]
    a_ptrs = a_ptr + slot * a_slot + part * rank * a_rank + (r[None, :] * a_rank + k[:, None])  # [BK, BR]
    down = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, inner, BLOCK_K):
        mask_k = start + k < inner
        x = load_2d(x_ptrs, mask_m[:, None], mask_k[None, :], EVEN_K)
        a = load_2d(a_ptrs, mask_r[None, :], mask_k[:, None], EVEN_K)
        down = tl.dot(x, a, down, input_precision=PRECISION)
        x_ptrs += BLOCK_K * x_inner
        a_ptrs += BLOCK_K

    scaled = (down * tl.load(scales_ptr + slot * PARTS + part)).to(b_ptr.dtype.element_ty)
    expand_add(
        scaled,
        b_ptr + slot * b_slot + part * out * b_out,
        y_ptr + row * y_row + first_m * y_token + part * out * y_out,
        m * y_token,
        mask_m,
        first_n.to(tl.int32),
        tl.minimum(first_n + piece, out).to(tl.int32),
        rank,
        b_out,
        y_out,
        BLOCK_N,
        BLOCK_R,
        PRECISION,
    )


@functools.lru_cache(maxsize=4096)
def add_launch(problem: Problem, arch: str, strides: tuple[int, ...] = ()) -> Launch:
    """The launch for one shape; `problem.bias` is not used.

    Args:
        problem: sizes and dtype.
        arch: the target, e.g. "sm_90" or "gfx942".
        strides: x (row, token, inner), a (slot, rank), b (slot, out), y (row, token, out); () for contiguous tensors.
    """
    p, tile, out = problem, add_tile(problem, arch), problem.outer // problem.parts
    if not strides:
        x_row, x_token, x_inner, _, *rest = contiguous_strides(p)
        strides = (x_row, x_token, x_inner, *rest)
    names = ("x_row", "x_token", "x_inner", "a_slot", "a_rank", "b_slot", "b_out", "y_row", "y_token", "y_out")
    tiles_m = p.rows * cdiv(p.tokens, tile.block_m)
    piece = expand_piece(tiles_m * p.parts, out, tile.block_n, arch)
    pieces, pointer, size, m = cdiv(out, piece), POINTER[p.dtype], p.dtype.itemsize, p.rows * p.tokens
    lora = p.rank * (p.inner * p.parts + p.outer)
    # x once per part and piece, A the same per tile of m; y read and written once; B once per tile of m.
    issued = p.parts * pieces * p.inner * (m + tiles_m * p.rank) + 2 * m * p.outer + tiles_m * p.outer * p.rank
    return Launch(
        kernel=add_kernel,
        name=f"add {p.describe()}",
        tensors={"y_ptr": pointer, "x_ptr": pointer}
        | {"slots_ptr": "*i64", "a_ptr": pointer, "b_ptr": pointer, "scales_ptr": "*fp32"},
        scalars={
            "tokens": p.tokens,
            "inner": p.inner,
            "out": out,
            "rank": p.rank,
            "piece": piece,
            **dict(zip(names, strides, strict=True)),
        },
        constexprs={
            "PARTS": p.parts,
            **tile.blocks(),
            "BLOCK_R": rank_bucket(p.rank),
            "GROUP": tile.group,
            "EVEN_K": p.inner % tile.block_k == 0,
            "PRECISION": dot_precision(p.dtype, arch),
        },
        grid=(tiles_m * p.parts * pieces, 1, 1),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=size * issued + 12 * tiles_m * p.parts * pieces,
        unique_bytes=size * (m * (p.inner + 2 * p.outer) + p.adapters * lora) + 8 * p.rows + 4 * p.adapters * p.parts,
        flops=2 * m * p.rank * (p.inner * p.parts + p.outer),
    )


def triton_add(y: Tensor, x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> None:
    """Run the kernel on y [rows, tokens, out]; x and y may have any strides."""
    a, b = inner_contiguous(a), inner_contiguous(b)
    strides = (*x.stride(), *a.stride()[:2], *b.stride()[:2], *y.stride())
    launch = add_launch(Problem.of(x, slots, b, scales, bias=False), arch_of(x.device), strides)
    launch(y, x, slots.contiguous(), a, b, scales.contiguous())
