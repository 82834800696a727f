"""The gate of a feed-forward: y = value * gelu(gate), value and gate side by side in x (GEGLU, arXiv 2002.05202)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch
from cmlora_kernels.primitives import gated
from cmlora_kernels.triton_shim import tl, triton

BLOCK_BYTES = 4096  # of y per program: of value and of gate two 16-byte accesses in flight for each of 128 threads
COLUMNS = 256  # widths are multiples of 256 in SD1.5 and SDXL: no column is wasted


@triton.jit
def geglu_kernel(
    x_ptr,  # [tokens, 2 * width]
    y_ptr,  # [tokens, width]
    tokens,
    width,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS
    token, column = tl.arange(0, BLOCK_TOKENS), tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (first + token < tokens)[:, None] & (column < width)[None, :]
    value_ptrs = x_ptr + first * 2 * width + (token[:, None] * (2 * width) + column[None, :])
    value = tl.load(value_ptrs, inside, 0.0).to(tl.float32)
    gate = tl.load(value_ptrs + width, inside, 0.0).to(tl.float32)
    y = gated(value, gate).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + first * width + (token[:, None] * width + column[None, :]), y, inside)


def geglu_definition(x: Tensor) -> Tensor:
    """`geglu` in plain torch, as diffusers computes it."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


@functools.lru_cache(maxsize=256)
def geglu_launch(tokens: int, width: int, dtype: torch.dtype) -> Launch:
    """The launch of `geglu_kernel` on x [tokens, 2 * width]."""
    block = BLOCK_BYTES // dtype.itemsize // COLUMNS
    moved = 3 * tokens * width * dtype.itemsize
    return Launch(
        kernel=geglu_kernel,
        name=f"geglu {tokens}x{width}",
        tensors={"x_ptr": POINTER[dtype], "y_ptr": POINTER[dtype]},
        scalars={"tokens": tokens, "width": width},
        constexprs={"BLOCK_TOKENS": block, "BLOCK_COLUMNS": COLUMNS},
        grid=(-(-tokens // block), -(-width // COLUMNS), 1),
        num_warps=4,
        num_stages=1,
        bytes=moved,
        unique_bytes=moved,
        flops=0,
    )


def _body(x: Tensor, backend: str) -> Tensor:
    y = _fake(x, backend)
    if not (use_triton(x, backend) and x.dtype in POINTER and y.numel()):
        return geglu_definition(x)
    geglu_launch(x.shape[:-1].numel(), y.shape[-1], x.dtype)(x.contiguous(), y)
    return y


def _fake(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


_op = register("geglu(Tensor x, str backend) -> Tensor", _body, _fake)


def geglu(x: Tensor, backend: Backend = "auto") -> Tensor:
    """value * gelu(gate), the exact gelu, in one pass and in float32; x's last dimension is value, then gate.

    Args:
        x: [..., 2 * width], a float dtype.
        backend: "auto", "torch" or "triton".

    Returns:
        [..., width].

    Raises:
        ValueError: an odd last dimension, a dtype that is no float, or an unknown backend.
    """
    check_backend(backend)
    if not x.ndim or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"x must be [..., 2 * width] of a float dtype, got {tuple(x.shape)} {x.dtype}")
    y: Tensor = _op(x, backend)
    return y
