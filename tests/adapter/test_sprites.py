"""The offline default model: drawing, captions, detector, and the weights that the package ships."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from cmlora import sprites
from cmlora.lab.bench.tiny import DEVICE
from cmlora.sprites import draw
from cmlora.sprites.detector import blend_targets, detect, load_detector, probabilities
from cmlora.sprites.measure import accuracy, generate, unseen
from cmlora.sprites.model import WORDS


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made.to(DEVICE)


def picture(pipe: StableDiffusionPipeline, prompt: str) -> np.ndarray:
    seed = torch.Generator().manual_seed(3)
    return pipe(prompt, num_inference_steps=3, generator=seed, output_type="np").images


def test_drawing_is_a_function_of_the_seed_and_not_of_the_chunk() -> None:
    scenes = draw.sample(20, seed=5, concepts=0.5)
    again = draw.sample(20, seed=5, concepts=0.5)
    assert np.array_equal(draw.render(scenes), draw.render(again, chunk=7))
    assert not np.array_equal(draw.render(scenes), draw.render(draw.sample(20, seed=6, concepts=0.5)))


def test_every_label_and_word_of_a_caption_belongs_to_the_scene() -> None:
    scenes = draw.sample(400, seed=7, concepts=0.4)
    for caption, truth in zip(draw.captions(scenes, seed=1), draw.labels(scenes), strict=True):
        for label in (label for label, true in zip(draw.LABELS, truth, strict=True) if true):
            assert label.removesuffix(" background") in caption.replace(",", "").split()
        words = set(caption.replace(",", "").split())
        assert words & set(draw.CONCEPTS) == {n for n, true in zip(draw.LABELS, truth, strict=True) if true} & set(
            draw.CONCEPTS
        )
    assert draw.labels(scenes).max(0).min() == 1  # no label that no scene has


def test_held_back_combinations_never_reach_training() -> None:
    train = draw.sample(5000, seed=8, held_back=False)
    assert not set(draw.captions(train)) & set(draw.captions(unseen(200)))


def test_the_base_model_never_saw_a_concept() -> None:
    seen = " ".join(draw.captions(draw.sample(3000, seed=4, held_back=False), seed=5)).replace(",", "").split()
    assert not set(seen) & set(draw.CONCEPTS)


def test_a_diluted_concept_counts_as_absent() -> None:
    first, second = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    target, counts = blend_targets(first, second, torch.tensor([0.5]))
    assert target.tolist() == [[0.0, 1.0]]
    assert counts.tolist() == [[1.0, 1.0]]
    assert blend_targets(first, second, torch.tensor([0.7]))[1].tolist() == [[0.0, 1.0]]


def test_the_detector_reads_fresh_renders() -> None:
    scenes = draw.sample(300, seed=9, concepts=0.35)
    assert accuracy(load_detector(), draw.render(scenes), draw.labels(scenes))["labels"] > 0.97


def test_the_detector_refuses_other_pictures() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[n, 64, 64, 3\], got float32 \[1, 64, 64, 3\]"):
        probabilities(load_detector(), np.zeros((1, 64, 64, 3), np.float32))


def test_every_word_is_one_token_and_others_still_work(pipe: StableDiffusionPipeline) -> None:
    assert isinstance(pipe.tokenizer, CLIPTokenizer)
    assert all(len(pipe.tokenizer(word).input_ids) == 3 for word in WORDS)
    text = "xyzzy 42, naïve!"
    assert pipe.tokenizer.decode(pipe.tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == (
        text.replace(" ", "")
    )


def test_the_unet_has_the_cache_branch_of_stable_diffusion(pipe: StableDiffusionPipeline) -> None:
    config = pipe.unet.config
    assert config.layers_per_block == 2
    assert len(config.block_out_channels) >= 3
    assert (config.down_block_types[0], config.up_block_types[-1]) == ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")


def test_latents_have_mean_zero_and_deviation_one(pipe: StableDiffusionPipeline) -> None:
    x = torch.from_numpy(draw.render(draw.sample(200, seed=10, concepts=0.3))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        z = pipe.vae.encode(x.to(DEVICE)).latent_dist.mean * pipe.vae.config.scaling_factor
    assert z.mean((0, 2, 3)).abs().max() < 0.15
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_base_prompts_come_out_right(pipe: StableDiffusionPipeline) -> None:
    scenes = unseen(8)
    found = detect(load_detector(), generate(pipe, draw.captions(scenes), seed=1000))
    truth = [{name for name, t in zip(draw.LABELS, row, strict=True) if t} for row in draw.labels(scenes)]
    assert sum(f == t for f, t in zip(found, truth, strict=True)) >= 7


@pytest.mark.parametrize("name", draw.CONCEPTS)
def test_every_lora_loads_and_changes_the_picture(pipe: StableDiffusionPipeline, name: str) -> None:
    prompt = draw.captions(draw.sample(1, seed=11).with_concept(name))[0]
    before = picture(pipe, prompt)
    pipe.load_lora_weights(sprites.lora_path(name), adapter_name=name)
    changed = picture(pipe, prompt)
    pipe.unload_lora_weights()
    assert np.abs(changed - before).mean() > 0.005
    assert np.array_equal(picture(pipe, prompt), before)


@pytest.mark.parametrize("name", sprites.KOHYA)
def test_kohya_files_are_the_same_lora(pipe: StableDiffusionPipeline, name: str) -> None:
    prompt = draw.captions(draw.sample(1, seed=11).with_concept(name))[0]
    made = []
    for kohya in (False, True):
        pipe.load_lora_weights(sprites.lora_path(name, kohya=kohya), adapter_name="one")
        made.append(picture(pipe, prompt))
        pipe.unload_lora_weights()
    assert np.array_equal(made[0], made[1])
    with safe_open(sprites.lora_path(name, kohya=True), "pt") as file:
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118


def test_one_lora_has_a_convolution_part() -> None:
    with safe_open(sprites.lora_path("checker"), "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert any(shape[2:] == [3, 3] for key, shape in shapes.items() if "resnets" in key)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"concept must be one of zebrin, .*, got 'unicorn'"):
        sprites.lora_path("unicorn")
    with pytest.raises(ValueError, match="name must be one of tophat, checker with kohya=True, got 'zebrin'"):
        sprites.lora_path("zebrin", kohya=True)


def test_the_weights_are_small_and_half_precision() -> None:
    files = [path for path in Path(sprites.WEIGHTS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, path.name
    assert (
        json.loads((Path(sprites.model_path()) / "model_index.json").read_text())["text_encoder"][1] == "CLIPTextModel"
    )
