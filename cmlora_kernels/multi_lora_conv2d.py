"""Low-rank updates of many adapters in one convolution (LoCon): a k x k down with `rank` outputs, a 1x1 up.

y[r] = W * x[r] + bias + scales[slot r] B[slot r] (A[slot r] * x[r])

Every row of the batch names its adapter by a slot in a device tensor; slot -1 is the base layer alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.costs import choose
from cmlora_kernels.dispatch import Backend, check_backend, register
from cmlora_kernels.launch import arch_of
from cmlora_kernels.multi_lora import check_dtypes, check_weights, column_weights, fused_all, runs_triton
from cmlora_kernels.multi_lora_conv import triton_conv_add
from cmlora_kernels.tiles import Problem


def conv2d_definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """`multi_lora_conv2d` in plain torch."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    return conv2d_add_definition(y, x, slots, a, b, scales, stride, padding, dilation, token_weights, groups)


def conv2d_add_definition(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """`multi_lora_conv2d_add_` in plain torch: the shrink is one grouped convolution, a group per row."""
    rows, channels, height, width = x.shape
    index = slots.clamp_min(0)
    image, kernels = x.reshape(1, rows * channels, height, width), a[index].flatten(0, 1)
    down = F.conv2d(image, kernels, None, stride, padding, dilation, groups=rows).view(rows, a.shape[1], -1)
    if token_weights is not None and groups is not None:
        down *= column_weights(token_weights, groups, index)
    per_row = (scales[index] * (slots >= 0).unsqueeze(1)).unsqueeze(2).to(x.dtype)
    return y.add_(torch.bmm(b[index], down * per_row).view(y.shape))


def _conv2d_body(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    if not runs_triton(x, a.shape[1], backend):
        return conv2d_definition(x, weight, bias, slots, a, b, scales, stride, padding, dilation, token_weights, groups)
    if weight.shape[2:] == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        y = _pointwise(x, weight, bias, slots, a, b, scales, token_weights, groups)
        if y is not None:
            return y
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    return triton_conv_add(y, x, slots, a, b, scales, (*stride, *padding, *dilation), token_weights, groups)


def _conv2d_add_body(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> None:
    if not runs_triton(x, a.shape[1], backend):
        conv2d_add_definition(y, x, slots, a, b, scales, stride, padding, dilation, token_weights, groups)
        return
    into = y if y.stride(2) == y.shape[3] * y.stride(3) else y.contiguous()  # pixels must be one dimension
    triton_conv_add(into, x, slots, a, b, scales, (*stride, *padding, *dilation), token_weights, groups)
    if into is not y:
        y.copy_(into)


def _conv2d_add_fake(*_: Any, **__: Any) -> None:
    return None


def _pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor | None:
    """A 1x1 convolution as a linear layer over pixels, in x's memory format; None where the cost model says cuDNN."""
    rows, channels, height, width = x.shape
    weights = 0 if token_weights is None else token_weights.shape[1]
    sizes = (rows, height * width, channels, weight.shape[0], b.shape[2], 1, a.shape[0])
    problem = Problem(*sizes, x.dtype, bias is not None, weights)
    if x.stride(2) != width * x.stride(3) or choose(problem, arch_of(x.device)).strategy != "fused":
        return None
    last = x.stride(1) == 1 and not x.is_contiguous()
    y = torch.empty(
        (rows, weight.shape[0], height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    tokens, outputs = x.flatten(2).transpose(1, 2), y.flatten(2).transpose(1, 2)
    fused_all(tokens, weight.flatten(1), bias, slots, a.flatten(2), b, scales, outputs, token_weights, groups)
    return y


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation)


_conv2d = register(
    "multi_lora_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor slots, Tensor a, Tensor b, Tensor scales, "
    "int[2] stride, int[2] padding, int[2] dilation, str backend, "
    "Tensor? token_weights=None, Tensor? groups=None) -> Tensor",
    _conv2d_body,
    _conv2d_fake,
)


_conv2d_add = register(
    "multi_lora_conv2d_add_(Tensor(y!) y, Tensor x, Tensor slots, Tensor a, Tensor b, Tensor scales, "
    "int[2] stride, int[2] padding, int[2] dilation, str backend, "
    "Tensor? token_weights=None, Tensor? groups=None) -> ()",
    _conv2d_add_body,
    _conv2d_add_fake,
)


def multi_lora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    backend: Backend = "auto",
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """A convolution with one LoRA per row of the batch (LoCon: a k x k down, a 1x1 up), or with weighted ones at once.

    Args:
        x: [rows, in, height, width].
        weight: [out, in, kh, kw]; bias: [out] or None.
        slots: [rows], int64; -1 is the base layer alone.
        a: [slots, rank, in, kh, kw]; b: [slots, out, rank]; scales: [slots, 1], float32.
        stride, padding, dilation: as in torch.nn.functional.conv2d; groups are not supported.
        token_weights: [rows, weights, height' * width'] or [rows, weights, height', width'], float32, for the output's
            pixels; groups: [slots, rank], int32. As in `multi_lora_linear`.

    Returns:
        [rows, out, height', width'].

    Raises:
        ValueError: a shape or backend that does not fit; it names the argument.
    """
    if a.shape[2:] != weight.shape[1:]:
        raise ValueError(f"a must be [slots, rank, {', '.join(map(str, weight.shape[1:]))}], got {tuple(a.shape)}")
    _check(x, slots, a, b, scales, weight.shape[0], backend)
    check_dtypes(x, weight=weight, bias=bias)
    geometry = (stride, padding, dilation)
    if token_weights is not None or groups is not None:
        weights = _pixel_weights(token_weights, groups, x, a, *geometry)
        weighted: Tensor = _conv2d(x, weight, bias, slots, a, b, scales, *geometry, backend, weights, groups)
        return weighted
    y: Tensor = _conv2d(x, weight, bias, slots, a, b, scales, *geometry, backend)  # the shorter call is the cheaper one
    return y


def multi_lora_conv2d_add_(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    backend: Backend = "auto",
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Add every row's low-rank update of a convolution to y in place, whatever computed y.

    Args:
        y: [rows, out, height', width'], the base convolution's output; any strides, but dense pixels spare a copy.
        x ... groups: as in `multi_lora_conv2d`.

    Returns:
        y.

    Raises:
        ValueError: a shape, dtype or backend that does not fit; it names the argument.
    """
    _check(x, slots, a, b, scales, b.shape[1] if b.ndim == 3 else 0, backend)
    geometry = (stride, padding, dilation)
    want = (x.shape[0], b.shape[1], *_out_size(x, a, *geometry))
    if y.shape != want:
        raise ValueError(
            f"y must be [rows, out, height', width'] = {want} for x {tuple(x.shape)}, got {tuple(y.shape)}"
        )
    check_dtypes(x, y=y)
    if token_weights is not None or groups is not None:
        weights = _pixel_weights(token_weights, groups, x, a, *geometry)
        _conv2d_add(y, x, slots, a, b, scales, *geometry, backend, weights, groups)
    else:
        _conv2d_add(y, x, slots, a, b, scales, *geometry, backend)
    return y


def _out_size(x: Tensor, a: Tensor, *geometry: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the output; geometry is stride, padding and dilation."""
    height, width = (
        (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, pad, dilation in zip(x.shape[2:], a.shape[3:], *geometry, strict=True)
    )
    return height, width


def _pixel_weights(
    token_weights: Tensor | None, groups: Tensor | None, x: Tensor, a: Tensor, *geometry: tuple[int, int]
) -> Tensor | None:
    """Token weights [rows, weights, pixels], checked."""
    size = _out_size(x, a, *geometry)
    if token_weights is not None and token_weights.ndim == 4:
        if token_weights.shape[2:] != size:
            raise ValueError(
                f"token_weights must be [rows, weights, height', width'] with {size} places, "
                f"got {tuple(token_weights.shape)}"
            )
        token_weights = token_weights.flatten(2)
    check_weights(token_weights, groups, (x.shape[0], size[0] * size[1]), a)
    return token_weights


def _check(x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, out: int, backend: str) -> None:
    check_backend(backend)
    if x.ndim != 4:
        raise ValueError(f"x must be [rows, in, height, width], got {tuple(x.shape)}")
    if a.ndim != 5 or a.shape[2] != x.shape[1]:
        raise ValueError(f"a must be [slots, rank, {x.shape[1]}, kh, kw] for x {tuple(x.shape)}, got {tuple(a.shape)}")
    if b.shape != (a.shape[0], out, a.shape[1]):
        raise ValueError(f"b must be [slots, out, rank] = {(a.shape[0], out, a.shape[1])}, got {tuple(b.shape)}")
    if slots.shape != (x.shape[0],):
        raise ValueError(f"slots must be [{x.shape[0]}] for x {tuple(x.shape)}, got {tuple(slots.shape)}")
    if scales.shape != (a.shape[0], 1):
        raise ValueError(f"scales must be [slots, 1] = {(a.shape[0], 1)}, got {tuple(scales.shape)}")
    check_dtypes(x, slots, scales, a=a, b=b)
