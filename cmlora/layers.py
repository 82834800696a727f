"""What a PEFT layer's `forward` is replaced with while a pipeline is accelerated, and put back on restore.

The layer itself stays in the model: `pipe.set_adapters`, `load_lora_weights` and `delete_adapters` go on working, and
the module tree, its names and its `state_dict` never change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cmlora.adapters import AdapterBank, LayerBank
from cmlora.errors import AdapterError, RunError
from cmlora_kernels import multi_lora_add_, multi_lora_conv2d, multi_lora_linear


@dataclass
class RowSlots:
    """The adapter slot of every row of the batch that is running; None outside a step.

    One object is shared by all layers of a model, so that a change of rows is one assignment.
    """

    slots: Tensor | None = None


class _MultiLora:
    """Base of the replaced forwards: outside a step it is PEFT's own."""

    def __init__(self, layer: Any, bank: LayerBank | None, rows: RowSlots, backend: str) -> None:
        self.layer = layer
        self.base = layer.get_base_layer()
        self.bank = bank
        self.rows = rows
        self.backend: Any = backend

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        slots = self.rows.slots
        if slots is None:
            plain: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
            return plain
        if self.bank is None:
            base: Tensor = self.base(x)
            return base
        if x.shape[0] != slots.shape[0]:
            raise RunError(
                f"a LoRA layer got a batch of {x.shape[0]} where the step has {slots.shape[0]} rows: an attention "
                "processor that splits the batch cannot be combined with cmlora"
            )
        return self.update(x.to(self.bank.a.dtype), slots, self.bank)

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        raise NotImplementedError


class MultiLoraLinear(_MultiLora):
    """A linear layer with an adapter per row."""

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        """x [rows, ..., in] -> [rows, ..., out]."""
        base = self.base
        tokens = x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
        if _computes_plainly(base, nn.Linear):
            y = multi_lora_linear(
                tokens, base.weight, base.bias, slots, bank.a, bank.b, bank.scales, backend=self.backend
            )
        else:
            y = multi_lora_add_(base(tokens), tokens, slots, bank.a, bank.b, bank.scales, backend=self.backend)
        return y if x.ndim == 3 else y.view(*x.shape[:-1], y.shape[-1])


class MultiLoraConv2d(_MultiLora):
    """A convolution with an adapter per row."""

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        """x [rows, in, height, width] -> [rows, out, height', width']."""
        base = self.base
        if not _computes_plainly(base, nn.Conv2d):
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


def _computes_plainly(base: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a base layer is nothing but its weight: not quantised, no hook (offload, layerwise casting) around it."""
    return (
        type(base) is kind
        and "forward" not in base.__dict__
        and not base._forward_pre_hooks
        and not base._forward_hooks
    )


def install(bank: AdapterBank, rows: RowSlots, backend: str) -> None:
    """Put a batched forward on every layer of the bank."""
    for layer, layer_bank in bank.layers:
        kind = MultiLoraConv2d if isinstance(layer.get_base_layer(), nn.Conv2d) else MultiLoraLinear
        layer.forward = kind(layer, layer_bank, rows, backend)


def uninstall(layers: Iterable[nn.Module]) -> None:
    """Give every layer its own forward back; layers without ours are left alone."""
    for layer in layers:
        if isinstance(layer.__dict__.get("forward"), _MultiLora):
            del layer.__dict__["forward"]
