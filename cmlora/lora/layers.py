"""What a PEFT layer's `forward` is replaced with while a pipeline is accelerated, and put back on restore.

The layer itself stays in the model: `pipe.set_adapters`, `load_lora_weights` and `delete_adapters` go on working, and
the module tree, its names and its `state_dict` never change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cmlora.batch.replaced import give_back_forward, replace_forward
from cmlora.batch.rows import Running
from cmlora.errors import AdapterError
from cmlora.lora.bank import AdapterBank, LayerBank, outline
from cmlora.lora.winograd import is_transformed
from cmlora_kernels import merged_linear, multi_lora_add_, multi_lora_conv2d, multi_lora_linear


class MultiLora:
    """Base of the replaced forwards: outside a step it is PEFT's own."""

    def __init__(self, layer: Any, bank: LayerBank | None, running: Running, backend: str) -> None:
        self.layer = layer
        self.base = layer.get_base_layer()
        self.bank = bank
        self.running = running
        self.backend: Any = backend
        self.seen: tuple[int, int] | None = None  # rows and tokens of the last batch
        self.merged: Tensor | None = None  # a weight per adapter, where `merged.Merging` is on

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.running.rows is None:
            plain: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
            return plain
        if self.bank is None:
            base: Tensor = self.base(x)
            return base
        return self.update(x.to(self.bank.a.dtype), self.running.slots(x.shape[0]), self.bank)

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        raise NotImplementedError


class MultiLoraLinear(MultiLora):
    """A linear layer with an adapter per row."""

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        """x [rows, ..., in] -> [rows, ..., out]."""
        base = self.base
        tokens = x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
        self.seen = (tokens.shape[0], tokens.shape[1])
        plain = computes_plainly(base, nn.Linear)  # asked in every call: a hook may have come since
        if plain and self.merged is not None:
            y = merged_linear(tokens, self.merged, base.bias, slots, backend=self.backend)
        elif plain:
            y = multi_lora_linear(
                tokens, base.weight, base.bias, slots, bank.a, bank.b, bank.scales, backend=self.backend
            )
        else:
            y = multi_lora_add_(base(tokens), tokens, slots, bank.a, bank.b, bank.scales, backend=self.backend)
        return y if x.ndim == 3 else y.view(*x.shape[:-1], y.shape[-1])


class MultiLoraConv2d(MultiLora):
    """A convolution with an adapter per row."""

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        """x [rows, in, height, width] -> [rows, out, height', width']."""
        base = self.base
        if not computes_plainly(base, nn.Conv2d):
            raise AdapterError(f"LoRA on a {type(base).__name__} with hooks or of a special kind is not supported")
        return multi_lora_conv2d(
            x,
            base.weight,
            base.bias,
            slots,
            bank.a,
            bank.b,
            bank.scales,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            backend=self.backend,
        )


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


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward: no hook of offload, layerwise casting or a user."""
    return "forward" not in module.__dict__ and not hooked(module)


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def untouched(model: nn.Module) -> bool:
    """Whether all modules in `model` are unhooked but for our own forwards."""
    return all(
        ((forward_of(module) is not None or is_transformed(module)) and not hooked(module)) or unhooked(module)
        for module in model.modules()
        if module is not model
    )


def computes_plainly(base: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a base layer is nothing but its weight: not quantised, nothing around it."""
    return type(base) is kind and unhooked(base)


def install(bank: AdapterBank, running: Running, backend: str) -> None:
    """Put a batched forward on every layer of the bank."""
    for layer, layer_bank in bank.layers:
        kind = MultiLoraConv2d if isinstance(layer.get_base_layer(), nn.Conv2d) else MultiLoraLinear
        replace_forward(layer, kind(layer, layer_bank, running, backend))


def uninstall(layers: Iterable[nn.Module]) -> None:
    """Give every layer its own forward back; layers without ours are left alone."""
    for layer in layers:
        forward = forward_of(layer)
        if forward is not None:
            give_back_forward(layer, forward)
