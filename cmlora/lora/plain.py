"""Whether a module is nothing but arithmetic on its weights: only then may it be computed without calling it.

Asked of what a module does, not of what it is called, and at every call: hooks and forwards come and go.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_hooks

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PLAIN = (Tensor, nn.Parameter)


def origin(call: Any) -> str:
    """The module whose code a callable runs; functools.wraps lends names, but not the code."""
    while isinstance(call, functools.partial):
        call = call.func
    call = getattr(call, "__func__", call)
    scope = getattr(call, "__globals__", None)
    return str(type(call).__module__ if scope is None else scope.get("__name__"))


def globally_hooked() -> bool:
    """Whether hooks sit on all modules; torch's own, which count, do not count."""
    if not torch_hooks._global_forward_pre_hooks and not torch_hooks._global_forward_hooks:
        return False
    hooks = (*torch_hooks._global_forward_pre_hooks.values(), *torch_hooks._global_forward_hooks.values())
    return any(origin(hook).partition(".")[0] != "torch" for hook in hooks)


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or globally_hooked()


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward: no hook of offload, layerwise casting or a user."""
    return classes_own(module) and not hooked(module)


def classes_own(module: nn.Module) -> bool:
    """Whether a module's forward is its class's; a copy of ours, of a copied model, is that, bound to the layer."""
    if "forward" not in module.__dict__:
        return True
    forward = module.__dict__["forward"]
    bound = getattr(forward, "__func__", None), getattr(forward, "__self__", None)
    return bound[0] is type(module).forward and bound[1] is module


def _torchs_own(kind: type[Any], name: str) -> Any:
    """A method as torch defines it; None where it was replaced before this was imported."""
    method = getattr(kind, name)
    return method if origin(method).startswith("torch.") else None


FORWARDS: dict[type[nn.Module], Any] = {
    kind: _torchs_own(kind, "forward") for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.SiLU)
}
CONVOLVE = _torchs_own(nn.Conv2d, "_conv_forward")


def torchs_own() -> tuple[bool, ...]:
    """Whether torch's layers are computed as torch defines them, and nothing sits on all modules."""
    kept = (kind.forward is forward for kind, forward in FORWARDS.items())
    return (*kept, nn.Conv2d._conv_forward is CONVOLVE, not globally_hooked())


def as_torch_wrote(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module is torch's own forward of its kind."""
    return type(module) is kind and kind.forward is FORWARDS[kind] and unhooked(module)


def weights_alone(module: nn.Module, kind: type[nn.Linear] | type[nn.Conv2d] | type[nn.GroupNorm]) -> bool:
    """Whether a layer is its kind's forward on plain float weights; a convolution's geometry may be any."""
    if not as_torch_wrote(module, kind):
        return False
    if kind is nn.Conv2d and ("_conv_forward" in module.__dict__ or nn.Conv2d._conv_forward is not CONVOLVE):
        return False
    given = module._parameters
    weight, bias = given.get("weight"), given.get("bias", given)  # given: neither a tensor nor None
    plain = weight is not None and type(weight) in PLAIN and weight.dtype in FLOATS
    return plain and (bias is None or type(bias) in PLAIN)


def computes_plainly(base: nn.Module, kind: type[nn.Linear] | type[nn.Conv2d]) -> bool:
    """Whether a base layer is its weight and bias, and zeros around an image: what our own arithmetic does."""
    if not weights_alone(base, kind):
        return False
    if not isinstance(base, nn.Conv2d):
        return True
    return base.padding_mode == "zeros" and base.groups == 1 and not isinstance(base.padding, str)
