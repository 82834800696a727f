"""Tiny pipelines with the block structure of SD1.5 and SDXL, random LoRAs, and the peer: one adapter after the other.

The peer is the algorithm of the published code with PEFT's own set_adapters and forward; it shares no code with ours.
"""

from __future__ import annotations

import re

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ATTENTION = r"(to_q|to_k|to_v|to_out\.0)$"
EVERYTHING = (
    r"(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2|conv1|conv2|conv_shortcut|time_emb_proj|conv)$"
)


def sd_unet(seed: int = 0, **overrides) -> UNet2DConditionModel:
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


def sdxl_unet(seed: int = 0, **overrides) -> UNet2DConditionModel:
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
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sd_pipe(unet: UNet2DConditionModel | None = None, scheduler=None, kind=StableDiffusionPipeline, **parts):
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
    return pipe


def sdxl_pipe(unet: UNet2DConditionModel | None = None, scheduler=None, kind=StableDiffusionXLPipeline, **parts):
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
    return pipe


def add_lora(
    model: nn.Module, name: str, rank: int = 4, alpha: float | None = None, pattern: str = ATTENTION, seed: int = 1
) -> str:
    """Load random LoRA weights through diffusers, on the linear and convolution layers that match `pattern`."""
    generator = torch.Generator().manual_seed(seed)
    state, alphas = {}, {}
    for path, module in model.named_modules():
        path = path.replace(".base_layer", "")
        if not re.search(pattern, path) or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight = module.weight
        fan_in = weight[0].numel()
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / fan_in**0.5
        up = torch.randn(weight.shape[0], rank, *([1, 1] if weight.ndim == 4 else []), generator=generator) * 0.1
        state[f"unet.{path}.lora_A.weight"], state[f"unet.{path}.lora_B.weight"] = down, up
        if alpha is not None:
            alphas[f"unet.{path}.alpha"] = alpha
    model.load_lora_adapter(state, prefix="unet", adapter_name=name, network_alphas=alphas or None)
    return name


def embeddings(pipe, images: int = 1, seed: int = 3, size: tuple[int, int] = (16, 16)) -> dict:
    """The tensors of one call, as keyword arguments of the pipeline."""
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
    return given


def call(pipe, steps: int = 4, guidance: float = 7.5, given: dict | None = None, **kwargs) -> torch.Tensor:
    """One pipeline call with embeddings given; returns latents."""
    given = dict(given or embeddings(pipe))
    height, width = (8 * side for side in given["latents"].shape[-2:])
    if guidance <= 1:
        given = {k: v for k, v in given.items() if not k.startswith("negative")}
    given["latents"] = given["latents"].clone()
    return pipe(
        **given,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **kwargs,
    ).images


class Sequential:
    """The peer: replaces the UNet's forward by N PEFT passes, one adapter after the other, with DeepCache in between.

    Args:
        names: adapters, in order. weights: of set_adapters.
        interval: steps between refreshes; the dominant adapter is refreshed, in turn.
        dominance: weight of the dominant adapter before normalisation; None: a plain mean, all refreshed together.
        deviation: add the adapters' differences from the base model instead of taking their mean.
        follow: whenever the base model's feature is refreshed, all cached features move by its difference.
    """

    def __init__(self, unet, names, weights=None, interval=1, dominance=None, deviation=False, follow=False):
        self.unet, self.names, self.interval = unet, list(names), interval
        self.weights = list(weights or [1.0] * len(names))
        self.dominance, self.deviation, self.follow = dominance, deviation, follow
        self.calls, self.turn, self.dominant = 0, -1, None
        self.features: dict[str | None, torch.Tensor] = {}
        self.full_passes: list[list[str | None]] = []
        self.predictions: list[dict[str | None, torch.Tensor]] = []
        self.original = unet.forward
        unet.forward = self

    def close(self):
        del self.unet.__dict__["forward"]

    def __call__(self, *args, **kwargs):
        refreshing = self.calls % self.interval == 0
        if refreshing:
            self.turn += 1
            self.dominant = self.names[self.turn % len(self.names)]
        who = [None, *self.names] if self.deviation else self.names
        self.full_passes.append([])
        seen = {}
        for name in who:
            stale = refreshing and (self.dominance is None or name in (self.dominant, None))
            full = self.calls == 0 or self.interval == 1 or stale
            before = self.features.get(name)
            seen[name] = self._pass(name, full, args, kwargs)
            if name is None and full and before is not None and self.follow:
                moved = self.features[None] - before
                self.features |= {adapter: self.features[adapter] + moved for adapter in self.names}
        self.predictions.append(seen)
        self.calls += 1
        return (self._combine(seen),)

    def _combine(self, seen):
        n = len(self.names)
        weight = 1.0 if self.dominance is None else self.dominance
        other = n / (weight + n - 1)
        w = {name: weight * other if name == self.dominant and self.dominance else other for name in self.names}
        if self.deviation:
            base = seen[None]
            return base + sum(w[name] * (seen[name] - base) for name in self.names)
        return torch.stack([w[name] * seen[name] for name in self.names]).mean(0)

    def _pass(self, name, full, args, kwargs):
        unet = self.unet
        if name is None:
            unet.disable_lora() if hasattr(unet, "disable_lora") else unet.disable_adapters()
        else:
            unet.set_adapters([name], [self.weights[self.names.index(name)]])
        try:
            if full:
                self.full_passes[-1].append(name)
            return self._full(name, args, kwargs) if full else self._shallow(name, *args, **kwargs)
        finally:
            if name is None:
                unet.enable_lora() if hasattr(unet, "enable_lora") else unet.enable_adapters()

    def _full(self, name, args, kwargs):
        skip = self.unet.down_blocks[0].resnets[-1].out_channels

        def keep(module, inputs):
            self.features[name] = inputs[0][:, :-skip]

        handle = self.unet.up_blocks[-1].resnets[0].register_forward_pre_hook(keep)
        try:
            return self.original(*args, **kwargs)[0]
        finally:
            handle.remove()

    def _shallow(self, name, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, **kwargs):
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample, timestep))
        extra = unet.get_aug_embed(emb, encoder_hidden_states, added_cond_kwargs)
        emb = emb if extra is None else emb + extra
        hidden = unet.conv_in(sample)
        skips = [hidden]
        hidden_states = {"encoder_hidden_states": encoder_hidden_states, "return_dict": False}

        def layers(block):
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            return zip(block.resnets, attentions, strict=True)

        for resnet, attention in layers(unet.down_blocks[0]):
            hidden = resnet(hidden, emb)
            hidden = hidden if attention is None else attention(hidden, **hidden_states)[0]
            skips.append(hidden)
        hidden = self.features[name]
        for resnet, attention in layers(unet.up_blocks[-1]):
            hidden = resnet(torch.cat([hidden, skips.pop()], 1), emb)
            hidden = hidden if attention is None else attention(hidden, **hidden_states)[0]
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `want`."""
    return ((got - want).norm() / want.norm()).item()


SMALL = {  # of sd_unet: what is quickest
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def three_adapters(pattern: str = EVERYTHING, **unet):
    """A pipeline with two high adapters and a low one, all active."""
    pipe = sd_pipe(sd_unet(**unet))
    names = ["character", "style", "background"]
    for i, name in enumerate(names):
        add_lora(pipe.unet, name, rank=2 + i, pattern=pattern, seed=i + 1)
    pipe.set_adapters(names)
    return pipe


def noises(pipe, steps=3, images=2, guidance=7.5, size=8, controlled=False, seed=0, **kwargs) -> list[torch.Tensor]:
    """The UNet's answers to latents of our own, so that rounding is not amplified from step to step.

    controlled: with residuals of a ControlNet, for SMALL.
    """
    generator, device = torch.Generator().manual_seed(seed), pipe.unet.device

    def random(*shape):
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
