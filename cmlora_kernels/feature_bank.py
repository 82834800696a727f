"""Cached deep features, one row of a bank per adapter and image (DeepCache, arXiv 2312.00858, per adapter)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora_kernels.dispatch import Backend, check_backend, register


def scatter_definition(bank: Tensor, rows: Tensor, index: Tensor) -> None:
    """`scatter_rows` in plain torch."""
    bank.index_copy_(0, index, rows)


def gather_concat_definition(bank: Tensor, skip: Tensor, index: Tensor | None) -> Tensor:
    """`gather_concat` in plain torch."""
    return torch.cat((bank if index is None else bank[index], skip), 1)


def _scatter_body(bank: Tensor, rows: Tensor, index: Tensor, backend: str) -> None:
    scatter_definition(bank, rows, index)


def _scatter_fake(bank: Tensor, rows: Tensor, index: Tensor, backend: str) -> None:
    return None


def _gather_body(bank: Tensor, skip: Tensor, index: Tensor | None, backend: str) -> Tensor:
    return gather_concat_definition(bank, skip, index)


def _gather_fake(bank: Tensor, skip: Tensor, index: Tensor | None, backend: str) -> Tensor:
    return gather_concat_definition(bank, skip, index)


_scatter = register(
    "scatter_rows(Tensor(bank!) bank, Tensor rows, Tensor index, str backend) -> ()", _scatter_body, _scatter_fake
)
_gather = register(
    "gather_concat(Tensor bank, Tensor skip, Tensor? index, str backend) -> Tensor", _gather_body, _gather_fake
)


def scatter_rows(bank: Tensor, rows: Tensor, index: Tensor, backend: Backend = "auto") -> None:
    """bank[index[i]] = rows[i], in place; the index is read on the device.

    Args:
        bank: [bank rows, channels, height, width]; rows: [n, channels, height, width]; index: [n] int64, no duplicates.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
    """
    check_backend(backend)
    if rows.shape[1:] != bank.shape[1:]:
        raise ValueError(f"rows must be [n, {', '.join(map(str, bank.shape[1:]))}], got {tuple(rows.shape)}")
    if index.shape != (rows.shape[0],):
        raise ValueError(f"index must be [{rows.shape[0]}], got {tuple(index.shape)}")
    _scatter(bank, rows, index, backend)


def gather_concat(bank: Tensor, skip: Tensor, index: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """concat(bank[index[r]], skip[r]) over channels for every row r, in one pass.

    Args:
        bank: [bank rows, channels, height, width]; skip: [rows, skip channels, height, width].
        index: [rows] int64, or None: row r of the bank itself.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, channels + skip channels, height, width].

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
    """
    check_backend(backend)
    if bank.shape[2:] != skip.shape[2:]:
        raise ValueError(f"bank and skip must share height and width, got {tuple(bank.shape)} and {tuple(skip.shape)}")
    rows = bank.shape[0] if index is None else index.shape[0]
    if rows != skip.shape[0]:
        raise ValueError(f"skip must have {rows} rows, got {tuple(skip.shape)}")
    y: Tensor = _gather(bank, skip, index, backend)
    return y
