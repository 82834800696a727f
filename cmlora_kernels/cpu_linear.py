"""A linear layer on the CPU by whichever library multiplies faster."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TOKENS, LARGE = 256, 2**24
"""Tokens, and multiplications, from which oneDNN is the faster one; below, laying out the weight costs too much."""

HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
"""Elsewhere (ARM) torch multiplies by other libraries."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias), where it is large on the CPU in float32 as a 1x1 convolution.

    torch multiplies matrices by MKL and convolves by oneDNN, which was more than twice as fast on the AMD
    processor where it was measured (benchmarks/bench_cpu.py).

    Args:
        x: [..., in]. weight: [out, in]. bias: [out] or None.

    Returns:
        [..., out].
    """
    inner, outer = weight.shape[1], weight.shape[0]
    large = HAS_BOTH and x.numel() >= TOKENS * inner and x.numel() * outer >= LARGE
    if not large or x.device.type != "cpu" or {x.dtype, weight.dtype} != {torch.float32}:
        return F.linear(x, weight, bias)
    # one image, a token per line, channels innermost: a view on both ways
    image = x.reshape(1, -1, 1, inner).permute(0, 3, 1, 2)
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], outer)
