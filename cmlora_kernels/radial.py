"""Tables of the spectrum: bins of the radial average, in which order they are summed, and the DFT matrices."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def padded(size: int, least: int = 16) -> int:
    """The next power of two, at least `least`: what tl.arange and tl.dot take."""
    return max(least, 1 << (size - 1).bit_length())


def number_of_bins(height: int, width: int) -> int:
    """1 + floor(largest radius)."""
    return 1 + math.isqrt((height // 2) ** 2 + (width // 2) ** 2)


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
def bin_means(height: int, width: int, device: torch.device) -> Tensor:
    """[height * width, bins], column r averages the frequencies of bin r: a fixed order of summation, no atomics."""
    bins, counts = radial_bins(height, width)
    matrix = torch.zeros(height * width, len(counts))
    matrix[torch.arange(height * width), torch.tensor(bins)] = 1 / torch.tensor(counts).float()[torch.tensor(bins)]
    return matrix.to(device)


@functools.lru_cache(maxsize=32)
def radial_order(height: int, width: int, block_h: int, block_k: int, multiple: int) -> list[list[list[int]]]:
    """Per block of `block_k` columns of the half spectrum and per bin, where the bin's members lie in the block.

    A real image's spectrum needs the columns 0..width // 2 only: |F(-y, -x)| = |F(y, x)|, and both lie in one bin. A
    place is column-in-block * block_h + y. Every list is filled up with -1 to the longest one's length, a multiple of
    `multiple`.
    """
    columns = width // 2 + 1
    bins, counts = radial_bins(height, width)
    blocks: list[list[list[int]]] = [[[] for _ in counts] for _ in range(-(-columns // block_k))]
    for y in range(height):
        for x in range(columns):
            blocks[x // block_k][bins[y * width + x]].append(x % block_k * block_h + y)
    longest = max(len(members) for block in blocks for members in block)
    length = -(-longest // multiple) * multiple
    return [[members + [-1] * (length - len(members)) for members in block] for block in blocks]


@functools.lru_cache(maxsize=32)
def order_table(
    height: int, width: int, block_h: int, block_k: int, block_bins: int, multiple: int, device: torch.device
) -> Tensor:
    """`radial_order` as [blocks, block_bins, length] int32, -1 beyond the last bin."""
    order = torch.tensor(radial_order(height, width, block_h, block_k, multiple), dtype=torch.int32)
    table = torch.full((order.shape[0], block_bins, order.shape[2]), -1, dtype=torch.int32)
    table[:, : order.shape[1]] = order
    return table.to(device)


@functools.lru_cache(maxsize=32)
def bin_scales(height: int, width: int, block_bins: int, device: torch.device) -> Tensor:
    """1 / (frequencies in the bin), [block_bins] float32, 0 beyond the last bin."""
    counts = radial_bins(height, width)[1]
    return torch.tensor([1 / n for n in counts] + [0.0] * (block_bins - len(counts))).to(device)


@functools.lru_cache(maxsize=32)
def dft_matrices(size: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """cos and sin of 2 pi j k / size, [2, rows, columns] float32, zero beyond j, k < size; angles in float64."""
    j, k = torch.arange(rows).unsqueeze(1), torch.arange(columns)
    angle = (j * k % size).double() * (2 * math.pi / size)
    inside = (j < size) & (k < size)
    return (torch.stack((angle.cos(), angle.sin())) * inside).float().to(device)
