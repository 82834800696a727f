"""The merged bank: W + s B A of every adapter, kept in memory; a layer is then one GEMM that picks its W by slot.

No LoRA work at all while memory lasts: the second strategy beside `multi_lora_linear`, chosen by `strategy.choose`.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from cmlora_kernels.cpu_linear import linear
from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch, arch_of
from cmlora_kernels.primitives import product, tile_of_row
from cmlora_kernels.tiles import Problem, cdiv, dot_precision, linear_tile, supports
from cmlora_kernels.triton_shim import tl, triton

SMALL = 2**24
"""Multiplications of a GEMM on the CPU below which several cost less in one call, above it less one by one."""


@triton.jit
def merged_kernel(
    x_ptr,  # [rows, tokens, inner]
    w_ptr,  # [slots + 1, out, inner]
    bias_ptr,  # [out] or None
    slots_ptr,  # [rows]
    y_ptr,  # [rows, tokens, out]
    adapters,
    tokens,
    inner,
    out,
    x_row,
    x_token,
    x_inner,
    w_slot,
    w_out,
    y_row,
    y_token,
    y_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, first_m, tile_n = tile_of_row(tokens, tl.cdiv(out, BLOCK_N), BLOCK_M, GROUP)
    first_n = tile_n * BLOCK_N
    slot = tl.load(slots_ptr + row)
    slot = tl.where(slot < 0, adapters, slot)  # the base layer is the bank's last weight

    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m, mask_n = first_m + m < tokens, first_n + n < out
    x_ptrs = x_ptr + row * x_row + first_m * x_token + (m[:, None] * x_token + k[None, :] * x_inner)  # [BM, BK]
    w_ptrs = w_ptr + slot * w_slot + first_n * w_out + (n[None, :] * w_out + k[:, None])  # [BK, BN]
    acc = product(x_ptrs, w_ptrs, inner, x_inner, mask_m, mask_n, EVEN_K, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first_n + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + row * y_row + first_m * y_token + first_n * y_out + (m[:, None] * y_token + n[None, :] * y_out)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@functools.lru_cache(maxsize=4096)
def merged_launch(problem: Problem, arch: str, strides: tuple[int, ...] = ()) -> Launch:
    """The launch for one shape; `problem.rank` and `parts` are not used.

    Args:
        problem: sizes and dtype; `adapters` weights and the base one.
        arch: the target, e.g. "sm_90" or "gfx942".
        strides: x (row, token, inner), bank (slot, out), y (row, token, out), in elements; () for contiguous tensors.
    """
    p = problem._replace(rank=0, parts=1)
    tile, size, pointer = linear_tile(p, arch), p.dtype.itemsize, POINTER[p.dtype]
    if not strides:
        weight, y = (p.outer * p.inner, p.inner), (p.tokens * p.outer, p.outer, 1)
        strides = (p.tokens * p.inner, p.inner, 1, *weight, *y)
    names = ("x_row", "x_token", "x_inner", "w_slot", "w_out", "y_row", "y_token", "y_out")
    tiles_m, tiles_n, m = p.rows * cdiv(p.tokens, tile.block_m), cdiv(p.outer, tile.block_n), p.rows * p.tokens
    bias = p.outer if p.bias else 0
    issued = m * p.inner * tiles_n + tiles_m * (p.outer * p.inner + bias) + m * p.outer
    once = m * (p.inner + p.outer) + min(p.rows, p.adapters) * p.outer * p.inner + bias
    return Launch(
        kernel=merged_kernel,
        name=f"merged {p.describe()}",
        tensors={
            "x_ptr": pointer,
            "w_ptr": pointer,
            "bias_ptr": pointer if p.bias else None,
            "slots_ptr": "*i64",
            "y_ptr": pointer,
        },
        scalars={
            "adapters": p.adapters,
            "tokens": p.tokens,
            "inner": p.inner,
            "out": p.outer,
            **dict(zip(names, strides, strict=True)),
        },
        constexprs={
            **tile.blocks(),
            "GROUP": tile.group,
            "EVEN_K": p.inner % tile.block_k == 0,
            "PRECISION": dot_precision(p.dtype, arch),
        },
        grid=(tiles_m * tiles_n, 1, 1),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=size * issued + 8 * tiles_m * tiles_n,
        unique_bytes=size * once + 8 * p.rows,
        flops=2 * m * p.inner * p.outer,
    )


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """W + s B A of one slot: summed in float32 and rounded once, to weight's dtype.

    Args:
        weight: [out, in] or a convolution's [out, in, kh, kw].
        a: [parts * rank, in] or [rank, in, kh, kw]; b: [out, rank]; scales: [parts].
    """
    (out, rank), parts = b.shape, scales.shape[0]
    up = b.float().view(parts, out // parts, rank) * scales[:, None, None]
    update = torch.bmm(up, a.float().reshape(parts, rank, -1)).view_as(weight)
    return (weight.float() + update).to(weight.dtype)


def merge_weights(weight: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """The bank [slots + 1, out, in] in weight's dtype: `merged_weight` of every slot, and W itself last.

    Args:
        weight: [out, in]; a: [slots, parts * rank, in]; b: [slots, out, rank]; scales: [slots, parts].
    """
    bank = weight.new_empty((a.shape[0] + 1, *weight.shape))
    for slot, parts in enumerate(zip(a, b, scales, strict=True)):
        bank[slot] = merged_weight(weight, *parts)
    bank[-1] = weight
    return bank


def merged_definition(x: Tensor, bank: Tensor, bias: Tensor | None, slots: Tensor) -> Tensor:
    """`merged_linear` in plain torch. On the CPU, where slots can be read, neighbours of one slot are one GEMM."""
    last = bank.shape[0] - 1
    if x.device.type == "cpu":
        return _by_runs(x, bank, bias, [last if slot < 0 else slot for slot in slots.tolist()])
    weight = bank[torch.where(slots < 0, last, slots)].transpose(1, 2)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


def _by_runs(x: Tensor, bank: Tensor, bias: Tensor | None, slots: list[int]) -> Tensor:
    """No weight is copied, as one gathered per row would be."""
    runs = [(slot, len(list(rows))) for slot, rows in itertools.groupby(slots)]
    if len(runs) == 1:
        return linear(x, bank[runs[0][0]], bias)
    in_order = [slot for slot, _ in runs] == list(range(len(runs))) and len({count for _, count in runs}) == 1
    if in_order and x.numel() * bank.shape[1] < SMALL * len(runs):
        tokens, weight = x.reshape(len(runs), -1, x.shape[2]), bank[: len(runs)].transpose(1, 2)
        y = torch.bmm(tokens, weight) if bias is None else torch.baddbmm(bias, tokens, weight)
        return y.view(*x.shape[:2], -1)
    parts = torch.split(x, [count for _, count in runs])
    return torch.cat([linear(part, bank[slot], bias) for part, (slot, _) in zip(parts, runs, strict=True)])


def _merged_body(x: Tensor, bank: Tensor, bias: Tensor | None, slots: Tensor, backend: str) -> Tensor:
    if not _runs_triton(x, backend):
        return merged_definition(x, bank, bias, slots)
    (rows, tokens, inner), out = x.shape, bank.shape[1]
    bank = bank if bank.stride(2) == 1 else bank.contiguous()
    y = x.new_empty((rows, tokens, out))
    problem = Problem(rows, tokens, inner, out, 0, 1, bank.shape[0] - 1, x.dtype, bias is not None)
    strides = (*x.stride(), *bank.stride()[:2], *y.stride())
    merged_launch(problem, arch_of(x.device), strides)(x, bank, bias, slots.contiguous(), y)
    return y


def _runs_triton(x: Tensor, backend: str) -> bool:
    return use_triton(x, backend) and x.numel() > 0 and supports(1, x.dtype)


def _merged_fake(x: Tensor, bank: Tensor, bias: Tensor | None, slots: Tensor, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:2], bank.shape[1]))


_merged = register(
    "merged_linear(Tensor x, Tensor bank, Tensor? bias, Tensor slots, str backend) -> Tensor",
    _merged_body,
    _merged_fake,
)


def merged_linear(x: Tensor, bank: Tensor, bias: Tensor | None, slots: Tensor, backend: Backend = "auto") -> Tensor:
    """A linear layer whose weight is chosen per row: x[r] bank[slots[r]]^T + bias.

    Args:
        x: [rows, tokens, in].
        bank: [slots + 1, out, in], from `merge_weights`; its last weight is the base layer's.
        bias: [out] or None.
        slots: [rows], int64 on x's device; -1 is the base layer.
        backend: "auto" (Triton on CUDA and ROCm, torch elsewhere), "torch" or "triton".

    Returns:
        [rows, tokens, out].

    Raises:
        ValueError: a shape, dtype or backend that does not fit; it names the argument.
    """
    check_backend(backend)
    if x.ndim != 3:
        raise ValueError(f"x must be [rows, tokens, in], got {tuple(x.shape)}")
    if bank.ndim != 3 or bank.shape[2] != x.shape[2]:
        raise ValueError(f"bank must be [slots + 1, out, {x.shape[2]}] for x {tuple(x.shape)}, got {tuple(bank.shape)}")
    if slots.shape != (x.shape[0],):
        raise ValueError(f"slots must be [{x.shape[0]}] for x {tuple(x.shape)}, got {tuple(slots.shape)}")
    if bank.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"bank and bias must be of x's dtype {x.dtype}, got bank {bank.dtype}")
    y: Tensor = _merged(x, bank, bias, slots, backend)
    return y
