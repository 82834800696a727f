"""SD3Transformer2DModel: blocks of two streams; both guidance halves in one call, the conditional one last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from cmlora.batch.rows import Rows, Shared, pick, whole
from cmlora.batch.running import Running
from cmlora.config import CMLoRAConfig
from cmlora.errors import RunError, UnsupportedModelError
from cmlora.models.dit.family import TransformerFamily, layers_in
from cmlora.models.dit.step import (
    BatchedTransformer,
    State,
    TransformerConditions,
    TransformerInputs,
    TransformerPart,
)
from cmlora.models.family import Call

PATCH = 2


@dataclass(kw_only=True)
class SD3Inputs(TransformerInputs):
    """Names as in SD3Transformer2DModel.forward; `sample` is its hidden_states [own rows, channels, height, width]."""

    pooled_projections: Tensor
    block_controlnet_hidden_states: Sequence[Tensor] | None = None

    CONSTANT = ("encoder_hidden_states", "pooled_projections", "prompts")


class BatchedSD3(BatchedTransformer[SD3Inputs]):
    """Steps of one SD3Transformer2DModel; its blocks are called as they are."""

    def list_blocks(self) -> list[Any]:
        return [*self.module.transformer_blocks]

    def positions(self, inputs: SD3Inputs) -> tuple[Tensor, ...]:
        return ()  # in the patch embedder

    def text_embedders(self) -> set[nn.Module]:
        return {self.module.context_embedder}

    def embed_text(self, conditions: TransformerConditions, inputs: SD3Inputs, rows: Rows | None) -> Tensor:
        text: Tensor = self.module.context_embedder(conditions.given("encoder_hidden_states", inputs, rows))
        return text

    def embed_image(self, part: TransformerPart) -> Shared:
        image = part.run(self.module.pos_embed, Shared(part.inputs.sample[: part.rows.images], False, False))
        return Shared(image.value.contiguous(), image.by_prediction, image.by_half)

    def embed_time(self, part: TransformerPart) -> Shared:
        module, inputs, conditions = self.module, part.inputs, part.conditions
        if conditions.prompts is None and module.time_text_embed not in conditions.carrying:
            return Shared(module.time_text_embed(inputs.timestep, inputs.pooled_projections), False, True)
        pooled = pick(conditions.given("pooled_projections", inputs, part.everyone), part.rows.index)
        time = whole(Shared(inputs.timestep.expand(part.rows.own), False, True), part.rows)
        return Shared(module.time_text_embed(time, pooled), True, True)

    def block(self, part: TransformerPart, index: int, state: State) -> State:
        block, given = self.blocks[index], part.inputs.block_controlnet_hidden_states
        before, tokens, temb = part.rows_for(block, *part.apart(state), part.temb)
        text, image = block(hidden_states=tokens.value, encoder_hidden_states=before.value, temb=temb.value)
        after = before if text is None else replace(before, value=text)  # nothing reads it behind the last block
        changed = replace(tokens, value=image)
        if given is not None and not block.context_pre_only:
            changed = part.add_own(changed, given[int(index / (len(self.blocks) / len(given)))])
        return after, changed

    def finish(self, part: TransformerPart, image: Tensor) -> Tensor:
        module, (height, width) = self.module, part.inputs.size
        patches = module.proj_out(module.norm_out(image, whole(part.temb, part.rows)))
        patches = patches.view(-1, height, width, PATCH, PATCH, module.out_channels).permute(0, 5, 1, 3, 2, 4)
        noise: Tensor = patches.reshape(-1, module.out_channels, height * PATCH, width * PATCH)
        return noise

    def latents(self, inputs: SD3Inputs) -> Tensor:
        return inputs.sample[:, : self.module.out_channels]  # inpainting passes its mask behind them

    def placeless(self) -> set[nn.Module]:
        parts = [self.module.context_embedder, self.module.time_text_embed]
        for block in self.blocks:
            attn = block.attn
            parts += [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, getattr(attn, "to_add_out", None)]
            parts += [block.ff_context, block.norm1_context]
        return layers_in(parts)


class SD3Family(TransformerFamily):
    """Stable Diffusion 3 and 3.5."""

    kind = SD3Transformer2DModel
    pipelines = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
    )
    text_kinds = ("encoder_hidden_states", "pooled_projections")

    def check(self, module: Any) -> None:
        super().check(module)
        if module.config.patch_size != PATCH:
            raise UnsupportedModelError(f"patch_size must be {PATCH}, got {module.config.patch_size}")

    def read(self, arguments: Mapping[str, Any]) -> Call:
        given = dict(arguments)
        scale, return_dict = self.take_kwargs(given), given.pop("return_dict", True)
        if given.pop("skip_layers", None) is not None:
            raise RunError("skip_layers is not supported: call the pipeline without skip_guidance_layers")
        sample = given.pop("hidden_states")
        size = (sample.shape[2] // PATCH, sample.shape[3] // PATCH)
        return Call(SD3Inputs(sample=sample, size=size, **given), scale, return_dict)

    def guidance(self, frame: FrameType | None, by_itself: bool, inputs: Any) -> tuple[int, bool, bool | None]:
        if frame is None:
            return 1, False, None
        guided = frame.f_locals["self"].do_classifier_free_guidance and inputs.sample.shape[0] % 2 == 0
        if guided and not by_itself:  # a wrapper of somebody else's: what it passes on is looked at
            guided = torch.equal(*inputs.sample.chunk(2))
        return (2 if guided else 1), True, None

    def encode(self, encode_prompt: Any, text: str) -> tuple[Tensor, ...]:
        with torch.no_grad():
            encoded = encode_prompt(prompt=text, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)
        return encoded[0], encoded[2]

    def batched(self, module: Any, config: CMLoRAConfig, running: Running) -> BatchedSD3:
        return BatchedSD3(module, config, running)
