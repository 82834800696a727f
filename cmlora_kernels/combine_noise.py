"""N noise predictions into one: eps[m] = sum_i coefficients[i, m] eps_i[m]  (CMLoRA, arXiv 2502.04923)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch
from cmlora_kernels.layout import dense_format
from cmlora_kernels.triton_shim import tl, triton

BLOCK = 1024  # per program: one 16-byte access per thread and adapter in fp16; the adapters' loads fly together


@triton.jit
def combine_kernel(
    noise_ptr,  # [adapters, rows, numel]
    coefficient_ptr,  # [adapters, rows]
    y_ptr,  # [rows, numel]
    rows,
    numel,
    ADAPTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of one row: a sum over the adapters in float32, rounded once."""
    row = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(ADAPTERS):
        part = i * rows + row
        noise = tl.load(noise_ptr + part * numel + offset, offset < numel, 0.0).to(tl.float32)
        total += tl.load(coefficient_ptr + part) * noise
    tl.store(y_ptr + row * numel + offset, total.to(y_ptr.dtype.element_ty), offset < numel)


def combine_definition(noise: Tensor, coefficients: Tensor) -> Tensor:
    """`combine_noise` in plain torch."""
    stacked = noise.reshape(*coefficients.shape, *noise.shape[1:])
    y = torch.einsum("nm...,nm->m...", stacked.float(), coefficients).to(noise.dtype)
    return y.contiguous(memory_format=dense_format(noise))


@functools.lru_cache(maxsize=256)
def combine_launch(adapters: int, rows: int, numel: int, dtype: torch.dtype) -> Launch:
    """The launch of `combine_kernel` on noise [adapters, rows, numel]."""
    blocks = -(-numel // BLOCK)
    moved = (adapters + 1) * rows * numel * dtype.itemsize
    return Launch(
        kernel=combine_kernel,
        name=f"combine_noise {adapters}x{rows}x{numel}",
        tensors={"noise_ptr": POINTER[dtype], "coefficient_ptr": "*fp32", "y_ptr": POINTER[dtype]},
        scalars={"rows": rows, "numel": numel},
        constexprs={"ADAPTERS": adapters, "BLOCK": BLOCK},
        grid=(blocks, rows, 1),
        num_warps=4,
        num_stages=1,
        bytes=moved + 4 * adapters * rows * blocks,
        unique_bytes=moved + 4 * adapters * rows,
        flops=2 * adapters * rows * numel,
    )


def _combine_body(noise: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    y = _combine_fake(noise, coefficients, backend)
    if not (use_triton(noise, backend) and y.numel()):
        return combine_definition(noise, coefficients)
    adapters, rows = coefficients.shape
    launch = combine_launch(adapters, rows, y[0].numel(), noise.dtype)
    launch(noise.contiguous(memory_format=dense_format(noise)), coefficients.contiguous(), y)
    return y


def _combine_fake(noise: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    shape = (coefficients.shape[1], *noise.shape[1:])
    return torch.empty(shape, dtype=noise.dtype, device=noise.device, memory_format=dense_format(noise))


_combine = register(
    "combine_noise(Tensor noise, Tensor coefficients, str backend) -> Tensor", _combine_body, _combine_fake
)


def combine_noise(noise: Tensor, coefficients: Tensor, backend: Backend = "auto") -> Tensor:
    """Weighted sum of the adapters' noise predictions, weights per image, in float32.

    Args:
        noise: [adapters * rows, ...], adapter-major: channels, height, width, or tokens, channels.
        coefficients: [adapters, rows] float32.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, ...] of noise's dtype, channels_last where noise is.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend.
    """
    _check(noise, coefficients, backend)
    combined: Tensor = _combine(noise, coefficients, backend)
    return combined


def _check(noise: Tensor, coefficients: Tensor, backend: str) -> None:
    check_backend(backend)
    if noise.ndim < 2:
        raise ValueError(f"noise must be [adapters * rows, ...], got {tuple(noise.shape)}")
    if coefficients.ndim != 2 or coefficients.numel() != noise.shape[0]:
        raise ValueError(
            f"coefficients must be [adapters, rows] with adapters * rows = {noise.shape[0]}, "
            f"got {tuple(coefficients.shape)}"
        )
    if coefficients.dtype != torch.float32:
        raise ValueError(f"coefficients must be float32, got {coefficients.dtype}")
