"""FLOPs for torch's counter, which counts custom ops, and attention on the CPU, as none:

from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(custom_mapping=FLOPS): ...

As there, a multiply-add is two, and only matrix products and convolutions count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from cmlora_kernels import merged_bank as _registers_one  # noqa: F401
from cmlora_kernels import multi_lora_conv2d as _registers_the_ops  # noqa: F401

Shape = tuple[int, ...]


def _update(y: Shape | None, x: Shape, slots: Shape, a: Shape, b: Shape, *rest: Any, **named: Any) -> int:
    """Shrink and expand of every row."""
    rows, tokens, inner = x
    _, outer, rank = b
    return 2 * rows * tokens * (inner * a[1] + rank * outer)


def _linear(
    x: Shape, weight: Shape, bias: Shape | None, slots: Shape, a: Shape, b: Shape, *rest: Any, **named: Any
) -> int:
    return 2 * math.prod(x) * weight[0] + _update(None, x, slots, a, b)


def _conv2d(
    x: Shape,
    weight: Shape,
    bias: Shape | None,
    slots: Shape,
    a: Shape,
    b: Shape,
    *rest: Any,
    out_shape: Shape,
    **named: Any,
) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:]) + _conv2d_add(out_shape, x, slots, a, b)


def _conv2d_add(y: Shape, x: Shape, slots: Shape, a: Shape, b: Shape, *rest: Any, **named: Any) -> int:
    rows, outer, height, width = y
    return 2 * rows * height * width * (math.prod(a[1:]) + b[2] * outer)


def _merged(x: Shape, bank: Shape, *rest: Any, **named: Any) -> int:
    return 2 * math.prod(x) * bank[1]


def _attention(query: Shape, key: Shape, value: Shape, *rest: Any, **named: Any) -> int:
    return 2 * math.prod(query) * key[2] + 2 * math.prod(query[:3]) * math.prod(value[2:])


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.cmlora_kernels.multi_lora_linear: _linear,
    torch.ops.cmlora_kernels.multi_lora_add_: _update,
    torch.ops.cmlora_kernels.multi_lora_conv2d: _conv2d,
    torch.ops.cmlora_kernels.multi_lora_conv2d_add_: _conv2d_add,
    torch.ops.cmlora_kernels.merged_linear: _merged,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # torch's counter leaves it out
}
"""Op -> formula over the shapes of its arguments."""
