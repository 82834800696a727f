"""Low-rank updates of many adapters in one batch.

y[r] = x[r] W^T + bias + scales[slot r] (x[r] A[slot r]^T) B[slot r]^T          (LoRA, arXiv 2106.09685, eq. 3, per row)

Every row of the batch names its adapter by a slot in a device tensor; slot -1 is the base layer alone. Several
projections of one x (q, k, v) may be stacked: `parts` equal slices of the output, each with its own rank slice of A.

With token weights w the columns of x A^T are multiplied per token, z[t, c] = w[groups[slot, c], t] (x A^T)[t, c], so
that a slot of several adapters' ranks lets each act where its mask says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.costs import choose
from cmlora_kernels.cpu_linear import linear
from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import arch_of
from cmlora_kernels.multi_lora_add import triton_add
from cmlora_kernels.multi_lora_linear import fused_linear
from cmlora_kernels.tiles import Problem, rank_chunks, supports


def add_definition(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """`multi_lora_add_` in plain torch."""
    rank = b.shape[2]
    down, per_row = shrink_definition(x, slots, a, scales, token_weights, groups)
    for part, (y_part, b_part) in enumerate(
        zip(y.chunk(scales.shape[1], 2), b[slots.clamp_min(0)].chunk(scales.shape[1], 1), strict=True)
    ):
        scaled = down[..., part * rank : (part + 1) * rank] * per_row[:, part, None, None].to(down.dtype)
        y_part.baddbmm_(scaled, b_part.transpose(1, 2))
    return y


def shrink_definition(
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    scales: Tensor,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x A^T per row [rows, tokens, parts * rank], and the scale per row and part, zero where the slot is -1."""
    index = slots.clamp_min(0)
    per_row = scales[index] * (slots >= 0).unsqueeze(1)
    if token_weights is None or groups is None:
        return torch.bmm(x, a[index].transpose(1, 2)), per_row
    down = torch.bmm(a[index], x.transpose(1, 2))  # tokens innermost, as the weights are
    down *= column_weights(token_weights, groups[index])
    return down.transpose(1, 2), per_row


def column_weights(token_weights: Tensor, groups: Tensor) -> Tensor:
    """Each row's weights per column of x A^T: groups [rows, columns] -> [rows, columns, tokens]."""
    rows, _, tokens = token_weights.shape
    whole = token_weights.new_ones(1, 1, 1).expand(rows, 1, tokens)
    each = torch.arange(rows, device=groups.device).unsqueeze(1)
    return torch.cat([token_weights, whole], 1)[each, groups]  # -1 is the last one


def linear_definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """`multi_lora_linear` in plain torch."""
    return add_definition(linear(x, weight, bias), x, slots, a, b, scales, token_weights, groups)


def runs_triton(x: Tensor, rank: int, backend: str) -> bool:
    """Whether a kernel runs: not for dtypes and empty tensors that none serves; not for bfloat16 on the CPU, where the
    interpreter's tl.dot reads the numbers as integers."""
    if not use_triton(x, backend) or x.numel() == 0 or (x.dtype == torch.bfloat16 and not x.is_cuda):
        return False
    return supports(rank, x.dtype)


def _linear_body(
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
        return linear_definition(x, weight, bias, slots, a, b, scales, token_weights, groups)
    problem = Problem.of(x, slots, b, scales, bias is not None, token_weights)
    if choose(problem, arch_of(x.device)).strategy == "fused":
        y = x.new_empty((x.shape[0], x.shape[1], weight.shape[0]))
        return fused_all(x, weight, bias, slots, a, b, scales, y, token_weights, groups)
    y = F.linear(x, weight, bias)
    triton_add(y, x, slots, a, b, scales, token_weights, groups)
    return y


def fused_all(
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
    """The base GEMM with the first chunk of ranks inside, then the other chunks in place."""
    fused_linear(x, weight, bias, slots, a, b, scales, y, token_weights, groups)
    if len(rank_chunks(b.shape[2], x.dtype, arch_of(x.device))) > 1:
        triton_add(y, x, slots, a, b, scales, token_weights, groups, done=1)
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
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[0]))


def _add_body(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    backend: str,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> None:
    run = triton_add if runs_triton(x, b.shape[2], backend) else add_definition
    run(y, x, slots, a, b, scales, token_weights, groups)


def _add_fake(*_: Any, **__: Any) -> None:
    return None


_linear = register(
    "multi_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor slots, Tensor a, Tensor b, Tensor scales, "
    "str backend, Tensor? token_weights=None, Tensor? groups=None) -> Tensor",
    _linear_body,
    _linear_fake,
)
_add = register(
    "multi_lora_add_(Tensor(y!) y, Tensor x, Tensor slots, Tensor a, Tensor b, Tensor scales, "
    "str backend, Tensor? token_weights=None, Tensor? groups=None) -> ()",
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
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """A linear layer with one LoRA per row of the batch, or with several at once, each where its weights let it.

    A slot may hold the concatenated ranks of several adapters: `groups` names for each of them the token weight that
    multiplies its column of x A^T.

    Args:
        x: [rows, tokens, in].
        weight: [out, in]; bias: [out] or None.
        slots: [rows], int64 on x's device; -1 is the base layer alone.
        a: [slots, parts * rank, in]; b: [slots, out, rank]; of x's dtype; any rank.
        scales: [slots, parts], float32. Output slice p of `parts` equal ones uses rows p * rank.. of a.
        backend: "auto" (Triton on CUDA and ROCm, torch elsewhere), "torch" or "triton".
        token_weights: [rows, weights, tokens], float32, any strides; None: 1 everywhere.
        groups: [slots, parts * rank], int32: the weight of each column, -1: none. Given with token_weights. What it
            holds is on the device and is not checked: at least -1 and below the number of weights.

    Returns:
        [rows, tokens, out].

    Raises:
        ValueError: a shape, dtype or backend that does not fit; it names the argument.
    """
    _check(x, slots, a, b, scales, weight.shape[0], backend)
    if weight.shape[1] != x.shape[2]:
        raise ValueError(f"weight must be [out, {x.shape[2]}] for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    check_dtypes(x, weight=weight, bias=bias)
    if token_weights is not None or groups is not None:
        check_weights(token_weights, groups, (x.shape[0], x.shape[1]), a)
        weighted: Tensor = _linear(x, weight, bias, slots, a, b, scales, backend, token_weights, groups)
        return weighted
    y: Tensor = _linear(x, weight, bias, slots, a, b, scales, backend)  # the shorter call is the cheaper one
    return y


def multi_lora_add_(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    backend: Backend = "auto",
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Add every row's low-rank update to y [rows, tokens, out] in place; arguments as in `multi_lora_linear`."""
    _check(x, slots, a, b, scales, y.shape[-1], backend)
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(f"y must be [{x.shape[0]}, {x.shape[1]}, out] for x {tuple(x.shape)}, got {tuple(y.shape)}")
    check_dtypes(x, y=y)
    if token_weights is not None or groups is not None:
        check_weights(token_weights, groups, (x.shape[0], x.shape[1]), a)
        _add(y, x, slots, a, b, scales, backend, token_weights, groups)
    else:
        _add(y, x, slots, a, b, scales, backend)
    return y


def check_weights(token_weights: Tensor | None, groups: Tensor | None, places: tuple[int, int], a: Tensor) -> None:
    """Raise ValueError unless both are given and fit `places`, rows and tokens, and a's slots and ranks."""
    if token_weights is None or groups is None:
        missing = "token_weights" if token_weights is None else "groups"
        raise ValueError(f"token_weights and groups must be given together, got no {missing}")
    rows, tokens = places
    if token_weights.ndim != 3 or token_weights.shape[::2] != places or not token_weights.shape[1]:
        raise ValueError(f"token_weights must be [{rows}, weights, {tokens}], got {tuple(token_weights.shape)}")
    if groups.shape != a.shape[:2]:
        raise ValueError(f"groups must be [slots, parts * rank] = {tuple(a.shape[:2])}, got {tuple(groups.shape)}")
    if token_weights.dtype != torch.float32:
        raise ValueError(f"token_weights must be float32, got {token_weights.dtype}")
    if groups.dtype != torch.int32:
        raise ValueError(f"groups must be int32, got {groups.dtype}")


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
