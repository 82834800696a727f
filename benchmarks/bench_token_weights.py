"""N LoRAs in one pass, each with a weight per token, against a masked product per LoRA and the loop over PEFT's layers.

pytest benchmarks/bench_token_weights.py -s
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import BACKEND, DEVICE, DTYPE, GPU, compare
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels import multi_lora_linear
from cmlora_kernels.costs import choose
from cmlora_kernels.multi_lora_add import add_launches
from cmlora_kernels.multi_lora_linear import linear_launch
from cmlora_kernels.tiles import Problem

PREDICTED_FOR = "sm_90"
TOLERANCE = 8 * torch.finfo(DTYPE).eps

# tokens, in, out, adapters, rank of each: two rows, the guidance halves
LAYERS = {
    "shipped_model_128": (256, 128, 128, 5, 8),
    "sd15_attention_320": (4096 if GPU else 1024, 320, 320, 5, 8),
    "sd15_attention_1280": (256, 1280, 1280, 5, 16),
    "sdxl_attention_1280": (1024 if GPU else 256, 1280, 1280, 5, 16),
    "sdxl_two_characters": (1024 if GPU else 256, 1280, 1280, 2, 128),
}


def normal(*shape: int, fan: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) / fan**0.5).to(DEVICE, DTYPE)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer(benchmark: Any, layer: str) -> None:
    tokens, inner, outer, adapters, rank = LAYERS[layer]
    x, weight, bias = normal(2, tokens, inner), normal(outer, inner, fan=inner), normal(outer)
    a, b = normal(1, adapters * rank, inner, fan=inner), normal(1, outer, adapters * rank, fan=rank)
    slots, scales = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    masks = torch.rand(1, adapters, tokens, device=DEVICE).expand(2, -1, -1)  # both halves share them
    groups = (torch.arange(adapters * rank, dtype=torch.int32, device=DEVICE) // rank)[None]
    lora = (slots, a, b, scales)
    pairs = [(a[0, i : i + rank], b[0, :, i : i + rank]) for i in range(0, adapters * rank, rank)]

    def peft_like() -> Tensor:
        """What PEFT's layer does with several active adapters, each one's output masked."""
        y = F.linear(x, weight, bias)
        for mask, (down, up) in zip(masks.unbind(1), pairs, strict=True):
            y = y + F.linear(F.linear(x, down), up) * mask[:, :, None].to(DTYPE)
        return y

    def masked_addmms() -> Tensor:
        """The masks on the narrow side, the sum in place."""
        y = F.linear(x, weight, bias).flatten(0, 1)
        for mask, (down, up) in zip(masks.unbind(1), pairs, strict=True):
            y.addmm_((F.linear(x, down) * mask[:, :, None].to(DTYPE)).flatten(0, 1), up.t())
        return y.view(2, tokens, outer)

    weighted = {"token_weights": masks, "groups": groups}
    rivals: dict[str, Callable[[], Tensor]] = {
        "multi_lora_linear weighted": lambda: multi_lora_linear(x, weight, bias, *lora, BACKEND, **weighted),
        "N masked addmms": masked_addmms,
        "PEFT-like loop": peft_like,
    }
    columns = masks.double().transpose(1, 2)[:, :, groups[0].long()]
    down = (x.double() @ a[0].double().t()) * columns
    want = F.linear(x.double(), weight.double(), bias.double()) + down @ b[0].double().t()
    moved, rival_bytes = counted(x, weight, b, scales, slots, masks)
    compare(f"token weights {layer}", rivals, want, TOLERANCE, moved, rival_bytes)
    ones = {"token_weights": torch.ones_like(masks), "groups": groups}
    overhead: dict[str, Callable[[], Tensor]] = {
        "weighted by 1": lambda: multi_lora_linear(x, weight, bias, *lora, BACKEND, **ones),
        "without weights": lambda: multi_lora_linear(x, weight, bias, *lora, BACKEND),
    }
    compare(f"token weights {layer}", overhead, overhead["without weights"]().double(), TOLERANCE, moved, {})
    benchmark(rivals["multi_lora_linear weighted"])


def counted(
    x: Tensor, weight: Tensor, b: Tensor, scales: Tensor, slots: Tensor, masks: Tensor
) -> tuple[int, dict[str, int]]:
    """Bytes at full precision of a GPU, every element once per launch: ours, and the rivals op by op."""
    p = Problem.of(x, slots, b, scales, True, masks)._replace(dtype=torch.float16)
    fused, adds = choose(p, PREDICTED_FOR).strategy == "fused", add_launches(p, PREDICTED_FOR)
    rows_in, rows_out, lora = p.rows * p.tokens * p.inner, p.rows * p.tokens * p.outer, p.rank * (p.inner + p.outer)
    base = 2 * (rows_in + rows_out + p.inner * p.outer + p.outer)
    first = linear_launch(p, PREDICTED_FOR).unique_bytes if fused else base
    moved = first + sum(launch.unique_bytes for _, launch in adds[fused:])
    down = p.rows * p.tokens * p.rank  # of all adapters together
    narrow = 2 * (p.weights * (rows_in + 2 * rows_out) + 4 * down + lora)  # down written, read, written, read
    wide = 2 * (p.weights * (rows_in + 6 * rows_out) + 2 * down + lora)  # up, product and sum: x + 6 y
    return moved, {"N masked addmms": base + narrow, "PEFT-like loop": base + wide}
