"""The low-rank update of a convolution, added in place to the base convolution's output.

y[r] += scale B (A * x[r]): the k x k down is an implicit GEMM over (tap, channel) whose result stays in registers, the
1x1 up expands it into y. The base convolution stays with cuDNN or MIOpen, whose Winograd and channels-last kernels a
Triton GEMM does not beat. A 1x1 convolution without stride or padding is a linear layer over pixels and goes there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from cmlora_kernels.launch import POINTER, Launch, arch_of
from cmlora_kernels.multi_lora_linear import (
    NO_WEIGHTS,
    part_rank,
    weights_issued,
    weights_once,
    weights_pointers,
    weights_strides,
)
from cmlora_kernels.primitives import expand_add, tile_of_row, weigh
from cmlora_kernels.tiles import Problem, add_tile, cdiv, dot_precision, expand_piece, rank_bucket, rank_chunks
from cmlora_kernels.triton_shim import tl, triton


@triton.jit
def conv_add_kernel(
    y_ptr,  # [rows, out, pixels]
    x_ptr,  # [rows, channels, height, width]
    slots_ptr,  # [rows]
    a_ptr,  # [slots, rank, channels, taps]
    b_ptr,  # [slots, out, rank]
    scales_ptr,  # [slots, 1]
    groups_ptr,  # [slots, slot_ranks] or None
    weights_ptr,  # [rows, weights, pixels] or None
    pixels,
    out_width,
    channels,
    height,
    width,
    out,
    rank,  # of this launch; a slot of A holds slot_ranks
    piece,
    x_row,
    x_channel,
    x_height,
    x_width,
    slot_ranks,
    a_slot,
    a_rank,
    a_channel,
    a_tap,
    b_slot,
    b_out,
    y_row,
    y_out,
    y_pixel,
    weights_row,
    weights_group,
    weights_pixel,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pieces = tl.cdiv(out, piece)
    row, first_m, tile_n = tile_of_row(pixels, pieces, BLOCK_M, GROUP)
    first_n = tile_n * piece
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return

    m, k, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    pixel = first_m.to(tl.int32) + m
    mask_m, mask_r = pixel < pixels, r < rank
    top, left = pixel // out_width * STRIDE_H - PAD_H, pixel % out_width * STRIDE_W - PAD_W
    x_ptr += row * x_row
    a_ptr += slot * a_slot
    down = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    blocks = tl.cdiv(channels, BLOCK_K)
    for step in range(KERNEL_H * KERNEL_W * blocks):  # one flat loop over taps and channels, so that it pipelines
        tap, channel = step // blocks, step % blocks * BLOCK_K + k
        h, w = top + tap // KERNEL_W * DILATION_H, left + tap % KERNEL_W * DILATION_W
        inside = mask_m & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        x_ptrs = x_ptr + (h * x_height + w * x_width)[:, None] + channel[None, :] * x_channel  # [BM, BK]
        a_ptrs = a_ptr + tap * a_tap + r[None, :] * a_rank + channel[:, None] * a_channel  # [BK, BR]
        x = tl.load(x_ptrs, mask=inside[:, None] & (channel < channels)[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_r[None, :] & (channel < channels)[:, None], other=0.0)
        down = tl.dot(x, a, down, input_precision=PRECISION)

    if weights_ptr is not None:
        groups_ptr += slot * slot_ranks
        weights_ptr += row * weights_row + first_m * weights_pixel
        down = weigh(down, groups_ptr, weights_ptr, m, mask_m, mask_r, weights_group, weights_pixel)
    scaled = (down * tl.load(scales_ptr + slot)).to(b_ptr.dtype.element_ty)
    expand_add(
        scaled,
        b_ptr + slot * b_slot,
        y_ptr + row * y_row + first_m * y_pixel,
        m * y_pixel,
        mask_m,
        first_n.to(tl.int32),
        tl.minimum(first_n + piece, out).to(tl.int32),
        rank,
        b_out,
        y_out,
        BLOCK_N,
        BLOCK_R,
        PRECISION,
    )


_X_STRIDES = ("x_row", "x_channel", "x_height", "x_width")
_A_STRIDES = ("slot_ranks", "a_slot", "a_rank", "a_channel", "a_tap")
_Y_STRIDES = ("y_row", "y_out", "y_pixel", "weights_row", "weights_group", "weights_pixel")
_STRIDES = (*_X_STRIDES, *_A_STRIDES, "b_slot", "b_out", *_Y_STRIDES)


class ConvProblem(NamedTuple):
    """Sizes of one multi-LoRA convolution; `kernel`, `stride`, `padding` and `dilation` are (vertical, horizontal)."""

    rows: int
    channels: int
    height: int
    width: int
    out: int
    rank: int
    adapters: int
    dtype: torch.dtype
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...] = (1, 1)
    weights: int = 0

    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, pad, dilation in zip(
                (self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return height, width

    def as_linear(self) -> Problem:
        """The linear layer over pixels with the same outputs, for tiles; its inner size counts one tap."""
        height, width = self.out_size()
        sizes = (self.rows, height * width, self.channels, self.out, self.rank)
        return Problem(*sizes, 1, self.adapters, self.dtype, False, self.weights)


@functools.lru_cache(maxsize=4096)
def conv_add_launches(problem: ConvProblem, arch: str, strides: tuple[int, ...] = ()) -> tuple[tuple[int, Launch], ...]:
    """The first rank of every chunk and its launch.

    Args:
        problem: sizes and dtype.
        arch: the target, e.g. "sm_90" or "gfx942".
        strides: x (row, channel, height, width), ranks of a slot, a (slot, rank, channel, tap), b (slot, out), y (row,
            out, pixel), token weights (row, group, pixel), in elements; () for channels-last x, a and y, where 16-byte
            accesses are possible at every tap.
    """
    strides = strides or _channels_last_strides(problem)
    chunks = rank_chunks(problem.rank, problem.dtype, arch)
    return tuple((first, conv_add_launch(problem._replace(rank=rank), arch, strides)) for first, rank in chunks)


def conv_add_launch(problem: ConvProblem, arch: str, strides: tuple[int, ...]) -> Launch:
    """The launch of one chunk of ranks; arguments as in `conv_add_launches`."""
    p, linear = problem, problem.as_linear()
    tile, (height, width) = add_tile(linear, arch), p.out_size()
    pixels, pointer = height * width, POINTER[p.dtype]
    tiles_m = p.rows * cdiv(pixels, tile.block_m)
    piece = expand_piece(tiles_m, p.out, tile.block_n, arch)
    flops, once, issued = _counts(p, tiles_m, cdiv(p.out, piece))
    size = p.dtype.itemsize
    return Launch(
        kernel=conv_add_kernel,
        name=f"conv{p.kernel[0]}x{p.kernel[1]} {linear.describe()}" + " channels_last" * (strides[1] == 1),
        tensors={"y_ptr": pointer, "x_ptr": pointer}
        | {"slots_ptr": "*i64", "a_ptr": pointer, "b_ptr": pointer, "scales_ptr": "*fp32", **weights_pointers(linear)},
        scalars={
            "pixels": pixels,
            "out_width": width,
            "channels": p.channels,
            "height": p.height,
            "width": p.width,
            "out": p.out,
            "rank": p.rank,
            "piece": piece,
            **dict(zip(_STRIDES, strides, strict=True)),
        },
        constexprs={
            **_geometry(p),
            **tile.blocks(),
            "BLOCK_R": rank_bucket(p.rank),
            "GROUP": tile.group,
            "PRECISION": dot_precision(p.dtype, arch),
        },
        grid=(tiles_m * cdiv(p.out, piece), 1, 1),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes=size * issued + 12 * tiles_m * cdiv(p.out, piece) + weights_issued(linear, tiles_m, cdiv(p.out, piece)),
        unique_bytes=size * once + 8 * p.rows + 4 * p.adapters + weights_once(linear),
        flops=flops,
    )


def _geometry(p: ConvProblem) -> dict[str, int]:
    named = {"KERNEL": p.kernel, "STRIDE": p.stride, "PAD": p.padding, "DILATION": p.dilation}
    return {f"{name}_{axis}": value for name, pair in named.items() for axis, value in zip("HW", pair, strict=True)}


def _counts(p: ConvProblem, tiles_m: int, pieces: int) -> tuple[int, int, int]:
    """Flops; elements counted once; elements loaded and stored by all programs. Padding is neither read nor counted."""
    (height, width), taps = p.out_size(), p.kernel[0] * p.kernel[1]
    m, k = p.rows * height * width, p.channels * taps
    once = p.rows * p.channels * p.height * p.width + 2 * m * p.out + p.adapters * p.rank * (k + p.out)
    x = p.rows * p.channels * _inside(p, 0, height) * _inside(p, 1, width)
    issued = pieces * (x + tiles_m * p.rank * k) + 2 * m * p.out + tiles_m * p.out * p.rank
    return 2 * m * p.rank * (k + p.out), once, issued


def _inside(p: ConvProblem, axis: int, outputs: int) -> int:
    """Pairs of output and tap along one axis that fall on the image, not on its padding."""
    size, reach = (p.height, p.width)[axis], range(outputs)
    first = [tap * p.dilation[axis] - p.padding[axis] for tap in range(p.kernel[axis])]
    return sum(0 <= start + output * p.stride[axis] < size for start in first for output in reach)


def _channels_last_strides(p: ConvProblem) -> tuple[int, ...]:
    (height, width), taps = p.out_size(), p.kernel[0] * p.kernel[1]
    x = (p.height * p.width * p.channels, 1, p.width * p.channels, p.channels)
    a = (part_rank(p.as_linear()), p.rank * p.channels * taps, p.channels * taps, 1, p.channels)
    weights = (p.weights * height * width, height * width, 1) if p.weights else NO_WEIGHTS
    return (*x, *a, p.out * p.rank, p.rank, height * width * p.out, 1, p.out, *weights)


def triton_conv_add(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    geometry: tuple[int, ...],
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Run the kernel, once per chunk of ranks, on y [rows, out, height', width'] whose pixels are one dimension.

    `geometry` is stride, padding and dilation, two numbers each; `token_weights` [rows, weights, pixels].
    """
    rows, channels, height, width = x.shape
    adapters, rank, _, kernel_h, kernel_w = a.shape
    if a.stride(3) != kernel_w * a.stride(4):
        a = a.contiguous()  # taps must be one dimension
    b = b if b.stride(2) == 1 or rank == 1 else b.contiguous()
    weights = 0 if token_weights is None else token_weights.shape[1]
    sizes = (rows, channels, height, width, y.shape[1], rank, adapters, x.dtype, (kernel_h, kernel_w))
    problem = ConvProblem(*sizes, geometry[0:2], geometry[2:4], geometry[4:6], weights)
    lora = (rank if weights else 1, *a.stride()[:3], a.stride(4), *b.stride()[:2])
    strides = (*x.stride(), *lora, y.stride(0), y.stride(1), y.stride(3), *weights_strides(token_weights))
    slots, scales = slots.contiguous(), scales.contiguous()
    groups = groups if groups is None else groups.contiguous()
    for first, launch in conv_add_launches(problem, arch_of(x.device), strides):
        if first:  # only where they start matters: strides and sizes are the launch's
            own = groups if groups is None else groups[:, first:]
            launch(y, x, slots, a[:, first:], b[:, :, first:], scales, own, token_weights)
        else:
            launch(y, x, slots, a, b, scales, groups, token_weights)
    return y
