"""N noise predictions into one: eps[m] = sum_i coefficients[i, m] eps_i[m]  (CMLoRA, arXiv 2502.04923)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora_kernels.dispatch import Backend, check_backend, register


def combine_definition(noise: Tensor, coefficients: Tensor) -> Tensor:
    """`combine_noise` in plain torch."""
    stacked = noise.view(*coefficients.shape, *noise.shape[1:])
    return torch.einsum("nm...,nm->m...", stacked.float(), coefficients).to(noise.dtype)


def _combine_body(noise: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    return combine_definition(noise, coefficients)


def _combine_fake(noise: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    return noise.new_empty((coefficients.shape[1], *noise.shape[1:]))


_combine = register(
    "combine_noise(Tensor noise, Tensor coefficients, str backend) -> Tensor", _combine_body, _combine_fake
)


def combine_noise(noise: Tensor, coefficients: Tensor, backend: Backend = "auto") -> Tensor:
    """Weighted sum of the adapters' noise predictions, weights per image, in float32.

    Args:
        noise: [adapters * rows, channels, height, width], adapter-major.
        coefficients: [adapters, rows] float32.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, channels, height, width] of noise's dtype.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
    """
    check_backend(backend)
    if coefficients.ndim != 2 or coefficients.numel() != noise.shape[0]:
        raise ValueError(
            f"coefficients must be [adapters, rows] with adapters * rows = {noise.shape[0]}, "
            f"got {tuple(coefficients.shape)}"
        )
    combined: Tensor = _combine(noise, coefficients, backend)
    return combined
