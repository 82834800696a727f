"""UNet2DConditionModel of SD1.x, SD2.x and SDXL: how it is found and called, and its clock."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from cmlora.batch.running import Running
from cmlora.config import CMLoRAConfig
from cmlora.errors import ConfigError, RunError
from cmlora.models.caller import calling_pipeline
from cmlora.models.clock import index_in
from cmlora.models.family import Call, Family, Place
from cmlora.models.prompts import own_rows
from cmlora.models.unet.blocks import check_supported
from cmlora.models.unet.conditions import UNetInputs
from cmlora.models.unet.step import BatchedUNet


class UNetFamily(Family):
    """The pipelines below pass torch.cat([latents] * 2) under guidance, the conditional half last."""

    attribute = "unet"
    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
    )

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, UNet2DConditionModel)

    def check(self, module: Any) -> None:
        check_supported(module)

    def prompt(self, pipe: Any, name: str, given: Any) -> dict[str, Tensor]:
        if isinstance(given, str):
            if getattr(pipe, "tokenizer", None) is None or getattr(pipe, "text_encoder", None) is None:
                raise ConfigError(f"prompts[{name!r}] is text, but the pipeline has no tokenizer or text encoder")
            encode = functools.partial(pipe.encode_prompt, device=pipe._execution_device, num_images_per_prompt=1)
            with torch.no_grad():
                encoded = encode(prompt=given, do_classifier_free_guidance=False)
            given = (encoded[0], encoded[2]) if len(encoded) == 4 else encoded[0]  # SDXL: with pooled ones
        tensors = given if isinstance(given, list | tuple) else (given,)
        if not all(isinstance(t, Tensor) for t in tensors) or len(tensors) > 2 or tensors[0].ndim != 3:
            raise ConfigError(
                f"prompts[{name!r}] must be text, embeddings [images, tokens, width], or a pair of them and pooled "
                f"ones [images, width], got {type(given).__name__}"
            )
        return dict(zip(("encoder_hidden_states", "text_embeds"), tensors, strict=False))

    def spread_prompts(
        self, inputs: UNetInputs, prompts: Sequence[dict[str, Tensor] | None], images: int
    ) -> tuple[dict[str, Tensor] | None, ...]:
        own = {"encoder_hidden_states": inputs.encoder_hidden_states}
        if "text_embeds" in (inputs.added_cond_kwargs or {}):
            own["text_embeds"] = (inputs.added_cond_kwargs or {})["text_embeds"]
        return tuple(p and {key: own_rows(key, t, p, images) for key, t in own.items()} for p in prompts)

    def read(self, arguments: Mapping[str, Any]) -> Call:
        given = dict(arguments)
        kwargs = dict(given.pop("cross_attention_kwargs", None) or {})
        if "gligen" in kwargs:
            raise RunError("cross_attention_kwargs['gligen'] is not supported")
        scale = float(kwargs.pop("scale", 1.0))
        return_dict = given.pop("return_dict", True)
        return Call(UNetInputs(**given, cross_attention_kwargs=kwargs or None), scale, return_dict)

    def place(self, pipe: Any, scheduler: Any, call: Call) -> Place:
        """By where the timestep lies in memory: pipelines pass the elements of `scheduler.timesteps` on."""
        timestep, schedule = call.inputs.timestep, getattr(scheduler, "timesteps", None)
        index, guider = index_in(schedule, timestep), getattr(pipe, "guider", None)
        if getattr(guider, "_timestep", None) is not timestep:
            guider = None  # what it was told is not of this call
        if index is None:
            index = _guiders_step(guider, schedule)
        if index is None:
            raise RunError(
                "timestep must be an element of pipe.scheduler.timesteps (`for t in scheduler.timesteps`), so that "
                f"a step's position is known without reading the device; got {timestep!r}. Call set_timesteps of the "
                "scheduler of the pipeline that was accelerated and pass its elements on. Two threads that draw with "
                "one pipeline take each other's schedule away: let one wait for the other"
            )
        pipeline, by_itself = calling_pipeline(self.pipelines)
        if pipeline is None:
            return Place(scheduler.timesteps, index, conditional=None if guider is None else guider.is_conditional)
        guided = pipeline.do_classifier_free_guidance and call.inputs.sample.shape[0] % 2 == 0
        if guided and not by_itself:  # a wrapper of somebody else's: what it passes on is looked at
            guided = torch.equal(*call.inputs.sample.chunk(2))
        return Place(scheduler.timesteps, index, halves=2 if guided else 1, whole=True)

    def steps(self, pipe: Any, schedule: Tensor, first: int) -> int:
        count = schedule.shape[0] - first
        if getattr(pipe, "_denoising_end", None) is None:
            return count
        return min(count, getattr(pipe, "_num_timesteps", count))  # SDXL's base leaves the last steps to a refiner

    def batched(self, module: Any, config: CMLoRAConfig, running: Running) -> BatchedUNet:
        return BatchedUNet(module, config, running)

    def result(self, noise: Tensor, call: Call) -> Any:
        return UNet2DConditionOutput(sample=noise) if call.return_dict else (noise,)


def _guiders_step(guider: Any, schedule: Any) -> int | None:
    """The step that a modular pipeline told its guider of just before this call; None: none, or of a part of it."""
    if guider is None or not isinstance(schedule, Tensor) or guider._num_inference_steps != schedule.shape[0]:
        return None
    return int(guider._step)
