"""gather_concat and scatter_rows against index_select + cat and index_copy_, at the last up block of SD1.5 and SDXL.

pytest benchmarks/bench_feature_bank.py -s
"""

import pytest
import torch
from harness import BACKEND, DEVICE, DTYPE, GPU, compare

from cmlora_kernels import gather_concat, scatter_rows
from cmlora_kernels.feature_bank import gather_concat_launch, scatter_launch

SIDES = {"sd15": 64, "sdxl": 128}
ROWS = 10 if GPU else 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("model", SIDES)
def test_gather_concat(benchmark, model: str, layout: torch.memory_format) -> None:
    side, size = SIDES[model], DTYPE.itemsize
    bank = torch.randn(ROWS, 640, side, side, device=DEVICE, dtype=DTYPE).to(memory_format=layout)
    skip = torch.randn(ROWS, 320, side, side, device=DEVICE, dtype=DTYPE).to(memory_format=layout)
    index = torch.randperm(ROWS, device=DEVICE)
    last = layout is torch.channels_last
    launch = gather_concat_launch(ROWS, 640, 320, side * side, DTYPE, last, True)
    # index_select writes its rows and cat reads them again
    between = 2 * ROWS * 640 * side * side * size
    rivals = {
        "gather_concat": lambda: gather_concat(bank, skip, index, backend=BACKEND),
        "index_select + cat": lambda: torch.cat((bank.index_select(0, index), skip), 1),
    }
    want = torch.cat((bank[index], skip), 1)
    compare(
        f"gather_concat {model} {layout}", rivals, want, 0, launch.bytes, {"index_select + cat": launch.bytes + between}
    )
    benchmark(rivals["gather_concat"])


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
