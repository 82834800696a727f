"""What the CPU path does differently (csrc_docs/engine.md), each thing against being without it; on the CPU only.

pytest benchmarks/bench_cpu.py -s
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention import FeedForward
from harness import compare_calls
from torch import Tensor, nn

import cmlora
from cmlora.engine.footprint import keep_freed_memory
from cmlora.lab.bench.tiny import ATTENTION, call, relative, three_adapters
from cmlora.lora import winograd
from cmlora.models.unet import layers as transformer
from cmlora_kernels import cpu_linear

ROWS = 2  # the dominant adapter's, with guidance
LAYERS = [(320, 32), (640, 16), (1280, 8), (1280, 4)]
"""Channels and side of SD1.5's levels at 256 px."""

LINEAR = [
    (2 * 1024, 320, 2560),
    (2 * 1024, 1280, 320),
    (10 * 1024, 320, 320),
    (2 * 256, 640, 5120),
    (2 * 64, 1280, 10240),
]
"""Tokens, in and out of SD1.5's layers at 256 px; at the last one torch's own is kept."""

keep_freed_memory()  # as the engine does


def compare(case: str, ours: Callable[[], Tensor], rival: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        error = relative(ours(), rival())
        assert error < 1e-4, f"{case}: differs by {error:.1e}: not timed"
        compare_calls(case, ours, rival, error, pairs=7)


def test_merged_weights(benchmark) -> None:
    pipes = [three_adapters(ATTENTION, device="cpu") for _ in range(2)]
    for pipe, merge in zip(pipes, (True, False), strict=True):
        cmlora.accelerate(pipe, merge_weights=merge)
    compare("small UNet, 3 LoRAs: merged weights", *(lambda pipe=pipe: call(pipe, 6) for pipe in pipes))
    benchmark.pedantic(lambda: call(pipes[0], 6), rounds=1)


@pytest.mark.parametrize(("channels", "side"), LAYERS)
def test_channels_innermost(benchmark, channels: int, side: int) -> None:
    layer, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(3 * ROWS, channels, side, side)
    last = x.contiguous(memory_format=torch.channels_last)
    case = f"3x3 convolution, {3 * ROWS} rows of {channels} x {side} x {side}: channels innermost"
    compare(case, lambda: layer(last), lambda: layer(x))
    benchmark.pedantic(lambda: layer(last), rounds=1)


@pytest.mark.parametrize("rows", [ROWS, 5 * ROWS])
@pytest.mark.parametrize(("channels", "side"), LAYERS)
def test_winograd(benchmark, channels: int, side: int, rows: int) -> None:
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    x = torch.randn(rows, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = winograd.transform_weight(layer.weight.detach())
    case = f"3x3 convolution, {rows} rows of {channels} x {side} x {side}: F(2x2, 3x3)"
    bias = layer.bias.detach()
    compare(case, lambda: winograd.convolve(x, weight, bias), lambda: layer(x))
    benchmark.pedantic(lambda: winograd.convolve(x, weight, bias), rounds=1)


@pytest.mark.parametrize("rows", [ROWS, 5 * ROWS])
def test_feed_forward(benchmark, rows: int) -> None:
    channels, side = LAYERS[0]
    layer, x = FeedForward(channels, activation_fn="geglu"), torch.randn(rows, side * side, channels)
    case = f"feed-forward, {rows} rows of {side * side} x {channels}: the engine's"
    compare(case, lambda: transformer._feed_forward(layer, x, "auto"), lambda: layer(x))
    with torch.no_grad():
        benchmark.pedantic(lambda: transformer._feed_forward(layer, x, "auto"), rounds=1)


@pytest.mark.parametrize(("tokens", "inner", "outer"), LINEAR)
def test_linear_layers(benchmark, tokens: int, inner: int, outer: int) -> None:
    layer, x = nn.Linear(inner, outer), torch.randn(tokens, inner)
    case = f"linear layer, {tokens} tokens, {inner} to {outer}"
    compare(case, lambda: cpu_linear.linear(x, layer.weight, layer.bias), lambda: layer(x))
    with torch.no_grad():
        benchmark.pedantic(lambda: cpu_linear.linear(x, layer.weight, layer.bias), rounds=1)
