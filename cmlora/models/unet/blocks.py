"""UNet2DConditionModel as two flat lists of units, one per skip connection, and which models can be read so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from cmlora.errors import ConfigError, UnsupportedModelError
from cmlora.lora.bank import outline
from cmlora.lora.plain import origin, unhooked

BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "NoneType")


@dataclass(frozen=True)
class DownUnit:
    """A resnet with its attention, or a downsampler; `block` where a T2I-adapter adds its residual behind it."""

    resnet: nn.Module | None
    attention: nn.Module | None
    downsampler: nn.Module | None
    block: int | None


@dataclass(frozen=True)
class UpUnit:
    """A resnet with its attention, and the upsampler behind the last one of a block."""

    resnet: nn.Module
    attention: nn.Module | None
    upsampler: nn.Module | None
    block: nn.Module


def down_units(unet: UNet2DConditionModel) -> list[DownUnit]:
    """The down path behind conv_in, a unit per skip connection."""
    units = []
    for number, block in enumerate(unet.down_blocks):
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        samplers = block.downsamplers or []
        for i, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            last = i == len(block.resnets) - 1
            # blocks with attention take a T2I residual before the downsampler, the others behind it
            here = last and (attention is not None or not samplers)
            units.append(DownUnit(resnet, attention, None, number if here else None))
        units += [DownUnit(None, None, s, None if attentions[0] is not None else number) for s in samplers]
    return units


def up_units(unet: UNet2DConditionModel) -> list[UpUnit]:
    """The up path, a unit per skip connection."""
    units = []
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for i, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            sampler = block.upsamplers[0] if block.upsamplers and i == len(block.resnets) - 1 else None
            units.append(UpUnit(resnet, attention, sampler, block))
    return units


def cut_of(unet: UNet2DConditionModel, branch: tuple[int, int] | None) -> int:
    """Number of down units above the cut."""
    sizes = [len(block.resnets) for block in unet.down_blocks]
    layer, block = (0, sizes[0] - 1) if branch is None else branch
    if layer >= len(sizes) or block >= sizes[layer]:
        have = ", ".join(f"({i}, 0..{size - 1})" for i, size in enumerate(sizes))
        raise ConfigError(f"cache_branch must be a (layer, block) of this UNet: {have}; got {(layer, block)}")
    above = sum(sizes[i] + len(unet.down_blocks[i].downsamplers or ()) for i in range(layer))
    return above + block + 1


def check_supported(unet: Any) -> None:
    """Raise UnsupportedModelError unless `unet` is a UNet2DConditionModel made of blocks that we can run."""
    if not isinstance(unet, UNet2DConditionModel):
        raise UnsupportedModelError(f"unet must be a UNet2DConditionModel, got {type(unet).__name__}")
    forward = UNet2DConditionModel.forward
    if type(unet).forward is not forward or not origin(forward).startswith("diffusers."):
        raise UnsupportedModelError(
            f"{type(unet).__name__}.forward is not diffusers' UNet2DConditionModel's, and would be bypassed"
        )
    kinds = {type(b).__name__ for b in (*unet.down_blocks, *unet.up_blocks)} - set(BLOCKS)
    mid = type(unet.mid_block).__name__
    if kinds or mid not in MID_BLOCKS:
        raise UnsupportedModelError(
            f"this UNet has blocks of kind {', '.join(sorted(kinds) or [mid])}; supported are {', '.join(BLOCKS)}"
        )
    for name, allowed in (
        ("addition_embed_type", (None, "text", "text_time")),
        ("encoder_hid_dim_type", (None, "text_proj", "ip_image_proj")),
        ("attention_type", ("default",)),
        ("dual_cross_attention", (False,)),
    ):
        value = unet.config.get(name, allowed[0])
        if value not in allowed:
            raise UnsupportedModelError(f"this UNet's {name} is {value!r}; supported are {allowed}")
    for name in ("down_blocks", "up_blocks"):
        hooked = [i for i, block in enumerate(getattr(unet, name)) if not unhooked(block)]
        if hooked:
            raise UnsupportedModelError(
                f"{name}.{hooked[0]} carries a hook or a forward of its own, which would be bypassed: "
                "blocks are run piece by piece. Take it out, or hook the block's resnets and attentions"
            )
    modules: list[Any] = [module for _, module in outline(unet)]
    processors = {type(m.get_processor()).__name__ for m in modules if hasattr(type(m), "get_processor")}
    if any(name.startswith("PAG") for name in processors):
        raise UnsupportedModelError(
            "PAG processors split the batch; use a pipeline without perturbed-attention guidance"
        )
    # the modules stay marked as fused when they are no more
    if any(name.startswith("Fused") for name in processors):
        raise UnsupportedModelError(
            "this UNet's q, k, v are fused, past its LoRA layers: unet.unfuse_qkv_projections()"
        )
