"""3x3 convolutions on the CPU by F(2x2, 3x3): 16 multiplications for four pixels in the place of 36.

Winograd's minimal filtering as Lavin and Gray apply it (arXiv 1509.09308, section 4.1):
y = A^T [(G w G^T) * (B^T d B)] A over tiles d of 4x4 pixels that overlap by two; the product is one GEMM over channels
for each of the 16 positions. The transformed weight is kept. oneDNN lays a convolution's weight anew at every call,
which is what the inner levels of a UNet spend their time on otherwise.
"""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from cmlora.batch.identity import Identity, identity
from cmlora.batch.replaced import give_back_forward, replace_forward
from cmlora.lora.bank import outline
from cmlora.lora.plain import CONVOLVE, PLAIN, classes_own, computes_plainly

LEAST_CHANNELS = 1024
"""In and out; narrower layers gain nothing (csrc_docs/engine.md)."""
CHUNK = 16 * 2**20
"""Bytes of transformed tiles that are worked on at once: they stay in a cache, and memory does not grow with rows."""
G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def transform_weight(weight: Tensor) -> Tensor:
    """G w G^T of every pair of channels: [out, in, 3, 3] -> [16, out, in]."""
    g = weight.new_tensor(G)
    both = torch.einsum("ik,jl->ijkl", g, g).reshape(16, 9)
    return (both @ weight.reshape(-1, 9).t()).view(16, *weight.shape[:2])


def convolve(x: Tensor, transformed: Tensor, bias: Tensor | None) -> Tensor:
    """The 3x3 convolution that keeps the size: [rows, in, height, width] -> [rows, out, height, width].

    Args:
        x: any size and layout; channels innermost is the fast one.
        transformed: [16, out, in] of `transform_weight`.
        bias: [out].

    Returns:
        Channels innermost.

    In float32 the relative error against float64 is below 1e-6.
    """
    rows, channels, height, width = x.shape
    down, across = -(-height // 2), -(-width // 2)  # tiles; an odd side's last ones reach beyond it
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
    y = x.new_empty(rows, down, 2, across, 2, transformed.shape[1])
    line = 16 * across * channels * x.element_size()
    lines = max(1, min(down, CHUNK // line))
    images = max(1, CHUNK // (line * down))
    for image in range(0, rows, images):
        for top in range(0, down, lines):
            tiles = x[image : image + images, 2 * top : 2 * (top + lines) + 2]
            _tiles(tiles, transformed, bias, y[image : image + images, top : top + lines])
    return y.view(rows, 2 * down, 2 * across, -1)[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _tiles(x: Tensor, transformed: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x [rows, 2 down + 2, 2 across + 2, in] -> y [rows, down, 2, across, 2, out], written."""
    rows, down, _, across, _, out = y.shape
    t = x.new_empty(4, rows, down, x.shape[2], x.shape[3])
    _inwards([x[:, i : i + 2 * down - 1 : 2] for i in range(4)], t)
    v = x.new_empty(4, 4, rows, down, across, x.shape[3])
    _inwards([t[..., j : j + 2 * across - 1 : 2, :] for j in range(4)], v.transpose(0, 1))
    m = torch.bmm(v.flatten(2, 4).flatten(0, 1), transformed.transpose(1, 2)).view(4, 4, rows, down, across, out)
    if bias is not None:
        m[1, 1] += bias  # the one position that all four pixels count, once each
    s = m.new_empty(2, 4, rows, down, across, out)
    _outwards(m, s)
    _outwards(s.transpose(0, 1), y.permute(4, 2, 0, 1, 3, 5))


def _inwards(d: list[Tensor], out: Tensor) -> None:
    """B^T along one side."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _outwards(m: Tensor, out: Tensor) -> None:
    """A^T along one side."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


class TransformedConv2d:
    """What a convolution's `forward` is replaced with: the same by the transformed weight, made when first needed.

    Made again when the weight is another one or was written to, and where `renew` sees that `.data` was written to. The
    layer's own forward runs whenever the layer is no longer what was transformed: asked in every call.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer
        self.like = torch.empty(16, *layer.weight.shape[:2], device="meta")
        self.weight: Tensor = self.like  # none yet
        self.of: tuple[Tensor, Identity] | None = None  # held, so that no other weight takes its memory
        self.answer: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != torch.float32 or not _fits(layer):
            y: Tensor = type(layer).forward(layer, x)
            return y
        if isinstance(x, FakeTensor):  # memory is being predicted: shapes are enough
            return convolve(x, self.like, layer.bias)
        now = identity(layer.weight)
        if self.of is None or self.of[1] != now:
            self._transform(now)
        return convolve(x, self.weight, layer.bias)

    def renew(self) -> None:
        """Have the weight transformed anew where its values changed without a trace.

        Told by the layer's answer to one random patch, [out] numbers in its own precision. A change that leaves every
        bit of them as it was shows in answers to other patches by no more than their rounding, or is orthogonal to a
        random direction in every row, which does not happen. On other devices, where looking would wait for the
        device, it is transformed anew.
        """
        if self.of is not None and (self.answer is None or not torch.equal(self.answer, self._answer())):
            self.of = None

    def _transform(self, now: Identity) -> None:
        with torch.inference_mode(False):
            weight = self.layer.weight.detach()
            made = transform_weight(weight)
            if self.weight.device == made.device and self.weight.shape == made.shape:
                self.weight.copy_(made)  # where it lies, for steps that were captured
            else:
                self.weight = made
            self.of = (weight, now)
            self.answer = self._answer() if weight.device.type == "cpu" else None

    def _answer(self) -> Tensor:
        weight = self.layer.weight.detach().flatten(1)
        return weight @ _patch(weight.shape[1])


@functools.lru_cache(maxsize=16)
def _patch(size: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.randn(size, generator=torch.Generator().manual_seed(0))


class Transforming:
    """The transformed weights of a model's wide 3x3 convolutions: all of them there, or none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.on = False

    @functools.cached_property
    def layers(self) -> list[nn.Conv2d]:
        return [module for _, module in outline(self.model) if _suits(module)]

    @property
    def bytes(self) -> int:
        """Memory that they take, or would take."""
        return sum(layer.weight.nbytes * 16 // 9 for layer in self.layers)

    def switch(self, on: bool) -> None:
        """Have them, or let them go."""
        if on == self.on:
            return
        self.on = on
        for layer in self.layers:
            if on:
                replace_forward(layer, TransformedConv2d(layer))
            elif is_transformed(layer):
                give_back_forward(layer)

    def renew(self) -> None:
        """At a run's start: follow weights that were written to in a way that leaves no trace."""
        for layer in self.layers if self.on else ():
            forward = layer.__dict__.get("forward")
            if isinstance(forward, TransformedConv2d):
                forward.renew()


def is_transformed(layer: nn.Module) -> bool:
    """Whether a layer's forward is ours."""
    return isinstance(layer.__dict__.get("forward"), TransformedConv2d)


def _suits(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        isinstance(layer, nn.Conv2d)
        and classes_own(layer)
        and computes_plainly(layer, nn.Conv2d)
        and _fits(layer)
        and min(layer.in_channels, layer.out_channels) >= LEAST_CHANNELS
    )


def _fits(layer: nn.Conv2d) -> bool:
    """Whether a layer is a plain 3x3 convolution that keeps the size, whatever else calls it."""
    weight, state = layer._parameters.get("weight"), layer.__dict__
    return (
        type(layer) is nn.Conv2d
        and "_conv_forward" not in state
        and nn.Conv2d._conv_forward is CONVOLVE
        and (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and type(weight) in PLAIN
        and weight is not None
        and weight.dtype == torch.float32
    )
