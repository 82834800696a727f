"""One step of UNet2DConditionModel as one batch: a shallow part for all rows, a deep part for the refreshed ones.

The model is read as two flat lists of units: the down path, in which every unit leaves a skip connection, and the up
path, in which every unit takes one. A cache branch is a cut through both at the same skip connection; what lies below
the cut is the deep part, and the feature that comes up from it is what is cached (DeepCache, arXiv 2312.00858).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn

from cmlora.errors import ConfigError, UnsupportedModelError
from cmlora.layers import RowSlots
from cmlora_kernels import gather_concat, scatter_rows

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


@dataclass(frozen=True)
class Rows:
    """Some rows of a step's batch of predictions x images.

    Attributes:
        slots: [n] adapter of every row.
        index: [n] their places in the whole batch; None: all of it, in order.
        images: [n] the pipeline's own rows that they belong to; None: all, once per prediction.
    """

    slots: Tensor
    index: Tensor | None = None
    images: Tensor | None = None


@dataclass
class Inputs:
    """What the pipeline passes to the UNet, [images, ...]; names as in UNet2DConditionModel.forward."""

    sample: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    class_labels: Tensor | None = None
    timestep_cond: Tensor | None = None
    attention_mask: Tensor | None = None
    cross_attention_kwargs: dict[str, Any] | None = None
    added_cond_kwargs: dict[str, Any] | None = None
    down_block_additional_residuals: Sequence[Tensor] | None = None
    mid_block_additional_residual: Tensor | None = None
    down_intrablock_additional_residuals: Sequence[Tensor] | None = None
    encoder_attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        # T2I-adapters were once passed as ControlNet residuals without a middle one; half of a pair is not used else
        if self.mid_block_additional_residual is None or self.down_block_additional_residuals is None:
            if self.down_intrablock_additional_residuals is None:
                self.down_intrablock_additional_residuals = self.down_block_additional_residuals
            self.down_block_additional_residuals = self.mid_block_additional_residual = None
        for name in ("attention_mask", "encoder_attention_mask"):
            mask = getattr(self, name)
            if mask is not None:
                setattr(self, name, ((1 - mask.to(self.sample.dtype)) * -10000.0).unsqueeze(1))


@dataclass
class Conditions:
    """What every resnet and attention of some rows is given."""

    emb: Tensor
    attention: dict[str, Any]  # per row
    kwargs: dict[str, Any] | None  # cross_attention_kwargs: for all rows

    def select(self, index: Tensor) -> Conditions:
        """The conditions of some rows."""
        select = Select(index)
        return Conditions(select(self.emb), select(self.attention), self.kwargs)


class BatchedUNet:
    """Runs steps of one UNet on batches of predictions x images.

    Args:
        unet: the pipeline's model; its modules are called, never changed.
        branch: (layer, block) of the skip connection at which the deep part begins; None: the last up block's input.
        rows: where the LoRA layers read the slots of the running rows.
        backend: of the kernels.

    Raises:
        UnsupportedModelError: a UNet of other blocks or conditions; it names them.
        ConfigError: a branch that the UNet does not have.
    """

    def __init__(
        self, unet: UNet2DConditionModel, branch: tuple[int, int] | None, rows: RowSlots, backend: Any
    ) -> None:
        check_supported(unet)
        self.unet = unet
        self.rows = rows
        self.backend = backend
        down, up = down_units(unet), up_units(unet)
        cut = _cut(unet, branch)
        self.shallow_down, self.deep_down = down[:cut], down[cut:]
        self.deep_up, self.shallow_up = up[: len(up) - cut - 1], up[len(up) - cut - 1 :]

    def run(self, inputs: Inputs, everyone: Rows, deep: Rows | None, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            inputs: of the pipeline's own rows.
            everyone: all rows, prediction-major.
            deep: the rows that run the deep part; None: none, the cache serves all.
            cache: [rows, ...] cached features, refreshed in place; None in a run's first step.

        Returns:
            Noise predictions [rows, channels, height, width], and the cache.
        """
        try:
            self.rows.slots = everyone.slots
            hidden, conditions = self._begin(inputs, everyone)
            skips = self._down(self.shallow_down, inputs, everyone, hidden, conditions)
            residuals = inputs.down_block_additional_residuals
            hidden = skips[-1]
            skips = _add_residuals(skips, residuals[: len(skips)] if residuals else None, everyone)
            if deep is not None:
                self.rows.slots = deep.slots
                feature = self._deep(inputs, deep, hidden, skips, conditions)
                cache = self._refresh(cache, feature, deep)
                self.rows.slots = everyone.slots
            assert cache is not None  # the first step of a run is full
            hidden = self._up(self.shallow_up, cache, skips, conditions, self._upsample(inputs.sample), boundary=True)
            return self._end(hidden), cache
        finally:
            self.rows.slots = None

    def _refresh(self, cache: Tensor | None, feature: Tensor, deep: Rows) -> Tensor:
        if deep.index is None or cache is None:
            return feature
        scatter_rows(cache, feature, deep.index, backend=self.backend)
        return cache

    def _begin(self, inputs: Inputs, rows: Rows) -> tuple[Tensor, Conditions]:
        """Embeddings, conditions and conv_in, as the first part of UNet2DConditionModel.forward has them."""
        unet, spread = self.unet, Spread(inputs.sample.shape[0], rows)
        sample = spread(inputs.sample)
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0
        added = spread(inputs.added_cond_kwargs)
        context = spread(inputs.encoder_hidden_states)
        timestep = inputs.timestep
        if timestep.ndim == 1 and timestep.shape[0] == inputs.sample.shape[0]:
            timestep = spread(timestep)
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), spread(inputs.timestep_cond))
        class_emb = unet.get_class_embed(sample=sample, class_labels=spread(inputs.class_labels))
        if class_emb is not None:
            emb = torch.cat([emb, class_emb], dim=-1) if unet.config.class_embeddings_concat else emb + class_emb
        aug_emb = unet.get_aug_embed(emb=emb, encoder_hidden_states=context, added_cond_kwargs=added)
        emb = emb if aug_emb is None else emb + aug_emb
        if unet.time_embed_act is not None:
            emb = unet.time_embed_act(emb)
        attention = {
            "encoder_hidden_states": unet.process_encoder_hidden_states(context, added),
            "attention_mask": spread(inputs.attention_mask),
            "encoder_attention_mask": spread(inputs.encoder_attention_mask),
        }
        return unet.conv_in(sample), Conditions(emb, attention, inputs.cross_attention_kwargs)

    def _end(self, hidden: Tensor) -> Tensor:
        unet = self.unet
        if unet.conv_norm_out:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        noise: Tensor = unet.conv_out(hidden)
        return noise

    def _down(
        self, units: Sequence[DownUnit], inputs: Inputs, rows: Rows, hidden: Tensor, conditions: Conditions
    ) -> list[Tensor]:
        """The units' outputs, the first entry being what goes in."""
        skips = [hidden]
        intrablock = inputs.down_intrablock_additional_residuals or ()
        for unit in units:
            if unit.downsampler is not None:
                hidden = unit.downsampler(hidden)
            else:
                assert unit.resnet is not None
                hidden = _layer(unit.resnet, unit.attention, hidden, conditions)
            if unit.block is not None and unit.block < len(intrablock):
                hidden = _add(hidden, intrablock[unit.block], rows)
            skips.append(hidden)
        return skips

    def _deep(
        self, inputs: Inputs, deep: Rows, hidden: Tensor, shallow_skips: list[Tensor], conditions: Conditions
    ) -> Tensor:
        """Everything below the cut, for the rows that are refreshed."""
        unet = self.unet
        if deep.index is not None:
            hidden, conditions = hidden.index_select(0, deep.index), conditions.select(deep.index)
        skips = self._down(self.deep_down, inputs, deep, hidden, conditions)
        hidden = skips[-1]
        residuals, skips = inputs.down_block_additional_residuals, skips[1:]
        skips = _add_residuals(skips, residuals[len(self.shallow_down) + 1 :] if residuals else None, deep)
        if unet.mid_block is not None:
            if getattr(unet.mid_block, "has_cross_attention", False):
                hidden = unet.mid_block(
                    hidden, conditions.emb, **conditions.attention, cross_attention_kwargs=conditions.kwargs
                )
            else:
                hidden = unet.mid_block(hidden, conditions.emb)
            intrablock = inputs.down_intrablock_additional_residuals or ()
            rest = intrablock[len(unet.down_blocks) :]
            if rest and rest[0].shape[1:] == hidden.shape[1:]:
                hidden = _add(hidden, rest[0], deep)
        if inputs.mid_block_additional_residual is not None:
            hidden = _add(hidden, inputs.mid_block_additional_residual, deep)
        # the last upsampler below the cut takes its size from the skip connection above it
        above = shallow_skips[-1:] if self._upsample(inputs.sample) else []
        return self._up(self.deep_up, hidden, skips, conditions, bool(above), above=above)

    def _up(
        self,
        units: Sequence[UpUnit],
        hidden: Tensor,
        skips: list[Tensor],
        conditions: Conditions,
        forward_size: bool,
        *,
        above: Sequence[Tensor] = (),
        boundary: bool = False,
    ) -> Tensor:
        skips = [*above, *skips]
        for i, unit in enumerate(units):
            skip = skips.pop()
            if _freeu(unit.block):
                block: Any = unit.block
                hidden = hidden.clone() if boundary and i == 0 else hidden  # FreeU writes into what may be the cache
                hidden, skip = apply_freeu(
                    block.resolution_idx, hidden, skip, s1=block.s1, s2=block.s2, b1=block.b1, b2=block.b2
                )
                hidden = torch.cat([hidden, skip], dim=1)
            elif boundary and i == 0:
                hidden = gather_concat(hidden, skip, backend=self.backend)
            else:
                hidden = torch.cat([hidden, skip], dim=1)
            hidden = _layer(unit.resnet, unit.attention, hidden, conditions)
            if unit.upsampler is not None:
                hidden = unit.upsampler(hidden, skips[-1].shape[2:] if forward_size and skips else None)
        return hidden

    def _upsample(self, sample: Tensor) -> bool:
        """Whether upsamplers must be told their size: a side is no multiple of the whole upsampling factor."""
        factor = 2**self.unet.num_upsamplers
        return any(side % factor for side in sample.shape[-2:])


class Spread:
    """Repeats tensors [images, ...], alone or nested, over the predictions of all rows."""

    def __init__(self, images: int, rows: Rows) -> None:
        self.copies = rows.slots.shape[0] // images

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if self.copies == 1 else value.repeat(self.copies, *(1 for _ in value.shape[1:]))
        return _nested(self, value)


class Select:
    """Takes some rows of tensors [rows, ...], alone or nested."""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, self.index)
        return _nested(self, value)


def _nested(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: function(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(function(v) for v in value)
    return value


def _layer(resnet: nn.Module, attention: nn.Module | None, hidden: Tensor, conditions: Conditions) -> Tensor:
    hidden = resnet(hidden, conditions.emb)
    if attention is None:
        return hidden
    attended: Tensor = attention(
        hidden, **conditions.attention, cross_attention_kwargs=conditions.kwargs, return_dict=False
    )[0]
    return attended


def _add(hidden: Tensor, residual: Tensor, rows: Rows) -> Tensor:
    """Add a residual [images, ...] to some rows."""
    if residual.shape[0] == 1:
        return hidden + residual
    if rows.images is not None:
        return hidden + residual.index_select(0, rows.images)
    return (hidden.view(-1, *residual.shape) + residual).flatten(0, 1)


def _add_residuals(skips: list[Tensor], residuals: Sequence[Tensor] | None, rows: Rows) -> list[Tensor]:
    if residuals is None:
        return skips
    return [_add(skip, residual, rows) for skip, residual in zip(skips, residuals, strict=False)]


def _freeu(block: Any) -> bool:
    return all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))


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


def _cut(unet: UNet2DConditionModel, branch: tuple[int, int] | None) -> int:
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
        hint = "; accelerate before torch.compile" if type(unet).__name__ == "OptimizedModule" else ""
        raise UnsupportedModelError(f"unet must be a UNet2DConditionModel, got {type(unet).__name__}{hint}")
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
    processors = {type(p).__name__ for p in unet.attn_processors.values()}
    if any(name.startswith("PAG") for name in processors):
        raise UnsupportedModelError(
            "PAG processors split the batch; use a pipeline without perturbed-attention guidance"
        )
    # the modules stay marked as fused when they are no more
    if any(name.startswith("Fused") for name in processors):
        raise UnsupportedModelError(
            "this UNet's q, k, v are fused, past its LoRA layers: unet.unfuse_qkv_projections()"
        )
