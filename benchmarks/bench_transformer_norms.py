"""modulated_norm and rotary_norm against the modules that they stand for, on a block of Flux.

pytest benchmarks/bench_transformer_norms.py -s
"""

from typing import Any

import pytest
import torch
from harness import BACKEND, DEVICE, DTYPE, GPU, compare
from torch.nn import functional as F

from cmlora_kernels import modulated_norm, rotary_norm
from cmlora_kernels.modulated_norm import modulated_launch
from cmlora_kernels.rotary_norm import rotary_launch

WIDTH, HEADS = 3072, 24
HEAD = WIDTH // HEADS
TOKENS, TEXT = (4096, 512) if GPU else (256, 32)
EPS, TOLERANCE = 1e-6, 8 * torch.finfo(DTYPE).eps


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, DTYPE)


@pytest.mark.parametrize("rows", [1, 3])
def test_modulated_norm(benchmark: Any, rows: int) -> None:
    """One image's modulation for all rows, as predictions share it."""
    x, (shift, scale, _) = normal(rows, TOKENS, WIDTH), normal(1, 3, WIDTH).chunk(3, 1)
    rivals = {
        "modulated_norm": lambda: modulated_norm(x, shift, scale, EPS, backend=BACKEND),
        "layer_norm, product, sum": lambda: F.layer_norm(x, (WIDTH,), eps=EPS) * (1 + scale) + shift,
    }
    launch = modulated_launch(tuple(x.shape), 1, (TOKENS * WIDTH, 3 * WIDTH), DTYPE, EPS)
    want = F.layer_norm(x.double(), (WIDTH,), eps=EPS) * (1 + scale.double()) + shift.double()
    rival = {"layer_norm, product, sum": 6 * x.nbytes}  # each of the three reads x and writes it
    compare(f"modulated_norm flux rows={rows}", rivals, want, TOLERANCE, launch.unique_bytes, rival)
    benchmark(rivals["modulated_norm"])


@pytest.mark.parametrize("rows", [1, 3])
def test_rotary_norm(benchmark: Any, rows: int) -> None:
    """The prompt's heads before the image's, and their turn as diffusers writes it."""
    x, before = normal(rows, TOKENS, HEADS, HEAD), normal(rows, TEXT, HEADS, HEAD)
    weights, angle = normal(2, HEAD), normal(TEXT + TOKENS, HEAD // 2).float()
    turns = torch.stack((angle.cos(), angle.sin()), -1)
    cos, sin = (t.repeat_interleave(2, 1)[:, None] for t in turns.unbind(-1))

    def modules(dtype: torch.dtype = DTYPE, wide: torch.dtype = torch.float32) -> torch.Tensor:
        parts = zip((before, x), (weights[1], weights[0]), strict=True)
        normed = [F.rms_norm(p.to(dtype), (HEAD,), weight.to(dtype), EPS) for p, weight in parts]
        y = torch.cat(normed, 1)
        real, imaginary = y.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-imaginary, real), -1).flatten(-2)
        return (y.to(wide) * cos.to(wide) + turned.to(wide) * sin.to(wide)).to(dtype)

    rivals = {
        "rotary_norm": lambda: rotary_norm(x, weights[0], turns, EPS, before, weights[1], backend=BACKEND),
        "rms_norm, cat, turn": modules,
    }
    strides = (TOKENS * WIDTH, TEXT * WIDTH)
    launch = rotary_launch((rows, TOKENS, HEADS, HEAD), (rows, TEXT), strides, DTYPE, DTYPE, EPS)
    want = modules(torch.float64, torch.float64)
    compare(f"rotary_norm flux rows={rows}", rivals, want, TOLERANCE, launch.unique_bytes, {})
    benchmark(rivals["rotary_norm"])
