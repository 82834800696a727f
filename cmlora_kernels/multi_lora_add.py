"""y[r] += scale (x[r] A^T) B^T in place, in one kernel: for layers whose base GEMM stays with cuBLAS.

A program shrinks one tile of tokens, keeps the result in registers and expands it over a piece of y's columns. Rows
with slot -1 return at once, so their y is not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import Tensor

from cmlora_kernels.launch import POINTER, Launch, arch_of
from cmlora_kernels.multi_lora_linear import (
    WEIGHTS_STRIDES,
    contiguous_strides,
    inner_contiguous,
    part_rank,
    weights_issued,
    weights_once,
    weights_pointers,
    weights_strides,
)
from cmlora_kernels.primitives import expand_add, product, tile_of_row, weigh
from cmlora_kernels.tiles import Problem, add_tile, cdiv, dot_precision, expand_piece, rank_bucket, rank_chunks
from cmlora_kernels.triton_shim import tl, triton

Launches = tuple[tuple[int, Launch], ...]
"""First rank of every chunk, and its launch."""


@triton.jit
def add_kernel(
    y_ptr,  # [rows, tokens, parts * out]
    x_ptr,  # [rows, tokens, inner]
    slots_ptr,  # [rows]
    a_ptr,  # [slots, parts * rank, inner]
    b_ptr,  # [slots, parts * out, rank]
    scales_ptr,  # [slots, parts]
    groups_ptr,  # [slots, parts * part_rank] or None
    weights_ptr,  # [rows, weights, tokens] or None
    tokens,
    inner,
    out,
    rank,  # of this launch; A holds part_rank rows a part
    piece,  # columns of a part that one program expands
    x_row,
    x_token,
    x_inner,
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
):
    pieces = tl.cdiv(out, piece)
    row, first_m, tile_n = tile_of_row(tokens, PARTS * pieces, BLOCK_M, GROUP)
    part, first_n = tile_n // pieces, tile_n % pieces * piece
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return

    m, k, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m, mask_r = first_m + m < tokens, r < rank
    x_ptrs = x_ptr + row * x_row + first_m * x_token + (m[:, None] * x_token + k[None, :] * x_inner)  # [BM, BK]
    if PARTS > 1:
        a_ptr += part * part_rank * a_rank
    a_ptrs = a_ptr + slot * a_slot + (r[None, :] * a_rank + k[:, None])  # [BK, BR]
    down = product(x_ptrs, a_ptrs, inner, x_inner, mask_m, mask_r, EVEN_K, PRECISION)

    if weights_ptr is not None:
        groups_ptr += (slot * PARTS + part) * part_rank
        weights_ptr += row * weights_row + first_m * weights_token
        down = weigh(down, groups_ptr, weights_ptr, m, mask_m, mask_r, weights_group, weights_token)
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


_X_STRIDES = ("x_row", "x_token", "x_inner", "part_rank", "a_slot", "a_rank", "b_slot", "b_out")
_STRIDES = (*_X_STRIDES, "y_row", "y_token", "y_out", *WEIGHTS_STRIDES)


@functools.lru_cache(maxsize=4096)
def add_launches(problem: Problem, arch: str, strides: tuple[int, ...] = ()) -> Launches:
    """The first rank of every chunk and its launch; arguments as in `add_launch`."""
    if not strides:
        x_row, x_token, x_inner, _, *rest = contiguous_strides(problem)
        strides = (x_row, x_token, x_inner, *rest)
    chunks = rank_chunks(problem.rank, problem.dtype, arch)
    return tuple((first, add_launch(problem._replace(rank=rank), arch, strides)) for first, rank in chunks)


def add_launch(problem: Problem, arch: str, strides: tuple[int, ...]) -> Launch:
    """The launch of one chunk of ranks; `problem.bias` is not used.

    Args:
        problem: sizes and dtype.
        arch: the target, e.g. "sm_90" or "gfx942".
        strides: x (row, token, inner), ranks of a from part to part, a (slot, rank), b (slot, out), y (row, token,
            out), token weights (row, group, token).
    """
    p, tile, out = problem, add_tile(problem, arch), problem.outer // problem.parts
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
        | {"slots_ptr": "*i64", "a_ptr": pointer, "b_ptr": pointer, "scales_ptr": "*fp32", **weights_pointers(p)},
        scalars={
            "tokens": p.tokens,
            "inner": p.inner,
            "out": out,
            "rank": p.rank,
            "piece": piece,
            **dict(zip(_STRIDES, strides, strict=True)),
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
        bytes=size * issued + 12 * tiles_m * p.parts * pieces + weights_issued(p, tiles_m, p.parts * pieces),
        unique_bytes=size * (m * (p.inner + 2 * p.outer) + p.adapters * lora)
        + (8 * p.rows + 4 * p.adapters * p.parts + weights_once(p)),
        flops=2 * m * p.rank * (p.inner * p.parts + p.outer),
    )


def triton_add(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
    done: int = 0,
) -> None:
    """Run the kernel on y [rows, tokens, out], once per chunk of ranks; x and y may have any strides.

    `done` chunks are left out: 1 after `fused_linear`, which has the first one in it.
    """
    a, b, slots, scales = inner_contiguous(a), inner_contiguous(b), slots.contiguous(), scales.contiguous()
    problem = Problem.of(x, slots, b, scales, bias=False, token_weights=token_weights)
    lora = (part_rank(problem), *a.stride()[:2], *b.stride()[:2])
    strides = (*x.stride(), *lora, *y.stride(), *weights_strides(token_weights))
    groups = groups if groups is None else groups.contiguous()
    run_adds(add_launches(problem, arch_of(x.device), strides)[done:], y, x, slots, a, b, scales, groups, token_weights)


def run_adds(
    launches: Iterable[tuple[int, Launch]],
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    token_weights: Tensor | None,
) -> None:
    """Run launches of `add_launches` on tensors that lie as they say."""
    for first, launch in launches:
        if first:  # only where they start matters: strides and sizes are the launch's
            own = groups if groups is None else groups[:, first:]
            launch(y, x, slots, a[:, first:], b[:, :, first:], scales, own, token_weights)
        else:
            launch(y, x, slots, a, b, scales, groups, token_weights)
