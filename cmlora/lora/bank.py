"""PEFT's layers of a model -> AdapterBank: stacked A, B and scales per layer. The only room that knows PEFT."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cmlora.errors import AdapterError

REKEY = (
    "the file's keys did not match this UNet. Keys must read 'unet.<layer>.lora_A.weight' or be in kohya's format; "
    "to add a missing prefix: state = safetensors.torch.load_file(path); "
    "pipe.load_lora_weights({'unet.' + k: v for k, v in state.items()}, adapter_name=...). "
    "A LoRA made for another base model (SD2, SDXL) cannot be used"
)


@dataclass(frozen=True)
class LayerBank:
    """One layer's adapters, stacked.

    Attributes:
        a: [slots, rank, in] for a linear layer, [slots, rank, in, kh, kw] for a convolution; zero padded to one rank.
        b: [slots, out, rank].
        scales: [slots, 1] float32; zero where an adapter does not touch the layer.
    """

    a: Tensor
    b: Tensor
    scales: Tensor


class Place(NamedTuple):
    """Where one adapter of one layer lies in the layer's bank; views of it."""

    layer: LoraLayer
    name: str
    a: Tensor
    b: Tensor
    scale: Tensor


@dataclass(frozen=True)
class AdapterBank:
    """All layers of a model that carry a LoRA of the named adapters.

    Attributes:
        names: adapters in the order of their slots.
        merged: whether they are one virtual adapter.
        layers: every LoRA layer of the model and its stacked adapters; None where none of the named ones touches it.
    """

    names: tuple[str, ...]
    merged: bool
    layers: tuple[tuple[LoraLayer, LayerBank | None], ...]

    @property
    def bytes(self) -> int:
        """Memory of the stacked tensors."""
        banks = (bank for _, bank in self.layers if bank is not None)
        return sum(t.numel() * t.element_size() for bank in banks for t in (bank.a, bank.b, bank.scales))

    @functools.cached_property
    def places(self) -> list[Place]:
        """Of all adapters in all layers; as one virtual adapter they lie behind each other in the rank."""
        places = []
        for layer, bank in self.layers:
            first = 0
            for slot, name in enumerate(self.names if bank is not None else ()):
                if bank is not None and name in layer.lora_A:
                    rank = layer.lora_A[name].weight.shape[0]
                    s, ranks = (0, slice(first, first + rank)) if self.merged else (slot, slice(rank))
                    places.append(Place(layer, name, bank.a[s, ranks], bank.b[s, :, ranks], bank.scales[s]))
                    first += rank
        return places


def outline(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model, nothing inside PEFT's layers: with many adapters those are most of all modules."""
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        yield name, module
        if not isinstance(module, BaseTunerLayer):
            prefix = f"{name}." if name else ""
            children = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
            waiting += reversed(children)


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Names and PEFT layers of a model, of whatever tuner."""
    for name, module in outline(model):
        if isinstance(module, BaseTunerLayer):
            yield name, module


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The LoRA layers of a model, in its order."""
    return [layer for _, layer in tuner_layers(model) if isinstance(layer, LoraLayer)]


def elsewhere(pipe: Any) -> tuple[str, ...]:
    """Adapters that the pipeline knows outside its UNet."""
    if not hasattr(pipe, "get_list_adapters"):
        return ()
    return tuple(name for part, names in pipe.get_list_adapters().items() if part != "unet" for name in names)


def loaded_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that changed at least one layer, in the order in which they were loaded."""
    present = {name for layer in lora_layers(model) for name in layer.lora_A}
    return tuple(name for name in getattr(model, "peft_config", {}) if name in present)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that pipe.set_adapters made active, in its order, if they changed a layer."""
    loaded = loaded_adapters(model)
    active = dict.fromkeys(name for layer in lora_layers(model) for name in layer.active_adapters)
    return tuple(name for name in active if name in loaded)


def choose_adapters(
    model: nn.Module,
    wanted: Sequence[str] | None,
    *,
    several: bool,
    elsewhere: Sequence[str] = (),
    lenient: bool = False,
) -> tuple[str, ...]:
    """The adapters that take part: those wanted, or the active ones.

    Loading several LoRAs one after the other leaves the last one alone active. Where the method composes several, that
    state means all of them; any other choice of `pipe.set_adapters` is taken as it is.

    Args:
        model: the UNet.
        wanted: names, or None.
        several: whether the method composes several adapters.
        elsewhere: adapters known to the pipeline outside the UNet, for a better message.

    Raises:
        AdapterError: none at all, or one that changed no layer of this model.
    """
    loaded = loaded_adapters(model)
    names = active_adapters(model) if wanted is None else tuple(wanted)
    if wanted is None and several and names == loaded[-1:]:
        names = loaded
    for name in names:
        if name not in loaded:
            raise AdapterError(_missing(name, loaded, elsewhere))
    if not names and lenient:
        return ()
    if not names and loaded:
        raise AdapterError(f"no adapter is active; choose among {', '.join(loaded)} with pipe.set_adapters([...])")
    if not names:
        raise AdapterError(
            "the UNet carries no LoRA layer: load one with pipe.load_lora_weights(..., adapter_name=...). "
            f"If you did, {REKEY}. Fused LoRAs must be unfused first: pipe.unfuse_lora()"
        )
    return names


def _missing(name: str, loaded: Sequence[str], elsewhere: Sequence[str]) -> str:
    known = f"the UNet's adapters are {', '.join(loaded) or 'none'}"
    if name in elsewhere:
        return f"adapter {name!r} changes only the text encoder, which needs no composition; {known}"
    return f"adapter {name!r} changed no layer of the UNet ({known}): it was not loaded or deleted, or {REKEY}"


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """What the bank's shape depends on: layers, adapters, ranks, base weights, switches. Reads no tensor."""
    state: list[object] = []
    for name, layer in tuner_layers(model):
        switches = (tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters))
        state.append((name, id(layer), *switches))
        if isinstance(layer, LoraLayer):
            base = getattr(layer.get_base_layer(), "weight", None)
            weights = [base, *(module.weight for module in layer.lora_A.values())]
            state.append(tuple(layer.lora_A))
            state += [None if w is None else (w.shape, w.dtype, w.device, w.data_ptr(), w._version) for w in weights]
    return tuple(state)


def build_bank(model: nn.Module, recipes: Any, *, device: torch.device, lenient: bool = False) -> AdapterBank:
    """Room for the named adapters of every layer; `fill_bank` puts them in.

    Args:
        model: the UNet with PEFT layers.
        names: adapters in the order of their slots.
        merged: one virtual adapter of concatenated ranks, weights folded in, instead of a slot per adapter.
        device: where the stacked tensors live.

    Raises:
        AdapterError: a fused, disabled or unsupported adapter; it names the layer.
    """
    names = tuple(dict.fromkeys(n for r in recipes for n, _ in r))
    merged = len(recipes) == 1
    layers: list[tuple[LoraLayer, LayerBank | None]] = []
    for name, layer in tuner_layers(model):
        here = [n for n in names if isinstance(layer, LoraLayer) and n in layer.lora_A]
        _check(name, layer, names, here)
        if isinstance(layer, LoraLayer):
            bank = _stack(layer, names, merged=merged, device=device) if here else None
            layers.append((layer, bank))
    return AdapterBank(tuple(names), merged, tuple(layers))


def _check(name: str, layer: BaseTunerLayer, names: Sequence[str], here: Sequence[str]) -> None:
    if layer.merged:
        raise AdapterError(f"{name}: LoRA {', '.join(layer.merged_adapters)} is fused; call pipe.unfuse_lora() first")
    if names and layer.disable_adapters:
        raise AdapterError(f"{name}: adapters are disabled; call pipe.enable_lora() first, or use method='no_lora'")
    if not isinstance(layer, LoraLayer):
        for n in dict.fromkeys((*names, *layer.active_adapters)):
            if any(n in getattr(layer, a, {}) for a in layer.adapter_layer_names):
                raise AdapterError(
                    f"{name}: adapter {n!r} is a {type(layer).__name__}, no LoRA; only LoRA and LoCon can be composed: "
                    f"remove it with pipe.delete_adapters({n!r})"
                )
        return
    for adapter in here:
        if layer.use_dora.get(adapter) or adapter in layer.lora_variant:
            raise AdapterError(
                f"{name}: adapter {adapter!r} is a DoRA or another LoRA variant, which cannot be batched"
            )
        down = layer.lora_A[adapter]
        if hasattr(down, "_hf_hook") and down.weight.is_meta:
            raise AdapterError(
                f"{name}: weights that are offloaded layer by layer (on the meta device between calls) cannot be "
                "stacked; use pipe.enable_model_cpu_offload() instead of enable_sequential_cpu_offload()"
            )
        if layer.lora_bias.get(adapter):
            raise AdapterError(f"{name}: adapter {adapter!r} has a LoRA bias, which cannot be batched")
    if here and not isinstance(layer, PeftLinear | PeftConv2d):
        raise AdapterError(
            f"{name}: LoRA on {type(layer).__name__} is not supported, only on linear and 2-D convolution"
        )
    base = layer.get_base_layer()
    if here and isinstance(base, nn.Conv2d) and (base.groups != 1 or base.padding_mode != "zeros"):
        raise AdapterError(
            f"{name}: LoRA on a convolution with groups or padding_mode={base.padding_mode!r} is not supported"
        )


def _stack(layer: LoraLayer, names: Sequence[str], *, merged: bool, device: torch.device) -> LayerBank:
    """Zeros of the right shape for one layer."""
    dtype = layer.get_base_layer().weight.dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):  # a quantised base
        dtype = next(iter(layer.lora_A.values())).weight.dtype
    present = [layer.lora_A[n].weight for n in names if n in layer.lora_A]
    ranks = [down.shape[0] for down in present]
    rank, slots = (sum(ranks), 1) if merged else (max(ranks), len(names))
    channels, kernel = present[0].shape[1], present[0].shape[2:]
    # a convolution's channels are innermost in memory: whole 16-byte loads for the kernel that reads them
    a = torch.zeros(slots, rank, *kernel, channels, dtype=dtype, device=device)
    a = a.permute(0, 1, 4, 2, 3) if kernel else a
    up = next(iter(layer.lora_B.values())).weight
    b = torch.zeros(slots, up.shape[0], rank, dtype=dtype, device=device)
    return LayerBank(a, b, torch.zeros(slots, 1, device=device))


def fill_bank(bank: AdapterBank, scale: float) -> None:
    """Copy PEFT's weights into the bank as they are now, whatever wrote them.

    Args:
        bank: made for these layers.
        scale: factor on all adapters (`cross_attention_kwargs={"scale": ...}`).
    """
    places = bank.places
    if not places:
        return
    factors = [float(place.layer.scaling[place.name]) * scale for place in places]
    down = [place.layer.lora_A[place.name].weight.detach() for place in places]
    up = [place.layer.lora_B[place.name].weight.detach().flatten(1) for place in places]
    if bank.merged:
        up = list(torch._foreach_mul(up, factors))
        factors = [1.0] * len(places)
    constants = {factor: places[0].scale.new_full((1,), factor) for factor in set(factors)}
    torch._foreach_copy_([place.scale for place in places], [constants[factor] for factor in factors])
    torch._foreach_copy_([place.a for place in places], down)
    torch._foreach_copy_([place.b for place in places], up)


def switches(model: nn.Module) -> tuple[object, ...]:
    return tuple(
        (
            tuple(layer.active_adapters),
            layer.disable_adapters,
            tuple(layer.scaling.values()),
            tuple(layer.merged_adapters),
        )
        for layer in lora_layers(model)
    )
