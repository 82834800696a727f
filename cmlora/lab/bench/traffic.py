"""What one LoRA moves in a UNet call of SDXL, counted."""

from __future__ import annotations

import torch

from cmlora_kernels.costs import choose, costs, without_memory
from cmlora_kernels.tiles import Problem

# SDXL at 1024 x 1024: how often, tokens, in, out. 10 transformer layers at 640 channels, 60 at 1280.
SDXL_LINEARS = [
    (10 * 6 + 2 * 5, 4096, 640, 640),  # q, k, v, out of self-attention, q, out of cross-attention; projections
    (10 * 2, 77, 2048, 640),
    (10, 4096, 640, 5120),
    (10, 4096, 2560, 640),
    (60 * 6 + 2 * 6, 1024, 1280, 1280),
    (60 * 2, 77, 2048, 1280),
    (60, 1024, 1280, 10240),
    (60, 1024, 5120, 1280),
]


def sdxl_lora_bytes(arch: str, share: float | None = None) -> int:
    """Bytes beyond the base layers' own, each element counted once per launch, by the strategies chosen on `arch`.

    Args:
        arch: the target.
        share: where the speed of our GEMMs, as a share of the library's, is known; None: as chosen without.
    """
    total = 0
    for count, tokens, inner, outer in SDXL_LINEARS:
        p = Problem(2, tokens, inner, outer, 16, 1, 1, torch.float16, True)
        base = 2 * (2 * tokens * (inner + outer) + inner * outer)
        chosen = choose(p, arch) if share is None else without_memory(costs(p, arch, share))[0]
        total += count * (chosen.bytes - base)
    return total
