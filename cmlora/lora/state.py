"""What PEFT's layers are set to, as values that can be compared; no tensor is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from cmlora.batch.identity import identity, memory, version
from cmlora.lora.bank import tuner_layers
from cmlora.lora.check import own_forward
from cmlora.lora.plain import torchs_own


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """What the bank's shape depends on: layers, adapters, ranks, base weights, switches. Reads no tensor."""
    state: list[object] = [torchs_own()]
    for name, layer in tuner_layers(model):
        switches = (tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters))
        base: Any = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        held = memory(weight) if isinstance(weight, Tensor) else None
        state.append((name, id(layer), id(base), type(base), own_forward(layer), held, *switches))
        if isinstance(layer, LoraLayer):
            state += _adapters(layer)
    return tuple(state)


def _adapters(layer: Any) -> Iterator[object]:
    """What of a layer's adapters decides whether and how they are stacked; past torch's own look-ups, for speed."""
    modules = layer._modules
    drops = modules["lora_dropout"]._modules
    for name, down in modules["lora_A"]._modules.items():
        drop = drops[name]
        yield name, type(drop), drop.training and drop.__dict__.get("p", 0) > 0, _touched(drop.__dict__)
        for part in (down, modules["lora_B"]._modules[name]):
            given, weight = part._parameters, part._parameters.get("weight")
            yield type(part), _touched(part.__dict__), given.get("bias") is None
            yield None if weight is None else (type(weight), weight.shape, weight.dtype, weight.device)


def _touched(state: dict[str, Any]) -> bool:
    """Whether something lies around a module: `plain.unhooked` asks the same of one, and looks closer."""
    return bool(
        state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state or "_conv_forward" in state
    )


class Switches:
    """What `pipe.set_adapters`, `disable_lora` and their like set, and weights that are written to or exchanged, to be
    compared in every step of a run. Writing through `.data` leaves no trace, and is seen by the next run.

    Args:
        model: with PEFT's layers, which are looked for once; ones that come with another adapter change the state, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        layers = [layer for _, layer in tuner_layers(model)]
        self.layers = [layer.__dict__ for layer in layers]
        parts = ("lora_A", "lora_B")
        ups_and_downs = [part for layer in layers for name in parts for part in getattr(layer, name, {}).values()]
        bases: list[Any] = [layer.get_base_layer() for layer in layers]
        self.parameters = [module._parameters for module in (*bases, *ups_and_downs)]
        self.seen: list[Tensor] = []  # held, so that no other tensor gets the id of one of them

    def now(self) -> list[object]:
        """Equal as long as nothing was switched or written: active adapters, scalings, disabled and fused ones, by
        layer, and which weights there are in which version."""
        state: list[object] = [*getattr(self.model, "peft_config", ())]
        for layer in self.layers:
            active = layer.get("_active_adapter")
            state.append(active if isinstance(active, str) else tuple(active or ()))
            state.append(layer.get("_disable_adapters"))
            state.append(tuple(layer.get("merged_adapters", ())))
            for name, scaling in layer.get("scaling", {}).items():
                state.append(name)
                state.append(identity(scaling) if isinstance(scaling, Tensor) else scaling)
        weights = [weight for given in self.parameters if (weight := given.get("weight")) is not None]
        state += map(id, weights)
        state += map(version, weights)
        self.seen = weights
        return state
