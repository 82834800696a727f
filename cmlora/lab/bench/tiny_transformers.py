"""Tiny pipelines of the transformer families: random weights, no VAE, no text encoders, calls with tensors given.

All on the CPU unless a device is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor

from cmlora.lab.bench.tiny import DEVICE, add_lora

TEXT, WIDTH, POOLED = 7, 24, 20
"""Tokens of a prompt, their width, and the pooled prompt's."""
NAMES = ("character", "style", "background", "pose")


@dataclass(frozen=True)
class Kind:
    """A family at its smallest.

    Attributes:
        model: makes its transformer. pipeline: diffusers' class.
        layers: pattern of the linear layers in its blocks; edges: those and all that lie around the blocks.
        blocks: the attributes that hold its blocks.
    """

    model: Callable[..., Any]
    pipeline: Any
    layers: str
    edges: str
    blocks: tuple[str, ...]


def flux(**config: Any) -> Any:
    """Two blocks of two streams, three of one."""
    given = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": POOLED,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**(given | config))


def sd3(**config: Any) -> Any:
    """Four blocks, the first with a second attention."""
    given = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return SD3Transformer2DModel(**(given | config))


def qwen(**config: Any) -> Any:
    """Four blocks."""
    given = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 4, 8),
    }
    return QwenImageTransformer2DModel(**(given | config))


def z_image(**config: Any) -> Any:
    """A refiner of either stream, four blocks."""
    given = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WIDTH,
        "axes_dims": [4, 4, 8],
        "axes_lens": [128, 32, 32],
    }
    return ZImageTransformer2DModel(**(given | config))


ATTENTION = r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"
KINDS = {
    "flux": Kind(
        flux,
        FluxPipeline,
        r"blocks.*(to_[qkv]|to_out\.0|add_q_proj|to_add_out|proj_mlp|proj_out|net\.0\.proj|net\.2)$",
        r"(x_embedder|context_embedder|linear_1|norm1\.linear|norm1_context\.linear|norm\.linear|to_q|proj_out|net\.2)$",
        ("transformer_blocks", "single_transformer_blocks"),
    ),
    "sd3": Kind(
        sd3,
        StableDiffusion3Pipeline,
        r"blocks.*(to_[qkv]|to_out\.0|add_q_proj|to_add_out|net\.0\.proj|net\.2)$",
        r"(pos_embed\.proj|context_embedder|linear_1|norm1\.linear|norm1_context\.linear|norm_out\.linear|to_q|net\.2)$",
        ("transformer_blocks",),
    ),
    "qwen": Kind(
        qwen,
        QwenImagePipeline,
        r"blocks.*(to_[qkv]|to_out\.0|add_q_proj|to_add_out|net\.0\.proj|net\.2)$",
        r"(img_in|txt_in|linear_1|img_mod\.1|txt_mod\.1|norm_out\.linear|to_q|proj_out|net\.2)$",
        ("transformer_blocks",),
    ),
    "z_image": Kind(
        z_image,
        ZImagePipeline,
        r"(layers|noise_refiner).*(to_[qkv]|to_out\.0|w1|w2)$",
        r"(cap_embedder\.1|mlp\.0|adaLN_modulation\.[01]|to_q|linear|w2)$",
        ("layers",),
    ),
}


def transformer(kind: str, seed: int = 0, **config: Any) -> Any:
    """The transformer of a kind; zeros that training begins with are noise: they would hide what LoRAs change."""
    torch.manual_seed(seed)
    model = KINDS[kind].model(**config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.is_meta and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def pipeline(kind: str, model: Any = None, device: str = DEVICE, **parts: Any) -> Any:
    """A pipeline around a transformer, and nothing else in it."""
    model = model or transformer(kind)
    cls = parts.pop("cls", KINDS[kind].pipeline)
    empty = dict.fromkeys(n for n in cls._get_signature_types() if n not in ("transformer", "scheduler"))
    pipe = cls(**(empty | {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler()} | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def with_loras(pipe: Any, kind: str, count: int = 3, edges: bool = False) -> Any:
    """`count` adapters of ranks 3, 4, ... on the blocks' linear layers, or on those around them, too; all active."""
    pattern = KINDS[kind].edges if edges else KINDS[kind].layers
    for i, name in enumerate(NAMES[:count]):
        add_lora(pipe.transformer, name, rank=3 + i, pattern=pattern, seed=i + 1)
    pipe.transformer.set_adapters(list(NAMES[:count]))
    return pipe


def draw(
    pipe: Any, kind: str, steps: int = 4, images: int = 1, guided: bool = False, seed: int = 3, **kwargs: Any
) -> Tensor:
    """Latents of one call at 16 x 16 latent pixels; guided: with true guidance."""
    generator, device = torch.Generator().manual_seed(seed), pipe.transformer.device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, pipe.transformer.dtype)

    def prompt(sign: str) -> dict[str, Any]:
        if kind == "z_image":  # of different lengths
            made: Any = [random(40 if sign and i == 0 else TEXT + i, WIDTH) for i in range(images)]
            return {f"{sign}prompt_embeds": made}
        given: dict[str, Any] = {f"{sign}prompt_embeds": random(images, TEXT, WIDTH)}
        if kind == "qwen":
            mask = torch.ones(images, TEXT, dtype=torch.int64, device=device)
            mask[0, 5:] = 0
            return given | {f"{sign}prompt_embeds_mask": mask}
        return given | {f"{sign}pooled_prompt_embeds": random(images, POOLED)}

    given = prompt("") | (prompt("negative_") if guided else {})
    latents = random(images, 64, 16) if kind in ("flux", "qwen") else random(images, 4, 16, 16)
    scale = {"true_cfg_scale": 3.0 if guided else 1.0} if kind in ("flux", "qwen") else {}
    if kind in ("sd3", "z_image"):
        scale = {"guidance_scale": 3.0 if guided else (1.0 if kind == "sd3" else 0.0)}
    call = {"height": 128, "width": 128, "num_inference_steps": steps, "output_type": "latent"}
    found: Tensor = pipe(**(given | scale | call | {"latents": latents} | kwargs)).images
    return found
