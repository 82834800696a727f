"""FluxTransformer2DModel: blocks of two streams, then of one; guidance is distilled, or a call per half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cmlora.batch.rows import Rows, Shared, pick, whole
from cmlora.batch.running import Running
from cmlora.config import CMLoRAConfig
from cmlora.errors import RunError, UnsupportedModelError
from cmlora.models.caller import calling_frame
from cmlora.models.dit.family import TransformerFamily, layers_in, packed, unpacked
from cmlora.models.dit.flux_blocks import double_block, is_plain, single_block
from cmlora.models.dit.step import BatchedTransformer, State, TransformerConditions, TransformerInputs, TransformerPart
from cmlora.models.family import Call


@dataclass(kw_only=True)
class FluxInputs(TransformerInputs):
    """Names as in FluxTransformer2DModel.forward; `sample` is its hidden_states [own rows, tokens, channels]."""

    pooled_projections: Tensor
    img_ids: Tensor
    txt_ids: Tensor
    guidance: Tensor | None = None
    controlnet_block_samples: Sequence[Tensor] | None = None
    controlnet_single_block_samples: Sequence[Tensor] | None = None
    controlnet_blocks_repeat: bool = False

    CONSTANT = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance", "prompts")


class BatchedFlux(BatchedTransformer[FluxInputs]):
    """Steps of one FluxTransformer2DModel."""

    def list_blocks(self) -> list[Any]:
        return [*self.module.transformer_blocks, *self.module.single_transformer_blocks]

    def plain_blocks(self) -> frozenset[nn.Module]:
        return frozenset(block for block in self.blocks if is_plain(block))

    def positions(self, inputs: FluxInputs) -> tuple[Tensor, ...]:
        ids = [x[0] if x.ndim == 3 else x for x in (inputs.txt_ids, inputs.img_ids)]
        cos, sin = self.module.pos_embed(torch.cat(ids))
        return cos, sin, torch.stack((cos[:, ::2], sin[:, ::2]), -1).float()

    def text_embedders(self) -> set[nn.Module]:
        return {self.module.context_embedder}

    def embed_text(self, conditions: TransformerConditions, inputs: FluxInputs, rows: Rows | None) -> Tensor:
        text: Tensor = self.module.context_embedder(conditions.given("encoder_hidden_states", inputs, rows))
        return text

    def embed_image(self, part: TransformerPart) -> Shared:
        return part.run(self.module.x_embedder, Shared(part.inputs.sample[: part.rows.images], False, False))

    def embed_time(self, part: TransformerPart) -> Shared:
        module, inputs, conditions = self.module, part.inputs, part.conditions
        dtype = inputs.sample.dtype
        times = [t.to(dtype) * 1000 for t in (inputs.timestep, inputs.guidance) if t is not None]
        if conditions.prompts is None and module.time_text_embed not in conditions.carrying:
            return Shared(module.time_text_embed(*times, inputs.pooled_projections), False, True)
        pooled = conditions.given("pooled_projections", inputs, part.everyone)
        times = [whole(Shared(t.expand(part.rows.own), False, True), part.rows) for t in times]
        return Shared(module.time_text_embed(*times, pick(pooled, part.rows.index)), True, True)

    def block(self, part: TransformerPart, index: int, state: State) -> State:
        block, inputs, double = self.blocks[index], part.inputs, index < len(self.module.transformer_blocks)
        if block in part.conditions.plain:
            state = double_block(block, part, *part.apart(state)) if double else single_block(block, part, state)
        else:
            before, tokens, temb = part.rows_for(block, *part.apart(state), part.temb)
            text, image = block(
                hidden_states=tokens.value,
                encoder_hidden_states=before.value,
                temb=temb.value,
                image_rotary_emb=part.conditions.positions[:2],
            )
            state = (replace(before, value=text), replace(tokens, value=image))
        residual = _residual(inputs, index, len(self.module.transformer_blocks), len(self.blocks))
        if residual is None:
            return state
        prompt, picture = part.apart(state)
        return prompt, part.add_own(picture, residual)

    def finish(self, part: TransformerPart, image: Tensor) -> Tensor:
        noise: Tensor = self.module.proj_out(self.module.norm_out(image, whole(part.temb, part.rows)))
        return noise

    def latents(self, inputs: FluxInputs) -> Tensor:
        channels = self.module.out_channels  # filling and control pass their conditions behind the latents
        return unpacked(inputs.sample[:, :, :channels], inputs.size)

    def as_image(self, noise: Tensor, inputs: FluxInputs) -> Tensor:
        return unpacked(noise, inputs.size)

    def as_noise(self, image: Tensor) -> Tensor:
        return packed(image)

    def placeless(self) -> set[nn.Module]:
        parts = [self.module.context_embedder, self.module.time_text_embed]
        for block in self.module.transformer_blocks:
            attn = block.attn
            parts += [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out, block.ff_context]
        return layers_in(parts)


def _residual(inputs: FluxInputs, index: int, doubles: int, blocks: int) -> Tensor | None:
    """What a ControlNet adds to the image behind a block, as FluxTransformer2DModel.forward picks it."""
    if index < doubles:
        samples, count, repeat = inputs.controlnet_block_samples, doubles, inputs.controlnet_blocks_repeat
    else:
        samples, count, repeat = inputs.controlnet_single_block_samples, blocks - doubles, False
        index -= doubles
    if samples is None:
        return None
    return samples[index % len(samples) if repeat else index // -(-count // len(samples))]


class FluxFamily(TransformerFamily):
    """Flux: latents are tokens of 2 x 2 pixels; under true guidance the pipeline calls the conditional half first."""

    kind = FluxTransformer2DModel
    pipelines = (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    )
    text_kinds = ("encoder_hidden_states", "pooled_projections", None)

    def __init__(self) -> None:
        self._sizes: Any = WeakTensorKeyDictionary()

    def check(self, module: Any) -> None:
        super().check(module)
        if module.out_channels % 4:
            raise UnsupportedModelError(f"out_channels must be 2 x 2 pixels of latents, got {module.out_channels}")

    def passed(self, timesteps: Tensor) -> Tensor:
        return timesteps / 1000

    def read(self, arguments: Mapping[str, Any]) -> Call:
        given = dict(arguments)
        scale, return_dict = self.take_kwargs(given), given.pop("return_dict", True)
        sample = given.pop("hidden_states")
        size = self._size(given["img_ids"], sample.shape[1])
        return Call(FluxInputs(sample=sample, size=size, **given), scale, return_dict)

    def _size(self, img_ids: Tensor, tokens: int) -> tuple[int, int]:
        """Height and width of the image in tokens: as a pipeline says, else of the largest position, read once."""
        frame, _ = calling_frame(self.pipelines)
        if frame is not None:
            said = frame.f_locals
            side = 2 * said["self"].vae_scale_factor
            if said.get("height") and said.get("width"):
                size = int(said["height"]) // side, int(said["width"]) // side
                if size[0] * size[1] == tokens:
                    return size
        if img_ids not in self._sizes:
            ids = img_ids[0] if img_ids.ndim == 3 else img_ids
            self._sizes[img_ids] = (ids.amax(0) - ids.amin(0) + 1).int().tolist()
        images, height, width = self._sizes[img_ids]
        if images != 1 or height * width != tokens:
            raise RunError(
                f"img_ids must name the places of one image, got {images} x {height} x {width} places for {tokens} "
                "tokens: reference images beside the latents (FluxKontextPipeline) are not supported"
            )
        return height, width

    def encode(self, encode_prompt: Any, text: str) -> tuple[Tensor, ...]:
        with torch.no_grad():
            embeddings, pooled, _ = encode_prompt(prompt=text, prompt_2=None)
        return embeddings, pooled

    def batched(self, module: Any, config: CMLoRAConfig, running: Running) -> BatchedFlux:
        return BatchedFlux(module, config, running)
