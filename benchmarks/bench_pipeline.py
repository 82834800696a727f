"""Whole pipeline calls on N LoRAs: ours against what people run now, latents checked equal before anything is timed.

pytest benchmarks/bench_pipeline.py -s                        # N = 2..5, sprites and SD1.5's shape (random weights)
pytest benchmarks/bench_pipeline.py -s -k "sprites and 3"     # a part of it
pytest benchmarks/bench_pipeline.py -s -k routed              # routed against merges, N = 5, 25 steps
pytest benchmarks/bench_pipeline.py -s --reference DIR        # another implementation too, in the same run

Rivals: the same algorithm as a loop over the adapters with PEFT's set_adapters; a plain merge with PEFT; a merge with
one DeepCache-style cache. DIR must hold a `reference.py` with `denoise(pipe, adapters, steps, guidance, **embeddings)`
that returns latents; it is timed as it is, its latents are compared and the difference printed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from harness import DEVICE, GPU, compare_calls

import cmlora
from cmlora import sprites
from cmlora.lab.bench.loop import CachedLoop, MergedLoop
from cmlora.lab.bench.tiny import add_lora, call, embeddings, relative, sd_pipe, sd_unet

INTERVAL = 2
STEPS = 20 if GPU else 4
TOLERANCE = 1e-4
# The dominant adapter of the loop takes turns at a constant weight, so ours is told to do the same.
SAME = {"partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0, "combine": "mean"}


def sprites_pipe(count: int) -> tuple[Any, list[str], dict[str, torch.Tensor]]:
    """The shipped model, 64 px."""
    pipe = StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names = [pair[0] for pair in sprites.ROLES.values()][:count]
    for name in names:
        pipe.load_lora_weights(sprites.lora_path(name), adapter_name=name)
    return pipe.to(DEVICE), names, embeddings(pipe, size=(16, 16))


def sd15_pipe(count: int) -> tuple[Any, list[str], dict[str, torch.Tensor]]:
    """SD1.5's UNet with random weights; 512 px on a GPU, 256 px on a CPU."""
    size = 64 if GPU else 32
    unet = sd_unet(
        sample_size=size,
        block_out_channels=(320, 640, 1280, 1280),
        norm_num_groups=32,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    pipe = sd_pipe(unet)
    names = [add_lora(unet, f"lora_{i}", rank=16, seed=i) for i in range(count)]
    return pipe, names, embeddings(pipe, size=(size, size))


MODELS = {"sprites": sprites_pipe, "sd15": sd15_pipe}


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("model", MODELS)
def test_pipeline(benchmark: Any, request: pytest.FixtureRequest, model: str, count: int) -> None:
    pipe, names, given = MODELS[model](count)
    fast, *_ = MODELS[model](count)  # a second one with the same weights, so that ours is set up once per comparison
    fast.unet.set_adapters(names)

    def ours() -> torch.Tensor:
        return call(fast, STEPS, given=given)

    def loop() -> torch.Tensor:
        with CachedLoop(pipe.unet, names, interval=INTERVAL, dominance=count - 0.5):
            return call(pipe, STEPS, given=given)

    def merge() -> torch.Tensor:
        pipe.unet.set_adapters(names)
        return call(pipe, STEPS, given=given)

    def single_cache() -> torch.Tensor:
        pipe.unet.set_adapters(names)
        with MergedLoop(pipe.unet, INTERVAL):
            return call(pipe, STEPS, given=given)

    composed = {"method": "cmlora", "cache_interval": INTERVAL, **SAME}
    rivals: dict[str, tuple[dict[str, Any], Callable[[], torch.Tensor]]] = {
        "merge against PEFT's": ({"method": "merge", "cache_interval": 1}, merge),
        "merge with a cache against DeepCache's": ({"method": "merge", "cache_interval": INTERVAL}, single_cache),
        "cmlora against the loop": (composed, loop),
    }
    for name, (config, theirs) in rivals.items():
        cmlora.accelerate(fast, **config)
        error = relative(ours(), theirs())
        assert error <= TOLERANCE, f"{name}: latents differ by {error:.1e} (allowed {TOLERANCE:.0e}): not timed"
        compare_calls(f"{model} N={count}: {name}", ours, theirs, error)
    compare_calls(f"{model} N={count}: cmlora against PEFT's merge (another algorithm)", ours, merge, None)
    folder = request.config.getoption("--reference")
    if folder is not None:
        reference = load_reference(Path(folder))

        def published() -> torch.Tensor:
            return reference(pipe, names, steps=STEPS, guidance=7.5, **given)

        compare_calls(f"{model} N={count}: cmlora against {folder}", ours, published, relative(ours(), published()))
    benchmark.pedantic(ours, rounds=1)


@pytest.mark.parametrize("interval", [1, INTERVAL])
@pytest.mark.parametrize("model", MODELS)
def test_routed(benchmark: Any, model: str, interval: int) -> None:
    """Against merges of the same interval: as they come, without merged weights, and PEFT's."""
    steps = 25
    pipes = {name: MODELS[model](5) for name in ("routed", "merge", "apart", "peft")}
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for name, (pipe, names, given) in pipes.items():
        pipe.unet.set_adapters(names)
        calls[name] = functools.partial(call, pipe, steps, given=given)
    _, names, _ = pipes["routed"]
    cmlora.accelerate(pipes["merge"][0], method="merge", cache_interval=interval)
    cmlora.accelerate(pipes["apart"][0], method="merge", cache_interval=interval, merge_weights=False)
    everywhere = dict.fromkeys(names, torch.ones(1, 1))
    cmlora.accelerate(pipes["routed"][0], method="routed", cache_interval=interval, regions=everywhere)
    error = relative(calls["routed"](), calls["apart"]())
    assert error <= TOLERANCE, f"routed with masks of one is no merge: latents differ by {error:.1e}: not timed"
    cmlora.accelerate(pipes["routed"][0], method="routed", cache_interval=interval)
    calls["routed"]()
    case = f"{model} N=5, 25 steps, interval {interval}: routed against"
    compare_calls(f"{case} merge", calls["routed"], calls["merge"], None)
    compare_calls(f"{case} merge without merged weights", calls["routed"], calls["apart"], None)
    if interval == 1:
        compare_calls(f"{case} PEFT's merge", calls["routed"], calls["peft"], None)
    benchmark.pedantic(calls["routed"], rounds=1)


def load_reference(folder: Path) -> Callable[..., torch.Tensor]:
    """`denoise` of folder/reference.py."""
    path = folder / "reference.py"
    if not path.is_file():
        raise pytest.UsageError(f"--reference must be a folder with a reference.py, got {folder}")
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    denoise: Callable[..., torch.Tensor] = module.denoise
    return denoise
