"""Radial amplitude spectra of latents, and the choice of the dominant adapter that follows from them.

amplitude = |DFT2(x)| with the zero frequency at (H // 2, W // 2); bin r = mean amplitude where floor(radius) == r;
the profile is divided by its largest bin (the relative amplitudes of CMLoRA, arXiv 2502.04923).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from cmlora_kernels.dispatch import Backend, check_backend, register


@functools.lru_cache(maxsize=32)
def radial_bins(height: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bin of every frequency of an unshifted [height, width] spectrum, row by row, and the number in each bin."""
    bins = []
    for y in range(height):
        dy = (y + height // 2) % height - height // 2
        for x in range(width):
            dx = (x + width // 2) % width - width // 2
            bins.append(math.isqrt(dy * dy + dx * dx))
    counts = [0] * (max(bins) + 1)
    for r in bins:
        counts[r] += 1
    return tuple(bins), tuple(counts)


@functools.lru_cache(maxsize=32)
def _bin_means(height: int, width: int, device: torch.device) -> Tensor:
    """[height * width, bins], column r averages the frequencies of bin r: a fixed order of summation, no atomics."""
    bins, counts = radial_bins(height, width)
    matrix = torch.zeros(height * width, len(counts))
    matrix[torch.arange(height * width), torch.tensor(bins)] = 1 / torch.tensor(counts).float()[torch.tensor(bins)]
    return matrix.to(device)


def profile_definition(x: Tensor, channel_mean: bool) -> Tensor:
    """`radial_profile` in plain torch."""
    x = x.float().mean(1) if channel_mean else x.float()
    amplitude = torch.fft.fft2(x).abs()
    profile = amplitude.flatten(-2) @ _bin_means(x.shape[-2], x.shape[-1], x.device)
    if not channel_mean:
        profile = profile.mean(1)
    normalised: Tensor = profile / profile.amax(-1, keepdim=True)
    return normalised


def share_definition(x: Tensor, cutoff: float) -> Tensor:
    """`high_frequency_share` in plain torch."""
    profile = profile_definition(x, True)
    return profile[:, first_high_bin(profile.shape[1], cutoff) :].mean(1)


def first_high_bin(bins: int, cutoff: float) -> int:
    """The first bin beyond `cutoff` times the largest radius; the last bin is always beyond it."""
    return min(math.floor(cutoff * (bins - 1)) + 1, bins - 1)


def select_definition(
    share: Tensor, gate: float, early: int, late: int, adapters: int, dominant_weight: float, other_weight: float
) -> tuple[Tensor, Tensor]:
    """`select_dominant` in plain torch."""
    dominant = torch.where(share >= gate, early, late)
    is_dominant = torch.arange(adapters, device=share.device).unsqueeze(1) == dominant
    return dominant, torch.where(is_dominant, dominant_weight, other_weight)


def _profile_body(x: Tensor, channel_mean: bool, backend: str) -> Tensor:
    return profile_definition(x, channel_mean)


def _profile_fake(x: Tensor, channel_mean: bool, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], len(radial_bins(x.shape[2], x.shape[3])[1])), dtype=torch.float32)


def _share_body(x: Tensor, cutoff: float, backend: str) -> Tensor:
    return share_definition(x, cutoff)


def _share_fake(x: Tensor, cutoff: float, backend: str) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.float32)


def _select_body(
    share: Tensor,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return select_definition(share, gate, early, late, adapters, dominant_weight, other_weight)


def _select_fake(
    share: Tensor,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return share.new_empty(share.shape, dtype=torch.int64), share.new_empty((adapters, *share.shape))


_profile = register("radial_profile(Tensor x, bool channel_mean, str backend) -> Tensor", _profile_body, _profile_fake)
_share = register("high_frequency_share(Tensor x, float cutoff, str backend) -> Tensor", _share_body, _share_fake)
_select = register(
    "select_dominant(Tensor share, float gate, int early, int late, int adapters, float dominant_weight, "
    "float other_weight, str backend) -> (Tensor, Tensor)",
    _select_body,
    _select_fake,
)


def radial_profile(x: Tensor, channel_mean: bool = True, backend: Backend = "auto") -> Tensor:
    """Normalised radial amplitude profile of every row.

    Args:
        x: [rows, channels, height, width].
        channel_mean: True: the spectrum of the channels' mean (latents). False: the mean over channels of their
            profiles (feature maps).
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, bins] float32, largest bin 1; bins = 1 + floor(largest radius).

    Raises:
        ValueError: x of another rank, or an unknown backend.
    """
    _check(x, backend)
    profile: Tensor = _profile(x, channel_mean, backend)
    return profile


def high_frequency_share(x: Tensor, cutoff: float, backend: Backend = "auto") -> Tensor:
    """m of the online partition: mean of the profile beyond `cutoff` x largest radius.

    Args:
        x: [rows, channels, height, width]. cutoff: in [0, 1).

    Returns:
        [rows] float32.

    Raises:
        ValueError: x of another rank, cutoff out of range, or an unknown backend.
    """
    _check(x, backend)
    if not 0 <= cutoff < 1:
        raise ValueError(f"cutoff must be in [0, 1), got {cutoff}")
    share: Tensor = _share(x, cutoff, backend)
    return share


def select_dominant(
    share: Tensor,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Dominant adapter and weights per row, chosen on the device.

    Args:
        share: [rows] float32, from `high_frequency_share`; NaN counts as below the gate.
        gate: a row is in the early stage while share >= gate.
        early, late: the adapter that dominates in either stage.
        adapters: their number.
        dominant_weight, other_weight: what the weights are made of.

    Returns:
        dominant [rows] int64 and weights [adapters, rows] float32.

    Raises:
        ValueError: share of another rank, early or late out of range, or an unknown backend.
    """
    check_backend(backend)
    if share.ndim != 1:
        raise ValueError(f"share must be [rows], got {tuple(share.shape)}")
    for name, slot in (("early", early), ("late", late)):
        if not 0 <= slot < adapters:
            raise ValueError(f"{name} must be in [0, {adapters}), got {slot}")
    dominant, weights = _select(share, gate, early, late, adapters, dominant_weight, other_weight, backend)
    return dominant, weights


def _check(x: Tensor, backend: str) -> None:
    check_backend(backend)
    if x.ndim != 4:
        raise ValueError(f"x must be [rows, channels, height, width], got {tuple(x.shape)}")
