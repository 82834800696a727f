"""q, k and v of one x as one launch: copies of their weights and adapters, one below the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmlora.batch.rows import Running
from cmlora.lora.bank import LayerBank, outline
from cmlora.lora.layers import MultiLoraLinear, computes_plainly, forward_of, hooked
from cmlora_kernels import merged_linear, multi_lora_linear
from cmlora_kernels.tiles import Problem


class StackedProjection:
    """q, k and v of one x in one launch: their weights one below the other, an adapter per row."""

    def __init__(self, bases: Sequence[Any], banks: Sequence[LayerBank | None], running: Running, backend: str) -> None:
        self.weight = torch.cat([base.weight.detach() for base in bases])
        self.bias = None if bases[0].bias is None else torch.cat([base.bias.detach() for base in bases])
        self.banks = banks
        self.bank = _stack_parts(banks)
        self.running = running
        self.backend: Any = backend
        self.seen: tuple[int, int] | None = None
        self.merged: Tensor | None = None  # a weight per adapter, where `merged.Merging` is on

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, tokens, in] -> [rows, tokens, 3 * out]."""
        self.seen = (x.shape[0], x.shape[1])
        bank, slots = self.bank, self.running.slots(x.shape[0])
        if self.merged is not None:
            return merged_linear(x, self.merged, self.bias, slots, backend=self.backend)
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


def stack_projections(model: nn.Module, running: Running, backend: str) -> dict[nn.Module, StackedProjection]:
    """For every attention whose q, k and v are plain linear layers of one width, at least one with an adapter."""
    stacked = {}
    for _, module in outline(model):
        layers = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
        forwards = [f for f in map(forward_of, layers) if isinstance(f, MultiLoraLinear)]
        if len(forwards) < 3 or any(hooked(f.layer) for f in forwards):
            continue
        bases = [forward.base for forward in forwards]
        plain = all(computes_plainly(base, nn.Linear) for base in bases)
        alike = len({(base.weight.shape, base.weight.dtype, base.bias is None) for base in bases}) == 1
        banks = [forward.bank for forward in forwards]
        if plain and alike and any(bank is not None for bank in banks):
            stacked[module] = StackedProjection(bases, banks, running, backend)
    return stacked


def problems(
    model: nn.Module, stacked: Mapping[nn.Module, StackedProjection]
) -> Iterator[tuple[MultiLoraLinear | StackedProjection, Problem]]:
    """The layers that ran last and their linear problems, one per launch, as the kernels' cost model takes them."""
    ran = [f for _, m in outline(model) if isinstance(f := forward_of(m), MultiLoraLinear) and f.seen is not None]
    layers: list[MultiLoraLinear | StackedProjection] = [*ran, *stacked.values()]
    for layer in layers:
        bank, seen = layer.bank, layer.seen
        if bank is not None and seen is not None:
            bias = layer.base.bias if isinstance(layer, MultiLoraLinear) else layer.bias
            (slots, outer, rank), inner, parts = bank.b.shape, bank.a.shape[2], bank.scales.shape[1]
            yield layer, Problem(*seen, inner, outer, rank, parts, slots, bank.a.dtype, bias is not None)
