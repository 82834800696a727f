"""Profiles: what is measured equals NumPy on what PEFT computes, the pipeline is left alone, high="auto" follows."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import cmlora
from cmlora import sprites
from cmlora.cli import app
from cmlora.lab.bench.tiny import DEVICE, add_lora, call, embeddings, sd_pipe, sd_unet, sdxl_pipe
from cmlora.profile import high_frequency_difference, profile_loras, split
from tests.adapter.test_restore import assert_same, snapshot
from tests.conftest import shared
from tests.golden.test_golden import golden_pipe

CUTOFF, STEPS = 0.3, 3  # not the default cutoff: it must reach the measure


def numpy_profile(images: np.ndarray) -> np.ndarray:
    """[bins] normalised mean amplitude per bin of the radius, over all of [images, height, width], in float64."""
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(images), axes=(1, 2))).mean(0)
    rows, columns = amplitude.shape
    y, x = np.meshgrid(np.arange(rows) - rows // 2, np.arange(columns) - columns // 2, indexing="ij")
    radius = np.sqrt(x**2 + y**2).astype(int)
    profile = np.array([amplitude[radius == r].mean() for r in range(radius.max() + 1)])
    return profile / profile.max()


def intensity(profile: np.ndarray) -> float:
    return profile[np.arange(len(profile)) > CUTOFF * (len(profile) - 1)].mean()


def alone_with_peft(pipe, name, arguments):
    """Inputs of the UNet and of its last up block less the skip connection, per step, with PEFT's own adapter."""
    unet, latents, features = pipe.unet, [], []
    skip = unet.down_blocks[0].resnets[-1].out_channels
    pipe.set_adapters([name], [0.7])
    hooks = [
        unet.conv_in.register_forward_pre_hook(lambda m, given: latents.append(given[0].double().cpu().numpy())),
        unet.up_blocks[-1]
        .resnets[0]
        .register_forward_pre_hook(lambda m, given: features.append(given[0][:, :-skip].double().cpu().numpy())),
    ]
    pipe(**arguments, num_inference_steps=STEPS, output_type="latent")
    for hook in hooks:
        hook.remove()
    return latents, features


def tiny(make):
    def build():
        pipe = make()
        for i, name in enumerate(("one", "two")):
            add_lora(pipe.unet, name, seed=i + 1)
        pipe.set_adapters(["one", "two"], [0.7, 0.7])
        return pipe, embeddings(pipe, 2) | {"height": 128, "width": 128}

    return build


def golden():
    folder = shared("golden")
    names = ["character_1", "style_1"]
    case = {"scheduler": "ddim", "adapters": names, "adapter_weights": [0.7, 0.7]}
    return golden_pipe(folder, case), load_file(folder / "inputs.safetensors") | {"height": 128, "width": 128}


@pytest.mark.parametrize("build", [tiny(sd_pipe), tiny(sdxl_pipe), golden], ids=["sd", "sdxl", "golden"])
def test_intensity_spectra_and_similarity_equal_numpy_on_what_peft_computes(build):
    pipe, arguments = build()
    config = cmlora.CMLoRAConfig(online_cutoff=CUTOFF)
    profile = profile_loras(pipe, config=config, steps=STEPS, **arguments)
    assert list(profile.loras) == pipe.get_active_adapters()
    for name, lora in profile.loras.items():
        latents, features = alone_with_peft(pipe, name, arguments)
        for got, images in (
            (lora.latents, [[row.mean(0, keepdims=True) for row in step] for step in latents]),
            (lora.feature, features),
        ):
            want = np.array([[numpy_profile(row) for row in step] for step in images]).mean(1)
            np.testing.assert_allclose(got.profiles, want, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(got.intensity, [intensity(profile) for profile in want], rtol=1e-4)
            assert got.mean == pytest.approx(np.mean([intensity(profile) for profile in want]), rel=1e-4)
        flat = np.array([step.reshape(len(step), -1) for step in features])
        unit = flat / np.linalg.norm(flat, axis=2, keepdims=True)
        np.testing.assert_allclose(lora.similarity, np.einsum("srv,trv->st", unit, unit) / flat.shape[1], atol=1e-5)
        assert lora.image.shape == (128, 128, 3)


def test_the_larger_half_is_high_in_the_given_order():
    assert split({"a": 0.1, "b": 0.3, "c": 0.2}) == (("b", "c"), ("a",))
    assert split({"a": 0.1, "b": 0.1}) == (("a",), ("b",))


def test_a_profile_leaves_the_pipeline_as_it_was_even_by_an_error():
    pipe, given = tiny(sd_pipe)()
    before, scheduler, timesteps = snapshot(pipe), pipe.scheduler, pipe.scheduler.timesteps
    profile_loras(pipe, ["two"], steps=1, images=False, **given)

    def fail(*_):
        raise KeyError

    with pytest.raises(KeyError):
        profile_loras(pipe, steps=1, images=False, callback_on_step_end=fail, **given)
    assert pipe.scheduler is scheduler
    assert pipe.scheduler.timesteps is timesteps
    assert_same(before, snapshot(pipe))
    cmlora.accelerate(pipe, method="composite")
    image, told = call(pipe, 1), cmlora.summary(pipe)
    profile_loras(pipe, steps=1, images=False, **given)
    assert cmlora.summary(pipe).steps == told.steps
    assert torch.equal(call(pipe, 1), image)


def test_what_cannot_be_profiled_is_named():
    pipe, given = tiny(sd_pipe)()
    with pytest.raises(cmlora.ConfigError, match="by must be one of 'feature', 'latents', got 'noise'"):
        profile_loras(pipe, by="noise", **given)
    with pytest.raises(cmlora.AdapterError, match="'nobody' changed no layer"):
        profile_loras(pipe, ["nobody"], **given)
    with pytest.raises(cmlora.UnsupportedModelError, match="has no unet or transformer, which no model family of"):
        profile_loras(pipe.vae)
    given["latents"][0, 0, 0, 0] = torch.nan
    with pytest.raises(cmlora.RunError, match="LoRA 'one' alone are not finite"):
        profile_loras(pipe, steps=1, **given)


@pytest.mark.parametrize("size", [(16, 16), (15, 22)])
def test_the_difference_is_that_of_two_high_passed_images(size):
    a, b = np.random.default_rng(0).random((2, *size, 3))
    y, x = (np.arange(side) - side // 2 for side in size)
    radius = np.floor(np.hypot(y[:, None], x))
    high = (radius > CUTOFF * radius.max())[:, :, None]

    def passed(image):
        spectrum = np.fft.fftshift(np.fft.fft2(image, axes=(0, 1)), axes=(0, 1))
        return np.fft.ifft2(np.fft.ifftshift(spectrum * high, axes=(0, 1)), axes=(0, 1)).real

    got = high_frequency_difference(torch.from_numpy(a), torch.from_numpy(b), CUTOFF)
    np.testing.assert_allclose(got, np.abs(passed(a) - passed(b)).mean(2), atol=1e-6)
    with pytest.raises(ValueError, match=r"of one size, got \(16, 16, 3\) and \(8, 16, 3\)"):
        high_frequency_difference(torch.zeros(16, 16, 3), torch.zeros(8, 16, 3))


@pytest.fixture
def drawing_pipe():
    """A tiny pipeline that draws from a prompt, with two LoRAs whose names alone would put both into one half."""
    pipe = sd_pipe(sd_unet(cross_attention_dim=96))
    trained = StableDiffusionPipeline.from_pretrained(
        sprites.model_path(), unet=None, vae=None, torch_dtype=torch.float32
    )
    pipe.register_modules(tokenizer=trained.tokenizer, text_encoder=trained.text_encoder)
    for i, name in enumerate(("background_1", "background_2")):
        add_lora(pipe.unet, name, seed=i + 1)
    pipe.set_adapters(["background_1", "background_2"])
    return pipe.to(DEVICE)


def test_auto_takes_the_split_of_a_short_profile(drawing_pipe, monkeypatch):
    monkeypatch.setattr("cmlora.profile.AUTO_STEPS", 1)  # eight take longer and show no more
    config = {"partition": "offline", "offline_boundary": 1.0, "cache_interval": 1}
    profile = profile_loras(drawing_pipe, steps=1, seed=0, images=False, prompt="", guidance_scale=1.0)
    told = {}
    for high in ((), "auto"):
        cmlora.accelerate(drawing_pipe, high=high, **config)
        drawing_pipe("a red creature", num_inference_steps=2, guidance_scale=1, output_type="latent")
        told[high] = {step.dominant[0] for step in cmlora.summary(drawing_pipe).steps}
    assert told == {(): {"background_1", "background_2"}, "auto": set(profile.high)}

    add_lora(drawing_pipe.unet, "third", seed=3)
    drawing_pipe.set_adapters(["background_1", "third"])
    with pytest.raises(
        cmlora.AdapterError, match=r"background_1, background_2, which are now background_1, third; call"
    ):
        drawing_pipe("a red creature", num_inference_steps=2, guidance_scale=1, output_type="latent")
    cmlora.accelerate(drawing_pipe, high="auto", **config)
    drawing_pipe("a red creature", num_inference_steps=1, guidance_scale=1, output_type="latent")
    assert "third" in cmlora.summary(drawing_pipe).adapters


def test_auto_refuses_what_it_cannot_settle(drawing_pipe):
    with pytest.raises(cmlora.ConfigError, match="low must be empty with high='auto', which settles both, got a"):
        cmlora.CMLoRAConfig(high="auto", low=["a"])
    with pytest.raises(cmlora.ConfigError, match="high must be a sequence of adapter names or 'auto', got 'atuo'"):
        cmlora.CMLoRAConfig(high="atuo")
    pipe, _ = tiny(sd_pipe)()
    with pytest.raises(cmlora.ConfigError, match=r"StableDiffusionPipeline has no tokenizer.*profile_loras\(pipe"):
        cmlora.accelerate(pipe, high="auto")
    cmlora.accelerate(pipe, method="composite", high="auto")  # knows no high and low: nothing to settle
    image_to_image = StableDiffusionImg2ImgPipeline.from_pipe(drawing_pipe)
    with pytest.raises(cmlora.ConfigError, match="this StableDiffusionImg2ImgPipeline also needs an image"):
        cmlora.accelerate(image_to_image, high="auto")


def test_the_command_writes_plots_and_all_numbers(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    settings = f"--steps 3 --guidance 1 --every 2 --compare tophat {tmp_path / 'red.png'} --out {tmp_path}"
    loras = "--lora zebrin:0.5=character --lora tophat"
    done = CliRunner().invoke(app, ["profile", *f"{loras} {settings}".split(), "--prompt", "a zebrin creature"])
    refused = CliRunner().invoke(app, f"profile {loras} --compare tophat blue.png --prompt x".split())
    assert "neither a LoRA (character, tophat) nor" in refused.output
    assert done.exit_code == 0, done.output
    assert "half  LoRA (the feature decides)" in done.output
    for name in ("intensity", "spectra", "similarity", "difference"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 0
    told = json.loads((tmp_path / "profile.json").read_text())
    assert sorted(told["high"] + told["low"]) == ["character", "tophat"]
    assert told["prompt"] == "a zebrin creature"
    assert told["difference"]["mean"] > 0
    lora = told["loras"]["tophat"]
    assert np.shape(lora["similarity"]) == (3, 3)
    assert len(lora["feature"]["intensity"]) == 3
    assert lora["latents"]["change"] == pytest.approx(np.diff(lora["latents"]["intensity"]), abs=1e-6)
    assert list(lora["feature"]["profiles"]) == ["0", "2"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "cmlora.lab.plots", raising=False)
    with pytest.raises(cmlora.CMLoRAError, match=r"pip install 'cmlora\[plots\]'"):
        importlib.import_module("cmlora.lab.plots")
