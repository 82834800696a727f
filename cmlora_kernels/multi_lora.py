"""Low-rank updates of many adapters in one batch.

y[r] = x[r] W^T + bias + scales[slot r] (x[r] A[slot r]^T) B[slot r]^T          (LoRA, arXiv 2106.09685, eq. 3, per row)

Every row of the batch names its adapter by a slot in a device tensor; slot -1 is the base layer alone. Several
projections of one x (q, k, v) may be stacked: `parts` equal slices of the output, each with its own rank slice of A.

With token weights w the columns of x A^T are multiplied per token, z[t, c] = w[groups[slot, c], t] (x A^T)[t, c], so
that a slot of several adapters' ranks lets each act where its mask says.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.costs import choose
from cmlora_kernels.cpu_linear import linear
from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import arch_of
from cmlora_kernels.multi_lora_add import Launches, add_launches, run_adds, triton_add
from cmlora_kernels.multi_lora_linear import NO_WEIGHTS, fused_linear, linear_launch, part_rank
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
    index = slots.clamp_min(0)
    only = a.shape[0] == 1  # no row needs a copy of its own
    rank = b.shape[2]
    down = F.linear(x, a[0]) if only else torch.bmm(x, a[index].transpose(1, 2))
    if token_weights is not None and groups is not None:
        down *= column_weights(token_weights, groups, index).transpose(1, 2)
    per_row = (scales[index] * (slots >= 0).unsqueeze(1)).to(down.dtype)
    down.unflatten(2, (-1, rank)).mul_(per_row[:, None, :, None])
    ups = (b if only else b[index]).transpose(1, 2)
    for into, part, up in zip(
        y.chunk(scales.shape[1], 2), down.split(rank, 2), ups.chunk(scales.shape[1], 2), strict=True
    ):
        if only and into.is_contiguous():
            into.view(-1, into.shape[2]).addmm_(part.flatten(0, 1), up[0])
        else:
            into.baddbmm_(part, up.expand(len(x), -1, -1))
    return y


def column_weights(token_weights: Tensor, groups: Tensor, index: Tensor) -> Tensor:
    """Each row's weights per column of x A^T [rows, columns, tokens], of slot index[row] of groups [slots, columns]."""
    rows, _, tokens = token_weights.shape
    padded = torch.cat([token_weights.new_ones(1, 1, 1).expand(rows, 1, tokens), token_weights], 1)
    if len(groups) == 1:
        return padded.index_select(1, groups[0] + 1)
    each = torch.arange(rows, device=groups.device).unsqueeze(1)
    return padded[each, groups[index] + 1]  # -1, none, is the first


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
    fused, launches = _route(
        (x.shape, x.stride()),
        (weight.shape, weight.stride()),
        a.stride(),
        (b.shape, b.stride()),
        scales.shape[1],
        None if token_weights is None else (token_weights.shape, token_weights.stride()),
        x.dtype,
        bias is not None,
        arch_of(x.device),
    )
    y = x.new_empty((x.shape[0], x.shape[1], weight.shape[0])) if fused else F.linear(x, weight, bias)
    if launches is None:
        run = fused_all if fused else _add_all
        return run(x, weight, bias, slots, a, b, scales, y, token_weights, groups)
    slots, scales = slots.contiguous(), scales.contiguous()
    groups = groups if groups is None else groups.contiguous()
    if fused:
        bias = bias if bias is None else bias.contiguous()
        launches[0][1](x, weight, bias, slots, a, b, scales, y, groups, token_weights)
        launches = launches[1:]
    run_adds(launches, y, x, slots, a, b, scales, groups, token_weights)
    return y


def _add_all(
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
    triton_add(y, x, slots, a, b, scales, token_weights, groups)
    return y


Laid = tuple[torch.Size, tuple[int, ...]]
"""Shape and strides of a tensor."""


@functools.lru_cache(maxsize=4096)
def _route(
    x: Laid,
    weight: Laid,
    a: tuple[int, ...],
    b: Laid,
    parts: int,
    token_weights: Laid | None,
    dtype: torch.dtype,
    bias: bool,
    target: str,
) -> tuple[bool, Launches | None]:
    """What runs for tensors that lie so: whether the update is fused, and the launches; None: some must be copied."""
    (rows, tokens, inner), (adapters, outer, rank) = x[0], b[0]
    weights = 0 if token_weights is None else token_weights[0][1]
    p = Problem(rows, tokens, inner, outer, rank, parts, adapters, dtype, bias, weights)
    fused = choose(p, target).strategy == "fused"
    if weight[1][-1] != 1 or a[-1] != 1 or b[1][-1] != 1:
        return fused, None
    masks = NO_WEIGHTS if token_weights is None else token_weights[1]
    lora, y = (part_rank(p), *a[:2], *b[1][:2]), (tokens * outer, outer, 1)
    adds = add_launches(p._replace(bias=False), target, (*x[1], *lora, *y, *masks))
    if not fused:
        return False, adds
    first = linear_launch(p, target, (*x[1], weight[1][0], *lora, *y, *masks))
    return True, ((0, first), *adds[1:])


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
    check_linear(x, weight, bias, slots, a, b, scales, backend)
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


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, backend: str
) -> None:
    """Raise ValueError unless the arguments of `multi_lora_linear` fit; shapes that did are not looked at again."""
    check = _check_linear if torch.compiler.is_compiling() else _check_linear_once
    check(
        (x.shape, weight.shape, slots.shape, a.shape, b.shape, scales.shape),
        (x.dtype, weight.dtype, None if bias is None else bias.dtype, slots.dtype, a.dtype, b.dtype, scales.dtype),
        backend,
    )


def _check(x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, out: int, backend: str) -> None:
    _check_shapes(x.shape, slots.shape, a.shape, b.shape, scales.shape, out, backend)
    check_dtypes(x, slots, scales, a=a, b=b)


def _check_linear(shapes: tuple[torch.Size, ...], dtypes: tuple[torch.dtype | None, ...], backend: str) -> None:
    x, weight, slots, a, b, scales = shapes
    _check_shapes(x, slots, a, b, scales, weight[0], backend)
    if weight[1:] != x[2:]:
        raise ValueError(f"weight must be [out, {x[2]}] for x {tuple(x)}, got {tuple(weight)}")
    names = ("x", "weight", "bias", "slots", "a", "b", "scales")
    given = dict(zip(names, dtypes, strict=True))
    for name in ("a", "b", "weight", "bias"):
        _must_be(name, given[name], given["x"], f"of x's dtype {given['x']}")
    _must_be("slots", given["slots"], torch.int64, "int64")
    _must_be("scales", given["scales"], torch.float32, "float32")


_check_linear_once = functools.lru_cache(maxsize=4096)(_check_linear)  # an error is not kept, so it is raised each time


def _must_be(name: str, got: torch.dtype | None, want: torch.dtype | None, words: str) -> None:
    if got is not None and got != want:
        raise ValueError(f"{name} must be {words}, got {got}")


def _check_shapes(
    x: torch.Size, slots: torch.Size, a: torch.Size, b: torch.Size, scales: torch.Size, out: int, backend: str
) -> None:
    check_backend(backend)
    if len(x) != 3:
        raise ValueError(f"x must be [rows, tokens, in], got {tuple(x)}")
    if slots != x[:1]:
        raise ValueError(f"slots must be [{x[0]}] for x {tuple(x)}, got {tuple(slots)}")
    count, rank, parts = a[0], b[-1], scales[-1]
    if a != (count, parts * rank, x[2]):
        raise ValueError(f"a must be [slots, parts * rank, in] = {(count, parts * rank, x[2])}, got {tuple(a)}")
    if b != (count, out, rank) or out % parts:
        raise ValueError(
            f"b must be [slots, out, rank] = {(count, out, rank)} with out divisible by parts {parts}, got {tuple(b)}"
        )
    if scales != (count, parts):
        raise ValueError(f"scales must be [slots, parts] = {(count, parts)}, got {tuple(scales)}")


def check_dtypes(x: Tensor, slots: Tensor | None = None, scales: Tensor | None = None, **others: Tensor | None) -> None:
    """Raise ValueError unless tensors are of x's dtype, slots int64 and scales float32; it names the argument."""
    for name, tensor in others.items():
        _must_be(name, None if tensor is None else tensor.dtype, x.dtype, f"of x's dtype {x.dtype}")
    _must_be("slots", None if slots is None else slots.dtype, torch.int64, "int64")
    _must_be("scales", None if scales is None else scales.dtype, torch.float32, "float32")
