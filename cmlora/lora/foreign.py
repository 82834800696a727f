"""Code inside a model that a batch of more rows may not suit: a user's own, and offload that moves weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cmlora.errors import UnsupportedModelError
from cmlora.lora.plain import classes_own, globally_hooked, origin

TRUSTED = frozenset({"torch", "diffusers", "peft", "transformers", "accelerate", "cmlora"})
"""Packages whose modules and hooks treat each row of a batch on its own."""
QUANTISED = frozenset({"bitsandbytes", "torchao", "optimum"})
"""Packages whose layers do so, too, but for `_of_weights`: linear layers on weights of fewer bits."""
PROCESSORS = "diffusers.models."
"""Where the processors of diffusers' models are; those of its pipelines mix images (text to video, editing)."""
OFFLOADS = ("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker")


def foreign(model: nn.Module) -> list[str]:
    """Code in a model that may look at other rows of its batch, each as "where: what".

    Hooks and forwards that are not of torch, diffusers, peft, transformers or accelerate, attention processors that are
    not of diffusers' models, subclasses of modules that were defined elsewhere, class methods that were replaced, and
    weights of 8 bits that are multiplied without the outliers of the batch. The model's own forward is not looked at.
    """
    found = ["all modules: a global forward hook"] if globally_hooked() else []
    kinds: dict[type[nn.Module], str | None] = {}
    suspects: list[tuple[nn.Module, list[str]]] = []
    for module in _walk(model):
        kind, state = type(module), module.__dict__
        if kind not in kinds:
            kinds[kind] = _of_class(kind)
        hooked = module is not model and (state["_forward_pre_hooks"] or state["_forward_hooks"])
        what = _of_hooks(state) if hooked else []  # hooks of the model itself see the pipeline's own batch
        if kinds[kind] is not None and module is not model:
            what.append(str(kinds[kind]))
        what += _of_weights(module)
        if "forward" in state and module is not model and not classes_own(module):
            what += _of_forward(state)
        processor = state.get("processor") or state["_modules"].get("processor")
        if processor is not None and not type(processor).__module__.startswith(PROCESSORS):
            what.append(f"attention processor {_kind(processor)}")
        if what:
            suspects.append((module, what))
    return found + _named(model, suspects)


def offloaded(model: nn.Module) -> list[str]:
    """Modules whose weights a hook moves while the model runs: diffusers' group offload, accelerate's device hooks.

    `pipe.enable_model_cpu_offload()`, which moves the model as a whole before it runs, is not among them.
    """
    suspects = []
    for module in _walk(model):
        state = module.__dict__
        registry, hook = state.get("_diffusers_hook"), state.get("_hf_hook")
        if registry is not None or hook is not None:
            moves = [kind for kind in OFFLOADS if registry is not None and registry.get_hook(kind) is not None]
            moves += [type(h).__name__ for h in _flat(hook) if type(h).__name__ == "AlignDevicesHook"]
            suspects += [(module, moves)]
    return _named(model, suspects)


def must_stay(model: nn.Module) -> None:
    """Raise an UnsupportedModelError where a hook moves weights while the model runs: they are read outside of it."""
    moved = offloaded(model)
    if moved:
        raise UnsupportedModelError(
            f"{moved[0]}: weights that are offloaded piece by piece are not there when several layers are run as one; "
            "use pipe.enable_model_cpu_offload() instead of group or sequential offload"
        )


def _walk(model: nn.Module) -> Iterator[nn.Module]:
    """All modules but PEFT's own inside of its layers, whose base layers count, and code that makes weights."""
    tuners: dict[type[nn.Module], bool] = {}  # isinstance asks an abstract class, which takes its time
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        yield module
        kind = type(module)
        if kind not in tuners:
            tuners[kind] = issubclass(kind, BaseTunerLayer)
        inner = module._modules
        if tuners[kind]:
            waiting.append(inner["base_layer"])
        elif "parametrizations" in inner:
            waiting += [child for key, child in inner.items() if key != "parametrizations"]
        else:
            waiting += inner.values()


def _named(model: nn.Module, suspects: list[tuple[nn.Module, list[str]]]) -> list[str]:
    """What was found, in the order of the model's modules, each with its module's name."""
    if not suspects:
        return []
    found = dict(suspects)
    named = ((name, found[module]) for name, module in model.named_modules() if module in found)
    return [f"{name or 'the model itself'}: {part}" for name, what in named for part in what]


def _of_hooks(state: dict[str, Any]) -> list[str]:
    hooks = (*state["_forward_pre_hooks"].values(), *state["_forward_hooks"].values())
    return [f"forward hook {_called(hook)}" for hook in hooks if _root(origin(hook)) not in TRUSTED]


def _of_class(kind: type[nn.Module]) -> str | None:
    """What is foreign of a module's class; None: nothing."""
    if _root(kind.__module__) not in TRUSTED | QUANTISED:
        return f"module of class {kind.__module__}.{kind.__qualname__}"
    code = origin(kind.forward)
    return None if _root(code) in TRUSTED | QUANTISED else f"{kind.__qualname__}.forward, replaced by {code}"


def _of_weights(module: nn.Module) -> list[str]:
    """LLM.int8 (arXiv 2208.07339): what is large in one row is multiplied in full precision in all of them."""
    threshold = getattr(module.__dict__.get("state"), "threshold", 0)
    if _root(type(module).__module__) != "bitsandbytes" or not threshold:
        return []
    return [f"weights of 8 bits with llm_int8_threshold={threshold:g}"]


def _of_forward(state: dict[str, Any]) -> list[str]:
    """What is foreign of a module's own forward: its code, or the hooks that accelerate or diffusers call for it."""
    registry = state.get("_diffusers_hook")
    hooks = [*_flat(state.get("_hf_hook")), *(registry.hooks.values() if registry is not None else ())]
    what = [f"hook {_kind(hook)}" for hook in hooks if _root(type(hook).__module__) not in TRUSTED]
    code = origin(state["forward"])
    return what if _root(code) in TRUSTED else [*what, f"forward of {code}"]


def _flat(hook: Any) -> list[Any]:
    """accelerate's hook, or those of several in a row."""
    if hook is None:
        return []
    return [part for one in hook.hooks for part in _flat(one)] if hasattr(hook, "hooks") else [hook]


def _root(module: str) -> str:
    return module.partition(".")[0]


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _called(hook: Any) -> str:
    return f"{origin(hook)}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"
