"""group_norm_silu against torch's group norm and SiLU, at levels of SDXL and SD1.5, in both memory formats.

pytest benchmarks/bench_group_norm.py -s
"""

from typing import Any

import pytest
import torch
from harness import BACKEND, DEVICE, DTYPE, GPU, compare
from torch.nn import functional as F

from cmlora_kernels import group_norm_silu
from cmlora_kernels.group_norm import group_norm_launches, images_of
from cmlora_kernels.launch import arch_of

LEVELS = {"sdxl 320": (320, 128), "sdxl 960": (960, 128), "sdxl 640": (640, 64), "sd15 1280": (1280, 8)}
ROWS = (10, 2, 1) if GPU else (2,)  # all predictions, those that are refreshed, what they share
EPS, TOLERANCE = 1e-5, 8 * torch.finfo(DTYPE).eps


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("level", LEVELS)
def test_group_norm_silu(benchmark: Any, level: str, rows: int, layout: torch.memory_format) -> None:
    channels, side = LEVELS[level]
    side = side if GPU else min(side, 32)
    g = torch.Generator().manual_seed(side)
    x = torch.randn(rows, channels, side, side, generator=g).to(DEVICE, DTYPE).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, channels, generator=g).to(DEVICE, DTYPE)
    rivals = {
        "group_norm_silu": lambda: group_norm_silu(x, 32, weight, bias, EPS, backend=BACKEND),
        "group_norm, silu": lambda: F.silu(F.group_norm(x, 32, weight, bias, EPS)),
    }
    want = F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double(), EPS))
    launches = group_norm_launches(images_of(x, 32), DTYPE, EPS, arch_of(x.device))
    moved = sum(launch.bytes for launch in launches)  # the second reading counted on both sides
    compare(
        f"group norm {level} rows={rows} {layout}", rivals, want, TOLERANCE, moved, {"group_norm, silu": 5 * x.nbytes}
    )
    benchmark(rivals["group_norm_silu"])
