"""What the published code computed, through a real pipeline call."""

import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file

import cmlora
from cmlora.lab.bench.tiny import ddim, sd_pipe
from tests.conftest import SHARED, shared

CASES = SHARED / "golden" / "cases.json"
NAMES = sorted(json.loads(CASES.read_text())) if CASES.is_file() else ["absent"]


def golden_pipe(folder, case):
    unet = UNet2DConditionModel(**json.loads((folder / "unet_config.json").read_text())).eval()
    unet.load_state_dict(load_file(folder / "unet.safetensors"))
    betas = json.loads((folder / "scheduler.json").read_text())
    dpm = case["scheduler"] == "dpm++"
    scheduler = DPMSolverMultistepScheduler(**betas, algorithm_type="dpmsolver++") if dpm else ddim()
    if not dpm:
        scheduler = type(scheduler).from_config(scheduler.config, **betas)
    pipe = sd_pipe(unet, scheduler)
    for name in case["adapters"]:
        pipe.load_lora_weights(folder / f"{name}.safetensors", adapter_name=name)
    if case["adapters"]:
        pipe.set_adapters(case["adapters"], case["adapter_weights"])
    return pipe


def config_of(case):
    method, _, partition = case["method"].partition("-")
    config = {"method": method, "combine": "mean", "cache_interval": case["cache_interval"]}
    if method == "switch":
        config["switch_step"] = case["switch_step"]
    if method == "cmlora":
        # the published code is sound where its stage never changes and its unused decay is off
        config |= {"partition": partition, "dominant_decay": 0, "offline_boundary": 1.0}
    return config


@pytest.mark.parametrize("name", NAMES)
def test_latents_equal_the_published_code_at_every_step(name):
    folder = shared("golden")
    case = json.loads(CASES.read_text())[name]
    pipe = golden_pipe(folder, case)
    given = load_file(folder / "inputs.safetensors")
    recorded = []

    def record(pipe, step, timestep, kwargs):
        recorded.append(kwargs["latents"].cpu().clone())
        return {}

    cmlora.accelerate(pipe, **config_of(case))
    given["latents"] = given["latents"].clone()
    size = {"height": 128, "width": 128, "output_type": "latent", "callback_on_step_end": record}
    pipe(**given, **size, num_inference_steps=case["steps"], guidance_scale=case["guidance_scale"])
    wanted = load_file(folder / f"{name}.safetensors")["latents"]
    errors = [((g - w).norm() / w.norm()).item() for g, w in zip(recorded, wanted, strict=True)]
    assert max(errors) < 1e-4, errors
    assert torch.isfinite(recorded[-1]).all()


def test_the_kernels_in_the_interpreter_equal_the_published_code():
    """The first step of a golden case, every op forced through its kernel; only one, for it takes half a minute."""
    folder = shared("golden")
    case = json.loads(CASES.read_text())["cmlora_2_every_step"]
    pipe = golden_pipe(folder, case)
    given = load_file(folder / "inputs.safetensors")
    cmlora.accelerate(pipe, **config_of(case), backend="triton")
    recorded = []

    def record(pipe, step, timestep, kwargs):
        recorded.append(kwargs["latents"].cpu().clone())
        pipe._interrupt = True
        return {}

    size = {"height": 128, "width": 128, "output_type": "latent", "callback_on_step_end": record}
    pipe(**given, **size, num_inference_steps=case["steps"], guidance_scale=case["guidance_scale"])
    (got,) = recorded
    want = load_file(folder / "cmlora_2_every_step.safetensors")["latents"][0]
    assert ((got - want).norm() / want.norm()).item() < 1e-4
