"""Masks from predictions, and local combination, against the same in torch, op by op.

pytest benchmarks/bench_places.py -s
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import BACKEND, DEVICE, DTYPE, compare
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels import combine_local, combine_regions, place_masks, place_strength
from cmlora_kernels.combine_places import local_launch, regions_launch
from cmlora_kernels.places import blur_launch, masks_launch, strength_launch

SIDES = {"sd15": 64, "sdxl": 128}
TOLERANCE = 16 * torch.finfo(DTYPE).eps
FLOAT = 4  # bytes of masks and strengths


def _predictions(adapters: int, side: int) -> Tensor:
    return torch.randn((adapters + 1) * 2, 4, side, side, device=DEVICE, dtype=DTYPE)


def _masks(strength: Tensor, temperature: float) -> Tensor:
    """The design, an op at a time."""
    blurred = F.avg_pool2d(F.pad(strength, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    soft = torch.softmax(blurred / blurred.mean((2, 3), keepdim=True) / temperature, 0)
    return soft / soft.amax(0)


@pytest.mark.parametrize("adapters", [2, 5])
@pytest.mark.parametrize("model", SIDES)
def test_masks(benchmark: Any, model: str, adapters: int) -> None:
    side, noise = SIDES[model], _predictions(adapters, SIDES[model])
    names, bases = torch.arange(1, adapters + 1, device=DEVICE), torch.zeros(adapters, dtype=torch.int64, device=DEVICE)

    def ours() -> Tensor:
        strength = place_strength(noise, names, bases, 1, 1, backend=BACKEND)
        return place_masks(strength, 0.6, backend=BACKEND)

    def separate(noise: Tensor) -> Tensor:
        e = noise.unflatten(0, (adapters + 1, 2))[:, 1:]
        return _masks((e[1:] - e[:1]).square().sum(2).sqrt(), 0.6)

    places = side * side
    launches = (
        strength_launch((2, 1, 4, places), (places, 1), adapters, 1, None, DTYPE),
        blur_launch(adapters, 1, side, side, 3),
        masks_launch(adapters, 1, places, 0.6, True),
    )
    moved, maps = sum(launch.unique_bytes for launch in launches), adapters * places
    # e - base, square, sum, sqrt; pad, pool, mean, divide, divide, softmax, amax, divide: each reads and writes
    rival = DTYPE.itemsize * maps * (4 * 3 + 4 * 2 + 4 + 1 + 2) + FLOAT * maps * 15
    rivals = {"place_strength, place_masks": ours, "torch, 12 ops": lambda: separate(noise)}
    compare(f"masks {model} N={adapters}", rivals, separate(noise.double()), TOLERANCE, moved, {"torch, 12 ops": rival})
    benchmark(ours)


@pytest.mark.parametrize("kind", ["local", "regions"])
@pytest.mark.parametrize("model", SIDES)
def test_combination(benchmark: Any, model: str, kind: str) -> None:
    side, adapters, local = SIDES[model], 5, kind == "local"
    noise, mu = _predictions(adapters, side), torch.rand(adapters, 1, side, side, device=DEVICE)
    coefficients = torch.rand(adapters, 2, device=DEVICE) + 0.1
    names, bases = torch.arange(1, adapters + 1, device=DEVICE), torch.zeros(adapters, dtype=torch.int64, device=DEVICE)

    def ours() -> Tensor:
        if local:
            return combine_local(noise, mu, coefficients, names, bases, 0, BACKEND)
        return combine_regions(noise[2:], mu, coefficients, BACKEND)

    def separate(noise: Tensor) -> Tensor:
        e, weights = noise.unflatten(0, (adapters + 1, 2)), (coefficients[:, :, None, None] * mu)[:, :, None].to(noise)
        if local:
            return e[0] + (weights * (e[1:] - e[:1])).sum(0)
        return (weights * e[1:]).sum(0) / weights.sum(0)

    shape, strides = (2, 1, 4, side * side), (side * side, 1)
    launch = (
        local_launch(shape, strides, adapters, 0, DTYPE) if local else regions_launch(shape, strides, adapters, DTYPE)
    )
    row = 2 * 4 * side * side * DTYPE.itemsize  # a prediction's rows
    rival = row * (adapters * (7 if local else 4) + 5)
    name = "torch, op by op"
    compare(
        f"combine_{kind} {model} N={adapters}",
        {f"combine_{kind}": ours, name: lambda: separate(noise)},
        separate(noise.double()),
        TOLERANCE,
        launch.unique_bytes,
        {name: rival},
    )
    benchmark(ours)
