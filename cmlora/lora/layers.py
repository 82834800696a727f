"""What a PEFT layer's `forward` is replaced with while a pipeline is accelerated, and put back on restore.

The layer itself stays in the model: `pipe.set_adapters`, `load_lora_weights` and `delete_adapters` go on working, and
the module tree, its names and its `state_dict` never change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from cmlora.batch.replaced import give_back_forward, replace_forward
from cmlora.batch.running import Running
from cmlora.lora.bank import AdapterBank, LayerBank, outline, tuner_layers
from cmlora.lora.plain import computes_plainly, hooked, unhooked
from cmlora.lora.winograd import is_transformed
from cmlora_kernels import (
    merged_linear,
    multi_lora_add_,
    multi_lora_conv2d,
    multi_lora_conv2d_add_,
    multi_lora_geglu,
    multi_lora_linear,
)
from cmlora_kernels.cpu_linear import linear


class Replaced:
    """Base of the replaced forwards: outside a step, and once another bank is in force, it is the layer's own.

    Args:
        layer: PEFT's.
        bank: that it belongs to.
        running: where it reads which rows run.
    """

    bank: LayerBank | None = None
    seen: tuple[int, int] | None = None  # rows and tokens of the last batch

    def __init__(self, layer: Any, owner: AdapterBank, running: Running) -> None:
        self.layer, self.owner, self.running = layer, owner, running
        self.was_set = "forward" in layer.__dict__  # by a hook
        self.original: Any = layer.forward if self.was_set else None

    def own(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What stood here before."""
        layer = self.layer
        y: Tensor = (
            self.original(x, *args, **kwargs) if self.was_set else type(layer).forward(layer, x, *args, **kwargs)
        )
        return y

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        """Where a copy or pickle comes by this on another way than the layer: what stood here before."""
        return (_itself, (self.original,)) if self.was_set else (getattr, (self.layer, "forward"))

    @property
    def in_force(self) -> bool:
        return self.running.rows is not None and self.running.owner is self.owner


def _itself(x: Any) -> Any:
    return x


class Kept(Replaced):
    """A layer that only PEFT's own forward can compute: all that is added is the run's scale."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = self.owner.scale
        if not self.in_force or scale == 1:
            return self.own(x, *args, **kwargs)
        before = dict(self.layer.scaling)
        self.layer.scale_layer(scale)
        try:
            return self.own(x, *args, **kwargs)
        finally:
            self.layer.scaling.update(before)


class MultiLora(Replaced):
    """A layer with an adapter per row."""

    def __init__(self, layer: Any, bank: LayerBank | None, owner: AdapterBank, running: Running, backend: str) -> None:
        super().__init__(layer, owner, running)
        self.base = layer.get_base_layer()
        self.bank = bank
        self.backend: Any = backend
        self.placeless = False  # whether its tokens are never places of the image: the prompt's keys and values
        self.merged: Tensor | None = None  # a weight per adapter, where `merged.Merging` is on
        self.whole: Tensor | None = None  # or the one that all rows have

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.in_force:
            return self.own(x, *args, **kwargs)
        if self.bank is None:
            base: Tensor = self.base(x)
            return base
        return self.update(x, self.running.slots(x.shape[0]), self.bank)

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        raise NotImplementedError

    def plain(self, bank: LayerBank) -> bool:
        """Whether the layer may be computed from its weights without calling it; asked in every call."""
        raise NotImplementedError

    def called(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
        """The base layer's own answer in a dtype, to be written into, and the dtype that it had.

        A copy, always: whoever hooked the layer may have kept what it answered.
        """
        y: Tensor = self.base(x)
        return y.to(dtype, copy=True), y.dtype


class MultiLoraLinear(MultiLora):
    """A linear layer with an adapter per row."""

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        """x [rows, ..., in] -> [rows, ..., out]."""
        base = self.base
        cast = x.to(bank.a.dtype)
        tokens = cast if x.ndim == 3 else cast.reshape(x.shape[0], -1, x.shape[-1])
        self.seen = (tokens.shape[0], tokens.shape[1])
        weights = self.running.weights(*self.seen, placeless=self.placeless or x.ndim == 2)
        if self.whole is not None and weights is None and self.plain(bank):
            return linear(cast, self.whole, base.bias)
        how: dict[str, Any] = {"backend": self.backend}
        if weights is not None:
            how |= {"token_weights": weights, "groups": bank.masked}
        if not self.plain(bank):
            y, dtype = self.called(x, bank.a.dtype)
            flat = y if y.ndim == 3 else y.reshape(*tokens.shape[:2], -1)
            flat = multi_lora_add_(flat, tokens, slots, bank.a, bank.b, bank.scales, **how)
            return flat.view_as(y).to(dtype)
        if self.merged is not None:
            y = merged_linear(tokens, self.merged, base.bias, slots, backend=self.backend)
        else:
            y = multi_lora_linear(tokens, base.weight, base.bias, slots, bank.a, bank.b, bank.scales, **how)
        return y if x.ndim == 3 else y.view(*x.shape[:-1], y.shape[-1])

    def through_gate(self, x: Tensor) -> Tensor | None:
        """value * gelu(gate) of the halves of what the layer answers to x [rows, tokens, in], as one op.

        None where that is not what a call computes: the caller then calls the layer, and the gate behind it.
        """
        bank, base = self.bank, self.base
        if not self.in_force or bank is None or hooked(self.layer) or not self.plain(bank):
            return None
        if self.merged is not None or self.whole is not None:  # then no low-rank work is left for the op to take in
            return None
        if x.ndim != 3 or x.dtype != bank.a.dtype:
            return None
        self.seen = (x.shape[0], x.shape[1])
        weights = self.running.weights(*self.seen, placeless=self.placeless)
        return multi_lora_geglu(
            x,
            base.weight,
            base.bias,
            self.running.slots(x.shape[0]),
            bank.a,
            bank.b,
            bank.scales,
            backend=self.backend,
            token_weights=weights,
            groups=None if weights is None else bank.masked,
        )

    def plain(self, bank: LayerBank) -> bool:
        """Whether the base is its weight and nothing else; asked in every call: a hook may have come since."""
        return computes_plainly(self.base, nn.Linear) and self.base.weight.dtype == bank.a.dtype


Way = tuple[str, object, tuple[int, int], tuple[int, int], tuple[int, ...]]
"""How a convolution moves over its image: padding mode, padding, stride, dilation, what torch pads on each side."""


def way_of(layer: Any) -> Way:
    pads = tuple(layer._reversed_padding_repeated_twice)
    return (layer.padding_mode, layer.padding, layer.stride, layer.dilation, pads)


class MultiLoraConv2d(MultiLora):
    """A convolution with an adapter per row."""

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        """x [rows, in, height, width] -> [rows, out, height', width']."""
        base = self.base
        if self.plain(bank):
            x = x.to(bank.a.dtype)
            how: dict[str, Any] = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
            if self.whole is not None and not self.running.placing:
                return F.conv2d(x, self.whole, base.bias, **how)
            how |= self.how(x.shape[0], _out_size(x, base) if self.running.placing else (0, 0), bank)
            return multi_lora_conv2d(x, base.weight, base.bias, slots, bank.a, bank.b, bank.scales, **how)
        y, dtype = self.called(x, bank.a.dtype)
        ways = self.ways(bank)
        for way, members in ways.items():
            b = bank.b if len(ways) == 1 else bank.b * _columns(bank, members)
            self.add_(y, x.to(bank.a.dtype), slots, bank, b, way)
        return y.to(dtype)

    def plain(self, bank: LayerBank) -> bool:
        """Whether the base is its weight and nothing else, and all adapters move over the image as it does."""
        base = self.base
        plain = computes_plainly(base, nn.Conv2d) and base.weight.dtype == bank.a.dtype
        return plain and [*self.ways(bank)] == [way_of(base)] and base.kernel_size == tuple(bank.a.shape[3:])

    def ways(self, bank: LayerBank) -> dict[Way, list[int]]:
        """How the adapters' own convolutions move, and which adapters do so; users set circular padding on all."""
        ways: dict[Way, list[int]] = {}
        for position, name in enumerate(self.owner.names):
            if name in self.layer.lora_A:
                ways.setdefault(way_of(self.layer.lora_A[name]), []).append(position)
        return ways

    def add_(self, y: Tensor, x: Tensor, slots: Tensor, bank: LayerBank, b: Tensor, way: Way) -> None:
        """One way's updates onto y."""
        mode, padding, stride, dilation, pads = way
        if mode != "zeros" or not isinstance(padding, tuple):
            x, padding = F.pad(x, pads, mode="constant" if mode == "zeros" else mode), (0, 0)
        how = self.how(y.shape[0], (y.shape[2], y.shape[3]), bank)
        multi_lora_conv2d_add_(y, x, slots, bank.a, b, bank.scales, stride, padding, dilation, **how)

    def how(self, count: int, size: tuple[int, int], bank: LayerBank) -> dict[str, Any]:
        """Backend and, where the adapters have masks, the weights of the output's pixels."""
        weights = self.running.pixel_weights(count, size)
        if weights is None:
            return {"backend": self.backend}
        return {"backend": self.backend, "token_weights": weights, "groups": bank.masked}


def _out_size(x: Tensor, layer: nn.Conv2d) -> tuple[int, int]:
    """Height and width of what a convolution with plain padding returns."""
    pads = cast("tuple[int, int]", layer.padding)
    sizes = zip(x.shape[2:], pads, layer.dilation, layer.kernel_size, layer.stride, strict=True)
    height, width = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, pad, dilation, kernel, stride in sizes
    )
    return height, width


def _columns(bank: LayerBank, members: list[int]) -> Tensor:
    """[slots, 1, rank] ones where a column belongs to one of some adapters."""
    return torch.isin(bank.groups, torch.tensor(members)).unsqueeze(1).to(bank.b)


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """What runs inside leaves no trace in `problems`."""
    seen = {forward: forward.seen for _, m in outline(model) if (forward := forward_of(m)) is not None}
    try:
        yield
    finally:
        for forward, before in seen.items():
            forward.seen = before


def carrying(model: nn.Module) -> set[nn.Module]:
    """Every layer that an adapter of the batch changes, and all modules that it lies in."""
    modules = dict(outline(model))
    found = set()
    for name, module in modules.items():
        forward = forward_of(module)
        if forward is not None and forward.bank is not None:
            parts = name.split(".")
            found |= {modules[".".join(parts[:i])] for i in range(len(parts) + 1)}
    return found


def forward_of(layer: nn.Module | None) -> MultiLora | None:
    forward = None if layer is None else layer.__dict__.get("forward")
    return forward if isinstance(forward, MultiLora) else None


def untouched(model: nn.Module) -> bool:
    """Whether all modules in `model` are unhooked but for our own forwards."""
    return all(
        ((forward_of(module) is not None or is_transformed(module)) and not hooked(module)) or unhooked(module)
        for module in model.modules()
        if module is not model
    )


def install(bank: AdapterBank, running: Running, backend: str, placeless: Collection[nn.Module] = ()) -> None:
    """Put a batched forward on every layer of the bank; forwards of another bank are no longer in force.

    Args:
        bank: of the layers. running: where they read which rows run. backend: of the kernels.
        placeless: layers whose tokens are never places of the image.
    """
    running.owner = bank
    for layer, layer_bank in bank.layers:
        kind = MultiLoraConv2d if isinstance(layer.get_base_layer(), nn.Conv2d) else MultiLoraLinear
        forward = kind(layer, layer_bank, bank, running, backend)
        forward.placeless = layer in placeless
        replace_forward(layer, forward)
    for kept in bank.kept:
        replace_forward(kept, Kept(kept, bank, running))


def uninstall(model: nn.Module) -> None:
    """Give every layer its own forward back; layers without ours are left alone."""
    for _, layer in tuner_layers(model):
        give_back_forward(layer)
        _unwrap(layer)


def _unwrap(layer: BaseTunerLayer) -> None:
    """Take ours out of hooks of diffusers that came later and wrapped it."""
    state: Any = layer.__dict__
    for reference in getattr(state.get("_diffusers_hook"), "_fn_refs", ()):
        for name in ("forward", "original_forward"):
            forward = getattr(reference, name)
            if isinstance(forward, Replaced):
                setattr(reference, name, forward.original or type(layer).forward.__get__(layer))
