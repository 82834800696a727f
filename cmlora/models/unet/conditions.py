"""What a run computes once: time embeddings of all its steps, keys and values of the prompt.

All of it is exact: it depends on the schedule, the prompt, the added conditions and the adapters alone, and these are
compared at every step by the identity and version of their tensors.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from cmlora.batch.identity import identity, version
from cmlora.batch.rows import Rows, Running, Shared, pick, whole
from cmlora.lora.bank import outline
from cmlora.lora.layers import carrying
from cmlora.lora.plain import unhooked
from cmlora.lora.stacked import StackedProjection


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
            self.added_cond_kwargs,
        )
        return list(_tensors(given))

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return list(_tensors(getattr(self, f.name) for f in fields(self)))

    def signature(self) -> tuple[object, ...]:
        """Equal where all tensors are alike in shape, dtype and device."""
        given = ((f.name, _tensors([getattr(self, f.name)])) for f in fields(self))
        return tuple((name, tuple((t.shape, t.stride(), t.dtype, t.device) for t in found)) for name, found in given)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        return Inputs(**{f.name: map_tensors(getattr(self, f.name), change) for f in fields(self)})

    def bias(self, mask: Tensor | None) -> Tensor | None:
        """A mask (1 = keep) as UNet2DConditionModel makes a bias of it."""
        return None if mask is None else ((1 - mask.to(self.sample.dtype)) * -10000.0).unsqueeze(1)


class Held:
    """The tensors that stay the same over a run, held so that no others take their identity."""

    def __init__(self, inputs: Inputs) -> None:
        self.tensors = inputs.conditions()
        self.identities = [identity(t) for t in self.tensors]
        self.values = [_unversioned(t) for t in self.tensors]
        self.kwargs = inputs.cross_attention_kwargs

    def still(self, inputs: Inputs) -> bool:
        """Whether they are those of `inputs`, unchanged."""
        given = inputs.conditions()
        return (
            inputs.cross_attention_kwargs == self.kwargs
            and len(given) == len(self.tensors)
            and [identity(t) for t in given] == self.identities
            and all(_still(t, value) for t, value in zip(given, self.values, strict=True))
        )


def _unversioned(t: Tensor) -> Tensor | None:
    """What a tensor without a version is compared with: its values, on the CPU."""
    return t.clone() if version(t) is None and t.device.type == "cpu" else None


def _still(t: Tensor, value: Tensor | None) -> bool:
    """Whether a tensor in the same memory, where it has no version, holds the same values.

    On other devices that cannot be told without waiting for them, and counts as no.
    """
    return version(t) is not None if value is None else torch.equal(t, value)


class Conditions:
    """The conditions of a run.

    Args:
        unet: the model.
        inputs: of a step of the run.
        timesteps: [steps] of the whole run.
        running: where the LoRA layers read which rows run.
        stacked: q, k, v stacked, per attention.
        keep_prompt: whether the prompt's keys and values are kept, or made anew at every use.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        inputs: Inputs,
        timesteps: Tensor,
        running: Running,
        stacked: dict[nn.Module, StackedProjection],
        keep_prompt: bool,
    ) -> None:
        self.keep_prompt = keep_prompt
        self.unet = unet
        self.held = Held(inputs)
        self.kwargs = inputs.cross_attention_kwargs
        self.running = running
        self.stacked = stacked
        self.carrying = carrying(unet)
        plain = self.kwargs is None and inputs.attention_mask is None and inputs.encoder_attention_mask is None
        plain = plain and unet.encoder_hid_proj is None
        self.modules = [module for _, module in outline(unet)]
        self.plain = {m for m in self.modules if (plain and _plain_transformer(m)) or _plain_resnet(m)}
        self.plain |= {unet.mid_block} if unet.mid_block is not None and unhooked(unet.mid_block) else set()
        self._keys_values: dict[tuple[nn.Module, tuple[int, ...]], tuple[Tensor, Rows]] = {}
        self._columns: dict[nn.Module, slice] = {}
        self.times = self._times(inputs, timesteps)

    def hold(self, inputs: Inputs) -> bool:
        """Whether they are still those of `inputs`."""
        return self.held.still(inputs)

    def renew(self, inputs: Inputs, everyone: Rows, timesteps: Tensor) -> None:
        """Take over the conditions of another run; keys and values stay where they are in memory.

        Args:
            inputs: the tensors that these were made of, with other values.
            everyone: all rows of a step.
            timesteps: [steps] of the whole run.
        """
        with self.running.these(everyone):
            self.times = self._times(inputs, timesteps)
        for (attention, _), (kept, rows) in self._keys_values.items():
            with self.running.these(rows):
                kept.copy_(self._project(attention, rows))

    def one_step(self) -> Conditions:
        """The same with room for the time embedding of one step, as step 0."""
        one = copy.copy(self)
        one.times = None if self.times is None else torch.empty_like(self.times[:1])
        return one

    def _times(self, inputs: Inputs, timesteps: Tensor) -> Tensor | None:
        """[steps, 1 or own rows, columns]: the embeddings of all steps, and every plain resnet's share of them."""
        table = self._time_table(inputs, timesteps)
        if table is None:
            return None
        # the embedding itself goes by the module that makes it: torch.compile compares no module with None
        parts: dict[nn.Module, Tensor] = {self.unet.time_embedding: table}
        for module in self.modules:
            if module in self.plain and isinstance(module, ResnetBlock2D) and module.time_emb_proj not in self.carrying:
                parts[module] = module.time_emb_proj(table if module.skip_time_act else module.nonlinearity(table))
        ends = itertools.accumulate(part.shape[2] for part in parts.values())
        self._columns = {m: slice(end - part.shape[2], end) for (m, part), end in zip(parts.items(), ends, strict=True)}
        return torch.cat(list(parts.values()), 2)

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

    def time(self, module: Any, step: int) -> Tensor:
        """Of one step: [1 or own rows, channels] added behind a resnet's first convolution; of the UNet's
        time_embedding [1 or own rows, width], the embedding."""
        assert self.times is not None
        return self.times[step][:, self._columns[module]]

    def has_time(self, resnet: Any) -> bool:
        """Whether the resnet's share of the time embedding comes from the table."""
        return resnet in self._columns

    def keys_values(self, attention: Any, rows: Rows, everyone: Rows) -> Tensor:
        """[rows, 2, heads, tokens, width] of the prompt; where they are kept, made for all rows at their first use."""
        if not self.keep_prompt:
            return self._project(attention, rows)
        key = (attention, everyone.known)
        if key not in self._keys_values:
            with self.running.these(everyone):
                self._keys_values[key] = self._project(attention, everyone), everyone
        return pick(self._keys_values[key][0], rows.index)

    def _project(self, attention: Any, rows: Rows) -> Tensor:
        context = whole(Shared(self.held.tensors[0], False, True), rows)
        heads = [
            layer(context).unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for layer in (attention.to_k, attention.to_v)
        ]
        return torch.stack(heads, 1)

    @property
    def bytes(self) -> int:
        """Memory of what is kept for the run."""
        return sum(kept.nbytes for kept, _ in self._keys_values.values()) + (
            0 if self.times is None else self.times.nbytes
        )


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it, alone or nested, changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(v, change) for v in value)
    return value


def _tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value for _, value in sorted(value.items()))
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
