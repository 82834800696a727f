"""Which layers of PEFT's cannot run as rows of a batch, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cmlora.errors import AdapterError
from cmlora.lora.plain import FLOATS, classes_own, origin, unhooked, weights_alone

KEEPS = "method='merge' without `adapters` draws it as the plain pipeline does"
OURS = "cmlora"
QUANTISING = "peft.tuners.lora.bnb"
"""Where PEFT's layers on bitsandbytes' linear ones are: the same sum, of classes of their own."""
CASTING = "peft_autocast_disable"
"""diffusers' hook on a LoRA layer whose base is cast: x keeps its dtype, which it does with us, too."""


def check(name: str, layer: BaseTunerLayer, names: Sequence[str]) -> None:
    """Raise an AdapterError unless the named adapters of a layer can each have a slot."""
    fused = [n for n in layer.merged_adapters if holds(layer, n)]  # one that was deleted is part of the base by now
    if fused:
        raise AdapterError(f"{name}: LoRA {', '.join(fused)} is fused; call pipe.unfuse_lora() first, or {KEEPS}")
    if names and layer.disable_adapters:
        raise AdapterError(f"{name}: adapters are disabled; call pipe.enable_lora() first, or use method='no_lora'")
    problem = _problem(layer, names)
    if problem is not None:
        raise AdapterError(f"{name}: {problem}")


def left_to_peft(name: str, layer: BaseTunerLayer) -> bool:
    """Whether only PEFT's own forward gives what the layer as it stands computes."""
    _check_offload(name, layer)
    if own_forward(layer) or not isinstance(layer, LoraLayer) or isinstance(layer.base_layer, BaseTunerLayer):
        return True
    if layer.disable_adapters:
        return bool(layer.merged)  # PEFT unfuses it in passing
    if layer.merged:
        return False
    for n in layer.active_adapters:
        if _drops(layer, n):  # it would draw other numbers than in the plain pipeline: what rows share runs once
            raise AdapterError(f"{name}: {_dropping(n)}")
    return _problem(layer, layer.active_adapters) is not None


def own_forward(layer: nn.Module) -> bool:
    """Whether a layer has a forward that is neither its class's nor ours."""
    state = layer.__dict__
    if classes_own(layer) or type(state["forward"]).__module__.partition(".")[0] == OURS:
        return False
    registry = state.get("_diffusers_hook")
    return registry is None or "_hf_hook" in state or [*registry.hooks] != [CASTING] or not _wraps_peft(registry)


def _wraps_peft(registry: Any) -> bool:
    """Whether what diffusers' hook wraps is PEFT's forward, and not ours."""
    return origin(registry.hooks[CASTING].fn_ref.original_forward).startswith("peft.")


def _problem(layer: BaseTunerLayer, names: Sequence[str]) -> str | None:
    """Why some adapters of a layer cannot be batched; None: they can."""
    if not isinstance(layer, LoraLayer):
        for n in dict.fromkeys((*names, *layer.active_adapters)):
            if holds(layer, n):
                return (
                    f"adapter {n!r} is a {type(layer).__name__}, no LoRA; only LoRA and LoCon can be composed: "
                    f"{_remove(n)}"
                )
        return None
    here = [n for n in names if holds(layer, n)]
    if not here:
        return None
    if not isinstance(layer, PeftLinear | PeftConv2d) and type(layer).__module__ != QUANTISING:
        return (
            f"LoRA on {type(layer).__name__} is not supported, only on linear and 2-D convolution: {_remove(here[0])}"
        )
    if isinstance(layer.base_layer, BaseTunerLayer):
        kind = type(layer.base_layer).__name__
        return f"adapter {here[0]!r} lies around another one, a {kind}, which cannot be batched: {_remove(here[0])}"
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d) and base.groups != 1:
        return f"LoRA on a convolution with groups={base.groups} is not supported: {_remove(here[0])}"
    if own_forward(layer):
        return (
            f"the layer has a forward of its own, of {origin(layer.forward)}, which knows nothing of an adapter per "
            f"row; take it off, or {KEEPS}"
        )
    return next((problem for n in here if (problem := _adapter(layer, n)) is not None), None)


def _adapter(layer: Any, n: str) -> str | None:
    """Why one adapter of a LoRA layer cannot be batched."""
    if layer.use_dora.get(n) or n in layer.lora_variant:
        return f"adapter {n!r} is a DoRA or another LoRA variant, which cannot be batched: {_remove(n)}"
    down, up = layer.lora_A[n], layer.lora_B[n]
    _check_offload(n, layer)
    if layer.lora_bias.get(n) or up.bias is not None or down.bias is not None:
        return f"adapter {n!r} has a LoRA bias, which cannot be batched: {_remove(n)}"
    if down.weight.dtype not in FLOATS or up.weight.dtype not in FLOATS:
        return (
            f"adapter {n!r} is stored as {down.weight.dtype}, cast layer by layer, which cannot be batched: load it "
            "before pipe.unet.enable_layerwise_casting(...), with 'lora' in skip_modules_pattern where that is given, "
            f"or {KEEPS}"
        )
    kind = nn.Conv2d if isinstance(layer, PeftConv2d) else nn.Linear
    if _drops(layer, n):
        return _dropping(n)
    if not weights_alone(down, kind) or not weights_alone(up, kind) or not unhooked(layer.lora_dropout[n]):
        return (
            f"adapter {n!r} has hooks, a forward or weights of its own in lora_A, lora_B or lora_dropout, which a "
            f"batch passes by; take them off, or {KEEPS}"
        )
    return None


def _drops(layer: Any, n: str) -> bool:
    """Whether an adapter's dropout is in force."""
    if n not in layer.lora_dropout:
        return False
    dropout = layer.lora_dropout[n]
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def _dropping(n: str) -> str:
    return f"adapter {n!r} has a dropout in force, which draws each row differently: call pipe.unet.eval()"


def _check_offload(name: str, layer: BaseTunerLayer) -> None:
    """Offload that leaves no weights behind between calls is an error whatever is asked for."""
    for down in getattr(layer, "lora_A", {}).values():
        if hasattr(down, "_hf_hook") and down.weight.is_meta:
            raise AdapterError(
                f"{name}: weights that are offloaded layer by layer (on the meta device between calls) cannot be "
                "stacked; use pipe.enable_model_cpu_offload() instead of enable_sequential_cpu_offload()"
            )


def holds(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(layer, attribute, ()) for attribute in layer.adapter_layer_names)


def _remove(adapter: str) -> str:
    return f"remove it with pipe.delete_adapters({adapter!r}), or {KEEPS}"
