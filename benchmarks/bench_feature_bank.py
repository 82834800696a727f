"""concat_channels and scatter_rows against cat and index_copy_, at the last up block of SD1.5 and SDXL.

pytest benchmarks/bench_feature_bank.py -s
"""

import pytest
import torch
from harness import BACKEND, DEVICE, DTYPE, GPU, compare

from cmlora_kernels import concat_channels, scatter_rows
from cmlora_kernels.feature_bank import concat_channels_launch, scatter_launch

SIDES = {"sd15": 64, "sdxl": 128}
ROWS = 10 if GPU else 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("model", SIDES)
def test_concat_channels(benchmark, model: str, layout: torch.memory_format) -> None:
    side = SIDES[model]
    bank = torch.randn(ROWS, 640, side, side, device=DEVICE, dtype=DTYPE).to(memory_format=layout)
    skip = torch.randn(ROWS, 320, side, side, device=DEVICE, dtype=DTYPE).to(memory_format=layout)
    launch = concat_channels_launch(ROWS, 640, 320, side * side, DTYPE, layout is torch.channels_last)
    rivals = {
        "concat_channels": lambda: concat_channels(bank, skip, backend=BACKEND),
        "cat": lambda: torch.cat((bank, skip), 1),
    }
    want = torch.cat((bank, skip), 1)
    compare(f"concat_channels {model} {layout}", rivals, want, 0, launch.bytes, {"cat": launch.bytes})
    benchmark(rivals["concat_channels"])


@pytest.mark.parametrize("model", SIDES)
def test_scatter_rows(benchmark, model: str) -> None:
    side = SIDES[model]
    bank = torch.randn(ROWS, 640, side, side, device=DEVICE, dtype=DTYPE)
    rows = torch.randn(2, 640, side, side, device=DEVICE, dtype=DTYPE)
    index = torch.tensor([1, 0], device=DEVICE)
    launch = scatter_launch(2, 640 * side * side, DTYPE)

    def ours() -> torch.Tensor:
        scatter_rows(bank, rows, index, backend=BACKEND)
        return bank

    rivals = {"scatter_rows": ours, "index_copy_": lambda: bank.index_copy_(0, index, rows)}
    want = bank.clone()
    want[index] = rows
    compare(f"scatter_rows {model}", rivals, want, 0, launch.bytes, {"index_copy_": launch.bytes})
    benchmark(ours)
