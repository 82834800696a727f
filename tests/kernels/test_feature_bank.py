"""The feature bank's copies, bit for bit against indexing and torch.cat."""

import pytest
import torch

from cmlora.lab.bench.tiny import DEVICE
from cmlora_kernels import concat_channels, scatter_rows

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# aligned, ragged, one pixel, more than one block a row
SHAPES = [(64, 32, 8, 8), (5, 3, 7, 9), (130, 70, 1, 1), (2, 1, 13, 67)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def features(*shape: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAYOUTS[0]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_concat_equals_cat(shape, dtype, layout, backend) -> None:
    bank_channels, skip_channels, *size = shape
    bank = features(3, bank_channels, *size, dtype=dtype, layout=layout)
    skip = features(3, skip_channels, *size, dtype=dtype, layout=layout)
    y = concat_channels(bank, skip, backend=backend)
    assert torch.equal(y, torch.cat((bank, skip), 1))
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_writes_the_named_rows_and_no_other(dtype, layout, backend) -> None:
    bank = features(5, 7, 31, 20, dtype=dtype, layout=layout)
    rows = features(2, 7, 31, 20, dtype=dtype)  # in the other layout for channels_last
    index = torch.tensor([4, 1], device=DEVICE)
    want = bank.clone()
    want[index] = rows
    scatter_rows(bank, rows, index, backend=backend)
    assert torch.equal(bank, want)


def test_mixed_and_strided_layouts_concatenate_right() -> None:
    bank = features(3, 8, 6, 6, layout=torch.channels_last)
    skip = features(3, 12, 6, 6)[:, ::3]
    assert torch.equal(concat_channels(bank, skip, backend="triton"), torch.cat((bank, skip), 1))


def test_a_bank_with_gaps_is_still_written() -> None:
    whole = features(4, 6, 5, 5)
    bank, rows = whole[:, ::2], features(1, 3, 5, 5)
    scatter_rows(bank, rows, torch.tensor([2], device=DEVICE), backend="triton")
    assert torch.equal(whole[2, ::2], rows[0])


def test_no_rows_are_no_work() -> None:
    bank, none = features(2, 4, 3, 3), torch.empty(0, dtype=torch.int64, device=DEVICE)
    want = bank.clone()
    scatter_rows(bank, bank[:0], none, backend="triton")
    assert torch.equal(bank, want)
    assert concat_channels(bank[:0], features(0, 2, 3, 3), backend="triton").shape == (0, 6, 3, 3)


def test_ops_hold_torchs_contract() -> None:
    ops = torch.ops.cmlora_kernels
    index = torch.tensor([1, 0], device=DEVICE)
    for backend in ("torch", "triton"):
        for layout in LAYOUTS:
            bank, skip = features(3, 4, 5, 5, layout=layout), features(2, 2, 5, 5, layout=layout)
            torch.library.opcheck(ops.scatter_rows.default, (bank, bank[:2].clone(), index, backend))
            torch.library.opcheck(ops.concat_channels.default, (bank[:2], skip, backend))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda b, i: scatter_rows(b, b[:2, :1], i), r"rows must be \[n, 4, 3, 3\]"),
        (lambda b, i: scatter_rows(b, b[:2].half(), i), "rows must be of bank's dtype"),
        (lambda b, i: scatter_rows(b, b, i), r"index must be \[3\] int64"),
        (lambda b, i: concat_channels(b, b[:2, :, 1:]), "height and width"),
        (lambda b, i: concat_channels(b, b[:2].half()), "skip must be of bank's dtype"),
        (lambda b, i: concat_channels(b, b[:2]), "skip must have 3 rows"),
        (lambda b, i: scatter_rows(b, b[:2], i.int()), "int64, got"),
        (lambda b, i: concat_channels(b, b, backend="cpu"), "backend must be one of"),
    ],
)
def test_errors_name_the_argument(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(features(3, 4, 3, 3), torch.tensor([0, 1], device=DEVICE))
