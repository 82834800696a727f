"""Low-rank updates of many adapters in one batch.

y[r] = x[r] W^T + bias + scales[slot r] (x[r] A[slot r]^T) B[slot r]^T          (LoRA, arXiv 2106.09685, eq. 3, per row)

Every row of the batch names its adapter by a slot in a device tensor; slot -1 is the base layer alone. Several
projections of one x (q, k, v) may be stacked: `parts` equal slices of the output, each with its own rank slice of A.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.cpu_linear import linear
from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import arch_of
from cmlora_kernels.multi_lora_add import triton_add
from cmlora_kernels.multi_lora_linear import fused_linear
from cmlora_kernels.tiles import Problem, choose, supports


def add_definition(y: Tensor, x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """`multi_lora_add_` in plain torch."""
    rank = b.shape[2]
    down, per_row = shrink_definition(x, slots, a, scales)
    for part, (y_part, b_part) in enumerate(
        zip(y.chunk(scales.shape[1], 2), b[slots.clamp_min(0)].chunk(scales.shape[1], 1), strict=True)
    ):
        scaled = down[..., part * rank : (part + 1) * rank] * per_row[:, part, None, None].to(down.dtype)
        y_part.baddbmm_(scaled, b_part.transpose(1, 2))
    return y


def shrink_definition(x: Tensor, slots: Tensor, a: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """x A^T per row [rows, tokens, parts * rank], and the scale per row and part, zero where the slot is -1."""
    index = slots.clamp_min(0)
    return torch.bmm(x, a[index].transpose(1, 2)), scales[index] * (slots >= 0).unsqueeze(1)


def linear_definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor
) -> Tensor:
    """`multi_lora_linear` in plain torch."""
    return add_definition(linear(x, weight, bias), x, slots, a, b, scales)


def runs_triton(x: Tensor, rank: int, backend: str) -> bool:
    """Whether a kernel runs: not for ranks, dtypes and empty tensors that none serves; not for bfloat16 on the CPU,
    where the interpreter's tl.dot reads the numbers as integers."""
    if not use_triton(x, backend) or x.numel() == 0 or (x.dtype == torch.bfloat16 and not x.is_cuda):
        return False
    return supports(rank, x.dtype, arch_of(x.device))


def _linear_body(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    backend: str,
) -> Tensor:
    if not runs_triton(x, b.shape[2], backend):
        return linear_definition(x, weight, bias, slots, a, b, scales)
    problem = Problem.of(x, slots, b, scales, bias is not None)
    if choose(problem, arch_of(x.device)).strategy == "fused":
        y = x.new_empty((x.shape[0], x.shape[1], weight.shape[0]))
        return fused_linear(x, weight, bias, slots, a, b, scales, y)
    y = F.linear(x, weight, bias)
    triton_add(y, x, slots, a, b, scales)
    return y


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    backend: str,
) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[0]))


def _add_body(y: Tensor, x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, backend: str) -> None:
    if runs_triton(x, b.shape[2], backend):
        triton_add(y, x, slots, a, b, scales)
    else:
        add_definition(y, x, slots, a, b, scales)


def _add_fake(y: Tensor, x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, backend: str) -> None:
    return None


_linear = register(
    "multi_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor slots, Tensor a, Tensor b, Tensor scales, "
    "str backend) -> Tensor",
    _linear_body,
    _linear_fake,
)
_add = register(
    "multi_lora_add_(Tensor(y!) y, Tensor x, Tensor slots, Tensor a, Tensor b, Tensor scales, str backend) -> ()",
    _add_body,
    _add_fake,
)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """A linear layer with one LoRA per row of the batch.

    Args:
        x: [rows, tokens, in].
        weight: [out, in]; bias: [out] or None.
        slots: [rows], int64 on x's device; -1 is the base layer alone.
        a: [slots, parts * rank, in]; b: [slots, out, rank]; of x's dtype.
        scales: [slots, parts], float32. Output slice p of `parts` equal ones uses rows p * rank.. of a.
        backend: "auto" (Triton on CUDA and ROCm, torch elsewhere), "torch" or "triton".

    Returns:
        [rows, tokens, out].

    Raises:
        ValueError: a shape, dtype or backend that does not fit; it names the argument.
    """
    _check(x, slots, a, b, scales, weight.shape[0], backend)
    if weight.shape[1] != x.shape[2]:
        raise ValueError(f"weight must be [out, {x.shape[2]}] for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    check_dtypes(x, weight=weight, bias=bias)
    y: Tensor = _linear(x, weight, bias, slots, a, b, scales, backend)
    return y


def multi_lora_add_(
    y: Tensor, x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, backend: Backend = "auto"
) -> Tensor:
    """Add every row's low-rank update to y [rows, tokens, out] in place; arguments as in `multi_lora_linear`."""
    _check(x, slots, a, b, scales, y.shape[-1], backend)
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(f"y must be [{x.shape[0]}, {x.shape[1]}, out] for x {tuple(x.shape)}, got {tuple(y.shape)}")
    check_dtypes(x, y=y)
    _add(y, x, slots, a, b, scales, backend)
    return y


def _check(x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, out: int, backend: str) -> None:
    check_backend(backend)
    if x.ndim != 3:
        raise ValueError(f"x must be [rows, tokens, in], got {tuple(x.shape)}")
    if slots.shape != (x.shape[0],):
        raise ValueError(f"slots must be [{x.shape[0]}] for x {tuple(x.shape)}, got {tuple(slots.shape)}")
    count, rank, parts = a.shape[0], b.shape[-1], scales.shape[-1]
    if a.shape != (count, parts * rank, x.shape[2]):
        raise ValueError(
            f"a must be [slots, parts * rank, in] = {(count, parts * rank, x.shape[2])}, got {tuple(a.shape)}"
        )
    if b.shape != (count, out, rank) or out % parts:
        raise ValueError(
            f"b must be [slots, out, rank] = {(count, out, rank)} with out divisible by parts {parts}, "
            f"got {tuple(b.shape)}"
        )
    if scales.shape != (count, parts):
        raise ValueError(f"scales must be [slots, parts] = {(count, parts)}, got {tuple(scales.shape)}")
    check_dtypes(x, slots, scales, a=a, b=b)


def check_dtypes(x: Tensor, slots: Tensor | None = None, scales: Tensor | None = None, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be of x's dtype {x.dtype}, got {tensor.dtype}")
    if slots is not None and slots.dtype != torch.int64:
        raise ValueError(f"slots must be int64, got {slots.dtype}")
    if scales is not None and scales.dtype != torch.float32:
        raise ValueError(f"scales must be float32, got {scales.dtype}")
