"""Composition end to end on the shipped model: trained LoRAs, real prompts, a detector that says what is there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import cmlora
from cmlora import sprites
from cmlora.lab.bench.loop import CachedLoop
from cmlora.lab.bench.tiny import DEVICE, relative
from cmlora.sprites import draw, measure
from cmlora.sprites.detector import detect, load_detector

PROMPT = "a zebrin creature, wearing a tophat, holding a star, checker background"
NAMES = ("character", "clothing", "background")
COMMITTED = Path(__file__).with_name("sprites.png")
LEAST_DB = 30.0
"""Other processors round otherwise; another image of the same prompt and seed has about 15 dB."""


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return load()


def load() -> StableDiffusionPipeline:
    """A LoRA in diffusers' format, one in kohya's, and one in kohya's with a part on the convolutions."""
    made = StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    made.load_lora_weights(sprites.lora_path("zebrin"), adapter_name="character")
    made.load_lora_weights(sprites.lora_path("tophat", kohya=True), adapter_name="clothing")
    made.load_lora_weights(sprites.lora_path("checker", kohya=True), adapter_name="background")
    made.set_adapters(list(NAMES))
    return made.to(DEVICE)


def run(pipe: StableDiffusionPipeline, steps: int = 4, output: str = "latent", prompt: str = PROMPT) -> torch.Tensor:
    seed = torch.Generator().manual_seed(6)
    made = pipe(prompt, num_inference_steps=steps, guidance_scale=4.0, generator=seed, output_type=output)
    return made.images


@pytest.mark.parametrize("combine", ["mean", "deviation"])
@pytest.mark.parametrize("method", ["composite", "cmlora"])
def test_trained_loras_compose_as_a_loop_with_peft_does(pipe, method: str, combine: str) -> None:
    dominance = 2.5 if method == "cmlora" else None
    config = {"partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0, "cache_interval": 2}
    with cmlora.accelerated(pipe, method=method, combine=combine, high=NAMES, **config):
        got = run(pipe)
    how = {"dominance": dominance, "deviation": combine == "deviation", "follow": True}
    with CachedLoop(pipe.unet, NAMES, interval=2, **how):
        want = run(pipe)
    pipe.set_adapters(list(NAMES))
    assert relative(got, want) < 1e-4


@pytest.mark.parametrize(
    "config",
    [{"method": "merge"}, {"method": "switch", "switch_step": 1}, {"partition": "online"}, {"partition": "async"}],
    ids=lambda config: next(iter(config.values())),
)
def test_every_method_changes_the_picture_and_restore_brings_it_back(pipe, config) -> None:
    pipe.disable_lora()
    base = run(pipe)
    pipe.enable_lora()
    merged = run(pipe)
    with cmlora.accelerated(pipe, **config):
        got = run(pipe)
    assert torch.isfinite(got).all()
    assert relative(got, base) > 0.02
    if config == {"method": "merge"}:
        assert relative(got, merged) > 1e-3  # the default cache skips deep features
    assert torch.equal(run(pipe), merged)


def test_a_fixed_seed_gives_the_committed_picture(pipe) -> None:
    """`python -m tests.adapter.test_sprites_compose` draws it anew, after a change that is meant."""
    assert measure.psnr(picture(pipe), np.asarray(Image.open(COMMITTED))[None]) > LEAST_DB


def test_the_defaults_show_two_concepts_that_the_mean_loses(pipe) -> None:
    """All three rarely come through (csrc_docs/quality.md); which two is the weights' own."""
    detector, wanted = load_detector(), {"zebrin", "tophat", "checker"}
    assert len(wanted & detect(detector, picture(pipe))[0]) >= 2
    assert not wanted & detect(detector, picture(pipe, combine="mean"))[0]


def picture(pipe: StableDiffusionPipeline, **config) -> np.ndarray:
    """[1, 64, 64, 3] uint8 with all defaults but those named."""
    with cmlora.accelerated(pipe, **config):
        return (run(pipe, 20, "np") * 255 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("name", sprites.CONCEPTS)
def test_each_lora_alone_draws_its_concept(name: str) -> None:
    """At a weight as people give it; the card in cmlora/sprites/README.md has the whole curve."""
    pipe = StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(sprites.lora_path(name), adapter_name=name)
    pipe.set_adapters([name], [0.7])
    scenes = measure.unseen(3).with_concept(name)
    noise = [torch.Generator().manual_seed(i) for i in range(3)]
    made = pipe(draw.captions(scenes), num_inference_steps=12, guidance_scale=4.0, generator=noise, output_type="np")
    found = detect(load_detector(), (made.images * 255 + 0.5).astype(np.uint8))
    assert sum(name in labels for labels in found) >= 2


if __name__ == "__main__":
    Image.fromarray(picture(load())[0]).save(COMMITTED)
