"""q, k and v of one x as one launch: copies of their weights and adapters, one below the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmlora.batch.running import Running
from cmlora.lora.bank import LayerBank, outline
from cmlora.lora.layers import MultiLoraLinear, forward_of
from cmlora.lora.plain import computes_plainly, hooked
from cmlora_kernels import merged_linear, multi_lora_linear
from cmlora_kernels.cpu_linear import linear
from cmlora_kernels.tiles import Problem

Copies = list[tuple[Tensor, Tensor]]
"""Where, and what of."""


class StackedProjection:
    """q, k and v of one x in one launch: their weights one below the other, an adapter per row."""

    def __init__(self, forwards: Sequence[MultiLoraLinear], running: Running, backend: str) -> None:
        self.forwards = forwards
        self.bases = [forward.base for forward in forwards]
        self.banks = [forward.bank for forward in forwards]
        with torch.inference_mode(False):  # written to in later runs, which need not be in that mode
            self.weight = torch.cat([base.weight.detach() for base in self.bases])
            biases = [base.bias.detach() for base in self.bases if base.bias is not None]
            self.bias = torch.cat(biases) if biases else None
            self.bank = _stack_parts(self.banks)
        self.running = running
        self.backend: Any = backend
        self.seen: tuple[int, int] | None = None
        self.merged: Tensor | None = None  # as a layer's own
        self.whole: Tensor | None = None

    def holds(self) -> bool:
        """Whether the layers still are what this computes; a hook may have come since."""
        return all(
            forward_of(forward.layer) is forward and not hooked(forward.layer) and computes_plainly(base, nn.Linear)
            for forward, base in zip(self.forwards, self.bases, strict=True)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, tokens, in] -> [rows, tokens, 3 * out]."""
        self.seen = (x.shape[0], x.shape[1])
        bank, slots = self.bank, self.running.slots(x.shape[0])
        weights = self.running.weights(x.shape[0], x.shape[1], placeless=False)
        if self.whole is not None and weights is None:
            return linear(x, self.whole, self.bias)
        if self.merged is not None:
            return merged_linear(x, self.merged, self.bias, slots, backend=self.backend)
        return multi_lora_linear(
            x,
            self.weight,
            self.bias,
            slots,
            bank.a,
            bank.b,
            bank.scales,
            backend=self.backend,
            token_weights=weights,
            groups=None if weights is None else bank.masked,
        )

    def copies(self) -> tuple[Copies, Copies]:
        """Of the base weights, and of the layers' banks; what a layer lacks stays zero."""
        parts = len(self.banks)
        bases = list(zip(self.weight.chunk(parts), [base.weight.detach() for base in self.bases], strict=True))
        if self.bias is not None:
            bases += zip(self.bias.chunk(parts), [base.bias.detach() for base in self.bases], strict=True)
        banks = []
        for part, bank in enumerate(self.banks):
            if bank is not None:
                banks.append((self.bank.a.chunk(parts, 1)[part][:, : bank.a.shape[1]], bank.a))
                banks.append((self.bank.b.chunk(parts, 1)[part][:, :, : bank.b.shape[2]], bank.b))
                banks.append((self.bank.scales[:, part], bank.scales[:, 0]))
        return bases, banks

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        tensors = (self.weight, self.bias, self.bank.a, self.bank.b, self.bank.scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def fill_stacked(projections: Iterable[StackedProjection]) -> None:
    """Copy the layers' weights and banks as they are now, whatever wrote them."""
    given = [projection.copies() for projection in projections]
    for copies in ([c for bases, _ in given for c in bases], [c for _, banks in given for c in banks]):
        if copies:
            torch._foreach_copy_([to for to, _ in copies], [of for _, of in copies])


def _stack_parts(banks: Sequence[LayerBank | None]) -> LayerBank:
    """Zeros for equally wide layers as one with a part per layer."""
    present = next(bank for bank in banks if bank is not None)
    rank = max(bank.a.shape[1] for bank in banks if bank is not None)
    slots, out, width = present.b.shape[0], present.b.shape[1], present.a.shape[2]
    a = present.a.new_zeros(slots, len(banks) * rank, width)
    b = present.b.new_zeros(slots, len(banks) * out, rank)
    groups = present.groups.new_full((slots, len(banks) * rank), -1)
    for part, bank in enumerate(banks):
        if bank is not None:
            groups[:, part * rank : part * rank + bank.groups.shape[1]] = bank.groups
    return LayerBank(a, b, present.scales.new_zeros(slots, len(banks)), groups, _stack_masked(banks, groups))


def _stack_masked(banks: Sequence[LayerBank | None], groups: Tensor) -> Tensor | None:
    """Which mask multiplies a column; laid out as `groups`."""
    masked = None
    rank = groups.shape[1] // len(banks)
    for part, bank in enumerate(banks):
        if bank is not None and bank.masked is not None:
            if masked is None:
                masked = torch.full(groups.shape, -1, dtype=torch.int32, device=bank.masked.device)
            masked[:, part * rank : part * rank + bank.masked.shape[1]] = bank.masked
    return masked


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
        alike = plain and len({(base.weight.shape, base.weight.dtype, base.bias is None) for base in bases}) == 1
        if alike and any(forward.bank is not None for forward in forwards):
            stacked[module] = StackedProjection(forwards, running, backend)
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
