"""Nothing is first executed on the user's GPU: every launcher under a fake driver, every kernel's traffic counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cmlora.lab.bench.tiny import DEVICE
from cmlora.lab.bench.traffic import SDXL_LINEARS, sdxl_lora_bytes
from cmlora_kernels import (
    combine_local,
    combine_noise,
    combine_regions,
    concat_channels,
    dominant_from_latents,
    geglu,
    group_norm_silu,
    merge_weights,
    merged_linear,
    modulated_norm,
    multi_lora_add_,
    multi_lora_conv2d,
    multi_lora_conv2d_add_,
    multi_lora_geglu,
    multi_lora_linear,
    place_masks,
    place_strength,
    radial_profile,
    rotary_norm,
    scatter_rows,
)
from cmlora_kernels.chips import TRITON_SHARE
from cmlora_kernels.launch import Launch
from cmlora_kernels.variants import variants

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
interpreted = pytest.mark.skipif(
    DEVICE != "cpu", reason="needs a machine without a GPU: traffic is counted in Triton's interpreter"
)


def run_compiled(program: Path, *arguments: str) -> str:
    """A program's output, run without TRITON_INTERPRET and with this checkout first on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_launcher_asks_the_driver_for_what_was_inspected(target: str) -> None:
    """On AMD Triton also specialises on pointers of tensors below 2 GiB, which it then reads by buffer loads."""
    launches = [json.loads(line) for line in run_compiled(HERE / "fake_driver.py", target).splitlines()]
    for launch in launches:
        assert launch["same_source"], launch  # types, constexprs and specialisation as the inspection compiles them
        assert launch["same_options"], launch
        assert launch["same_grid"], launch
        assert launch["same_numbers"], launch
        assert launch["aligned"], launch
        assert launch["pointers"] == launch["expected_pointers"], launch
        assert launch["programs"] > 0
        assert max(launch["grid"][1:]) < 65536, launch  # CUDA's limit on the second and third axis
    assert sum(launch["again"] for launch in launches) > 10, "compiled kernels, launched directly"
    every = {variant.launch.kernel.__name__ for variant in variants(target, models=["sd15", "flux"], ranks=(16,))}
    assert {launch["kernel"] for launch in launches} == every


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Launch, list[int]]]:
    """Every launch with the bytes that it loads and stores; masked lanes move nothing."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved: list[tuple[Launch, list[int]]] = []
    load, store, call = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, Launch.__call__

    def count(ptrs, mask) -> None:
        moved[-1][1][0] += int(np.count_nonzero(mask.data)) * ptrs.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, ptrs, mask, *rest):
        count(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        count(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def remembered(self, *tensors) -> None:
        moved.append((self, [0]))
        call(self, *tensors)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    monkeypatch.setattr(Launch, "__call__", remembered)
    return moved


@interpreted
def test_kernels_move_the_bytes_that_their_formulas_say(traffic: list[tuple[Launch, list[int]]]) -> None:
    x, index = torch.randn(2, 4, 64, 64), torch.tensor([1, 0])
    dominant_from_latents(x, 0.2, 0.4, 0, 1, 5, 1.25, 0.75, backend="triton")
    radial_profile(torch.randn(1, 3, 40, 48), channel_mean=False, backend="triton")
    bank, skip = torch.randn(3, 64, 32, 32), torch.randn(2, 32, 32, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        concat_channels(bank[:2].to(memory_format=layout), skip.to(memory_format=layout), backend="triton")
    scatter_rows(bank, bank[:2].clone(), index, backend="triton")
    noise, weights = torch.randn(10, 4, 64, 64), torch.rand(5, 2)
    combine_noise(noise, weights, backend="triton")
    geglu(torch.randn(2, 77, 600), backend="triton")
    _run_places(noise, weights[1:].contiguous())
    _run_group_norms()
    assert len(traffic) == 27
    _run_multi_lora()
    kernels = {launch.kernel.__name__ for launch, _ in traffic[27:]}
    assert kernels == {"linear_kernel", "add_kernel", "gate_kernel", "conv_add_kernel", "merged_kernel"}
    for launch, (moved,) in traffic:
        assert moved == pytest.approx(launch.bytes, rel=0.1), launch.name
        assert launch.unique_bytes <= launch.bytes, launch.name


def _run_places(noise: torch.Tensor, weights: torch.Tensor) -> None:
    """Four adapters and a base, both memory formats; then ragged sizes."""
    adapters, bases = torch.arange(1, 5), torch.zeros(4, dtype=torch.int64)
    for layout in (torch.contiguous_format, torch.channels_last):
        noise = noise.contiguous(memory_format=layout)
        strength = place_strength(noise, adapters, bases, 1, 1, backend="triton")
        place_strength(noise, adapters, bases, 0, 2, torch.rand(4, 2, 64, 64), backend="triton")
        mu = place_masks(strength, 0.5, backend="triton")
        combine_local(noise, mu, weights, adapters, bases, bases[:1], backend="triton")
    combine_local(noise[..., :50], mu[..., :50], weights, adapters, bases, 0, backend="triton")
    combine_regions(noise[2:, :3, :, :50], mu[..., :50], weights, backend="triton")


def _run_group_norms() -> None:
    """In both memory formats: one launch of many groups, and two where few large ones are cut into slices."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for x, groups in ((torch.randn(8, 40, 9, 11), 8), (torch.randn(1, 24, 96, 90), 2)):
            weight, x = torch.randn(x.shape[1]), x.contiguous(memory_format=layout)
            group_norm_silu(x, groups, weight, weight, backend="triton")


def _run_norms() -> None:
    """Modulation shared by predictions, on a part of a longer sequence too; the prompt before the image, or none."""
    x, (shift, scale, _) = torch.randn(4, 70, 96), torch.randn(2, 3, 96).chunk(3, 1)
    for tokens in (x, x[:, 7:], x[:1]):
        modulated_norm(tokens, shift, scale, 1e-6, backend="triton")
    heads, weight, turns = x.view(4, 70, 4, 24), torch.randn(24), torch.randn(75, 12, 2)
    rotary_norm(heads, weight, turns[:70], 1e-6, backend="triton")
    rotary_norm(heads, weight, turns, 1e-6, torch.randn(2, 5, 4, 24), weight, backend="triton")


def _run_multi_lora() -> None:
    """Every strategy of the multi-LoRA layers, on ragged sizes."""
    slots, scales = torch.tensor([1, 0, 0]), torch.rand(2, 1)
    x, weight = torch.randn(3, 77, 80), torch.randn(96, 80)
    a, b = torch.randn(2, 8, 80), torch.randn(2, 96, 8)
    multi_lora_linear(x, weight, None, slots, a, b, scales, backend="triton")
    multi_lora_geglu(x, weight, None, slots, a, b, scales, backend="triton")
    multi_lora_add_(torch.randn(3, 77, 96), x, slots, a, b, scales, backend="triton")
    merged_linear(x, merge_weights(weight, a, b, scales), None, slots, backend="triton")
    images, kernel = torch.randn(3, 16, 9, 10), torch.randn(24, 16, 3, 3)
    down, up = torch.randn(2, 4, 16, 3, 3), torch.randn(2, 24, 4)
    multi_lora_conv2d(images, kernel, None, slots, down, up, scales, padding=(1, 1), backend="triton")
    _run_weighted_multi_lora(slots, scales)


def _run_weighted_multi_lora(slots: torch.Tensor, scales: torch.Tensor) -> None:
    """Token weights, and a rank in two chunks."""
    for rank in (8, 136):
        x, a, b = torch.randn(3, 77, 80), torch.randn(2, rank, 80), torch.randn(2, 96, rank)
        routed = {"token_weights": torch.rand(3, 4, 77), "groups": torch.zeros(2, rank, dtype=torch.int32)}
        multi_lora_linear(x, torch.randn(96, 80), None, slots, a, b, scales, backend="triton", **routed)
        multi_lora_geglu(x, torch.randn(96, 80), None, slots, a, b, scales, backend="triton", **routed)
        multi_lora_add_(torch.randn(3, 77, 96), x, slots, a, b, scales, backend="triton", **routed)
        images, down, y = torch.randn(3, 16, 9, 10), torch.randn(2, rank, 16, 3, 3), torch.randn(3, 96, 7, 8)
        routed["token_weights"] = torch.rand(3, 4, 7, 8)
        multi_lora_conv2d_add_(y, images, slots, down, b, scales, backend="triton", **routed)


def test_sdxl_lora_traffic_is_under_5_gb_at_the_assumed_share_and_halved_by_the_default() -> None:
    """Where the share is not known the strategy is the one that loses least, which fuses fewer layers."""
    assert sum(layer[0] for layer in SDXL_LINEARS) == 722  # the transformers' linear layers of SDXL
    assert sdxl_lora_bytes("sm_90", share=TRITON_SHARE) <= 5e9
    assert sdxl_lora_bytes("sm_90") <= 17.9e9 / 2, "half of what adding in every layer moves"
