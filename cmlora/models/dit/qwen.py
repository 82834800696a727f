"""QwenImageTransformer2DModel: blocks of two streams; a call per guidance half, the conditional one first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from cmlora.batch.rows import Rows, Shared, pick, whole
from cmlora.batch.running import Running
from cmlora.config import CMLoRAConfig
from cmlora.errors import ConfigError, RunError, UnsupportedModelError
from cmlora.models.dit.family import TransformerFamily, layers_in, packed, unpacked
from cmlora.models.dit.step import (
    BatchedTransformer,
    State,
    TransformerConditions,
    TransformerInputs,
    TransformerPart,
)
from cmlora.models.family import Call
from cmlora.models.prompts import own_rows

TEXT, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"


@dataclass(kw_only=True)
class QwenInputs(TransformerInputs):
    """Names as in QwenImageTransformer2DModel.forward; `sample` is its hidden_states [own rows, tokens, channels]."""

    encoder_hidden_states_mask: Tensor | None = None
    guidance: Tensor | None = None
    controlnet_block_samples: Sequence[Tensor] | None = None

    CONSTANT = ("encoder_hidden_states", "encoder_hidden_states_mask", "guidance", "prompts")


class BatchedQwen(BatchedTransformer[QwenInputs]):
    """Steps of one QwenImageTransformer2DModel; its blocks are called as they are."""

    def list_blocks(self) -> list[Any]:
        return [*self.module.transformer_blocks]

    def positions(self, inputs: QwenInputs) -> tuple[Tensor, ...]:
        (height, width), text = inputs.size, inputs.encoder_hidden_states.shape[1]
        if isinstance(inputs.sample, FakeTensor):  # the embedder keeps what it has made, which must not be one of these
            half = sum(self.module.config.axes_dims_rope) // 2
            like = inputs.sample.new_empty(height * width + text, half, dtype=torch.complex64)
            return like[: height * width].clone(), like[height * width :].clone()
        shapes = [[(1, height, width)]]
        made = self.module.pos_embed(shapes, max_txt_seq_len=text, device=inputs.sample.device)
        return tuple(t.clone() for t in made)

    def text_embedders(self) -> set[nn.Module]:
        return {self.module.txt_norm, self.module.txt_in}

    def embed_text(self, conditions: TransformerConditions, inputs: QwenInputs, rows: Rows | None) -> Tensor:
        prompt = conditions.given(TEXT, inputs, rows)
        text: Tensor = self.module.txt_in(self.module.txt_norm(prompt))
        return text

    def embed_image(self, part: TransformerPart) -> Shared:
        return part.run(self.module.img_in, Shared(part.inputs.sample[: part.rows.images], False, False))

    def embed_time(self, part: TransformerPart) -> Shared:
        inputs, module = part.inputs, self.module
        time = Shared(inputs.timestep.to(inputs.sample.dtype).expand(part.rows.own), False, True)
        if module.time_text_embed in part.conditions.carrying:
            time = Shared(whole(time, part.rows), True, True)
        return Shared(module.time_text_embed(time.value, inputs.sample), time.by_prediction, True)

    def block(self, part: TransformerPart, index: int, state: State) -> State:
        block, inputs, given = self.blocks[index], part.inputs, part.inputs.controlnet_block_samples
        before, tokens, temb = part.rows_for(block, *part.apart(state), part.temb)
        mask = inputs.encoder_hidden_states_mask
        if mask is not None and before.by_prediction:
            mask = pick(part.conditions.given(MASK, inputs, part.everyone), part.rows.index)
        text, image = block(
            hidden_states=tokens.value,
            encoder_hidden_states=before.value,
            encoder_hidden_states_mask=None if mask is None else mask.bool(),
            temb=temb.value,
            image_rotary_emb=part.conditions.positions,
        )
        changed = replace(tokens, value=image)
        if given is not None:
            changed = part.add_own(changed, given[index // -(-len(self.blocks) // len(given))])
        return replace(before, value=text), changed

    def finish(self, part: TransformerPart, image: Tensor) -> Tensor:
        noise: Tensor = self.module.proj_out(self.module.norm_out(image, whole(part.temb, part.rows)))
        return noise

    def latents(self, inputs: QwenInputs) -> Tensor:
        return unpacked(inputs.sample, inputs.size)

    def as_image(self, noise: Tensor, inputs: QwenInputs) -> Tensor:
        return unpacked(noise, inputs.size)

    def as_noise(self, image: Tensor) -> Tensor:
        return packed(image)

    def placeless(self) -> set[nn.Module]:
        parts = [self.module.txt_in, self.module.time_text_embed]
        for block in self.blocks:
            attn = block.attn
            parts += [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out, block.txt_mlp, block.txt_mod]
        return layers_in(parts)


class QwenFamily(TransformerFamily):
    """Qwen-Image; its editing pipelines pass pictures beside the latents and are refused."""

    kind = QwenImageTransformer2DModel
    kwargs = "attention_kwargs"
    pipelines = (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
    )
    text_kinds = (TEXT, MASK)

    def check(self, module: Any) -> None:
        super().check(module)
        for name in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if module.config.get(name, False):
                raise UnsupportedModelError(f"this QwenImageTransformer2DModel has {name}, as editing models have")

    def passed(self, timesteps: Tensor) -> Tensor:
        return timesteps / 1000

    def read(self, arguments: Mapping[str, Any]) -> Call:
        given = dict(arguments)
        scale, return_dict = self.take_kwargs(given), given.pop("return_dict", True)
        sample = given.pop("hidden_states")
        shapes = [shape if isinstance(shape, list) else [shape] for shape in given.pop("img_shapes")]
        if len(shapes[0]) != 1 or shapes[0][0][0] != 1 or any(shape != shapes[0] for shape in shapes):
            raise RunError(
                f"img_shapes must be one image [(1, height, width)] for every row, got {shapes}: reference images "
                "beside the latents (QwenImageEditPipeline and its relatives) are not supported"
            )
        if given.pop("additional_t_cond", None) is not None:
            raise RunError("additional_t_cond is not supported")
        if given.get("guidance") is not None:
            raise RunError("guidance must be None: QwenImageTransformer2DModel cannot take it")
        _, height, width = shapes[0][0]
        return Call(QwenInputs(sample=sample, size=(height, width), **given), scale, return_dict)

    def encode(self, encode_prompt: Any, text: str) -> tuple[Tensor, ...]:
        with torch.no_grad():
            embeddings, mask = encode_prompt(prompt=text)
        return (embeddings,) if mask is None else (embeddings, mask)

    def prompt(self, pipe: Any, name: str, given: Any) -> dict[str, Tensor]:
        found = super().prompt(pipe, name, given)
        if MASK in found and found[MASK].all():  # as encode_prompt: nothing is masked
            del found[MASK]
        return found

    def spread_prompts(
        self, inputs: QwenInputs, prompts: Sequence[dict[str, Tensor] | None], images: int
    ) -> tuple[dict[str, Tensor] | None, ...]:
        text, own = inputs.encoder_hidden_states, inputs.encoder_hidden_states_mask
        if own is None and any(MASK in (p or {}) for p in prompts):
            raise ConfigError("prompts must be without masked tokens, as the pipeline's own prompt is")
        spread = []
        for p in prompts:
            rows = p and {TEXT: own_rows(TEXT, text, p, images)}
            if rows and p and own is not None:
                whole = {MASK: own.new_ones(1, own.shape[1])}
                rows[MASK] = own_rows(MASK, own, whole | p, images)
            spread.append(rows)
        return tuple(spread)

    def batched(self, module: Any, config: CMLoRAConfig, running: Running) -> BatchedQwen:
        return BatchedQwen(module, config, running)
