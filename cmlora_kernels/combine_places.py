"""N noise predictions into one, each where it counts.

combine_local    eps = e_base + sum_j c_j mu_j (e_j - e_base_j)          a mask per adapter, image and place
combine_regions  eps = sum_j c_j R_j e_j / sum_j c_j R_j                 masks drawn by hand; all 1 where their sum is 0
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch
from cmlora_kernels.layout import dense_format
from cmlora_kernels.places import check_predictions, lay_out, tile_of
from cmlora_kernels.triton_shim import tl, triton


@triton.jit
def local_kernel(
    noise_ptr,  # [predictions, rows, channels, places] in either order of the last two
    masks_ptr,  # [adapters, images, places]
    coefficients_ptr,  # [adapters, rows]
    adapters_ptr,  # [adapters]
    bases_ptr,  # [adapters]
    base_ptr,  # [1] or None
    y_ptr,  # [rows, channels, places], as noise
    rows,
    images,
    channels,
    places,
    channel_stride,
    place_stride,
    base,
    ADAPTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, numel = tl.program_id(1).to(tl.int64), channels * places
    c, place = tl.arange(0, CHANNELS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (c < channels)[:, None] & (place < places)[None, :]
    offset = c[:, None] * channel_stride + place[None, :] * place_stride  # [CHANNELS, BLOCK]
    noise_ptrs = noise_ptr + row * numel + offset
    step = rows.to(tl.int64) * numel
    if base_ptr is not None:
        base = tl.load(base_ptr)
    reference = tl.load(noise_ptrs + base * step, inside, 0.0).to(tl.float32)
    total = tl.zeros((CHANNELS, BLOCK), tl.float32)
    for i in tl.static_range(ADAPTERS):
        own = tl.load(noise_ptrs + tl.load(adapters_ptr + i) * step, inside, 0.0).to(tl.float32)
        of = tl.load(bases_ptr + i)
        unread = tl.where(of == base, 0, channels)  # mostly: the pipeline's own base is here already
        other = tl.load(noise_ptrs + of * step, inside & (c < unread)[:, None], 0.0).to(tl.float32)
        other = tl.where(of == base, reference, other)
        mask = tl.load(masks_ptr + (i * images + row % images) * places + place, place < places, 0.0)
        weight = tl.load(coefficients_ptr + i * rows + row) * mask
        total += weight[None, :] * (own - other)
    tl.store(y_ptr + row * numel + offset, (reference + total).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def regions_kernel(
    noise_ptr,  # [adapters, rows, channels, places] in either order of the last two
    regions_ptr,  # [adapters, images, places]
    coefficients_ptr,  # [adapters, rows]
    y_ptr,  # [rows, channels, places], as noise
    rows,
    images,
    channels,
    places,
    channel_stride,
    place_stride,
    ADAPTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, numel = tl.program_id(1).to(tl.int64), channels * places
    c, place = tl.arange(0, CHANNELS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (c < channels)[:, None] & (place < places)[None, :]
    offset = c[:, None] * channel_stride + place[None, :] * place_stride  # [CHANNELS, BLOCK]
    weighted = tl.zeros((CHANNELS, BLOCK), tl.float32)
    plain = tl.zeros((CHANNELS, BLOCK), tl.float32)
    share, whole = tl.zeros((BLOCK,), tl.float32), 0.0
    for i in tl.static_range(ADAPTERS):
        coefficient = tl.load(coefficients_ptr + i * rows + row)
        region = tl.load(regions_ptr + (i * images + row % images) * places + place, place < places, 0.0)
        own = tl.load(noise_ptr + (i * rows + row) * numel + offset, inside, 0.0).to(tl.float32)
        weighted += (coefficient * region)[None, :] * own
        plain += coefficient * own
        share += coefficient * region
        whole += coefficient
    empty = (share == 0.0)[None, :]
    y = tl.where(empty, plain, weighted) / tl.where(share == 0.0, whole, share)[None, :]
    tl.store(y_ptr + row * numel + offset, y.to(y_ptr.dtype.element_ty), inside)


def local_definition(
    noise: Tensor,
    masks: Tensor,
    coefficients: Tensor,
    adapters: Tensor,
    bases: Tensor,
    base_at: Tensor | None,
    base: int,
) -> Tensor:
    """`combine_local` in plain torch."""
    stacked: Tensor = noise.unflatten(0, (-1, coefficients.shape[1])).float()
    start = stacked[base] if base_at is None else stacked[base_at].squeeze(0)
    apart = stacked[adapters] - stacked[bases]
    y: Tensor = start + (per_row(masks, coefficients) * apart).sum(0)
    return y.to(noise.dtype).contiguous(memory_format=dense_format(noise))


def regions_definition(noise: Tensor, regions: Tensor, coefficients: Tensor) -> Tensor:
    """`combine_regions` in plain torch."""
    stacked: Tensor = noise.unflatten(0, coefficients.shape).float()
    weights = per_row(regions, coefficients)
    whole = coefficients[:, :, None, None, None].expand_as(weights)
    weights = torch.where(weights.sum(0) == 0, whole, weights)
    y: Tensor = (weights * stacked).sum(0) / weights.sum(0)
    return y.to(noise.dtype).contiguous(memory_format=dense_format(noise))


def per_row(masks: Tensor, coefficients: Tensor) -> Tensor:
    """Coefficient times mask [adapters, rows, 1, height, width]; both guidance halves of an image share its mask."""
    repeats = coefficients.shape[1] // masks.shape[1]
    return (coefficients[:, :, None, None] * masks.repeat(1, repeats, 1, 1)).unsqueeze(2)


@functools.lru_cache(maxsize=256)
def local_launch(
    shape: tuple[int, ...], strides: tuple[int, int], adapters: int, base: int | None, dtype: torch.dtype
) -> Launch:
    """The launch of `local_kernel`.

    Args:
        shape: rows, images, channels, places. strides: of a channel and of a place.
        base: the pipeline's own base prediction; None where a tensor names it.
    """
    tensors = {"adapters_ptr": "*i64", "bases_ptr": "*i64", "base_ptr": "*i64" if base is None else None}
    return _launch(local_kernel, "combine_local", shape, strides, adapters, dtype, tensors, {"base": base or 0}, 1)


@functools.lru_cache(maxsize=256)
def regions_launch(shape: tuple[int, ...], strides: tuple[int, int], adapters: int, dtype: torch.dtype) -> Launch:
    """The launch of `regions_kernel`; arguments as in `local_launch`."""
    return _launch(regions_kernel, "combine_regions", shape, strides, adapters, dtype, {}, {}, 0)


def _launch(
    kernel: object,
    name: str,
    shape: tuple[int, ...],
    strides: tuple[int, int],
    adapters: int,
    dtype: torch.dtype,
    tensors: dict[str, str | None],
    scalars: dict[str, int],
    bases: int,
) -> Launch:
    """`bases` predictions are read beside the adapters' own: where all are compared with the pipeline's own base."""
    (rows, images, channels, places), pointer = shape, POINTER[dtype]
    padded, block = tile_of(channels)
    blocks, mask = -(-places // block), "masks_ptr" if bases else "regions_ptr"
    numel, indices = channels * places, sum(8 if kind else 0 for kind in tensors.values())
    predictions = dtype.itemsize * rows * numel * (adapters + bases + 1)
    per_program = adapters * (4 + (16 if bases else 0)) + (indices - 16 if bases else 0)
    return Launch(
        kernel=kernel,
        name=f"{name} {adapters}x{rows}x{channels}x{places}",
        tensors={"noise_ptr": pointer, mask: "*fp32", "coefficients_ptr": "*fp32", **tensors, "y_ptr": pointer},
        scalars={
            "rows": rows,
            "images": images,
            "channels": channels,
            "places": places,
            "channel_stride": strides[0],
            "place_stride": strides[1],
            **scalars,
        },
        constexprs={"ADAPTERS": adapters, "CHANNELS": padded, "BLOCK": block},
        grid=(blocks, rows, 1),
        num_warps=8 if bases and strides[0] == 1 else 4,  # channels side by side: with four, sm_90 spills four bytes
        num_stages=1,
        bytes=predictions + 4 * adapters * rows * places + per_program * blocks * rows,
        unique_bytes=predictions + 4 * adapters * (images * places + rows) + (16 * adapters if bases else 0),
        flops=rows * numel * adapters * (3 if bases else 4),
    )


def _local_body(
    noise: Tensor,
    masks: Tensor,
    coefficients: Tensor,
    adapters: Tensor,
    bases: Tensor,
    base_at: Tensor | None,
    base: int,
    backend: str,
) -> Tensor:
    if not (use_triton(noise, backend) and noise.numel() and noise.dtype in POINTER):
        return local_definition(noise, masks, coefficients, adapters, bases, base_at, base)
    noise, strides = lay_out(noise)
    y, shape = _empty(noise, coefficients), _shape(noise, masks, coefficients)
    launch = local_launch(shape, strides, masks.shape[0], base if base_at is None else None, noise.dtype)
    indices = (adapters.contiguous(), bases.contiguous(), base_at)
    launch(noise, masks.contiguous(), coefficients.contiguous(), *indices, y)
    return y


def _local_fake(
    noise: Tensor,
    masks: Tensor,
    coefficients: Tensor,
    adapters: Tensor,
    bases: Tensor,
    base_at: Tensor | None,
    base: int,
    backend: str,
) -> Tensor:
    return _empty(noise, coefficients)


def _regions_body(noise: Tensor, regions: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    if not (use_triton(noise, backend) and noise.numel() and noise.dtype in POINTER):
        return regions_definition(noise, regions, coefficients)
    noise, strides = lay_out(noise)
    y, shape = _empty(noise, coefficients), _shape(noise, regions, coefficients)
    launch = regions_launch(shape, strides, regions.shape[0], noise.dtype)
    launch(noise, regions.contiguous(), coefficients.contiguous(), y)
    return y


def _regions_fake(noise: Tensor, regions: Tensor, coefficients: Tensor, backend: str) -> Tensor:
    return _empty(noise, coefficients)


def _shape(noise: Tensor, masks: Tensor, coefficients: Tensor) -> tuple[int, ...]:
    return coefficients.shape[1], masks.shape[1], noise.shape[1], noise[0, 0].numel()


def _empty(noise: Tensor, coefficients: Tensor) -> Tensor:
    shape = (coefficients.shape[1], *noise.shape[1:])
    return torch.empty(shape, dtype=noise.dtype, device=noise.device, memory_format=dense_format(noise))


_local = register(
    "combine_local(Tensor noise, Tensor masks, Tensor coefficients, Tensor adapters, Tensor bases, Tensor? base_at, "
    "int base, str backend) -> Tensor",
    _local_body,
    _local_fake,
)
_regions = register(
    "combine_regions(Tensor noise, Tensor regions, Tensor coefficients, str backend) -> Tensor",
    _regions_body,
    _regions_fake,
)


def combine_local(
    noise: Tensor,
    mu: Tensor,
    coefficients: Tensor,
    adapters: Tensor,
    bases: Tensor,
    base: Tensor | int,
    backend: Backend = "auto",
) -> Tensor:
    """The base model's prediction, and each adapter's deviation from it where its mask lets it, in float32.

    Args:
        noise: [predictions * rows, channels, height, width], prediction-major.
        mu: [adapters, images, height, width] float32, of `place_masks` or drawn by hand; row r is of image
            r % images, so that both guidance halves share a mask.
        coefficients: [adapters, rows] float32.
        adapters, bases: [adapters] int64: each adapter's prediction, and the one that it is compared with.
        base: the prediction that the deviations are added to, as a number or as int64 [1] on noise's device. What the
            tensors hold is on the device and is not checked.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, channels, height, width] of noise's dtype, channels_last where noise is.

    Raises:
        ValueError: a shape, dtype or backend that does not fit; it names the argument.
    """
    _check(noise, mu, "mu", coefficients, backend)
    check_predictions(noise, coefficients.shape[1], adapters, bases)
    if adapters.shape[0] != mu.shape[0]:
        raise ValueError(f"adapters must be [{mu.shape[0]}] for mu {tuple(mu.shape)}, got {adapters.shape[0]}")
    count = noise.shape[0] // coefficients.shape[1]
    if isinstance(base, Tensor):
        if base.shape != (1,) or base.dtype != torch.int64:
            raise ValueError(f"base must be a number or int64 [1], got {tuple(base.shape)} {base.dtype}")
    elif not 0 <= base < count:
        raise ValueError(f"base must be one of {count} predictions, got {base}")
    at, number = (base, 0) if isinstance(base, Tensor) else (None, base)
    combined: Tensor = _local(noise, mu, coefficients, adapters, bases, at, number, backend)
    return combined


def combine_regions(noise: Tensor, regions: Tensor, coefficients: Tensor, backend: Backend = "auto") -> Tensor:
    """The adapters' weighted mean at every place, each weighted by its region there, in float32.

    Args:
        noise: [adapters * rows, channels, height, width], adapter-major.
        regions: [adapters, images, height, width] float32; row r is of image r % images. Where all of them (times the
            coefficients) sum to zero the mean is that without regions.
        coefficients: [adapters, rows] float32.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, channels, height, width] of noise's dtype, channels_last where noise is.

    Raises:
        ValueError: a shape, dtype or backend that does not fit; it names the argument.
    """
    _check(noise, regions, "regions", coefficients, backend)
    if noise.shape[0] != coefficients.numel():
        raise ValueError(
            f"noise must be [{coefficients.numel()}, channels, height, width] for coefficients "
            f"{tuple(coefficients.shape)}, got {tuple(noise.shape)}"
        )
    combined: Tensor = _regions(noise, regions, coefficients, backend)
    return combined


def _check(noise: Tensor, masks: Tensor, name: str, coefficients: Tensor, backend: str) -> None:
    check_backend(backend)
    if noise.ndim != 4:
        raise ValueError(f"noise must be [predictions * rows, channels, height, width], got {tuple(noise.shape)}")
    if coefficients.ndim != 2 or 0 in coefficients.shape or coefficients.dtype != torch.float32:
        raise ValueError(
            f"coefficients must be [adapters, rows] float32, got {tuple(coefficients.shape)} {coefficients.dtype}"
        )
    adapters, rows = coefficients.shape
    if masks.ndim != 4 or masks.shape[0] != adapters or masks.shape[2:] != noise.shape[2:]:
        want = (adapters, "images", *noise.shape[2:])
        raise ValueError(f"{name} must be {want} for noise {tuple(noise.shape)}, got {tuple(masks.shape)}")
    if not masks.shape[1] or rows % masks.shape[1]:
        raise ValueError(f"{name} must have a number of images that divides {rows} rows, got {masks.shape[1]}")
    if masks.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {masks.dtype}")
