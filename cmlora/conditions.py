"""What a run computes once: time embeddings of all its steps, keys and values of the prompt.

All of it is exact: it depends on the schedule, the prompt, the added conditions and the adapters alone, and these are
compared at every step by the identity and version of their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from cmlora.layers import RowSlots, StackedProjection, carries_adapter, unhooked
from cmlora.rows import Rows, Shared, pick, whole


@dataclass
class Inputs:
    """What the pipeline passes to the UNet, [own rows, ...]; names as in UNet2DConditionModel.forward."""

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

    def conditions(self) -> list[Tensor]:
        """The tensors that stay the same over a run."""
        given = (
            self.encoder_hidden_states,
            self.class_labels,
            self.timestep_cond,
            self.attention_mask,
            self.encoder_attention_mask,
            *(value for _, value in sorted((self.added_cond_kwargs or {}).items())),
        )
        return list(_tensors(given))

    def bias(self, mask: Tensor | None) -> Tensor | None:
        """A mask (1 = keep) as UNet2DConditionModel makes a bias of it."""
        return None if mask is None else ((1 - mask.to(self.sample.dtype)) * -10000.0).unsqueeze(1)


class Conditions:
    """The conditions of a run.

    Args:
        unet: the model.
        inputs: of a step of the run.
        timesteps: [steps] of the whole run.
        row_slots: where the LoRA layers read their slots.
        stacked: q, k, v stacked, per attention.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        inputs: Inputs,
        timesteps: Tensor,
        row_slots: RowSlots,
        stacked: dict[nn.Module, StackedProjection],
    ) -> None:
        self.unet = unet
        self.held = inputs.conditions()  # held, so that no other tensor takes their identity
        self.versions = [t._version for t in self.held]
        self.kwargs = inputs.cross_attention_kwargs
        self.row_slots = row_slots
        self.stacked = stacked
        self.carrying = {m for m in unet.modules() if carries_adapter(m)}
        plain = self.kwargs is None and inputs.attention_mask is None and inputs.encoder_attention_mask is None
        plain = plain and unet.encoder_hid_proj is None
        self.plain = {m for m in unet.modules() if plain and _plain_transformer(m)}
        self.plain |= {m for m in unet.modules() if _plain_resnet(m)}
        self.plain |= {unet.mid_block} if unet.mid_block is not None and unhooked(unet.mid_block) else set()
        self._keys_values: dict[tuple[nn.Module, tuple[int, ...]], Tensor] = {}
        self._time: dict[nn.Module, Tensor] = {}
        self.table = self._time_table(inputs, timesteps)

    def hold(self, inputs: Inputs) -> bool:
        """Whether they are still those of `inputs`."""
        given = inputs.conditions()
        return (
            inputs.cross_attention_kwargs == self.kwargs
            and len(given) == len(self.held)
            and all(a is b and a._version == v for a, b, v in zip(given, self.held, self.versions, strict=True))
        )

    def _time_table(self, inputs: Inputs, timesteps: Tensor) -> Tensor | None:
        """[steps, 1 or own rows, width] embeddings of all steps; None where they must be computed step by step."""
        unet = self.unet
        embedders = (unet.time_embedding, getattr(unet, "add_embedding", None), unet.class_embedding)
        if any(m in self.carrying for m in embedders if m is not None):
            return None
        if inputs.timestep_cond is not None or unet.class_embedding is not None:
            return None
        timesteps = timesteps.to(inputs.sample.device)
        dummy = inputs.sample.new_empty(timesteps.shape[0])
        emb = unet.time_embedding(unet.get_time_embed(sample=dummy, timestep=timesteps)).unsqueeze(1)
        aug = unet.get_aug_embed(
            emb=emb[:1, 0].expand(inputs.sample.shape[0], -1),
            encoder_hidden_states=inputs.encoder_hidden_states,
            added_cond_kwargs=inputs.added_cond_kwargs,
        )
        emb = emb if aug is None else emb + aug
        table: Tensor = emb if unet.time_embed_act is None else unet.time_embed_act(emb)
        return table

    def time_bias(self, resnet: Any, step: int) -> Tensor | None:
        """[1 or own rows, channels] of one step, added behind a resnet's first convolution."""
        if resnet not in self._time:
            assert self.table is not None
            emb = self.table if resnet.skip_time_act else resnet.nonlinearity(self.table)
            self._time[resnet] = resnet.time_emb_proj(emb)
        return self._time[resnet][step]

    def has_time_bias(self, resnet: Any) -> bool:
        """Whether the resnet's share of the time embedding comes from the table."""
        return self.table is not None and resnet in self.plain and resnet.time_emb_proj not in self.carrying

    def keys_values(self, attention: Any, rows: Rows, everyone: Rows) -> Tensor:
        """[rows, 2, heads, tokens, width] of the prompt, computed for all rows at their first use."""
        key = (attention, everyone.known)
        if key not in self._keys_values:
            before, self.row_slots.by_count = self.row_slots.by_count, everyone.by_count
            context = whole(Shared(self.held[0], False, True), everyone)
            heads = [
                layer(context).unflatten(2, (attention.heads, -1)).transpose(1, 2)
                for layer in (attention.to_k, attention.to_v)
            ]
            self._keys_values[key] = torch.stack(heads, 1)
            self.row_slots.by_count = before
        return pick(self._keys_values[key], rows.index)

    @property
    def bytes(self) -> int:
        """Memory of what is kept for the run."""
        return sum(t.numel() * t.element_size() for t in (*self._keys_values.values(), *self._time.values()))


def _tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _plain_attention(attention: Any) -> bool:
    return (
        type(attention) is Attention
        and type(attention.processor) is AttnProcessor2_0
        and unhooked(attention)
        and attention.rescale_output_factor == 1
        and not attention.residual_connection
        and not any(
            getattr(attention, name, None)
            for name in ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
        )
    )


def _plain_transformer(module: Any) -> bool:
    """Whether `transformer.py` computes exactly what this module's forward does."""
    if type(module) is not Transformer2DModel or not module.is_input_continuous or not unhooked(module):
        return False
    return all(
        type(block) is BasicTransformerBlock
        and unhooked(block)
        and block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not block.only_cross_attention
        and not block.double_self_attention
        and block._chunk_size is None
        and _plain_attention(block.attn1)
        and _plain_attention(block.attn2)
        for block in module.transformer_blocks
    )


def _plain_resnet(module: Any) -> bool:
    return (
        type(module) is ResnetBlock2D
        and unhooked(module)
        and module.time_embedding_norm == "default"
        and module.time_emb_proj is not None
        and module.upsample is None
        and module.downsample is None
    )
