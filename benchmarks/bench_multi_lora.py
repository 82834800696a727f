"""Multi-LoRA linear layers of SD1.5 and SDXL against what else serves a mixed batch.

    pytest benchmarks/bench_multi_lora.py

Rivals: PEFT's mixed-batch forward, base GEMM + bmm + baddbmm, the merged bank. Every result is checked against float64
before it is timed. With a GPU: fp16, full shapes, the Triton kernels. Without one: fp32, tokens and widths cut, every
strategy in its plain-torch definition; the figures that matter are then the counted bytes and the predicted ratios,
printed as predictions (model: cmlora_kernels/costs.py), for an H100 at full shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor
from torch.nn import functional as F

from cmlora.lab.bench.traffic import sdxl_lora_bytes
from cmlora_kernels import merge_weights, merged_linear, multi_lora_add_, multi_lora_linear
from cmlora_kernels.cards import chip
from cmlora_kernels.chips import LAUNCH_SECONDS, TRITON_SHARE
from cmlora_kernels.costs import Cost, choose, costs
from cmlora_kernels.tiles import Problem

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if GPU else ("cpu", torch.float32)
ADAPTERS, RANK, PREDICTED_FOR = 5, 16, "sm_90"

# rows (two guidance halves of every adapter), tokens, in, out
SHAPES = {
    "sd15_attention_320": (10, 4096, 320, 320),
    "sd15_attention_1280": (10, 256, 1280, 1280),
    "sd15_feedforward_out_1280": (10, 256, 5120, 1280),
    "sdxl_attention_640": (10, 4096, 640, 640),
    "sdxl_feedforward_in_1280": (10, 1024, 1280, 10240),
    "sdxl_prompt_640": (10, 77, 2048, 640),
}


class Layer(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    slots: Tensor
    a: Tensor
    b: Tensor
    scales: Tensor


def make(shape: tuple[int, int, int, int]) -> Layer:
    rows, tokens, inner, outer = shape if GPU else (shape[0], max(shape[1] // 16, 8), shape[2] // 4, shape[3] // 4)
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, fan: int = 1) -> Tensor:
        return (torch.randn(size, generator=g) / fan**0.5).to(DEVICE, DTYPE)

    slots = torch.arange(rows, device=DEVICE) // (rows // ADAPTERS)
    scales = torch.rand(ADAPTERS, 1, generator=g).to(DEVICE)
    a, b = normal(ADAPTERS, RANK, inner, fan=inner), normal(ADAPTERS, outer, RANK, fan=RANK)
    return Layer(normal(rows, tokens, inner), normal(outer, inner, fan=inner), normal(outer), slots, a, b, scales)


def peft(layer: Layer) -> Callable[[], Tensor]:
    base = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0], device=DEVICE, dtype=DTYPE)
    base.weight.data, base.bias.data = layer.weight, layer.bias
    module = PeftLinear(base, "0", LoraConfig(r=RANK, lora_alpha=RANK), r=RANK, lora_alpha=RANK)
    for slot in range(ADAPTERS):
        name = str(slot)
        if slot:
            module.update_layer(name, RANK, lora_alpha=RANK, config=LoraConfig(r=RANK, lora_alpha=RANK))
        module.lora_A[name].weight.data, module.lora_B[name].weight.data = layer.a[slot], layer.b[slot]
        module.scaling[name] = float(layer.scales[slot, 0])
    module.to(DEVICE, DTYPE).eval()
    names = [str(slot) for slot in layer.slots.tolist()]
    return lambda: module(layer.x, adapter_names=names)


def bmm_baddbmm(layer: Layer) -> Callable[[], Tensor]:
    """Equal groups of neighbouring rows: the update of all adapters is two batched GEMMs, without any gather."""
    grouped, scaled = (ADAPTERS, -1, layer.x.shape[2]), layer.b * layer.scales[:, :, None].to(DTYPE)

    def run() -> Tensor:
        base = F.linear(layer.x, layer.weight, layer.bias)
        down = torch.bmm(layer.x.view(grouped), layer.a.transpose(1, 2))
        return torch.baddbmm(base.view(ADAPTERS, -1, base.shape[2]), down, scaled.transpose(1, 2)).view_as(base)

    return run


def merged(layer: Layer) -> Callable[[], Tensor]:
    bank = merge_weights(layer.weight, layer.a, layer.b, layer.scales)
    return lambda: merged_linear(layer.x, bank, layer.bias, layer.slots)


def base_and_add(layer: Layer) -> Callable[[], Tensor]:
    return lambda: multi_lora_add_(F.linear(layer.x, layer.weight, layer.bias), layer.x, *layer[3:])


STRATEGIES: dict[str, Callable[[Layer], Callable[[], Tensor]]] = {
    "multi_lora_linear": lambda layer: lambda: multi_lora_linear(*layer),
    "multi_lora_add_": base_and_add,
    "merged_bank": merged,
    "bmm_baddbmm": bmm_baddbmm,
    "peft_mixed_batch": peft,
}


def check(layer: Layer, got: Tensor) -> None:
    """Within four units in the last place of the largest value: a rival rounds up to four times on its way."""
    exact = multi_lora_linear(*(t if t is layer.slots else t.double() for t in layer[:6]), layer.scales, "torch")
    error, scale = (got.double() - exact).abs().max(), exact.abs().max()
    assert error <= 4 * torch.finfo(got.dtype).eps * scale, f"error {error:.1e} at values up to {scale:.1e}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_layer(shape: str, strategy: str, benchmark: Any) -> None:
    layer = make(SHAPES[shape])
    run = STRATEGIES[strategy](layer)
    check(layer, run())

    def timed() -> None:
        run()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = shape
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if GPU else "cpu, reduced shape, torch definitions"
    benchmark.pedantic(timed, rounds=50 if GPU else 5, warmup_rounds=5 if GPU else 1)


def peft_cost(p: Problem) -> Cost:
    """PEFT's mixed batch, counted op by op: gather x, A, B, scale, gather y, add, scatter y; per adapter 8 launches."""
    x, y = p.rows * p.tokens * p.inner, p.rows * p.tokens * p.outer
    base = next(cost for cost in costs(p, PREDICTED_FOR) if cost.strategy == "add")
    moved = p.dtype.itemsize * (3 * x + 10 * y)
    alone = costs(p._replace(rank=1), PREDICTED_FOR)  # the base GEMM's share of "add" does not depend on the rank
    own = next(cost for cost in alone if cost.strategy == "add").seconds
    bandwidth, launches = chip(PREDICTED_FOR).bandwidth, 1 + 8 * p.adapters
    return Cost("peft", own + moved / bandwidth + launches * LAUNCH_SECONDS, base.bytes + moved, base.flops, launches)


def test_print_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    """Counted bytes and predicted times at full shapes; SDXL's LoRA traffic per UNet call."""
    with capsys.disabled():
        print(f"\npredicted for {PREDICTED_FOR}, float16, {ADAPTERS} adapters, rank {RANK} (counted MB, microseconds):")
        for name, (rows, tokens, inner, outer) in SHAPES.items():
            p = Problem(rows, tokens, inner, outer, RANK, 1, ADAPTERS, torch.float16, True)
            rivals = [*costs(p, PREDICTED_FOR), peft_cost(p)]
            best = choose(p, PREDICTED_FOR)
            listed = ", ".join(f"{c.strategy} {c.bytes / 1e6:.0f} MB {c.seconds * 1e6:.0f}" for c in rivals)
            print(f"  {name}: {listed}; {best.strategy} over peft {rivals[-1].seconds / best.seconds:.1f}x predicted")
        for share, known in ((None, "not measured"), (TRITON_SHARE, f"measured as {TRITON_SHARE}")):
            moved = sdxl_lora_bytes(PREDICTED_FOR, share) / 1e9
            print(f"  SDXL, one LoRA, rank 16, two rows, share {known}: {moved:.2f} GB of LoRA traffic a call, counted")
