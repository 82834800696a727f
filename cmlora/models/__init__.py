"""Which family a pipeline's model belongs to."""

from __future__ import annotations

from typing import Any

from torch import nn

from cmlora.errors import UnsupportedModelError
from cmlora.lora.foreign import must_stay
from cmlora.models.dit.flux import FluxFamily
from cmlora.models.dit.qwen import QwenFamily
from cmlora.models.dit.sd3 import SD3Family
from cmlora.models.dit.z_image import ZImageFamily
from cmlora.models.family import Family
from cmlora.models.unet.family import UNetFamily

FAMILIES: list[Family] = [UNetFamily(), FluxFamily(), SD3Family(), QwenFamily(), ZImageFamily()]
"""All that are known; the first that owns a pipeline's module takes it."""


def module_of(pipe: Any, family: Family) -> Any:
    """The module that a pipeline keeps for a family, what torch.compile wrapped taken out of it; None: none."""
    module = getattr(pipe, family.attribute, None)
    return getattr(module, "_orig_mod", module)


def modules_of(pipe: Any) -> list[nn.Module]:
    """The modules of a pipeline that a family may own."""
    found = (module_of(pipe, family) for family in FAMILIES)
    return [module for module in found if isinstance(module, nn.Module)]


def find_family(pipe: Any) -> tuple[Family, nn.Module]:
    """The family of a pipeline's model, and the model, checked.

    Raises:
        UnsupportedModelError: none owns it, or the one that does cannot run it.
    """
    found = None
    for family in FAMILIES:
        module = module_of(pipe, family)
        if isinstance(module, nn.Module) and family.owns(module):
            must_stay(module)
            family.check(module)
            return family, module
        found = found or (None if module is None else f"{family.attribute} is a {type(module).__name__}")
    names = ", ".join(name for family in FAMILIES for name in family.pipelines)
    kind = type(pipe).__name__
    lacks = " or ".join(dict.fromkeys(family.attribute for family in FAMILIES))
    raise UnsupportedModelError(
        f"{kind}: {found or f'it has no {lacks}'}, which no model family of cmlora can run; supported are {names}"
    )
