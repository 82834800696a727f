"""What a PEFT layer's `forward` is replaced with while a pipeline is accelerated, and put back on restore.

The layer itself stays in the model: `pipe.set_adapters`, `load_lora_weights` and `delete_adapters` go on working, and
the module tree, its names and its `state_dict` never change.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cmlora.adapters import AdapterBank, LayerBank, outline
from cmlora.errors import AdapterError, RunError
from cmlora.winograd import is_transformed
from cmlora_kernels import merge_weights, merged_linear, multi_lora_add_, multi_lora_conv2d, multi_lora_linear
from cmlora_kernels.tiles import Problem


class RowSlots:
    """The adapter slot of every row of the batch that is running; none outside a step.

    One object is shared by all layers of a model, so that a change of rows is one assignment. A layer finds its slots
    by the size of its batch: predictions x images, or with both guidance halves.
    """

    def __init__(self) -> None:
        self.by_count: dict[int, Tensor] | None = None

    def find(self, count: int) -> Tensor:
        """The slots of a batch of `count` rows."""
        assert self.by_count is not None
        if count not in self.by_count:
            raise RunError(
                f"a LoRA layer got a batch of {count} where the step has {max(self.by_count)} rows: an attention "
                "processor that splits the batch cannot be combined with cmlora"
            )
        return self.by_count[count]


class _MultiLora:
    """Base of the replaced forwards: outside a step it is PEFT's own."""

    def __init__(self, layer: Any, bank: LayerBank | None, rows: RowSlots, backend: str) -> None:
        self.layer = layer
        self.base = layer.get_base_layer()
        self.bank = bank
        self.rows = rows
        self.backend: Any = backend
        self.seen: tuple[int, int] | None = None  # rows and tokens of the last batch
        self.merged: MergedBank | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rows.by_count is None:
            plain: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
            return plain
        if self.bank is None:
            base: Tensor = self.base(x)
            return base
        return self.update(x.to(self.bank.a.dtype), self.rows.find(x.shape[0]), self.bank)

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        raise NotImplementedError


class MultiLoraLinear(_MultiLora):
    """A linear layer with an adapter per row."""

    def update(self, x: Tensor, slots: Tensor, bank: LayerBank) -> Tensor:
        """x [rows, ..., in] -> [rows, ..., out]."""
        base = self.base
        tokens = x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
        self.seen = (tokens.shape[0], tokens.shape[1])
        plain = _computes_plainly(base, nn.Linear)  # asked in every call: a hook may have come since
        if plain and self.merged is not None:
            y = merged_linear(tokens, self.merged.weights, base.bias, slots, backend=self.backend)
        elif plain:
            y = multi_lora_linear(
                tokens, base.weight, base.bias, slots, bank.a, bank.b, bank.scales, backend=self.backend
            )
        else:
            y = multi_lora_add_(base(tokens), tokens, slots, bank.a, bank.b, bank.scales, backend=self.backend)
        return y if x.ndim == 3 else y.view(*x.shape[:-1], y.shape[-1])


class MergedBank:
    """W + s B A of every adapter of a layer, and W: a linear layer then picks its weight by slot.

    Args:
        weight: [out, in] of the base layer.
        bank: of its adapters.
    """

    def __init__(self, weight: Tensor, bank: LayerBank) -> None:
        self.weight, self.bank = weight, bank
        self.weights = merge_weights(weight, bank.a, bank.b, bank.scales)
        self._of = self._now()

    def renew(self) -> None:
        """Merge again if a value has changed since; they are compared, since PEFT's hot swap leaves no trace."""
        of = (self.bank.a, self.bank.b, self.bank.scales)
        if self.weight._version != self._of[1] or not all(map(torch.equal, of, self._of[0])):
            self.weights.copy_(merge_weights(self.weight, *of))
            self._of = self._now()

    def _now(self) -> tuple[list[Tensor], int]:
        return [t.clone() for t in (self.bank.a, self.bank.b, self.bank.scales)], self.weight._version

    @staticmethod
    def bytes_of(weight: Tensor, bank: LayerBank) -> int:
        """Memory that one takes."""
        copies = (bank.a, bank.b, bank.scales)
        return (bank.a.shape[0] + 1) * weight.nbytes + sum(t.nbytes for t in copies)


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


class StackedProjection:
    """q, k and v of one x in one launch: their weights one below the other, an adapter per row."""

    def __init__(self, bases: Sequence[Any], banks: Sequence[LayerBank | None], rows: RowSlots, backend: str) -> None:
        self.weight = torch.cat([base.weight.detach() for base in bases])
        self.bias = None if bases[0].bias is None else torch.cat([base.bias.detach() for base in bases])
        self.banks = banks
        self.bank = _stack_parts(banks)
        self.rows = rows
        self.backend: Any = backend
        self.seen: tuple[int, int] | None = None
        self.merged: MergedBank | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, tokens, in] -> [rows, tokens, 3 * out]."""
        self.seen = (x.shape[0], x.shape[1])
        bank, slots = self.bank, self.rows.find(x.shape[0])
        if self.merged is not None:
            return merged_linear(x, self.merged.weights, self.bias, slots, backend=self.backend)
        return multi_lora_linear(x, self.weight, self.bias, slots, bank.a, bank.b, bank.scales, backend=self.backend)

    def fill(self) -> None:
        """Copy the layers' banks; what a layer lacks stays zero."""
        parts = len(self.banks)
        for part, bank in enumerate(self.banks):
            if bank is not None:
                self.bank.a.chunk(parts, 1)[part][:, : bank.a.shape[1]] = bank.a
                self.bank.b.chunk(parts, 1)[part][:, :, : bank.b.shape[2]] = bank.b
                self.bank.scales[:, part] = bank.scales[:, 0]

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        tensors = (self.weight, self.bias, self.bank.a, self.bank.b, self.bank.scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _stack_parts(banks: Sequence[LayerBank | None]) -> LayerBank:
    """Zeros for equally wide layers as one with a part per layer."""
    present = next(bank for bank in banks if bank is not None)
    rank = max(bank.a.shape[1] for bank in banks if bank is not None)
    slots, out, width = present.b.shape[0], present.b.shape[1], present.a.shape[2]
    a = present.a.new_zeros(slots, len(banks) * rank, width)
    b = present.b.new_zeros(slots, len(banks) * out, rank)
    return LayerBank(a, b, present.scales.new_zeros(slots, len(banks)))


def stack_projections(model: nn.Module, rows: RowSlots, backend: str) -> dict[nn.Module, StackedProjection]:
    """For every attention whose q, k and v are plain linear layers of one width, at least one with an adapter."""
    stacked = {}
    for _, module in outline(model):
        layers = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
        forwards = [f for f in map(_forward_of, layers) if isinstance(f, MultiLoraLinear)]
        if len(forwards) < 3 or any(_hooks(f.layer) for f in forwards):
            continue
        bases = [forward.base for forward in forwards]
        plain = all(_computes_plainly(base, nn.Linear) for base in bases)
        alike = len({(base.weight.shape, base.weight.dtype, base.bias is None) for base in bases}) == 1
        banks = [forward.bank for forward in forwards]
        if plain and alike and any(bank is not None for bank in banks):
            stacked[module] = StackedProjection(bases, banks, rows, backend)
    return stacked


Mergeable = tuple[MultiLoraLinear | StackedProjection, Tensor, LayerBank]
"""A layer whose weights can be merged, its base weight and its adapters."""


def mergeable(model: nn.Module, stacked: dict[nn.Module, StackedProjection]) -> Iterator[Mergeable]:
    """The linear layers that run in every step, as they run: q, k and v of a self-attention as one where stacked.

    Keys and values of the prompt are not among them: they run once.
    """
    for projection in stacked.values():
        yield projection, projection.weight, projection.bank
    passed_by: set[object] = set()
    for _, module in outline(model):
        layers = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
        if module in stacked:
            passed_by |= set(layers)
        elif getattr(module, "is_cross_attention", False):
            passed_by |= set(layers[1:])
        forward = _forward_of(module)
        if (
            isinstance(forward, MultiLoraLinear)
            and forward.bank is not None
            and module not in passed_by
            and _computes_plainly(forward.base, nn.Linear)
        ):
            yield forward, forward.base.weight, forward.bank


class Merging:
    """The merged weights of a model's linear layers: all of them there, or none.

    Args:
        model: with our forwards on its layers.
        stacked: the copies of q, k and v in force.
    """

    def __init__(self, model: nn.Module, stacked: dict[nn.Module, StackedProjection]) -> None:
        self.model, self.stacked = model, stacked
        self.on = False

    @functools.cached_property
    def layers(self) -> list[Mergeable]:
        return list(mergeable(self.model, self.stacked))

    @property
    def bytes(self) -> int:
        """Memory that they take, or would take."""
        return sum(MergedBank.bytes_of(weight, bank) for _, weight, bank in self.layers)

    def switch(self, on: bool) -> None:
        """Make them, or let them go."""
        if on == self.on:
            return
        self.on = on
        for layer, weight, bank in self.layers:
            layer.merged = MergedBank(weight, bank) if on else None

    def renew(self) -> None:
        """Make those anew whose adapters have changed."""
        for layer, _, _ in self.layers if self.on else ():
            assert layer.merged is not None
            layer.merged.renew()


def problems(model: nn.Module, stacked: dict[nn.Module, StackedProjection]) -> Iterator[Problem]:
    """The linear problems that ran last, one per launch, as the kernels' cost model takes them."""
    ran = [f for _, m in outline(model) if isinstance(f := _forward_of(m), MultiLoraLinear) and f.seen is not None]
    for bank, seen, bias in (
        *((f.bank, f.seen, f.base.bias) for f in ran),
        *((projection.bank, projection.seen, projection.bias) for projection in stacked.values()),
    ):
        if bank is not None and seen is not None:
            (slots, outer, rank), inner, parts = bank.b.shape, bank.a.shape[2], bank.scales.shape[1]
            yield Problem(*seen, inner, outer, rank, parts, slots, bank.a.dtype, bias is not None)


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """What runs inside leaves no trace in `problems`."""
    seen = {forward: forward.seen for _, m in outline(model) if (forward := _forward_of(m)) is not None}
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
        forward = _forward_of(module)
        if forward is not None and forward.bank is not None:
            parts = name.split(".")
            found |= {modules[".".join(parts[:i])] for i in range(len(parts) + 1)}
    return found


def _forward_of(layer: nn.Module | None) -> _MultiLora | None:
    forward = None if layer is None else layer.__dict__.get("forward")
    return forward if isinstance(forward, _MultiLora) else None


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward: no hook of offload, layerwise casting or a user."""
    return "forward" not in module.__dict__ and not _hooks(module)


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def untouched(model: nn.Module) -> bool:
    """Whether all modules in `model` are unhooked but for our own forwards."""
    return all(
        ((_forward_of(module) is not None or is_transformed(module)) and not _hooks(module)) or unhooked(module)
        for module in model.modules()
        if module is not model
    )


def _computes_plainly(base: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a base layer is nothing but its weight: not quantised, nothing around it."""
    return type(base) is kind and unhooked(base)


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
