"""Which adapter dominates the next step, chosen on the device from the latents' spectrum (CMLoRA, arXiv 2502.04923)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora_kernels.dispatch import Backend, register, use_triton
from cmlora_kernels.radial import bin_scales
from cmlora_kernels.spectrum import check_image, fits, partial_sums, share_definition
from cmlora_kernels.spectrum_finish import finish_launch


def select_definition(
    share: Tensor, gate: float, early: int, late: int, adapters: int, dominant_weight: float, other_weight: float
) -> tuple[Tensor, Tensor]:
    """The choice alone in plain torch: dominant [rows] and weights [adapters, rows]."""
    dominant = torch.where(share >= gate, early, late)
    is_dominant = torch.arange(adapters, device=share.device).unsqueeze(1) == dominant
    return dominant, torch.where(is_dominant, dominant_weight, other_weight)


def _latents_body(
    x: Tensor,
    cutoff: float,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    choice = (gate, early, late, adapters, dominant_weight, other_weight)
    if not (use_triton(x, backend) and fits(x)):
        share = share_definition(x, cutoff)
        return *select_definition(share, *choice), share
    rows, _, height, width = x.shape
    partial = partial_sums(x, True)
    dominant, weights, share = *_empty(x, rows, adapters), x.new_empty((rows,), dtype=torch.float32)
    launch = finish_launch(rows, height, width, partial.shape[1], cutoff, choice)
    launch(partial, bin_scales(height, width, partial.shape[2], x.device), None, share, dominant, weights)
    return dominant, weights, share


def _latents_fake(
    x: Tensor,
    cutoff: float,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty(x, x.shape[0], adapters), x.new_empty((x.shape[0],), dtype=torch.float32)


def _empty(like: Tensor, rows: int, adapters: int) -> tuple[Tensor, Tensor]:
    return like.new_empty((rows,), dtype=torch.int64), like.new_empty((adapters, rows), dtype=torch.float32)


_latents = register(
    "dominant_from_latents(Tensor x, float cutoff, float gate, int early, int late, int adapters, "
    "float dominant_weight, float other_weight, str backend) -> (Tensor, Tensor, Tensor)",
    _latents_body,
    _latents_fake,
)


def dominant_from_latents(
    x: Tensor,
    cutoff: float,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Dominant adapter and weights per row by `high_frequency_share`, all on the device.

    Args:
        x: [rows, channels, height, width]. cutoff: as in `high_frequency_share`.
        gate: a row is in the early stage while its share is at least this; NaN counts as below.
        early, late: the adapter that dominates in either stage.
        adapters: their number.
        dominant_weight, other_weight: what the weights are made of.

    Returns:
        dominant [rows] int64, weights [adapters, rows] float32, share [rows] float32.

    Raises:
        ValueError: x of another rank, cutoff, early or late out of range, or an unknown backend.
    """
    check_image(x, backend, cutoff)
    _check_choice(early, late, adapters)
    dominant, weights, share = _latents(x, cutoff, gate, early, late, adapters, dominant_weight, other_weight, backend)
    return dominant, weights, share


def _check_choice(early: int, late: int, adapters: int) -> None:
    for name, slot in (("early", early), ("late", late)):
        if not 0 <= slot < adapters:
            raise ValueError(f"{name} must be in [0, {adapters}), got {slot}")
