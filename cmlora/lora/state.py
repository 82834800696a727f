"""What PEFT's layers are set to, as values that can be compared; no tensor is read."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from cmlora.batch.identity import identity, memory
from cmlora.lora.bank import tuner_layers
from cmlora.lora.check import own_forward
from cmlora.lora.plain import unhooked


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """What the bank's shape depends on: layers, adapters, ranks, base weights, switches. Reads no tensor."""
    state: list[object] = []
    for name, layer in tuner_layers(model):
        switches = (tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters))
        base: Any = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        held = memory(weight) if isinstance(weight, Tensor) else None
        state.append((name, id(layer), id(base), type(base), own_forward(layer), held, *switches))
        if isinstance(layer, LoraLayer):
            state += [_adapter(layer, adapter) for adapter in layer.lora_A]
    return tuple(state)


def _adapter(layer: Any, adapter: str) -> tuple[object, ...]:
    """What of one adapter of a layer decides whether and how it is stacked."""
    parts = (layer.lora_A[adapter], layer.lora_B[adapter])
    dropout = layer.lora_dropout[adapter]
    drops = type(dropout), dropout.training and getattr(dropout, "p", 0) > 0, unhooked(dropout)
    return (adapter, *drops, *(fact for part in parts for fact in _part(part)))


def _part(part: Any) -> tuple[object, ...]:
    weight = part.weight
    own = type(part), unhooked(part), "_conv_forward" in part.__dict__
    return (*own, type(weight), weight.shape, weight.dtype, weight.device, part.bias is None)


class Switches:
    """What `pipe.set_adapters`, `disable_lora` and their like set, to be compared in every step of a run.

    Args:
        model: with PEFT's layers, which are looked for once; ones that come with another adapter change the state, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = [layer.__dict__ for _, layer in tuner_layers(model)]

    def now(self) -> list[object]:
        """Equal as long as nothing was switched: active adapters, scalings, disabled and fused ones, by layer."""
        state: list[object] = [*getattr(self.model, "peft_config", ())]
        for layer in self.layers:
            active = layer.get("_active_adapter")
            state.append(active if isinstance(active, str) else tuple(active or ()))
            state.append(layer.get("_disable_adapters"))
            state.append(tuple(layer.get("merged_adapters", ())))
            for name, scaling in layer.get("scaling", {}).items():
                state.append(name)
                state.append(identity(scaling) if isinstance(scaling, Tensor) else scaling)
        return state
