"""W + s B A in the place of low-rank work in every step, per adapter or one for all rows: of all layers, or none."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cmlora.lora.bank import LayerBank, outline
from cmlora.lora.layers import MultiLora, MultiLoraConv2d, MultiLoraLinear, forward_of
from cmlora.lora.stacked import StackedProjection
from cmlora_kernels import merge_weights, merged_weight


class MergedBank:
    """The merged weights of a layer, as its adapters and W are now.

    Args:
        weight: [out, in] of the base layer, or a convolution's.
        bank: of its adapters.
        alone: all rows have the bank's first slot: then its W + s B A is all that is kept, in the shape of `weight`.
            Else that of every slot and W, [slots + 1, out, in]: a linear layer picks its weight by slot.
    """

    def __init__(self, weight: Tensor, bank: LayerBank, *, alone: bool = False) -> None:
        self.weight, self.bank, self.alone = weight, bank, alone
        self._of: list[Tensor] = []  # what they were made of
        with torch.inference_mode(False):  # written to in later runs, which need not be in that mode
            self.weights = self._merged()
            self._keep()

    def _merged(self) -> Tensor:
        a, b, scales = self._adapters()
        if self.alone:
            return merged_weight(self.weight.detach(), a[0], b[0], scales[0])
        return merge_weights(self.weight.detach(), a, b, scales)

    def _adapters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.bank.a, self.bank.b, self.bank.scales

    def renew(self) -> None:
        """Merge again where a value has changed since: `.data` and PEFT's hot swap leave no trace but the values.

        On the CPU they are compared; elsewhere that would wait for the device, and merging anew does not.
        """
        now = (self.weight, *self._adapters())
        if self._of and all(map(torch.equal, now, self._of)):
            return
        self.weights.copy_(self._merged())  # where they lie, for steps that were captured
        self._keep()

    def _keep(self) -> None:
        if self.weight.device.type == "cpu":
            base = self.weight.detach().clone() if self.alone else self.weights[-1]
            self._of = [base, *(t.clone() for t in self._adapters())]

    @staticmethod
    def bytes_of(weight: Tensor, bank: LayerBank, *, alone: bool = False) -> int:
        """Memory that one takes."""
        compared = weight.device.type == "cpu"
        copies = (bank.a, bank.b, bank.scales) if compared else ()
        count = 1 + compared if alone else bank.a.shape[0] + 1
        return count * weight.nbytes + sum(t.nbytes for t in copies)


Mergeable = tuple[MultiLora | StackedProjection, Tensor, LayerBank]
"""A layer whose weights can be merged, its base weight and its adapters."""


def mergeable(
    model: nn.Module, stacked: Mapping[nn.Module, StackedProjection], *, convolutions: bool = False
) -> Iterator[Mergeable]:
    """The linear layers that run in every step, as they run: q, k and v of a self-attention as one where stacked.

    Keys and values of the prompt are not among them: they run once. `convolutions`: those, too.
    """
    kinds = (MultiLoraLinear, MultiLoraConv2d) if convolutions else (MultiLoraLinear,)
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
            isinstance(forward, kinds)
            and forward.bank is not None
            and module not in passed_by
            and forward.plain(forward.bank)
        ):
            yield forward, forward.base.weight, forward.bank


class Merging:
    """The merged weights of a model's layers: all of them there, or none.

    Args:
        model: with our forwards on its layers.
        stacked: the copies of q, k and v in force.
        alone: as for `MergedBank`. convolutions: merged, too; only where `alone`.
    """

    def __init__(
        self,
        model: nn.Module,
        stacked: Mapping[nn.Module, StackedProjection],
        *,
        alone: bool = False,
        convolutions: bool = False,
    ) -> None:
        self.model, self.stacked, self.alone, self.convolutions = model, stacked, alone, alone and convolutions
        self.on = False
        self.banks: list[MergedBank] = []  # of the layers, in their order

    @functools.cached_property
    def layers(self) -> list[Mergeable]:
        return list(mergeable(self.model, self.stacked, convolutions=self.convolutions))

    @property
    def bytes(self) -> int:
        """Memory that they take, or would take."""
        return sum(MergedBank.bytes_of(weight, bank, alone=self.alone) for _, weight, bank in self.layers)

    def switch(self, on: bool) -> None:
        """Make them, or let them go."""
        if on == self.on:
            return
        self.on = on
        self.banks = [MergedBank(weight, bank, alone=self.alone) for _, weight, bank in self.layers] if on else []
        for i, (layer, _, _) in enumerate(self.layers):
            weights = self.banks[i].weights if on else None
            if self.alone:
                layer.whole = weights
            else:
                layer.merged = weights

    def renew(self) -> None:
        """Make those anew whose weights or adapters have changed."""
        for bank in self.banks:
            bank.renew()
