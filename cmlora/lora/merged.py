"""A weight per adapter, W + s B A, in the place of low-rank work in every step: of all linear layers, or of none."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cmlora.lora.bank import LayerBank, outline
from cmlora.lora.layers import MultiLoraLinear, forward_of
from cmlora.lora.stacked import StackedProjection
from cmlora_kernels import merge_weights


class MergedBank:
    """W + s B A of every adapter of a layer, and W: a linear layer then picks its weight by slot.

    Args:
        weight: [out, in] of the base layer.
        bank: of its adapters.
    """

    def __init__(self, weight: Tensor, bank: LayerBank) -> None:
        self.weight, self.bank = weight, bank
        self._of: list[Tensor] = []  # what they were made of
        with torch.inference_mode(False):  # written to in later runs, which need not be in that mode
            self.weights = merge_weights(weight.detach(), bank.a, bank.b, bank.scales)
            self._keep()

    def renew(self) -> None:
        """Merge again where a value has changed since: `.data` and PEFT's hot swap leave no trace but the values.

        On the CPU they are compared, W with the one that ends the bank; elsewhere that would wait for the device, and
        merging anew does not.
        """
        of = (self.bank.a, self.bank.b, self.bank.scales)
        if self._of and torch.equal(self.weights[-1], self.weight) and all(map(torch.equal, of, self._of)):
            return
        self.weights.copy_(merge_weights(self.weight.detach(), *of))
        self._keep()

    def _keep(self) -> None:
        if self.weight.device.type == "cpu":
            self._of = [t.clone() for t in (self.bank.a, self.bank.b, self.bank.scales)]

    @staticmethod
    def bytes_of(weight: Tensor, bank: LayerBank) -> int:
        """Memory that one takes."""
        copies = (bank.a, bank.b, bank.scales) if weight.device.type == "cpu" else ()
        return (bank.a.shape[0] + 1) * weight.nbytes + sum(t.nbytes for t in copies)


Mergeable = tuple[MultiLoraLinear | StackedProjection, Tensor, LayerBank]
"""A layer whose weights can be merged, its base weight and its adapters."""


def mergeable(model: nn.Module, stacked: Mapping[nn.Module, StackedProjection]) -> Iterator[Mergeable]:
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
        forward = forward_of(module)
        if (
            isinstance(forward, MultiLoraLinear)
            and forward.bank is not None
            and module not in passed_by
            and forward.plain(forward.bank)
        ):
            yield forward, forward.base.weight, forward.bank


class Merging:
    """The merged weights of a model's linear layers: all of them there, or none.

    Args:
        model: with our forwards on its layers.
        stacked: the copies of q, k and v in force.
    """

    def __init__(self, model: nn.Module, stacked: Mapping[nn.Module, StackedProjection]) -> None:
        self.model, self.stacked = model, stacked
        self.banks: list[MergedBank] = []  # of the layers, in their order; none while they are off

    @property
    def on(self) -> bool:
        """Whether they are there."""
        return bool(self.banks)

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
        self.banks = [MergedBank(weight, bank) for _, weight, bank in self.layers] if on else []
        for i, (layer, _, _) in enumerate(self.layers):
            layer.merged = self.banks[i].weights if on else None

    def renew(self) -> None:
        """Make those anew whose weights or adapters have changed."""
        for bank in self.banks:
            bank.renew()
