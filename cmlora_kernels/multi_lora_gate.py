"""A multi-LoRA linear layer and the gate behind it: value * gelu(gate) of its columns' halves (arXiv 2002.05202).

Where base GEMM and update are one kernel, the layer's answer, twice as wide as what the gate leaves of it, is never
written. Where the base GEMM is the library's, the update is added on the way to the gate: its y is read, and only what
the gate makes of it is written.
"""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.costs import choose
from cmlora_kernels.dispatch import Backend, check_backend, register
from cmlora_kernels.geglu import geglu_definition
from cmlora_kernels.launch import POINTER, Launch, arch_of
from cmlora_kernels.multi_lora import check_linear, check_weights, linear_definition, runs_triton
from cmlora_kernels.multi_lora_add import Launches, add_launches, run_adds
from cmlora_kernels.multi_lora_linear import (
    WEIGHTS_STRIDES,
    contiguous_strides,
    inner_contiguous,
    linear_launch,
    part_rank,
    weights_issued,
    weights_once,
    weights_pointers,
    weights_strides,
)
from cmlora_kernels.primitives import gated, product, tile_of_row, weigh
from cmlora_kernels.tiles import Problem, cdiv, dot_precision, expand_piece, gate_tile, rank_bucket, rank_chunks
from cmlora_kernels.triton_shim import tl, triton


@triton.jit
def gate_kernel(
    y_ptr,  # [rows, tokens, 2 * width]
    x_ptr,  # [rows, tokens, inner]
    slots_ptr,  # [rows]
    a_ptr,  # [slots, rank, inner]
    b_ptr,  # [slots, 2 * width, rank]
    scales_ptr,  # [slots, 1]
    z_ptr,  # [rows, tokens, width]
    groups_ptr,  # [slots, part_rank] or None
    weights_ptr,  # [rows, weights, tokens] or None
    tokens,
    inner,
    width,
    rank,
    piece,  # columns of z that one program makes
    x_row,
    x_token,
    x_inner,
    part_rank,
    a_slot,
    a_rank,
    b_slot,
    b_out,
    weights_row,
    weights_group,
    weights_token,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, first_m, tile_n = tile_of_row(tokens, tl.cdiv(width, piece), BLOCK_M, GROUP)
    first_n = (tile_n * piece).to(tl.int32)
    slot = tl.load(slots_ptr + row)
    ranks = tl.where(slot < 0, 0, rank)  # slot -1: A and B read as zeros, but the gate is everyone's
    slot = tl.maximum(slot, 0)

    m, n, k, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m, mask_r = first_m + m < tokens, r < ranks
    x_ptrs = x_ptr + row * x_row + first_m * x_token + (m[:, None] * x_token + k[None, :] * x_inner)  # [BM, BK]
    a_ptrs = a_ptr + slot * a_slot + (r[None, :] * a_rank + k[:, None])  # [BK, BR]
    down = product(x_ptrs, a_ptrs, inner, x_inner, mask_m, mask_r, EVEN_K, PRECISION)
    if weights_ptr is not None:
        groups_ptr += slot * part_rank
        weights_ptr += row * weights_row + first_m * weights_token
        down = weigh(down, groups_ptr, weights_ptr, m, mask_m, mask_r, weights_group, weights_token)
    scaled = (down * tl.load(scales_ptr + slot)).to(b_ptr.dtype.element_ty)

    y_ptr += (row * tokens + first_m) * (2 * width)
    z_ptr += (row * tokens + first_m) * width
    b_ptr += slot * b_slot
    for start in range(first_n, tl.minimum(first_n + piece, width), BLOCK_N):
        column = start + n
        mask_n = column < width
        mask, mask_b = mask_m[:, None] & mask_n[None, :], mask_n[None, :] & mask_r[:, None]
        y_ptrs = y_ptr + m[:, None] * (2 * width) + column[None, :]  # [BM, BN]
        b_ptrs = b_ptr + column[None, :] * b_out + r[:, None]  # [BR, BN]
        value = tl.load(y_ptrs, mask, 0.0).to(tl.float32)
        value = tl.dot(scaled, tl.load(b_ptrs, mask_b, 0.0), value, input_precision=PRECISION)
        gate = tl.load(y_ptrs + width, mask, 0.0).to(tl.float32)
        gate = tl.dot(scaled, tl.load(b_ptrs + width * b_out, mask_b, 0.0), gate, input_precision=PRECISION)
        z_ptrs = z_ptr + m[:, None] * width + column[None, :]
        tl.store(z_ptrs, gated(value, gate).to(z_ptr.dtype.element_ty), mask)


_STRIDES = ("x_row", "x_token", "x_inner", "part_rank", "a_slot", "a_rank", "b_slot", "b_out", *WEIGHTS_STRIDES)


def gate_launch(problem: Problem, arch: str, strides: tuple[int, ...]) -> Launch:
    """The launch of one chunk of ranks, the last, and the gate.

    Args:
        problem: sizes and dtype; one part.
        arch: the target, e.g. "sm_90" or "gfx942".
        strides: x (row, token, inner), part_rank, a (slot, rank), b (slot, out), token weights (row, group, token).
    """
    p, tile, width = problem, gate_tile(problem, arch), problem.outer // 2
    tiles_m, m = p.rows * cdiv(p.tokens, tile.block_m), p.rows * p.tokens
    piece = expand_piece(tiles_m, width, tile.block_n, arch)
    pieces, pointer, size = cdiv(width, piece), POINTER[p.dtype], p.dtype.itemsize
    # x once per piece, A the same per tile of m; y read, half of it written; B once per tile of m.
    issued = pieces * p.inner * (m + tiles_m * p.rank) + 3 * m * width + tiles_m * p.outer * p.rank
    return Launch(
        kernel=gate_kernel,
        name=f"gate {p.describe()}",
        tensors={"y_ptr": pointer, "x_ptr": pointer, "slots_ptr": "*i64", "a_ptr": pointer, "b_ptr": pointer}
        | {"scales_ptr": "*fp32", "z_ptr": pointer, **weights_pointers(p)},
        scalars={
            "tokens": p.tokens,
            "inner": p.inner,
            "width": width,
            "rank": p.rank,
            "piece": piece,
            **dict(zip(_STRIDES, strides, strict=True)),
        },
        constexprs={
            **tile.blocks(),
            "BLOCK_R": rank_bucket(p.rank),
            "GROUP": tile.group,
            "EVEN_K": p.inner % tile.block_k == 0,
            "PRECISION": dot_precision(p.dtype, arch),
        },
        grid=(tiles_m * pieces, 1, 1),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=size * issued + 12 * tiles_m * pieces + weights_issued(p, tiles_m, pieces),
        unique_bytes=size * (m * (p.inner + 3 * width) + p.adapters * p.rank * (p.inner + p.outer))
        + (8 * p.rows + 4 * p.adapters + weights_once(p)),
        flops=2 * m * p.rank * (p.inner + p.outer),
    )


@functools.lru_cache(maxsize=4096)
def gated_launches(problem: Problem, arch: str, fused: bool, strides: tuple[int, ...] = ()) -> Launches:
    """Every chunk's first rank and launch, the last with the gate.

    Args:
        problem: sizes and dtype; gated.
        arch: the target, e.g. "sm_90" or "gfx942".
        fused: whether the base GEMM is in the first launch.
        strides: x (row, token, inner), weight (out), ranks of a from part to part, a (slot, rank), b (slot, out), token
            weights (row, group, token), in elements; () for contiguous tensors.
    """
    p, plain = problem, problem._replace(gated=False)
    if not strides:
        given = contiguous_strides(p)
        strides = (*given[:9], *given[12:])
    x, w, lora, masks = strides[:3], strides[3], strides[4:9], strides[9:]
    chunks = rank_chunks(p.rank, p.dtype, arch)
    y, z = ((p.tokens * width, width, 1) for width in (p.outer, p.outer // 2))
    if fused and len(chunks) == 1:
        return ((0, linear_launch(p, arch, (*x, w, *lora, *z, *masks))),)
    first, rank = chunks[-1]
    last = (first, gate_launch(p._replace(rank=rank, bias=False), arch, (*x, *lora, *masks)))
    adds = list(add_launches(plain._replace(bias=False), arch, (*x, *lora, *y, *masks)))[:-1]
    if fused:
        adds[0] = (0, linear_launch(plain, arch, (*x, w, *lora, *y, *masks)))
    return (*adds, last)


def _body(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    backend: str,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    if not runs_triton(x, b.shape[2], backend):
        return geglu_definition(linear_definition(x, weight, bias, slots, a, b, scales, token_weights, groups))
    weight, a, b = inner_contiguous(weight), inner_contiguous(a), inner_contiguous(b)
    slots, scales = slots.contiguous(), scales.contiguous()
    bias, groups = (t if t is None else t.contiguous() for t in (bias, groups))
    p = Problem.of(x, slots, b, scales, bias is not None, token_weights)._replace(gated=True)
    lora = (weight.stride(0), part_rank(p), *a.stride()[:2], *b.stride()[:2])
    strides = (*x.stride(), *lora, *weights_strides(token_weights))
    arch = arch_of(x.device)
    fused = choose(p, arch).strategy == "fused"
    launches = gated_launches(p, arch, fused, strides)
    z = x.new_empty((p.rows, p.tokens, p.outer // 2))
    whole = fused and len(launches) == 1
    y = z if whole else x.new_empty((p.rows, p.tokens, p.outer)) if fused else F.linear(x, weight, bias)
    if fused:
        launches[0][1](x, weight, bias, slots, a, b, scales, y, groups, token_weights)
    if not whole:
        run_adds(launches[fused:-1], y, x, slots, a, b, scales, groups, token_weights)
        first, gate = launches[-1]
        own = groups if groups is None else groups[:, first:]
        gate(y, x, slots, a[:, first:], b[:, :, first:], scales, z, own, token_weights)
    return z


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    backend: str,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[0] // 2))


_op = register(
    "multi_lora_geglu(Tensor x, Tensor weight, Tensor? bias, Tensor slots, Tensor a, Tensor b, Tensor scales, "
    "str backend, Tensor? token_weights=None, Tensor? groups=None) -> Tensor",
    _body,
    _fake,
)


def multi_lora_geglu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    backend: Backend = "auto",
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """`geglu` of `multi_lora_linear`, whose arguments these are: the first half of its columns * gelu of the second.

    Args:
        x: [rows, tokens, in].
        weight: [2 * width, in]; bias: [2 * width] or None; scales: [slots, 1]; the others as in `multi_lora_linear`.

    Returns:
        [rows, tokens, width].

    Raises:
        ValueError: a shape, dtype or backend that does not fit, or several parts; it names the argument.
    """
    check_backend(backend)
    check_linear(x, weight, bias, slots, a, b, scales, backend)
    if weight.shape[0] % 2:
        raise ValueError(f"weight must be [2 * width, in], got {tuple(weight.shape)}")
    if scales.shape[1] != 1:
        raise ValueError(f"scales must be [slots, 1], got {tuple(scales.shape)}")
    if token_weights is not None or groups is not None:
        check_weights(token_weights, groups, (x.shape[0], x.shape[1]), a)
    y: Tensor = _op(x, weight, bias, slots, a, b, scales, backend, token_weights, groups)
    return y
