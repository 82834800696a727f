"""Where each LoRA acts: masks from the LoRAs' own noise predictions, without reading anything back to the host.

place_strength  m_j = sqrt(sum_c (e_j - e_base)^2)             how far adapter j is from its base model, per place
place_masks     b_j = box mean of m_j;  s_j = b_j / mean(b_j);  mu_j = softmax_j(s_j / t) / max_l softmax_l

The strongest adapter of a place has mu = 1, and mu_j = exp((s_j - max_l s_l) / t).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch
from cmlora_kernels.layout import dense_format
from cmlora_kernels.triton_shim import tl, triton

TILE = 1024  # elements of a prediction per program: one 16-byte access for each of 128 threads in fp16
BLOCK = 256  # places per program of the masks: enough programs for one image to spread over a chip
MAX_ADAPTERS = 16


@triton.jit
def strength_kernel(
    noise_ptr,  # [predictions * rows, channels, places] in either order of the last two
    adapters_ptr,  # [adapters]
    bases_ptr,  # [adapters]
    previous_ptr,  # [adapters, images, places] or None
    y_ptr,  # [adapters, images, places]
    rows,
    first,
    channels,
    places,
    channel_stride,
    place_stride,
    keep,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, i = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    c, place = tl.arange(0, CHANNELS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (c < channels)[:, None] & (place < places)[None, :]
    noise_ptrs = noise_ptr + c[:, None] * channel_stride + place[None, :] * place_stride  # [CHANNELS, BLOCK]
    row, numel = first + image, channels * places
    own = tl.load(noise_ptrs + (tl.load(adapters_ptr + i) * rows + row) * numel, inside, 0.0).to(tl.float32)
    base = tl.load(noise_ptrs + (tl.load(bases_ptr + i) * rows + row) * numel, inside, 0.0).to(tl.float32)
    strength = tl.sqrt(tl.sum((own - base) * (own - base), 0))
    offset = (i * tl.num_programs(1) + image) * places + place
    if previous_ptr is not None:
        previous = tl.load(previous_ptr + offset, place < places, 0.0)
        strength = keep * previous + (1.0 - keep) * strength
    tl.store(y_ptr + offset, strength, place < places)


@triton.jit
def blur_kernel(
    strength_ptr,  # [adapters, images, height * width]
    blurred_ptr,  # the same
    sums_ptr,  # [adapters, images, blocks]
    height,
    width,
    radius,
    BLOCK: tl.constexpr,
):
    """The box mean of a block of places, and the block's sum of it."""
    block, map_ = tl.program_id(0), tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < height * width
    top, left = place // width - radius, place % width - radius
    strength_ptr += map_ * height * width
    side = 2 * radius + 1
    total = tl.zeros((BLOCK,), tl.float32)
    for tap in range(side * side):
        h = tl.minimum(tl.maximum(top + tap // side, 0), height - 1)  # edges are replicated
        w = tl.minimum(tl.maximum(left + tap % side, 0), width - 1)
        total += tl.load(strength_ptr + h * width + w, inside, 0.0)
    mean = total / (side * side)
    tl.store(blurred_ptr + map_ * height * width + place, mean, inside)
    tl.store(sums_ptr + map_ * tl.num_programs(0) + block, tl.sum(tl.where(inside, mean, 0.0), 0))


@triton.jit
def masks_kernel(
    blurred_ptr,  # [adapters, images, places]
    sums_ptr,  # [adapters, images, blocks]
    y_ptr,  # [adapters, images, places]
    adapters,
    places,
    blocks,
    temperature,
    OWN: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    image, images = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    i, block = tl.arange(0, ADAPTERS), tl.arange(0, BLOCKS)
    sums_ptrs = sums_ptr + ((i * images + image) * blocks)[:, None] + block[None, :]
    total = tl.sum(tl.load(sums_ptrs, (i < adapters)[:, None] & (block < blocks)[None, :], 0.0), 1)  # [ADAPTERS]
    mean = total / places
    if not OWN:
        mean = tl.zeros((ADAPTERS,), tl.float32) + tl.sum(mean, 0) / adapters
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < adapters)[:, None] & (place < places)[None, :]
    offset = ((i * images + image) * places)[:, None] + place[None, :]  # [ADAPTERS, BLOCK]
    blurred = tl.load(blurred_ptr + offset, inside, 0.0)
    relative = tl.where((mean == 0.0)[:, None], 0.0, blurred / mean[:, None])
    relative = tl.where((i < adapters)[:, None], relative, float("-inf"))
    apart = relative - tl.max(relative, 0)[None, :]
    tl.store(y_ptr + offset, tl.exp(apart / temperature), inside)


def strength_definition(
    noise: Tensor, adapters: Tensor, bases: Tensor, first: int, images: int, previous: Tensor | None, keep: float
) -> Tensor:
    """`place_strength` in plain torch."""
    counted: Tensor = noise.unflatten(0, (-1, first + images))[:, first:]
    apart = counted[adapters].float() - counted[bases].float()
    strength: Tensor = torch.linalg.vector_norm(apart, dim=2)
    if previous is not None:
        strength = keep * previous + (1 - keep) * strength
    return strength.contiguous()


def masks_definition(strength: Tensor, temperature: float, blur: int, own: bool) -> Tensor:
    """`place_masks` in plain torch."""
    blurred = F.avg_pool2d(F.pad(strength, (blur // 2,) * 4, mode="replicate"), blur, stride=1)
    mean = blurred.mean(dim=(2, 3) if own else (0, 2, 3), keepdim=True)
    relative = torch.where(mean == 0, 0.0, blurred / mean)  # an adapter that changed nothing
    return torch.exp((relative - relative.amax(0)) / temperature)


def lay_out(noise: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The predictions without gaps in their memory format, and the strides of channels and of places."""
    layout = dense_format(noise)
    channels, places = noise.shape[1], noise[0, 0].numel()
    strides = (1, channels) if layout is torch.channels_last else (places, 1)
    return noise.contiguous(memory_format=layout), strides


def tile_of(channels: int) -> tuple[int, int]:
    """Channels, padded, and places of one program."""
    padded = 1 << (channels - 1).bit_length()
    return padded, max(16, TILE // padded)


@functools.lru_cache(maxsize=256)
def strength_launch(
    shape: tuple[int, ...], strides: tuple[int, int], adapters: int, first: int, keep: float | None, dtype: torch.dtype
) -> Launch:
    """The launch of `strength_kernel`.

    Args:
        shape: of all predictions: rows of one, images that count, channels, places.
        strides: of a channel and of a place. adapters: strengths that are made.
        first: row of the first image that counts. keep: share of the previous strength; None without one.
    """
    (rows, images, channels, places), pointer = shape, POINTER[dtype]
    padded, block = tile_of(channels)
    made = adapters * images * places
    read = made * (2 * channels * dtype.itemsize + (0 if keep is None else 4))
    blocks = -(-places // block)
    return Launch(
        kernel=strength_kernel,
        name=f"place_strength {adapters}x{images}x{channels}x{places}{'' if keep is None else ' kept'}",
        tensors={"noise_ptr": pointer, "adapters_ptr": "*i64", "bases_ptr": "*i64"}
        | {"previous_ptr": None if keep is None else "*fp32", "y_ptr": "*fp32"},
        scalars={
            "rows": rows,
            "first": first,
            "channels": channels,
            "places": places,
            "channel_stride": strides[0],
            "place_stride": strides[1],
            "keep": float(keep or 0.0),
        },
        constexprs={"CHANNELS": padded, "BLOCK": block},
        grid=(blocks, images, adapters),
        num_warps=4,
        num_stages=1,
        bytes=read + 4 * made + 16 * blocks * images * adapters,
        # at least: all adapters compared with one base
        unique_bytes=read - (adapters - 1) * images * places * channels * dtype.itemsize + 4 * made + 16 * adapters,
        flops=made * (3 * channels + (1 if keep is None else 4)),
    )


@functools.lru_cache(maxsize=256)
def blur_launch(adapters: int, images: int, height: int, width: int, blur: int) -> Launch:
    """The launch of `blur_kernel` on strength [adapters, images, height, width]."""
    maps, places = adapters * images, height * width
    blocks = -(-places // BLOCK)
    return Launch(
        kernel=blur_kernel,
        name=f"place_masks blur {blur} {adapters}x{images}x{height}x{width}",
        tensors={"strength_ptr": "*fp32", "blurred_ptr": "*fp32", "sums_ptr": "*fp32"},
        scalars={"height": height, "width": width, "radius": blur // 2},
        constexprs={"BLOCK": BLOCK},
        grid=(blocks, images, adapters),
        num_warps=4,
        num_stages=1,
        bytes=4 * maps * (places * (blur * blur + 1) + blocks),
        unique_bytes=4 * maps * (2 * places + blocks),
        flops=maps * places * (blur * blur + 2),
    )


@functools.lru_cache(maxsize=256)
def masks_launch(adapters: int, images: int, places: int, temperature: float, own: bool) -> Launch:
    """The launch of `masks_kernel` on blurred strength [adapters, images, places]."""
    blocks, maps = -(-places // BLOCK), adapters * images
    return Launch(
        kernel=masks_kernel,
        name=f"place_masks {adapters}x{images}x{places}{'' if own else ' by all'}",
        tensors={"blurred_ptr": "*fp32", "sums_ptr": "*fp32", "y_ptr": "*fp32"},
        scalars={"adapters": adapters, "places": places, "blocks": blocks, "temperature": float(temperature)},
        constexprs={
            "OWN": own,
            "ADAPTERS": 1 << (adapters - 1).bit_length(),
            "BLOCK": BLOCK,
            "BLOCKS": max(16, 1 << (blocks - 1).bit_length()),
        },
        grid=(blocks, images, 1),
        num_warps=4,
        num_stages=1,
        bytes=4 * maps * (2 * places + blocks * blocks),
        unique_bytes=4 * maps * (2 * places + blocks),
        flops=maps * (5 * places + blocks),
    )


def _strength_body(
    noise: Tensor,
    adapters: Tensor,
    bases: Tensor,
    first: int,
    images: int,
    previous: Tensor | None,
    keep: float,
    backend: str,
) -> Tensor:
    if not (use_triton(noise, backend) and noise.numel() and adapters.numel() and noise.dtype in POINTER):
        return strength_definition(noise, adapters, bases, first, images, previous, keep)
    noise, strides = lay_out(noise)
    y = _strength_fake(noise, adapters, bases, first, images, previous, keep, backend)
    shape = (first + images, images, noise.shape[1], y[0, 0].numel())
    kept = None if previous is None else keep
    launch = strength_launch(shape, strides, y.shape[0], first, kept, noise.dtype)
    previous = previous if previous is None else previous.contiguous()
    launch(noise, adapters.contiguous(), bases.contiguous(), previous, y)
    return y


def _strength_fake(
    noise: Tensor,
    adapters: Tensor,
    bases: Tensor,
    first: int,
    images: int,
    previous: Tensor | None,
    keep: float,
    backend: str,
) -> Tensor:
    return noise.new_empty((adapters.shape[0], images, *noise.shape[2:]), dtype=torch.float32)


def _masks_body(strength: Tensor, temperature: float, blur: int, own: bool, backend: str) -> Tensor:
    if not (use_triton(strength, backend) and strength.numel()):
        return masks_definition(strength, temperature, blur, own)
    adapters, images, height, width = strength.shape
    launch = blur_launch(adapters, images, height, width, blur)
    y, blurred = torch.empty_like(strength, memory_format=torch.contiguous_format), strength.new_empty(strength.shape)
    sums = strength.new_empty((adapters, images, launch.grid[0]))
    launch(strength.contiguous(), blurred, sums)
    masks_launch(adapters, images, height * width, temperature, own)(blurred, sums, y)
    return y


def _masks_fake(strength: Tensor, temperature: float, blur: int, own: bool, backend: str) -> Tensor:
    return strength.new_empty(strength.shape)


_strength = register(
    "place_strength(Tensor noise, Tensor adapters, Tensor bases, int first, int images, Tensor? previous, float keep, "
    "str backend) -> Tensor",
    _strength_body,
    _strength_fake,
)
_masks = register(
    "place_masks(Tensor strength, float temperature, int blur, bool own, str backend) -> Tensor",
    _masks_body,
    _masks_fake,
)


def place_strength(
    noise: Tensor,
    adapters: Tensor,
    bases: Tensor,
    first: int,
    images: int,
    previous: Tensor | None = None,
    keep: float = 0.7,
    backend: Backend = "auto",
) -> Tensor:
    """How far each adapter's prediction is from its base model's, per place: the norm over channels, in float32.

    Args:
        noise: [predictions * (first + images), channels, height, width], prediction-major; the last `images` rows of
            each prediction count, its conditional half.
        adapters, bases: [adapters] int64 on noise's device: each adapter's prediction, and that of its base model. What
            they hold is on the device and is not checked.
        first: rows of a prediction before those that count: `images` with guidance, else 0.
        previous: [adapters, images, height, width] float32, from the step before, or None.
        keep: its share: keep * previous + (1 - keep) * strength.
        backend: "auto", "torch" or "triton".

    Returns:
        [adapters, images, height, width] float32.

    Raises:
        ValueError: a shape, dtype or backend that does not fit; it names the argument.
    """
    check_backend(backend)
    check_predictions(noise, first + images, adapters, bases)
    if images < 1 or first < 0:
        raise ValueError(f"images must be at least 1 and first at least 0, got {images} and {first}")
    want = (adapters.shape[0], images, *noise.shape[2:])
    if previous is not None and (previous.shape != want or previous.dtype != torch.float32):
        raise ValueError(f"previous must be {want} float32, got {tuple(previous.shape)} {previous.dtype}")
    strength: Tensor = _strength(noise, adapters, bases, first, images, previous, keep, backend)
    return strength


def place_masks(
    strength: Tensor, temperature: float, blur: int = 3, own: bool = True, backend: Backend = "auto"
) -> Tensor:
    """A mask per adapter, image and place; the strongest adapter of a place has 1.

    Args:
        strength: [adapters, images, height, width] float32, 1 to 16 adapters.
        temperature: of the softmax over adapters; small: the strongest alone, large: all of them.
        blur: side of the box mean, odd; 1: none. Edges are replicated.
        own: measure each adapter by its own mean over places; else all of them by the mean over adapters and places.
        backend: "auto", "torch" or "triton".

    Returns:
        [adapters, images, height, width] float32; images do not influence one another. An adapter whose mean is zero
        counts as the weakest.

    Raises:
        ValueError: a shape, dtype, value or backend that does not fit; it names the argument.
    """
    check_backend(backend)
    if strength.ndim != 4 or not 1 <= strength.shape[0] <= MAX_ADAPTERS or strength.dtype != torch.float32:
        raise ValueError(
            f"strength must be [adapters, images, height, width] float32 with 1 to {MAX_ADAPTERS} adapters, "
            f"got {tuple(strength.shape)} {strength.dtype}"
        )
    if blur < 1 or blur % 2 == 0:
        raise ValueError(f"blur must be odd and at least 1, got {blur}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    masks: Tensor = _masks(strength, temperature, blur, own, backend)
    return masks


def check_predictions(noise: Tensor, rows: int, adapters: Tensor, bases: Tensor) -> None:
    """Raise ValueError unless noise holds whole predictions of `rows` rows, and the indices can name them."""
    if noise.ndim != 4 or rows < 1 or noise.shape[0] % rows:
        raise ValueError(
            f"noise must be [predictions * rows, channels, height, width] with {rows} rows, got {tuple(noise.shape)}"
        )
    for name, index in (("adapters", adapters), ("bases", bases)):
        if index.shape != adapters.shape or index.ndim != 1 or index.dtype != torch.int64:
            raise ValueError(f"{name} must be [adapters] int64, got {tuple(index.shape)} {index.dtype}")
