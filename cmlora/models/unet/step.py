"""One step of UNet2DConditionModel as one batch: a shallow part for all rows, a deep part for the refreshed ones.

The model is read as two flat lists of units: the down path, in which every unit leaves a skip connection, and the up
path, in which every unit takes one. A cache branch is a cut through both at the same skip connection; what lies below
the cut is the deep part, and the feature that comes up from it is what is cached (DeepCache, arXiv 2312.00858).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn

from cmlora.batch.inputs import map_tensors
from cmlora.batch.rows import Rows, Shared, add, concat, lift, whole
from cmlora.batch.running import Running
from cmlora.config import CMLoRAConfig
from cmlora.lora.bank import outline
from cmlora.lora.layers import untouched
from cmlora.models.family import Batched
from cmlora.models.unet.blocks import DownUnit, UpUnit, check_supported, cut_of, down_units, up_units
from cmlora.models.unet.conditions import UNetConditions, UNetInputs, time_bias
from cmlora.models.unet.layers import norm_silu, plain_resnet, plain_transformer
from cmlora_kernels import concat_channels


class BatchedUNet(Batched[UNetInputs, UNetConditions]):
    """Steps of one UNet2DConditionModel; the cache branch cuts both paths at one skip connection.

    Raises:
        UnsupportedModelError: a UNet of other blocks or conditions; it names them.
        ConfigError: a branch that the UNet does not have.
    """

    def __init__(self, module: UNet2DConditionModel, config: CMLoRAConfig, running: Running) -> None:
        super().__init__(module, config, running)
        check_supported(module)
        down, up = down_units(module), up_units(module)
        cut = cut_of(module, config.cache_branch)
        self.shallow_down, self.deep_down = down[:cut], down[cut:]
        self.deep_up, self.shallow_up = up[: len(up) - cut - 1], up[len(up) - cut - 1 :]

    def begin(self, inputs: UNetInputs, timesteps: Tensor) -> UNetConditions:
        return UNetConditions(
            self.module, inputs, timesteps, self.running, self.stacked, self.keep_prompt, self.backend
        )

    def part(self, inputs: UNetInputs, conditions: UNetConditions, rows: Rows, everyone: Rows, step: int) -> UNetPart:
        return UNetPart(self, inputs, conditions, rows, everyone, step)

    def latents(self, inputs: UNetInputs) -> Tensor:
        channels = self.module.config.out_channels  # an inpainting UNet's input carries the mask behind them
        return inputs.sample[:, :channels]

    def placeless(self) -> set[nn.Module]:
        crossing = [m for _, m in outline(self.module) if getattr(m, "is_cross_attention", False)]
        layers = (getattr(m, name, None) for m in crossing for name in ("to_k", "to_v", "add_k_proj", "add_v_proj"))
        return {layer for layer in layers if layer is not None}

    def predictable(self) -> bool:
        processors = {type(p).__module__.split(".")[0] for p in self.module.attn_processors.values()}
        return untouched(self.module) and processors <= {"diffusers"}

    def baked(self) -> tuple[object, ...] | None:
        unet = self.module
        if not self.predictable() or unet.encoder_hid_proj is not None:
            return None
        freeu = tuple(getattr(block, name, None) for block in unet.up_blocks for name in ("s1", "s2", "b1", "b2"))
        return (freeu, tuple(map(id, unet.attn_processors.values())))


class UNetPart:
    """Some rows on their way through the UNet in one step."""

    def __init__(
        self,
        batched: BatchedUNet,
        inputs: UNetInputs,
        conditions: UNetConditions,
        rows: Rows,
        everyone: Rows,
        step: int,
    ) -> None:
        self.unet = batched.module
        self.batched = batched
        self.inputs = inputs
        self.conditions = conditions
        self.rows = rows
        self.everyone = everyone
        self.step = step
        factor = 2**self.unet.num_upsamplers
        # upsamplers must be told their size where a side is no multiple of the whole upsampling factor
        self.tell_size = any(side % factor for side in inputs.sample.shape[-2:])

    def head(self) -> tuple[Shared, list[Shared]]:
        """What goes into the deep part, and the skip connections above it."""
        skips = self.down(self.batched.shallow_down, self.latents())
        residuals = self.inputs.down_block_additional_residuals
        return skips[-1], self.add_residuals(skips, residuals[: len(skips)] if residuals else None)

    def tail(self, feature: Tensor, kept: Sequence[Shared]) -> Tensor:
        """Noise of all rows from their cached feature and the shallow skip connections."""
        return self.end(self.up(self.batched.shallow_up, Shared(feature, True, True), list(kept), cached=True))

    def latents(self) -> Shared:
        """The latents behind conv_in."""
        unet, inputs = self.unet, self.inputs
        sample = inputs.sample[: self.rows.images]  # the halves, where there are several, are alike
        sample = 2 * sample - 1.0 if unet.config.center_input_sample else sample
        if sample.device.type == "cpu":  # convolutions and norms keep the format, and tokens are then a view of it
            sample = sample.contiguous(memory_format=torch.channels_last)
        x = self._lifted(unet.conv_in, Shared(sample, False, False))
        return Shared(unet.conv_in(x.value), x.by_prediction, x.by_half)

    def end(self, x: Shared) -> Tensor:
        """Noise of all rows."""
        unet, hidden = self.unet, whole(x, self.rows)
        if unet.conv_norm_out:
            hidden = norm_silu(unet.conv_norm_out, unet.conv_act, hidden, self.batched.backend)
        noise: Tensor = unet.conv_out(hidden)
        return noise.contiguous()

    def down(self, units: Sequence[DownUnit], x: Shared) -> list[Shared]:
        """The units' outputs, the first entry being what goes in."""
        skips = [x]
        intrablock = self.inputs.down_intrablock_additional_residuals or ()
        for unit in units:
            if unit.downsampler is not None:
                x = self._lifted(unit.downsampler, x)
                x = Shared(unit.downsampler(x.value), x.by_prediction, x.by_half)
            else:
                x = self._layer(unit.resnet, unit.attention, x)
            if unit.block is not None and unit.block < len(intrablock):
                x = self._add_own(x, intrablock[unit.block])
            skips.append(x)
        return skips

    def deep(self, hidden: Shared, kept: Sequence[Shared]) -> Tensor:
        """Everything below the cut."""
        batched, inputs = self.batched, self.inputs
        skips = self.down(batched.deep_down, hidden)
        x = skips[-1]
        residuals = inputs.down_block_additional_residuals
        skips = self.add_residuals(skips[1:], residuals[len(batched.shallow_down) + 1 :] if residuals else None)
        if self.unet.mid_block is not None:
            x = self._middle(self.unet.mid_block, x)
        if inputs.mid_block_additional_residual is not None:
            x = self._add_own(x, inputs.mid_block_additional_residual)
        # the last upsampler below the cut takes its size from the skip connection above it
        return whole(self.up(batched.deep_up, x, [kept[-1], *skips]), self.rows)

    def _middle(self, block: Any, x: Shared) -> Shared:
        if block not in self.conditions.plain:  # a user's hook sits on it
            attending = getattr(block, "has_cross_attention", False)
            context = self._prompt | {"cross_attention_kwargs": self.conditions.kwargs} if attending else {}
            return self._middle_t2i(Shared(block(whole(x, self.rows), self._embedding, **context), True, True))
        attentions = getattr(block, "attentions", None) or [None] * (len(block.resnets) - 1)
        x = self._resnet(block.resnets[0], x)
        for attention, resnet in zip(attentions, block.resnets[1:], strict=True):
            x = x if attention is None else self._attention(attention, x)
            x = self._resnet(resnet, x)
        return self._middle_t2i(x)

    def _middle_t2i(self, x: Shared) -> Shared:
        rest = (self.inputs.down_intrablock_additional_residuals or ())[len(self.unet.down_blocks) :]
        if rest and rest[0].shape[1:] == x.value.shape[1:]:
            x = self._add_own(x, rest[0])
        return x

    def up(self, units: Sequence[UpUnit], x: Shared, skips: list[Shared], *, cached: bool = False) -> Shared:
        """Through the units, each taking its skip connection; `cached`: x is the cache and must not be written."""
        for i, unit in enumerate(units):
            # joined in the call: a variable would keep the widest tensor of the step alive through the attention
            x = self._layer(unit.resnet, unit.attention, self._join(unit, x, skips.pop(), cached=cached and i == 0))
            if unit.upsampler is not None:
                size = skips[-1].value.shape[2:] if self.tell_size and skips else None
                x = Shared(unit.upsampler(x.value, size), True, True)
        return x

    def _join(self, unit: UpUnit, x: Shared, skip: Shared, *, cached: bool) -> Shared:
        """x and a skip connection over channels, with all rows."""
        hidden = whole(x, self.rows)
        if _freeu(unit.block):
            joined = torch.cat(self._freeu(unit.block, hidden.clone(), whole(skip, self.rows)), dim=1)
        elif cached and skip.value.shape[0] == hidden.shape[0]:
            joined = concat_channels(hidden, skip.value, backend=self.batched.backend)
        else:
            joined = concat(hidden, skip, self.rows)
        return Shared(joined, True, True)

    def _freeu(self, block: Any, hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        changed: tuple[Tensor, Tensor] = apply_freeu(
            block.resolution_idx, hidden, skip, s1=block.s1, s2=block.s2, b1=block.b1, b2=block.b2
        )
        return changed

    def _layer(self, resnet: Any, attention: Any, x: Shared) -> Shared:
        x = self._resnet(resnet, x)
        return x if attention is None else self._attention(attention, x)

    def _resnet(self, module: Any, x: Shared) -> Shared:
        if self.conditions.has_time(module):
            return plain_resnet(module, x, self.conditions, self.conditions.time(module, self.step), self.rows)
        x = Shared(whole(x, self.rows), True, True)
        if module not in self.conditions.plain:
            return Shared(module(x.value, self._embedding), True, True)
        return plain_resnet(module, x, self.conditions, time_bias(module, self._embedding), self.rows)

    def _attention(self, module: Any, x: Shared) -> Shared:
        height, width = x.value.shape[-2:]
        with self.batched.running.at((height, width)):
            return self._attend(module, x)

    def _attend(self, module: Any, x: Shared) -> Shared:
        if module in self.conditions.plain:
            return plain_transformer(module, x, self.conditions, self.rows, self.everyone)
        attended = module(
            whole(x, self.rows), **self._prompt, cross_attention_kwargs=self.conditions.kwargs, return_dict=False
        )
        return Shared(attended[0], True, True)

    @functools.cached_property
    def _prompt(self) -> dict[str, Any]:
        """What a transformer that is called as it is gets of the conditions, for all rows."""
        unet, inputs = self.unet, self.inputs
        context = unet.process_encoder_hidden_states(self.conditions.context(self.rows, self.everyone), self._added)
        return {
            "encoder_hidden_states": context,
            "attention_mask": self._spread(inputs.bias(inputs.attention_mask)),
            "encoder_attention_mask": self._spread(inputs.bias(inputs.encoder_attention_mask)),
        }

    @functools.cached_property
    def _added(self) -> Any:
        """What SDXL and IP-Adapters condition on beside the prompt, for all rows."""
        given = self.inputs.added_cond_kwargs
        added = self._spread(given)
        if self.inputs.prompts is not None and given and "text_embeds" in given:
            added["text_embeds"] = self.conditions.pooled(given["text_embeds"], self.rows, self.everyone)
        return added

    @functools.cached_property
    def _embedding(self) -> Tensor:
        """[rows, width] embedding of the step, for resnets that are called as they are."""
        unet, inputs, spread = self.unet, self.inputs, self._spread
        if self.conditions.times is not None:
            own = self._own(self.conditions.time(unet.time_embedding, self.step))
            return whole(Shared(own, False, True), self.rows)
        sample = self.rows.slots.new_empty(self.rows.slots.shape[0], dtype=inputs.sample.dtype)
        timestep = spread(inputs.timestep) if inputs.timestep.numel() == self.rows.own else inputs.timestep
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), spread(inputs.timestep_cond))
        class_emb = unet.get_class_embed(sample=sample, class_labels=spread(inputs.class_labels))
        if class_emb is not None:
            emb = torch.cat([emb, class_emb], dim=-1) if unet.config.class_embeddings_concat else emb + class_emb
        aug_emb = unet.get_aug_embed(
            emb=emb,
            encoder_hidden_states=self.conditions.context(self.rows, self.everyone),
            added_cond_kwargs=self._added,
        )
        emb = emb if aug_emb is None else emb + aug_emb
        embedding: Tensor = emb if unet.time_embed_act is None else unet.time_embed_act(emb)
        return embedding

    def _own(self, x: Tensor) -> Tensor:
        return x.expand(self.rows.own, *x.shape[1:]) if x.shape[0] == 1 else x

    def _spread(self, value: Any) -> Any:
        """Repeat tensors [own rows, ...], alone or nested, over the predictions."""
        return map_tensors(value, lambda x: whole(Shared(x, False, True), self.rows))

    def _lifted(self, module: nn.Module, x: Shared) -> Shared:
        """`x` with a row per prediction if an adapter changes the module."""
        return lift(x, self.rows, by_prediction=True) if module in self.conditions.carrying else x

    def _add_own(self, x: Shared, residual: Tensor) -> Shared:
        """Add a residual [own rows, ...], or [1, ...] for all."""
        return add(x, Shared(self._own(residual), False, True), self.rows)

    def add_residuals(self, skips: list[Shared], residuals: Sequence[Tensor] | None) -> list[Shared]:
        """Add ControlNet's residuals to skip connections."""
        if residuals is None:
            return skips
        return [self._add_own(skip, residual) for skip, residual in zip(skips, residuals, strict=False)]


def _freeu(block: Any) -> bool:
    return all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
