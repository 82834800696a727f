"""Cached deep features, one row of a bank per adapter and image (DeepCache, arXiv 2312.00858, per adapter).

scatter_rows     bank[index[i]] = rows[i]        in place
concat_channels  y[r] = concat(bank[r], skip[r])  in one pass, in the layout of both
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch
from cmlora_kernels.layout import dense_format, is_dense
from cmlora_kernels.triton_shim import tl, triton

BLOCK_BYTES = 8192  # per program: four 16-byte accesses in flight for each of 128 threads


@triton.jit
def _copy_tile(from_ptr, to_ptr, segment, column, segments, from_length, to_length):
    """Columns of some segments: from [segments, from_length] into to [segments, to_length]."""
    inside = (segment[:, None] < segments) & (column[None, :] < from_length)
    tile = tl.load(from_ptr + segment[:, None] * from_length + column[None, :], inside)
    tl.store(to_ptr + segment[:, None] * to_length + column[None, :], tile, inside)


@triton.jit
def concat_channels_kernel(
    bank_ptr,  # [rows, segments, bank_length]
    skip_ptr,  # [rows, segments, skip_length]
    y_ptr,  # [rows, segments, bank_length + skip_length]
    segments,
    bank_length,
    skip_length,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
):
    """A tile of one row; its columns come from one source only."""
    block, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    segment = tl.program_id(1) * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
    y_length = bank_length + skip_length
    y_ptr += row * segments * y_length
    bank_blocks = tl.cdiv(bank_length, BLOCK_LENGTH)
    if block < bank_blocks:
        column = block * BLOCK_LENGTH + tl.arange(0, BLOCK_LENGTH)
        bank_ptr += row * segments * bank_length
        _copy_tile(bank_ptr, y_ptr, segment, column, segments, bank_length, y_length)
    else:
        column = (block - bank_blocks) * BLOCK_LENGTH + tl.arange(0, BLOCK_LENGTH)
        skip_ptr += row * segments * skip_length
        _copy_tile(skip_ptr, y_ptr + bank_length, segment, column, segments, skip_length, y_length)


@triton.jit
def scatter_kernel(
    bank_ptr,  # [bank rows, length]
    rows_ptr,  # [rows, length]
    index_ptr,  # [rows]
    length,
    BLOCK_LENGTH: tl.constexpr,
):
    """A block of one row, copied to where the index says."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_LENGTH + tl.arange(0, BLOCK_LENGTH)
    values = tl.load(rows_ptr + row * length + column, column < length)
    tl.store(bank_ptr + tl.load(index_ptr + row) * length + column, values, column < length)


def scatter_definition(bank: Tensor, rows: Tensor, index: Tensor) -> None:
    """`scatter_rows` in plain torch."""
    bank.index_copy_(0, index, rows)


def concat_channels_definition(bank: Tensor, skip: Tensor) -> Tensor:
    """`concat_channels` in plain torch."""
    return torch.cat((bank, skip), 1).contiguous(memory_format=dense_format(bank, skip))


@functools.lru_cache(maxsize=256)
def concat_channels_launch(
    rows: int,
    bank_channels: int,
    skip_channels: int,
    pixels: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Launch:
    """The launch of `concat_channels_kernel`. Contiguous: a row is one segment; channels_last: every pixel is one."""
    block = BLOCK_BYTES // dtype.itemsize
    segments = pixels if channels_last else 1
    bank_length = bank_channels * (1 if channels_last else pixels)
    skip_length = skip_channels * (1 if channels_last else pixels)
    # channels come in multiples of 64 or 320: a tile 64 wide wastes nothing and still moves whole 128-byte lines
    block_length = 64 if channels_last else block
    block_segments = block // block_length
    moved = 2 * rows * (bank_channels + skip_channels) * pixels * dtype.itemsize
    blocks = -(-bank_length // block_length) + -(-skip_length // block_length)
    return Launch(
        kernel=concat_channels_kernel,
        name=f"concat_channels {rows}x({bank_channels}+{skip_channels})x{pixels}" + " channels_last" * channels_last,
        tensors={
            "bank_ptr": POINTER[dtype],
            "skip_ptr": POINTER[dtype],
            "y_ptr": POINTER[dtype],
        },
        scalars={"segments": segments, "bank_length": bank_length, "skip_length": skip_length},
        constexprs={"BLOCK_SEGMENTS": block_segments, "BLOCK_LENGTH": block_length},
        grid=(blocks, -(-segments // block_segments), rows),
        num_warps=4,
        num_stages=1,
        bytes=moved,
        unique_bytes=moved,
        flops=0,
    )


@functools.lru_cache(maxsize=256)
def scatter_launch(rows: int, length: int, dtype: torch.dtype) -> Launch:
    """The launch of `scatter_kernel` on rows [rows, length]."""
    block = BLOCK_BYTES // dtype.itemsize
    blocks = -(-length // block)
    moved = 2 * rows * length * dtype.itemsize
    return Launch(
        kernel=scatter_kernel,
        name=f"scatter_rows {rows}x{length}",
        tensors={"bank_ptr": POINTER[dtype], "rows_ptr": POINTER[dtype], "index_ptr": "*i64"},
        scalars={"length": length},
        constexprs={"BLOCK_LENGTH": block},
        grid=(blocks, rows, 1),
        num_warps=4,
        num_stages=1,
        bytes=moved + 8 * rows * blocks,
        unique_bytes=moved + 8 * rows,
        flops=0,
    )


def _scatter_body(bank: Tensor, rows: Tensor, index: Tensor, backend: str) -> None:
    if not (use_triton(bank, backend) and is_dense(bank) and rows.numel()):
        scatter_definition(bank, rows, index)
        return
    launch = scatter_launch(rows.shape[0], bank[0].numel(), bank.dtype)
    launch(bank, rows.contiguous(memory_format=dense_format(bank)), index.contiguous())


def _scatter_fake(bank: Tensor, rows: Tensor, index: Tensor, backend: str) -> None:
    return None


def _concat_body(bank: Tensor, skip: Tensor, backend: str) -> Tensor:
    y = _concat_fake(bank, skip, backend)
    if not (use_triton(bank, backend) and y.numel()):
        return concat_channels_definition(bank, skip)
    layout = dense_format(bank, skip)
    rows, skip_channels, height, width = skip.shape
    last = layout is torch.channels_last
    launch = concat_channels_launch(rows, bank.shape[1], skip_channels, height * width, bank.dtype, last)
    launch(bank.contiguous(memory_format=layout), skip.contiguous(memory_format=layout), y)
    return y


def _concat_fake(bank: Tensor, skip: Tensor, backend: str) -> Tensor:
    shape = (skip.shape[0], bank.shape[1] + skip.shape[1], *skip.shape[2:])
    return torch.empty(shape, dtype=skip.dtype, device=skip.device, memory_format=dense_format(bank, skip))


_scatter = register(
    "scatter_rows(Tensor(bank!) bank, Tensor rows, Tensor index, str backend) -> ()", _scatter_body, _scatter_fake
)
_concat = register("concat_channels(Tensor bank, Tensor skip, str backend) -> Tensor", _concat_body, _concat_fake)


def scatter_rows(bank: Tensor, rows: Tensor, index: Tensor, backend: Backend = "auto") -> None:
    """bank[index[i]] = rows[i], in place; the index is read on the device.

    Args:
        bank: [bank rows, channels, height, width], contiguous or channels_last.
        rows: [n, channels, height, width], of bank's dtype; copied once more where its layout is not bank's.
        index: [n] int64, no duplicates, in [0, bank rows).
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend.
    """
    check_backend(backend)
    if rows.shape[1:] != bank.shape[1:]:
        raise ValueError(f"rows must be [n, {', '.join(map(str, bank.shape[1:]))}], got {tuple(rows.shape)}")
    if rows.dtype != bank.dtype:
        raise ValueError(f"rows must be of bank's dtype {bank.dtype}, got {rows.dtype}")
    _check_index(index, rows.shape[0])
    _scatter(bank, rows, index, backend)


def concat_channels(bank: Tensor, skip: Tensor, backend: Backend = "auto") -> Tensor:
    """concat(bank[r], skip[r]) over channels for every row r, in one pass.

    Args:
        bank: [rows, channels, height, width]; skip: [rows, skip channels, height, width], of bank's dtype.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, channels + skip channels, height, width], channels_last where both inputs are, else contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend.
    """
    check_backend(backend)
    if bank.ndim != 4 or skip.ndim != 4 or bank.shape[2:] != skip.shape[2:]:
        raise ValueError(
            "bank and skip must be [rows, channels, height, width] of one height and width, "
            f"got {tuple(bank.shape)} and {tuple(skip.shape)}"
        )
    if skip.dtype != bank.dtype:
        raise ValueError(f"skip must be of bank's dtype {bank.dtype}, got {skip.dtype}")
    if bank.shape[0] != skip.shape[0]:
        raise ValueError(f"skip must have {bank.shape[0]} rows, got {tuple(skip.shape)}")
    y: Tensor = _concat(bank, skip, backend)
    return y


def _check_index(index: Tensor, rows: int) -> None:
    if index.shape != (rows,) or index.dtype != torch.int64:
        raise ValueError(f"index must be [{rows}] int64, got {tuple(index.shape)} {index.dtype}")
