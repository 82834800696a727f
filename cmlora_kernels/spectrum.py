"""Radial amplitude spectra of latents and feature maps.

amplitude = |DFT2(x)| with the zero frequency at (H // 2, W // 2); bin r = mean amplitude where floor(radius) == r;
the profile is divided by its largest bin (the relative amplitudes of CMLoRA, arXiv 2502.04923).

On the GPU the transform is two products with DFT matrices, and only amplitude sums per bin leave a program.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch, arch_of
from cmlora_kernels.radial import bin_means, bin_scales, dft_matrices, number_of_bins, order_table, padded, radial_order
from cmlora_kernels.spectrum_finish import finish_launch, first_high_bin
from cmlora_kernels.tiles import dot_precision
from cmlora_kernels.triton_shim import tl, triton

MAX_SIZE = 128  # beyond it the accumulators of a block of columns no longer fit the registers: the definition runs


@triton.jit
def _row_transform(
    x_ptr,  # at this image
    shift,  # what is taken off every pixel
    plain,  # [CHUNK_W, CHUNK_H]
    dft_ptr,  # [2, TABLE_K, BLOCK_W]: cosine, sine
    k,  # columns of the spectrum
    h,  # rows of the image
    stride_channel,
    stride_y,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN_OVER: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNK_W: tl.constexpr,
    TABLE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of the channels' mean less shift over the rows h, [len(k), len(h)] each; its pixels are added to plain."""
    cosine = tl.zeros((k.shape[0], h.shape[0]), tl.float32)
    sine = tl.zeros((k.shape[0], h.shape[0]), tl.float32)
    for start in range(0, BLOCK_W, CHUNK_W):
        w = start + tl.arange(0, CHUNK_W)
        inside = (h[None, :] < HEIGHT) & (w[:, None] < WIDTH)
        pixel_ptr = x_ptr + h[None, :] * stride_y + w[:, None]
        pixels = tl.zeros((CHUNK_W, h.shape[0]), tl.float32)  # [CHUNK_W, CHUNK_H]
        for c in range(MEAN_OVER):
            pixels += tl.load(pixel_ptr + c * stride_channel, inside, 0.0).to(tl.float32)
        pixels *= 1.0 / MEAN_OVER
        plain += pixels
        pixels = tl.where(inside, pixels - shift, 0.0)
        table_ptr = dft_ptr + k[:, None] * BLOCK_W + w[None, :]
        cosine = tl.dot(tl.load(table_ptr), pixels, cosine, input_precision=PRECISION)
        sine = tl.dot(tl.load(table_ptr + TABLE_K * BLOCK_W), pixels, sine, input_precision=PRECISION)
    return cosine, sine, plain


@triton.jit
def _amplitude(
    x_ptr,  # at this image
    dft_w_ptr,  # [2, TABLE_K, BLOCK_W]
    dft_h_ptr,  # [2, BLOCK_H, BLOCK_H]
    k,  # columns of the spectrum
    stride_channel,
    stride_y,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN_OVER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNK_W: tl.constexpr,
    TABLE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """|DFT2| of one image at the columns k: [len(k), BLOCK_H]. Image rows stream through, nothing is kept of them."""
    # The first pixel is taken off all: a strong mean costs no digits but its own frequency's, which is summed apart.
    shift = 0.0
    for c in range(MEAN_OVER):
        shift += tl.load(x_ptr + c * stride_channel).to(tl.float32)
    shift *= 1.0 / MEAN_OVER
    m = tl.arange(0, BLOCK_H)
    plain = tl.zeros((CHUNK_W, CHUNK_H), tl.float32)
    real = tl.zeros((k.shape[0], BLOCK_H), tl.float32)
    imaginary = tl.zeros((k.shape[0], BLOCK_H), tl.float32)
    for start in range(0, BLOCK_H, CHUNK_H):
        h = start + tl.arange(0, CHUNK_H)
        cosine, sine, plain = _row_transform(
            x_ptr,
            shift,
            plain,
            dft_w_ptr,
            k,
            h,
            stride_channel,
            stride_y,
            HEIGHT,
            WIDTH,
            MEAN_OVER,
            BLOCK_W,
            CHUNK_W,
            TABLE_K,
            PRECISION,
        )
        table_ptr = dft_h_ptr + h[:, None] * BLOCK_H + m[None, :]  # [CHUNK_H, BLOCK_H]
        dft_cosine = tl.load(table_ptr)
        dft_sine = tl.load(table_ptr + BLOCK_H * BLOCK_H)
        real = tl.dot(cosine, dft_cosine, real, input_precision=PRECISION)
        real = tl.dot(-sine, dft_sine, real, input_precision=PRECISION)
        imaginary = tl.dot(sine, dft_cosine, imaginary, input_precision=PRECISION)
        imaginary = tl.dot(cosine, dft_sine, imaginary, input_precision=PRECISION)
    is_zero = (k[:, None] == 0) & (m[None, :] == 0)
    real = tl.where(is_zero, tl.sum(plain), real)
    return tl.sqrt(real * real + imaginary * imaginary)


@triton.jit
def spectrum_kernel(
    x_ptr,  # [rows, channels, height, width]
    dft_w_ptr,  # [2, TABLE_K, BLOCK_W]
    dft_h_ptr,  # [2, BLOCK_H, BLOCK_H]
    order_ptr,  # [blocks, BLOCK_BINS, LENGTH]: which amplitudes a bin adds up, -1 beyond them
    partial_ptr,  # [rows, groups, blocks, BLOCK_BINS]
    stride_row,
    stride_channel,
    stride_y,
    images,
    group_images,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN_OVER: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TABLE_K: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    CHUNK_LENGTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Amplitudes of one block of columns of a group of images, summed per bin: partial [row, group, block, bin]."""
    block, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    amplitude = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    x_ptr += row * stride_row + group.to(tl.int64) * group_images * stride_channel
    for image in range(tl.minimum(images - group * group_images, group_images)):
        amplitude += _amplitude(
            x_ptr + image * stride_channel,
            dft_w_ptr,
            dft_h_ptr,
            k,
            stride_channel,
            stride_y,
            HEIGHT,
            WIDTH,
            MEAN_OVER,
            BLOCK_H,
            CHUNK_H,
            BLOCK_W,
            CHUNK_W,
            TABLE_K,
            PRECISION,
        )
    # columns without a mirror image among the left-out ones count once, the others twice
    twice = (k > 0) & (2 * k < WIDTH)
    flat = tl.reshape(tl.where(twice[:, None], 2 * amplitude, amplitude), [BLOCK_K * BLOCK_H])
    bins = tl.arange(0, BLOCK_BINS)
    sums = tl.zeros((BLOCK_BINS,), tl.float32)
    for start in range(0, LENGTH, CHUNK_LENGTH):
        member = start + tl.arange(0, CHUNK_LENGTH)
        place = tl.load(order_ptr + (block * BLOCK_BINS + bins[:, None]) * LENGTH + member[None, :])
        wanted = tl.reshape(tl.maximum(place, 0), [BLOCK_BINS * CHUNK_LENGTH])
        found = tl.reshape(tl.gather(flat, wanted, 0), [BLOCK_BINS, CHUNK_LENGTH])
        sums += tl.sum(tl.where(place >= 0, found, 0.0), 1)
    part = (row * tl.num_programs(1) + group) * tl.num_programs(0) + block
    tl.store(partial_ptr + part * BLOCK_BINS + bins, sums)


def profile_definition(x: Tensor, channel_mean: bool) -> Tensor:
    """`radial_profile` in plain torch."""
    x = x.float().mean(1) if channel_mean else x.float()
    if not x.numel():
        empty: Tensor = x.new_empty((x.shape[0], number_of_bins(*x.shape[-2:])))
        return empty
    mean = x.mean((-2, -1), keepdim=True)  # apart from the rest: a strong one would cost the other bins their digits
    amplitude = torch.fft.fft2(x - mean).abs()
    amplitude[..., :1, :1] = mean.abs() * (x.shape[-2] * x.shape[-1])
    profile = amplitude.flatten(-2) @ bin_means(x.shape[-2], x.shape[-1], x.device)
    if not channel_mean:
        profile = profile.mean(1)
    normalised: Tensor = profile / profile.amax(-1, keepdim=True)
    return normalised


def share_definition(x: Tensor, cutoff: float) -> Tensor:
    """`high_frequency_share` in plain torch."""
    profile = profile_definition(x, True)
    return profile[:, first_high_bin(profile.shape[1], cutoff) :].mean(1)


@functools.lru_cache(maxsize=256)
def spectrum_launch(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, channel_mean: bool, arch: str
) -> Launch:
    """The launch of `spectrum_kernel` on x [rows, channels, height, width], contiguous along width."""
    rows, channels, height, width = shape
    block_h, block_w, block_k = padded(height), padded(width), 16
    # RDNA multiplies fp32 by plain FMAs here (bf16x6 spills): half the chunk, twice the warps
    rdna = arch.startswith("gfx1")
    # sm_80 spills sixteen bytes on float32 images of 128 rows with chunks of 32
    chunk = 16 if rdna or (arch == "sm_80" and block_h > 64 and dtype == torch.float32) else 32
    chunk_h, chunk_w, chunk_length = min(chunk, block_h), min(chunk, block_w), 16
    bins = number_of_bins(height, width)
    block_bins = padded(bins)
    order = radial_order(height, width, block_h, block_k, chunk_length)
    blocks, length = len(order), len(order[0][0])
    images, mean_over = (1, channels) if channel_mean else (channels, 1)
    group = 1 if channel_mean else group_size(rows, images)
    groups = -(-images // group)
    per_image = mean_over * (height * width + 1) * dtype.itemsize
    tables = 2 * 4 * (block_k * block_w * (block_h // chunk_h) + block_h * block_h)
    once = rows * groups * blocks * block_bins * 4  # the partial sums
    return Launch(
        kernel=spectrum_kernel,
        name=f"spectrum {rows}x{channels}x{height}x{width}{'' if channel_mean else ' each channel'}",
        tensors={
            "x_ptr": POINTER[dtype],
            "dft_w_ptr": "*fp32",
            "dft_h_ptr": "*fp32",
            "order_ptr": "*i32",
            "partial_ptr": "*fp32",
        },
        scalars={
            "stride_row": stride[0],
            "stride_channel": stride[1],
            "stride_y": stride[2],
            "images": images,
            "group_images": group,
        },
        constexprs={
            "HEIGHT": height,
            "WIDTH": width,
            "MEAN_OVER": mean_over,
            "LENGTH": length,
            "BLOCK_H": block_h,
            "CHUNK_H": chunk_h,
            "BLOCK_W": block_w,
            "CHUNK_W": chunk_w,
            "BLOCK_K": block_k,
            "TABLE_K": blocks * block_k,
            "BLOCK_BINS": block_bins,
            "CHUNK_LENGTH": chunk_length,
            "PRECISION": "ieee" if rdna else dot_precision(torch.float32, arch),
        },
        grid=(blocks, groups, rows),
        num_warps=(4 if block_h <= (16 if rdna else 64) else 8) * (2 if rdna and block_h > 64 else 1),
        num_stages=2,
        bytes=rows * blocks * (images * (per_image + tables) + groups * block_bins * length * 4) + once,
        unique_bytes=rows * channels * height * width * dtype.itemsize
        + 2 * 4 * (blocks * block_k * block_w + block_h * block_h)
        + blocks * block_bins * length * 4
        + once,
        flops=rows * images * height * (width // 2 + 1) * (4 * width + 8 * height + 4),
    )


def group_size(rows: int, images: int) -> int:
    """Images that one program adds up: as many as leave 512 groups, over twice the programs any target runs at once.

    15 at most: Triton would compile once more for a multiple of 16.
    """
    return max(1, min(15, rows * images // 512))


def partial_sums(x: Tensor, channel_mean: bool) -> Tensor:
    """Run `spectrum_kernel`: [rows, parts, padded bins] amplitude sums."""
    x = x if x.stride(3) == 1 else x.contiguous()
    rows, _, height, width = x.shape
    launch = spectrum_launch(tuple(x.shape), x.stride(), x.dtype, channel_mean, arch_of(x.device))
    c = launch.constexprs
    partial = x.new_empty((rows, launch.grid[1] * launch.grid[0], c["BLOCK_BINS"]), dtype=torch.float32)
    launch(
        x,
        dft_matrices(width, c["TABLE_K"], c["BLOCK_W"], x.device),
        dft_matrices(height, c["BLOCK_H"], c["BLOCK_H"], x.device),
        order_table(height, width, c["BLOCK_H"], c["BLOCK_K"], c["BLOCK_BINS"], c["CHUNK_LENGTH"], x.device),
        partial,
    )
    return partial


def fits(x: Tensor) -> bool:
    """Whether the kernel takes x: not empty, sides up to MAX_SIZE; the definition runs otherwise."""
    return x.numel() > 0 and max(x.shape[2:]) <= MAX_SIZE


def _profile_body(x: Tensor, channel_mean: bool, backend: str) -> Tensor:
    if not (use_triton(x, backend) and fits(x)):
        return profile_definition(x, channel_mean)
    rows, _, height, width = x.shape
    partial = partial_sums(x, channel_mean)
    profile = _profile_fake(x, channel_mean, backend)
    launch = finish_launch(rows, height, width, partial.shape[1], None, None)
    launch(partial, bin_scales(height, width, partial.shape[2], x.device), profile, None, None, None)
    return profile


def _profile_fake(x: Tensor, channel_mean: bool, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], number_of_bins(x.shape[2], x.shape[3])), dtype=torch.float32)


def _share_body(x: Tensor, cutoff: float, backend: str) -> Tensor:
    if not (use_triton(x, backend) and fits(x)):
        return share_definition(x, cutoff)
    rows, _, height, width = x.shape
    partial = partial_sums(x, True)
    share = _share_fake(x, cutoff, backend)
    launch = finish_launch(rows, height, width, partial.shape[1], cutoff, None)
    launch(partial, bin_scales(height, width, partial.shape[2], x.device), None, share, None, None)
    return share


def _share_fake(x: Tensor, cutoff: float, backend: str) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.float32)


_profile = register("radial_profile(Tensor x, bool channel_mean, str backend) -> Tensor", _profile_body, _profile_fake)
_share = register("high_frequency_share(Tensor x, float cutoff, str backend) -> Tensor", _share_body, _share_fake)


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
    check_image(x, backend)
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
    check_image(x, backend, cutoff)
    share: Tensor = _share(x, cutoff, backend)
    return share


def check_image(x: Tensor, backend: str, cutoff: float = 0) -> None:
    """The checks that the ops on spectra share; they raise ValueError."""
    check_backend(backend)
    if x.ndim != 4:
        raise ValueError(f"x must be [rows, channels, height, width], got {tuple(x.shape)}")
    if not 0 <= cutoff < 1:
        raise ValueError(f"cutoff must be in [0, 1), got {cutoff}")
