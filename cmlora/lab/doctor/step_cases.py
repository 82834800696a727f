"""The kernels that a step launches beside its layers: spectrum, choice, cached features, combination, masks, norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import cmlora_kernels as ck
from cmlora.lab.doctor.cases import Case, Results


def step_cases(dtype: torch.dtype, size: int, channels: int = 64) -> Iterator[Case]:
    """On latents of size x size: as a pipeline has them, channels_last, and ragged.

    Args:
        dtype: of latents and features. size: of the latents. channels: of the cached features.
    """
    word = str(dtype).removeprefix("torch.")
    for name, make in _OPS.items():
        yield Case(f"{name} {word}", _compared(make, dtype, size, channels))
        if name in ("concat_channels", "combine_noise", "combine_local", "group_norm_silu"):
            yield Case(f"{name} {word} channels_last", _compared(make, dtype, size, channels, last=True))
    yield Case(f"combine_noise {word} ragged", _compared(_OPS["combine_noise"], dtype, size - 3, channels))


Made = Callable[[str, torch.dtype], Tensor]
"""The op's answer by a backend, in a dtype."""


def _compared(
    make: Callable[..., Made], dtype: torch.dtype, size: int, channels: int, *, last: bool = False
) -> Callable[[torch.device], Results]:
    def run(device: torch.device) -> Results:
        g = torch.Generator(device.type).manual_seed(size)

        def normal(*shape: int) -> Tensor:
            x: Tensor = torch.randn(shape, generator=g, device=device).to(dtype)
            return x.contiguous(memory_format=torch.channels_last) if last else x

        op = make(normal, device, size, channels)
        got = op("triton", dtype)
        return Results(got, op("torch", dtype), op("torch", torch.float64), got)

    return run


# A case hands the names of backends through as plain strings, which mypy does not take for the ops' literals.


def _combine(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    noise, weights = normal(6, 4, size, size), torch.rand(3, 2, device=device)
    return lambda backend, dtype: ck.combine_noise(noise.to(dtype), weights, backend=backend)  # type: ignore[arg-type]


def _profile(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    latents = normal(2, 4, size, size)
    return lambda backend, dtype: ck.radial_profile(latents.to(dtype), backend=backend)  # type: ignore[arg-type]


def _share(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    latents = normal(2, 4, size, size)
    return lambda backend, dtype: ck.high_frequency_share(
        latents.to(dtype),
        0.2,
        backend=backend,  # type: ignore[arg-type]
    )


def _concat(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    bank, skip = normal(2, channels, size, size), normal(2, channels // 2, size, size)
    return lambda backend, dtype: ck.concat_channels(bank.to(dtype), skip.to(dtype), backend=backend)  # type: ignore[arg-type]


def _scatter(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    bank, rows = normal(3, channels, size, size), normal(2, channels, size, size)
    index = torch.tensor([2, 0], device=device)

    def op(backend: Any, dtype: torch.dtype) -> Tensor:
        into: Tensor = bank.to(dtype, copy=True)
        ck.scatter_rows(into, rows.to(dtype), index, backend=backend)
        return into

    return op


def _masks(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    noise, adapters = normal(8, 4, size, size), torch.arange(1, 4, device=device)
    bases = torch.zeros(3, dtype=torch.int64, device=device)

    def op(backend: Any, dtype: torch.dtype) -> Tensor:
        strength = ck.place_strength(noise.to(dtype), adapters, bases, 1, 1, backend=backend)
        masks: Tensor = ck.place_masks(strength, 0.6, backend=backend)
        return masks

    return op


def _local(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    noise, adapters = normal(8, 4, size, size), torch.arange(1, 4, device=device)
    bases, mu = torch.zeros(3, dtype=torch.int64, device=device), torch.rand(3, 1, size, size, device=device)
    weights = torch.rand(3, 2, device=device)
    return lambda backend, dtype: ck.combine_local(
        noise.to(dtype),
        mu,
        weights,
        adapters,
        bases,
        0,
        backend=backend,  # type: ignore[arg-type]
    )


def _regions(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    noise, mu, weights = normal(6, 4, size, size), torch.rand(3, 1, size, size, device=device), torch.rand(3, 2)
    return lambda backend, dtype: ck.combine_regions(
        noise.to(dtype),
        mu,
        weights.to(device),
        backend=backend,  # type: ignore[arg-type]
    )


def _modulated(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    """Three predictions of two images, whose modulation they share."""
    x, (shift, scale, _) = normal(6, size + 1, 3 * channels), normal(2, 3, 3 * channels).chunk(3, 1)
    return lambda backend, dtype: ck.modulated_norm(
        x.to(dtype),
        shift.to(dtype),
        scale.to(dtype),
        1e-6,
        backend=backend,  # type: ignore[arg-type]
    )


def _rotary(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    """A prompt of five tokens before the image, and shared by all predictions."""
    x, before, weights = normal(6, size + 1, 3, channels), normal(2, 5, 3, channels), normal(2, channels)
    angle = normal(size + 6, channels // 2).float()
    turns = torch.stack((angle.cos(), angle.sin()), -1)
    return lambda backend, dtype: ck.rotary_norm(
        x.to(dtype),
        weights[0].to(dtype),
        turns,
        1e-6,
        before.to(dtype),
        weights[1].to(dtype),
        backend=backend,  # type: ignore[arg-type]
    )


def _group_norm(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    x, (weight, bias) = 1 + normal(2, channels, size, size), normal(2, channels, 1, 1).flatten(1)
    groups = channels // 2

    def op(backend: Any, dtype: torch.dtype) -> Tensor:
        y: Tensor = ck.group_norm_silu(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), 1e-5, backend)
        return y

    return op


def _geglu(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    x = normal(2, size, 8 * channels)
    return lambda backend, dtype: ck.geglu(x.to(dtype), backend=backend)  # type: ignore[arg-type]


def _gate(normal: Any, device: torch.device, size: int, channels: int) -> Made:
    """Of a rank in two chunks: the second one's kernel has the gate."""
    rank, slots = 136, torch.tensor([1, -1], device=device)
    x, scales = normal(2, size, channels), torch.ones(2, 1, device=device)
    weight, a = (normal(*shape) / channels**0.5 for shape in ((8 * channels, channels), (2, rank, channels)))
    b = normal(2, 8 * channels, rank) / rank**0.5

    def op(backend: Any, dtype: torch.dtype) -> Tensor:
        given = (weight.to(dtype), None, slots, a.to(dtype), b.to(dtype), scales)
        y: Tensor = ck.multi_lora_geglu(x.to(dtype), *given, backend=backend)
        return y

    return op


_OPS: dict[str, Callable[..., Made]] = {
    "combine_noise": _combine,
    "radial_profile": _profile,
    "high_frequency_share": _share,
    "concat_channels": _concat,
    "scatter_rows": _scatter,
    "geglu": _geglu,
    "group_norm_silu": _group_norm,
    "multi_lora_geglu": _gate,
    "masks": _masks,
    "combine_local": _local,
    "combine_regions": _regions,
    "modulated_norm": _modulated,
    "rotary_norm": _rotary,
}
