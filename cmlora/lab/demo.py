"""The demo: the methods side by side on the shipped model, and one run step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cmlora import sprites
from cmlora.accelerate import accelerate, restore, summary
from cmlora.lab.pictures import labelled_grid, masks_over, timeline

METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "merge": (1.0, {"method": "merge"}),
    "merge at 0.6": (0.6, {"method": "merge"}),
    "switch": (1.0, {"method": "switch"}),
    "composite": (1.0, {"method": "composite"}),
    "cmlora": (1.0, {"method": "cmlora"}),
    "routed": (1.0, {"method": "routed"}),
    "routed at 0.6": (0.6, {"method": "routed", "mask_text": 0.5}),
}
"""A weight for every LoRA, and fields of CMLoRAConfig."""
ADAPTERS = {  # role, in the order in which LoRAs are added -> trigger word and its clause
    "character": ("zebrin", "a zebrin creature"),
    "clothing": ("tophat", "wearing a tophat"),
    "object": ("balloon", "holding a balloon"),
    "background": ("checker", "checker background"),
    "style": ("sketch", "sketch style"),
}


def load_pipe(roles: Sequence[str]) -> Any:
    """The shipped pipeline with one LoRA per role, on the GPU where there is one."""
    from diffusers import StableDiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32).to(device)
    for role in roles:
        pipe.load_lora_weights(sprites.lora_path(ADAPTERS[role][0]), adapter_name=role)
    return pipe


def prompt_for(roles: Sequence[str]) -> str:
    """What a person would write for these LoRAs."""
    return ", ".join(ADAPTERS[role][1] for role in ADAPTERS if role in roles)


def draw(pipe: Any, roles: Sequence[str], name: str, steps: int, seed: int) -> Image.Image:
    """One image with one of `METHODS`; the pipeline stays accelerated, so that `summary` can be asked."""
    weight, config = METHODS[name]
    pipe.set_adapters(list(roles), [weight] * len(roles))
    accelerate(pipe, **config)
    pipe.set_progress_bar_config(desc=f"{len(roles)} LoRAs, {name}", leave=False)
    generator = torch.Generator().manual_seed(seed)
    image: Image.Image = pipe(
        prompt_for(roles), num_inference_steps=steps, guidance_scale=4.0, generator=generator
    ).images[0]
    return image


def run_demo(out: Path, steps: int = 16, seed: int = 1) -> Iterator[Path]:
    """Draw the methods for two to five LoRAs at one seed, a run of `cmlora` and one of `routed`; yields each file.

    Args:
        out: folder for methods.png, masks.png, run.png and run.txt; made if absent.
        steps: denoising steps. seed: of the latents, the same for all images.
    """
    out.mkdir(parents=True, exist_ok=True)
    roles = tuple(ADAPTERS)
    pipe = load_pipe(roles)
    images = [[draw(pipe, roles[:n], name, steps, seed) for name in METHODS] for n in range(2, len(roles) + 1)]
    labels = [f"{n} LoRAs" for n in range(2, len(roles) + 1)]
    labelled_grid(images, list(METHODS), labels).save(out / "methods.png")
    yield out / "methods.png"
    image = draw(pipe, roles[:4], "routed at 0.6", steps, seed)
    masks_over(image, summary(pipe).masks).save(out / "masks.png")
    yield out / "masks.png"
    image = draw(pipe, roles[:4], "cmlora", steps, seed)
    run = summary(pipe)
    text = f"{run}\n"  # while the pipeline is accelerated: the peak is computed when it is asked for
    restore(pipe)
    timeline(run, image).save(out / "run.png")
    yield out / "run.png"
    (out / "run.txt").write_text(text)
    yield out / "run.txt"
