"""PEFT's layers of a model -> AdapterBank: stacked A, B and scales per layer, a recipe per slot."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cmlora.config import Recipe
from cmlora.errors import AdapterError
from cmlora.lora.check import check, left_to_peft
from cmlora.lora.plain import FLOATS, PLAIN


def called(model: nn.Module) -> str:
    """What users call a model."""
    kind = type(model).__name__
    return "UNet" if "UNet" in kind else "transformer" if "Transformer" in kind else kind


def _rekey(model: nn.Module) -> str:
    """What to do about a file that matched nothing."""
    part = called(model).lower()
    return (
        f"the file's keys did not match this {called(model)}. Keys must read '{part}.<layer>.lora_A.weight' or be in "
        "kohya's format; to add a missing prefix: state = safetensors.torch.load_file(path); "
        f"pipe.load_lora_weights({{'{part}.' + k: v for k, v in state.items()}}, adapter_name=...). "
        "A LoRA made for another base model cannot be used"
    )


@dataclass(frozen=True)
class LayerBank:
    """One layer's adapters, stacked; a slot holds those of its recipe behind each other in the rank.

    Attributes:
        a: [slots, rank, in] for a linear layer, [slots, rank, in, kh, kw] for a convolution; zero padded to one rank.
        b: [slots, out, rank]; weights and scaling are in it where a slot has several adapters.
        scales: [slots, 1] float32: weight times scaling of a slot's only adapter, one for several; zero where no
            adapter of the slot touches the layer.
        groups: [slots, rank] int32 on the host: whose column that is, as a position in `AdapterBank.names`; -1 padding.
        masked: [slots, rank] int32 beside a: which mask multiplies the column, -1 none; None: there are no masks.
    """

    a: Tensor
    b: Tensor
    scales: Tensor
    groups: Tensor
    masked: Tensor | None = None


class Place(NamedTuple):
    """Where one adapter of one slot of one layer lies in the layer's bank; views of it.

    `weight` is the recipe's; `folded`: it and the scaling go into b, else into scale.
    """

    layer: LoraLayer
    name: str
    weight: float
    folded: bool
    a: Tensor
    b: Tensor
    scale: Tensor


@dataclass
class AdapterBank:
    """All layers of a model that carry a LoRA, and what the slots of a batch stand for.

    Attributes:
        recipes: of the slots, in order.
        layers: every LoRA layer that we run, and its stacked adapters; None where no recipe touches it: the base layer.
        kept: layers that go on with their own forward (`build_bank`, lenient).
        places: of all adapters in all layers.
        scale: factor on all adapters, as `fill_bank` got it last.
    """

    recipes: tuple[Recipe, ...]
    layers: tuple[tuple[LoraLayer, LayerBank | None], ...]
    kept: tuple[BaseTunerLayer, ...]
    places: tuple[Place, ...]
    scale: float = field(default=1.0, compare=False)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order in which the recipes name them."""
        return names_of(self.recipes)

    @property
    def bytes(self) -> int:
        """Memory of the stacked tensors."""
        banks = (bank for _, bank in self.layers if bank is not None)
        return sum(t.numel() * t.element_size() for bank in banks for t in (bank.a, bank.b, bank.scales))


def names_of(recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """All adapters of some recipes, each once, in order."""
    return tuple(dict.fromkeys(name for recipe in recipes for name, _ in recipe))


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


def elsewhere(pipe: Any, attribute: str) -> tuple[str, ...]:
    """Adapters that the pipeline knows outside the model that it keeps as `attribute`."""
    if not hasattr(pipe, "get_list_adapters"):
        return ()
    return tuple(name for part, names in pipe.get_list_adapters().items() if part != attribute for name in names)


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
        model: the UNet or transformer.
        wanted: names, or None.
        several: whether the method composes several adapters.
        elsewhere: adapters known to the pipeline outside the model, for a better message.
        lenient: none at all is no error: the base model.

    Raises:
        AdapterError: none at all, or one that changed no layer of this model.
    """
    loaded = loaded_adapters(model)
    names = active_adapters(model) if wanted is None else tuple(wanted)
    if wanted is None and several and names == loaded[-1:]:
        names = loaded
    for name in names:
        if name not in loaded:
            raise AdapterError(_missing(model, name, loaded, elsewhere))
    if lenient and wanted is None:
        return names
    if not names and loaded:
        raise AdapterError(f"no adapter is active; choose among {', '.join(loaded)} with pipe.set_adapters([...])")
    if not names:
        raise AdapterError(
            f"the {called(model)} carries no LoRA layer: load one with pipe.load_lora_weights(..., adapter_name=...). "
            f"If you did, {_rekey(model)}. One that was fused and unloaded is part of the base model by now: to "
            "compose it, load it again into a fresh pipeline"
        )
    return names


def _missing(model: nn.Module, name: str, loaded: Sequence[str], elsewhere: Sequence[str]) -> str:
    known = f"the {called(model)}'s adapters are {', '.join(loaded) or 'none'}"
    if name in elsewhere:
        return f"adapter {name!r} changes only the text encoder, which needs no composition; {known}"
    how = f"it was not loaded or deleted, or {_rekey(model)}"
    return f"adapter {name!r} changed no layer of the {called(model)} ({known}): {how}"


def build_bank(
    model: nn.Module, recipes: Sequence[Recipe], *, device: torch.device, lenient: bool = False
) -> AdapterBank:
    """Room for the adapters of every layer; `fill_bank` puts them in.

    Args:
        model: with PEFT layers.
        recipes: what the slots stand for, in order.
        device: where the stacked tensors live.
        lenient: what the model as it stands would compute, for a single recipe of its active adapters: in every layer
            only those of them act that the layer itself has active, none where it is disabled or fused, and a layer
            that we cannot reproduce keeps its own forward. No state of an adapter is an error then.

    Raises:
        AdapterError: a fused, disabled or unsupported adapter; it names the layer and what to do.
    """
    names = names_of(recipes)
    layers: list[tuple[LoraLayer, LayerBank | None]] = []
    kept: list[BaseTunerLayer] = []
    places: list[Place] = []
    with torch.inference_mode(False):  # written to in later runs, which need not be in that mode
        for name, layer in tuner_layers(model):
            if lenient and left_to_peft(name, layer):
                kept.append(layer)
                continue
            if not lenient:
                check(name, layer, names)
            if isinstance(layer, LoraLayer):
                here = [_here(layer, recipe, lenient) for recipe in recipes]
                bank = _stack(layer, here, device) if any(here) else None
                layers.append((layer, bank))
                places += [] if bank is None else _fit(layer, here, bank, names)
    return AdapterBank(tuple(recipes), tuple(layers), tuple(kept), tuple(places))


def with_masks(bank: AdapterBank, names: Sequence[str]) -> AdapterBank:
    """The same bank, its columns multiplied by masks: mask i is that of names[i]; other adapters have none."""
    table = torch.tensor([*(names.index(name) if name in names else -1 for name in bank.names), -1], dtype=torch.int32)
    layers = []
    for layer, one in bank.layers:
        if one is not None:
            one = replace(one, masked=table[one.groups.long()].to(one.a.device))
        layers.append((layer, one))
    return replace(bank, layers=tuple(layers))


def _here(layer: LoraLayer, recipe: Recipe, lenient: bool) -> Recipe:
    """What of a recipe acts in a layer."""
    if not lenient:
        return tuple((name, weight) for name, weight in recipe if name in layer.lora_A)
    if layer.merged or layer.disable_adapters:
        return ()
    weights = dict(recipe)
    return tuple((name, weights[name]) for name in layer.active_adapters if name in weights and name in layer.lora_A)


def _stack(layer: LoraLayer, here: Sequence[Recipe], device: torch.device) -> LayerBank:
    """Zeros of the right shape for one layer."""
    down = {name: layer.lora_A[name].weight for recipe in here for name, _ in recipe}
    base = getattr(layer.get_base_layer(), "weight", None)
    if base is not None and type(base) in PLAIN and base.dtype in FLOATS:
        dtype = base.dtype
    else:  # a quantised base: its weight's dtype tells nothing
        dtype = functools.reduce(torch.promote_types, [weight.dtype for weight in down.values()])
    slots, rank = len(here), max(sum(down[name].shape[0] for name, _ in recipe) for recipe in here)
    like = next(iter(down.values()))
    channels, kernel = like.shape[1], like.shape[2:]
    # a convolution's channels are innermost in memory: whole 16-byte loads for the kernel that reads them
    a = torch.zeros(slots, rank, *kernel, channels, dtype=dtype, device=device)
    a = a.permute(0, 1, 4, 2, 3) if kernel else a
    up = layer.lora_B[next(iter(down))].weight
    b = torch.zeros(slots, up.shape[0], rank, dtype=dtype, device=device)
    groups = torch.full((slots, rank), -1, dtype=torch.int32)
    return LayerBank(a, b, torch.zeros(slots, 1, device=device), groups)


def _fit(layer: LoraLayer, here: Sequence[Recipe], bank: LayerBank, names: Sequence[str]) -> Iterator[Place]:
    """The adapters of one layer, slot by slot, behind each other in the rank."""
    for slot, recipe in enumerate(here):
        first = 0
        for name, weight in recipe:
            ranks = slice(first, first + layer.lora_A[name].weight.shape[0])
            bank.groups[slot, ranks] = names.index(name)
            place = (bank.a[slot, ranks], bank.b[slot, :, ranks], bank.scales[slot])
            yield Place(layer, name, weight, len(recipe) > 1, *place)
            first = ranks.stop


def fill_bank(bank: AdapterBank, scale: float) -> None:
    """Copy PEFT's weights into the bank as they are now, whatever wrote them.

    Args:
        bank: made for these layers.
        scale: factor on all adapters (`cross_attention_kwargs={"scale": ...}`).
    """
    bank.scale = scale
    places = bank.places
    if not places:
        return
    factors = [float(place.layer.scaling[place.name]) * place.weight * scale for place in places]
    down = [place.layer.lora_A[place.name].weight.detach() for place in places]
    up = [place.layer.lora_B[place.name].weight.detach().flatten(1) for place in places]
    folded = [i for i, place in enumerate(places) if place.folded]
    if folded:
        scaled = torch._foreach_mul([up[i] for i in folded], [factors[i] for i in folded])
        for i, weight in zip(folded, scaled, strict=True):
            up[i], factors[i] = weight, 1.0
    constants = {factor: places[0].scale.new_full((1,), factor) for factor in set(factors)}
    torch._foreach_copy_([place.scale for place in places], [constants[factor] for factor in factors])
    torch._foreach_copy_([place.a for place in places], down)
    torch._foreach_copy_([place.b for place in places], up)
