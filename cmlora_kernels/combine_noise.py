"""N noise predictions into one: eps[m] = sum_i coefficients[i, m] eps_i[m]  (CMLoRA, arXiv 2502.04923).

With guidance in the same pass: g = u + scale (c - u) of the combined halves u and c (classifier-free guidance,
arXiv 2207.12598), then g (rescale std(c) / std(g) + 1 - rescale) (arXiv 2305.08891, section 3.4).
"""

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
def _weighted_sum(noise_ptr, coefficient_ptr, row, rows, numel, offset, ADAPTERS: tl.constexpr):
    """sum_i coefficients[i, row] noise[i, row, offset] in float32."""
    total = tl.zeros(offset.shape, tl.float32)
    for i in tl.static_range(ADAPTERS):
        part = i * rows + row
        noise = tl.load(noise_ptr + part * numel + offset, offset < numel, 0.0).to(tl.float32)
        total += tl.load(coefficient_ptr + part) * noise
    return total


@triton.jit
def combine_kernel(
    noise_ptr, coefficient_ptr, y_ptr, rows, numel, ADAPTERS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = _weighted_sum(noise_ptr, coefficient_ptr, row, rows, numel, offset, ADAPTERS)
    tl.store(y_ptr + row * numel + offset, total.to(y_ptr.dtype.element_ty), offset < numel)


@triton.jit
def _guided_tile(noise_ptr, coefficient_ptr, image, images, numel, offset, scale, ADAPTERS: tl.constexpr):
    """Conditional half and guided prediction, float32."""
    u = _weighted_sum(noise_ptr, coefficient_ptr, image, 2 * images, numel, offset, ADAPTERS)
    c = _weighted_sum(noise_ptr, coefficient_ptr, image + images, 2 * images, numel, offset, ADAPTERS)
    return c, u + scale * (c - u)


@triton.jit
def _mean_and_deviation(tile, inside, count):
    mean = tl.sum(tl.where(inside, tile, 0.0), 0) / count
    deviation = tl.where(inside, tile - mean, 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def moments_kernel(
    noise_ptr, coefficient_ptr, moments_ptr, images, numel, scale, ADAPTERS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations of both tiles: moments [image, 4, block]."""
    image, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    c, guided = _guided_tile(noise_ptr, coefficient_ptr, image, images, numel, offset, scale, ADAPTERS)
    inside = offset < numel
    count = tl.minimum(numel - block * BLOCK, BLOCK)
    blocks = tl.num_programs(0)
    moments_ptr += image * 4 * blocks + block
    mean, deviation = _mean_and_deviation(c, inside, count)
    tl.store(moments_ptr, mean)
    tl.store(moments_ptr + blocks, deviation)
    mean, deviation = _mean_and_deviation(guided, inside, count)
    tl.store(moments_ptr + 2 * blocks, mean)
    tl.store(moments_ptr + 3 * blocks, deviation)


@triton.jit
def _merged_deviation(moments_ptr, numel, blocks, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Sum of squared deviations from the image's mean, out of the blocks' own (Chan, Golub, LeVeque 1979)."""
    block = tl.arange(0, PADDED)
    count = tl.where(block < blocks, tl.minimum(numel - block * BLOCK, BLOCK), 0)
    mean = tl.load(moments_ptr + block, block < blocks, 0.0)
    deviation = tl.load(moments_ptr + blocks + block, block < blocks, 0.0)
    apart = mean - tl.sum(mean * count, 0) / numel
    return tl.sum(deviation + count * apart * apart, 0)


@triton.jit
def guided_kernel(
    noise_ptr, coefficient_ptr, moments_ptr, y_ptr, images, numel, scale, rescale, blocks,
    ADAPTERS: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, guided = _guided_tile(noise_ptr, coefficient_ptr, image, images, numel, offset, scale, ADAPTERS)
    if moments_ptr is not None:
        moments_ptr += image * 4 * blocks
        c_deviation = _merged_deviation(moments_ptr, numel, blocks, BLOCK, PADDED)
        guided_deviation = _merged_deviation(moments_ptr + 2 * blocks, numel, blocks, BLOCK, PADDED)
        guided *= rescale * tl.sqrt(c_deviation / guided_deviation) + (1.0 - rescale)
    tl.store(y_ptr + image * numel + offset, guided.to(y_ptr.dtype.element_ty), offset < numel)


def combine_definition(noise: Tensor, coefficients: Tensor) -> Tensor:
    """`combine_noise` in plain torch."""
    stacked = noise.reshape(*coefficients.shape, *noise.shape[1:])
    y = torch.einsum("nm...,nm->m...", stacked.float(), coefficients).to(noise.dtype)
    return y.contiguous(memory_format=dense_format(noise))


def guided_definition(noise: Tensor, coefficients: Tensor, scale: float, rescale: float) -> Tensor:
    """`combine_guided_noise` in plain torch."""
    u, c = combine_definition(noise.float(), coefficients).chunk(2)
    guided = u + scale * (c - u)
    if rescale:
        std_c, std_guided = (t.flatten(1).std(1).view(-1, *[1] * (t.ndim - 1)) for t in (c, guided))
        guided = guided * (rescale * std_c / std_guided + (1 - rescale))
    return guided.to(noise.dtype).contiguous(memory_format=dense_format(noise))


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


@functools.lru_cache(maxsize=256)
def moments_launch(adapters: int, images: int, numel: int, dtype: torch.dtype, scale: float) -> Launch:
    """The launch of `moments_kernel` on noise [adapters, 2 * images, numel]."""
    blocks = -(-numel // BLOCK)
    moved = adapters * 2 * images * numel * dtype.itemsize + 16 * images * blocks
    return Launch(
        kernel=moments_kernel,
        name=f"guided moments {adapters}x{2 * images}x{numel}",
        tensors={"noise_ptr": POINTER[dtype], "coefficient_ptr": "*fp32", "moments_ptr": "*fp32"},
        scalars={"images": images, "numel": numel, "scale": float(scale)},
        constexprs={"ADAPTERS": adapters, "BLOCK": BLOCK},
        grid=(blocks, images, 1),
        num_warps=4,
        num_stages=1,
        bytes=moved + 8 * adapters * images * blocks,
        unique_bytes=moved + 8 * adapters * images,
        flops=images * numel * (4 * adapters + 11),
    )


@functools.lru_cache(maxsize=256)
def guided_launch(adapters: int, images: int, numel: int, dtype: torch.dtype, scale: float, rescale: float) -> Launch:
    """The launch of `guided_kernel` on noise [adapters, 2 * images, numel]."""
    blocks = -(-numel // BLOCK)
    moved = (2 * adapters + 1) * images * numel * dtype.itemsize
    return Launch(
        kernel=guided_kernel,
        name=f"combine_guided_noise {adapters}x{2 * images}x{numel}{' rescaled' if rescale else ''}",
        tensors={
            "noise_ptr": POINTER[dtype],
            "coefficient_ptr": "*fp32",
            "moments_ptr": "*fp32" if rescale else None,
            "y_ptr": POINTER[dtype],
        },
        scalars={
            "images": images,
            "numel": numel,
            "scale": float(scale),
            "rescale": float(rescale),
            "blocks": blocks,
        },
        constexprs={"ADAPTERS": adapters, "BLOCK": BLOCK, "PADDED": max(64, 1 << (blocks - 1).bit_length())},
        grid=(blocks, images, 1),
        num_warps=4,
        num_stages=1,
        bytes=moved + 8 * adapters * images * blocks + (16 * images * blocks * blocks if rescale else 0),
        unique_bytes=moved + 8 * adapters * images + (16 * images * blocks if rescale else 0),
        flops=images * numel * (4 * adapters + 4),
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
    return _empty(noise, coefficients.shape[1])


def _guided_body(noise: Tensor, coefficients: Tensor, scale: float, rescale: float, backend: str) -> Tensor:
    y = _guided_fake(noise, coefficients, scale, rescale, backend)
    if not (use_triton(noise, backend) and y.numel()):
        return guided_definition(noise, coefficients, scale, rescale)
    noise, coefficients = noise.contiguous(memory_format=dense_format(noise)), coefficients.contiguous()
    size = (coefficients.shape[0], y.shape[0], y[0].numel(), noise.dtype)
    moments = None
    if rescale:
        launch = moments_launch(*size, scale)
        moments = noise.new_empty((y.shape[0], 4, launch.grid[0]), dtype=torch.float32)
        launch(noise, coefficients, moments)
    guided_launch(*size, scale, rescale)(noise, coefficients, moments, y)
    return y


def _guided_fake(noise: Tensor, coefficients: Tensor, scale: float, rescale: float, backend: str) -> Tensor:
    return _empty(noise, coefficients.shape[1] // 2)


def _empty(noise: Tensor, rows: int) -> Tensor:
    shape = (rows, *noise.shape[1:])
    return torch.empty(shape, dtype=noise.dtype, device=noise.device, memory_format=dense_format(noise))


_combine = register(
    "combine_noise(Tensor noise, Tensor coefficients, str backend) -> Tensor", _combine_body, _combine_fake
)
_guided = register(
    "combine_guided_noise(Tensor noise, Tensor coefficients, float scale, float rescale, str backend) -> Tensor",
    _guided_body,
    _guided_fake,
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


def combine_guided_noise(
    noise: Tensor,
    coefficients: Tensor,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """`combine_noise`, classifier-free guidance and `guidance_rescale` in one pass (two launches with rescale).

    Args:
        noise: [adapters * rows, ...], adapter-major; rows = unconditional images, then the same
            images conditional, as diffusers stacks them.
        coefficients: [adapters, rows] float32.
        guidance_scale, guidance_rescale: as in diffusers' pipelines; 0 leaves the guided prediction unscaled.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows / 2, ...] of noise's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, an odd number of rows, or an unknown backend.
    """
    _check(noise, coefficients, backend)
    if coefficients.shape[1] % 2:
        raise ValueError(f"coefficients must have an even number of rows, got {tuple(coefficients.shape)}")
    guided: Tensor = _guided(noise, coefficients, guidance_scale, guidance_rescale, backend)
    return guided


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
