"""combine_noise against einsum.

pytest benchmarks/bench_combine_noise.py -s
"""

import pytest
import torch
from harness import BACKEND, DEVICE, DTYPE, compare

from cmlora_kernels import combine_noise
from cmlora_kernels.combine_noise import combine_launch

SIDES = {"sd15": 64, "sdxl": 128}
TOLERANCE = 4 * torch.finfo(DTYPE).eps


@pytest.mark.parametrize("adapters", [2, 5])
@pytest.mark.parametrize("model", SIDES)
def test_combine_noise(benchmark, model: str, adapters: int) -> None:
    side = SIDES[model]
    noise, weights = _predictions(adapters, side)
    stacked = noise.view(adapters, 2, 4, side, side)
    launch = combine_launch(adapters, 2, 4 * side * side, DTYPE)
    rivals = {
        "combine_noise": lambda: combine_noise(noise, weights, backend=BACKEND),
        "product + sum": lambda: (stacked * weights.to(DTYPE)[:, :, None, None, None]).sum(0),
    }
    product = 2 * noise.numel() * DTYPE.itemsize  # written, and read again
    rival = {"product + sum": launch.bytes + product}
    want = torch.einsum("nmchw,nm->mchw", stacked.double(), weights.double())
    compare(f"combine_noise {model} N={adapters}", rivals, want, TOLERANCE, launch.bytes, rival)
    benchmark(rivals["combine_noise"])


def _predictions(adapters: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randn(adapters * 2, 4, side, side, device=DEVICE, dtype=DTYPE)
    return noise, torch.rand(adapters, 2, device=DEVICE)
