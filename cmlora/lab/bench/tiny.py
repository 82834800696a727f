"""Tiny pipelines with the block structure of SD1.5 and SDXL, random LoRAs, and calls with tensors given.

All of it lies on the GPU where there is one, unless a builder is told otherwise.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where pipelines and tensors are put by default."""

ATTENTION = r"(to_q|to_k|to_v|to_out\.0)$"
EVERYTHING = (
    r"(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2|conv1|conv2|conv_shortcut|time_emb_proj|conv)$"
)


def sd_unet(seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """SD1.5's blocks at 16 and 32 channels, random weights; `overrides` of its config. On torch's default device."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (16, 32, 32, 32),
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    return UNet2DConditionModel(**(config | overrides)).eval()


def sdxl_unet(seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """SDXL's blocks, as `sd_unet`."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 1, 2),
        "projection_class_embeddings_input_dim": 72,
        "cross_attention_dim": 48,
    }
    return UNet2DConditionModel(**(config | overrides)).eval()


def _vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
    )


def _text(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=99,
        projection_dim=24,
        bos_token_id=0,
        eos_token_id=1,
    )


def ddim() -> DDIMScheduler:
    """As SD1.5's scheduler is configured."""
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sd_pipe(
    unet: UNet2DConditionModel | None = None,
    scheduler: Any = None,
    kind: Any = StableDiffusionPipeline,
    device: str | None = DEVICE,
    **parts: Any,
) -> Any:
    """A pipeline with `sd_unet`, or the UNet given, without tokenizer; device None: every part stays where it is."""
    unet = unet or sd_unet()
    pipe = kind(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text(unet.config.cross_attention_dim)),
        tokenizer=None,
        unet=unet,
        scheduler=scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


def sdxl_pipe(
    unet: UNet2DConditionModel | None = None,
    scheduler: Any = None,
    kind: Any = StableDiffusionXLPipeline,
    device: str | None = DEVICE,
    **parts: Any,
) -> Any:
    """The same with `sdxl_unet`."""
    unet = unet or sdxl_unet()
    pipe = kind(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text(24)),
        text_encoder_2=CLIPTextModelWithProjection(_text(24)),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler or ddim(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


def add_lora(
    model: Any, name: str, rank: int = 4, alpha: float | None = None, pattern: str = ATTENTION, seed: int = 1
) -> str:
    """Load random LoRA weights through diffusers, on the linear and convolution layers that match `pattern`.

    Returns the adapter's name.
    """
    generator = torch.Generator().manual_seed(seed)
    state, alphas = {}, {}
    for path, module in model.named_modules():
        path = path.replace(".base_layer", "")
        if not re.search(pattern, path) or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        shape: tuple[int, ...] = tuple(module.weight.shape)
        if isinstance(module, nn.Linear):  # whose weight may be quantised, and of another shape
            shape = module.out_features, module.in_features
        down = torch.randn(rank, *shape[1:], generator=generator) / math.prod(shape[1:]) ** 0.5
        up = torch.randn(shape[0], rank, *([1, 1] if len(shape) == 4 else []), generator=generator) * 0.1
        state[f"unet.{path}.lora_A.weight"], state[f"unet.{path}.lora_B.weight"] = down, up
        if alpha is not None:
            alphas[f"unet.{path}.alpha"] = alpha
    model.load_lora_adapter(state, prefix="unet", adapter_name=name, network_alphas=alphas or None)
    return name


def embeddings(pipe: Any, images: int = 1, seed: int = 3, size: tuple[int, int] = (16, 16)) -> dict[str, Tensor]:
    """The tensors of one call, as keyword arguments of the pipeline, on its device; `size` is the latents'."""
    generator = torch.Generator().manual_seed(seed)
    width = pipe.unet.config.cross_attention_dim
    given = {
        "prompt_embeds": torch.randn(images, 77, width, generator=generator),
        "negative_prompt_embeds": torch.randn(images, 77, width, generator=generator),
        "latents": torch.randn(images, 4, *size, generator=generator),
    }
    if hasattr(pipe, "text_encoder_2"):
        given["pooled_prompt_embeds"] = torch.randn(images, 24, generator=generator)
        given["negative_pooled_prompt_embeds"] = torch.randn(images, 24, generator=generator)
    return {name: tensor.to(pipe.device) for name, tensor in given.items()}


def call(
    pipe: Any, steps: int = 4, guidance: float = 7.5, given: dict[str, Tensor] | None = None, **kwargs: Any
) -> Tensor:
    """One pipeline call with `given`, or `embeddings`; returns latents [images, 4, height, width]."""
    given = dict(given or embeddings(pipe))
    height, width = (8 * side for side in given["latents"].shape[-2:])
    if guidance <= 1:
        given = {k: v for k, v in given.items() if not k.startswith("negative")}
    given["latents"] = given["latents"].clone()
    latents: Tensor = pipe(
        **given,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **kwargs,
    ).images
    return latents


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of `want`."""
    return float((got - want).norm() / want.norm())


SMALL = {  # of sd_unet: what is quickest
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def three_adapters(pattern: str = EVERYTHING, device: str = DEVICE, **unet: Any) -> Any:
    """A pipeline with two high adapters and a low one, all active; `unet`: overrides of `sd_unet`."""
    pipe = sd_pipe(sd_unet(**unet), device=device)
    names = ["character", "style", "background"]
    for i, name in enumerate(names):
        add_lora(pipe.unet, name, rank=2 + i, pattern=pattern, seed=i + 1)
    pipe.set_adapters(names)
    return pipe


def noises(
    pipe: Any,
    steps: int = 3,
    images: int = 2,
    guidance: float = 7.5,
    size: int = 8,
    controlled: bool = False,
    seed: int = 0,
    **kwargs: Any,
) -> list[Tensor]:
    """The UNet's answers to latents of our own, so that rounding is not amplified from step to step.

    controlled: with residuals of a ControlNet, for SMALL.
    """
    generator, device = torch.Generator().manual_seed(seed), pipe.unet.device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    halves = 2 if guidance > 1 else 1
    context = random(halves * images, 77, pipe.unet.config.cross_attention_dim)
    pipe._guidance_scale = guidance
    pipe.scheduler.set_timesteps(steps, device=device)
    found = []
    for t in pipe.scheduler.timesteps:
        sample = torch.cat([random(images, 4, size, size)] * halves)
        if controlled:
            skips = [(16, size), (16, size), (16, size // 2), (32, size // 2)]
            kwargs["down_block_additional_residuals"] = [random(halves * images, c, s, s) for c, s in skips]
            kwargs["mid_block_additional_residual"] = random(halves * images, 32, size // 2, size // 2)
        found.append(pipe.unet(sample, t, context, **kwargs).sample)
    return found
