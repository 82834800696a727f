"""What a run computes once: time embeddings of all its steps, keys and values of the prompt.

All of it is exact: it depends on the schedule, the prompt, the added conditions and the adapters alone, and these are
compared at every step by the identity and version of their tensors.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from cmlora.batch.inputs import Inputs
from cmlora.batch.rows import Rows, Shared, pick, whole
from cmlora.batch.running import Running
from cmlora.lora.bank import outline
from cmlora.lora.layers import carrying, forward_of, untouched
from cmlora.lora.plain import hooked, unhooked
from cmlora.lora.stacked import StackedProjection
from cmlora.models.family import Conditions
from cmlora.models.prompts import by_prediction


@dataclass
class UNetInputs(Inputs):
    """Names as in UNet2DConditionModel.forward; all [own rows, ...].

    Attributes:
        prompts: by prediction, where predictions have prompts of their own: None for the pipeline's, else
            encoder_hidden_states [own rows, tokens, width] and, for SDXL, text_embeds [own rows, width].
    """

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
    prompts: tuple[dict[str, Tensor] | None, ...] | None = None

    CONSTANT = (
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "encoder_attention_mask",
        "added_cond_kwargs",
        "prompts",
    )

    def __post_init__(self) -> None:
        # As UNet2DConditionModel.forward: residuals for the skip connections alone, without one for the middle block,
        # are a T2I-adapter's, passed by the name that they had before they got one of their own.
        if self.mid_block_additional_residual is None or self.down_block_additional_residuals is None:
            if self.down_intrablock_additional_residuals is None:
                self.down_intrablock_additional_residuals = self.down_block_additional_residuals
            self.down_block_additional_residuals = self.mid_block_additional_residual = None

    def settings(self) -> object:
        return self.cross_attention_kwargs

    def bias(self, mask: Tensor | None) -> Tensor | None:
        """A mask (1 = keep) as UNet2DConditionModel makes a bias of it."""
        return None if mask is None else ((1 - mask.to(self.sample.dtype)) * -10000.0).unsqueeze(1)


class UNetConditions(Conditions):
    """The conditions of a run.

    Args:
        unet: the model.
        inputs: of a step of the run.
        timesteps: [steps] of the whole run.
        running: where the LoRA layers read which rows run.
        stacked: q, k, v stacked, per attention.
        keep_prompt: whether the prompt's keys and values are kept, or made anew at every use.
        backend: of the kernels.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        inputs: UNetInputs,
        timesteps: Tensor,
        running: Running,
        stacked: Mapping[nn.Module, StackedProjection],
        keep_prompt: bool,
        backend: str,
    ) -> None:
        super().__init__(inputs)
        self.backend: Any = backend
        self.keep_prompt = keep_prompt
        self.unet = unet
        self.prompts = inputs.prompts
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

    def renew(self, inputs: Any, everyone: Rows, timesteps: Tensor) -> None:
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
                kept.copy_(self._project(attention, rows, rows))

    def one_step(self) -> UNetConditions:
        """The same with room for the time embedding of one step, as step 0."""
        one = copy.copy(self)
        one.times = None if self.times is None else torch.empty_like(self.times[:1])
        return one

    def load_step(self, whole_run: Conditions, index: int) -> None:
        if self.times is not None and whole_run.times is not None:
            self.times.copy_(whole_run.times[index : index + 1])

    def _times(self, inputs: UNetInputs, timesteps: Tensor) -> Tensor | None:
        """[steps, 1 or own rows, columns]: the embeddings of all steps, and every plain resnet's share of them."""
        table = self._time_table(inputs, timesteps)
        if table is None:
            return None
        # The embedding of the step has a place in the table, too. Its key is the module that makes it, not None: in a
        # compiled step torch.compile looks up modules in this dictionary, and cannot compare one with None.
        parts: dict[nn.Module, Tensor] = {self.unet.time_embedding: table}
        for module in self.modules:
            if module in self.plain and isinstance(module, ResnetBlock2D) and self._tabled(module.time_emb_proj):
                parts[module] = time_bias(module, table)
        ends = itertools.accumulate(part.shape[2] for part in parts.values())
        self._columns = {m: slice(end - part.shape[2], end) for (m, part), end in zip(parts.items(), ends, strict=True)}
        return torch.cat(list(parts.values()), 2)

    def _tabled(self, module: nn.Module) -> bool:
        """Whether a resnet's time projection can run for all steps at once."""
        return module not in self.carrying and _as_written(module)

    def _time_table(self, inputs: UNetInputs, timesteps: Tensor) -> Tensor | None:
        """[steps, 1 or own rows, width] embeddings of all steps; None where they must be computed step by step."""
        unet = self.unet
        embedders = (unet.time_embedding, getattr(unet, "add_embedding", None), unet.class_embedding)
        if any(m in self.carrying or not _as_written(m) for m in embedders if m is not None):
            return None  # a hook expects one step's rows, not the table of all steps
        if inputs.timestep_cond is not None or unet.class_embedding is not None:
            return None
        if inputs.prompts is not None and getattr(unet, "add_embedding", None) is not None:
            return None  # the pooled prompts are in it, by prediction
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
            return self._project(attention, rows, everyone)
        key = (attention, everyone.known)
        if key not in self._keys_values:
            with self.running.these(everyone):
                self._keys_values[key] = self._project(attention, everyone, everyone), everyone
        return pick(self._keys_values[key][0], rows.index)

    def context(self, rows: Rows, everyone: Rows) -> Tensor:
        """[rows, tokens, width] the prompt of some rows, by prediction where these have prompts of their own."""
        own, prompts = self.held.tensors[0], self.prompts
        if prompts is None:
            return whole(Shared(own, False, True), rows)
        return pick(
            by_prediction(own, [None if p is None else p["encoder_hidden_states"] for p in prompts], everyone),
            rows.index,
        )

    def pooled(self, own: Tensor, rows: Rows, everyone: Rows) -> Tensor:
        """[rows, width] SDXL's pooled prompt of some rows, `own` being the pipeline's."""
        prompts = self.prompts or ()
        return pick(
            by_prediction(own, [None if p is None else p["text_embeds"] for p in prompts], everyone), rows.index
        )

    def _project(self, attention: Any, rows: Rows, everyone: Rows) -> Tensor:
        context = self.context(rows, everyone)
        heads = [
            layer(context).unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for layer in (attention.to_k, attention.to_v)
        ]
        return torch.stack(heads, 1)

    @property
    def bytes(self) -> int:  # type: ignore[override]  # computed where the base class has a constant
        """Memory of what is kept for the run."""
        return sum(kept.nbytes for kept, _ in self._keys_values.values()) + (
            0 if self.times is None else self.times.nbytes
        )


def time_bias(resnet: Any, embedding: Tensor) -> Tensor:
    """[..., channels] that a resnet adds behind its first convolution, of time embeddings [..., width]."""
    bias: Tensor = resnet.time_emb_proj(embedding if resnet.skip_time_act else resnet.nonlinearity(embedding))
    return bias


def _as_written(module: nn.Module) -> bool:
    """Whether a module and all in it compute what their classes say: no hook, no forward but ours."""
    ours = forward_of(module) is not None and not hooked(module)
    return (ours or unhooked(module)) and untouched(module)


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
