"""Adaptive layer norm: y = layer_norm(x) (1 + scale) + shift, scale and shift per row (DiT, arXiv 2212.09748)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch
from cmlora_kernels.triton_shim import tl, triton

TOKENS = 4  # per program: shift and scale are loaded once for them


@triton.jit
def modulated_norm_kernel(
    x_ptr, shift_ptr, scale_ptr, y_ptr, tokens, width, x_rows, x_stride, own_rows, own_stride, eps,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * TOKENS
    x_ptr += row % x_rows * x_stride
    y_ptr += row * tokens * width
    own = row % own_rows * own_stride
    column = tl.arange(0, BLOCK)
    here = column < width
    shift = tl.load(shift_ptr + own + column, here, 0.0).to(tl.float32)
    scale = 1.0 + tl.load(scale_ptr + own + column, here, 0.0).to(tl.float32)
    for i in tl.static_range(TOKENS):
        place = (first + i) * width + column
        inside = column < tl.where(first + i < tokens, width, 0)
        x = tl.load(x_ptr + place, inside, 0.0).to(tl.float32)
        x = tl.where(here, x - tl.sum(x, 0) / width, 0.0)
        y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * scale + shift
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), inside)


def modulated_norm_definition(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`modulated_norm` in plain torch."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    fewer = min(x.shape[0], shift.shape[0])
    shift, normed, scale = (t.unflatten(0, (t.shape[0] // max(fewer, 1), fewer)) for t in (shift, normed, 1 + scale))
    return torch.addcmul(shift, normed, scale).flatten(0, 1)


@functools.lru_cache(maxsize=256)
def modulated_launch(x: tuple[int, ...], own: int, strides: tuple[int, int], dtype: torch.dtype, eps: float) -> Launch:
    """The launch of `modulated_norm_kernel` on x [rows, tokens, width]; strides of its rows and of the `own` shifts."""
    (x_rows, tokens, width), size = x, dtype.itemsize
    rows, blocks = max(x_rows, own), -(-tokens // TOKENS)
    return Launch(
        kernel=modulated_norm_kernel,
        name=f"modulated_norm {rows}x{tokens}x{width}",
        tensors=dict.fromkeys(("x_ptr", "shift_ptr", "scale_ptr", "y_ptr"), POINTER[dtype]),
        scalars={
            "tokens": tokens,
            "width": width,
            "x_rows": x_rows,
            "x_stride": strides[0],
            "own_rows": own,
            "own_stride": strides[1],
            "eps": float(eps),
        },
        constexprs={"TOKENS": TOKENS, "BLOCK": 1 << (width - 1).bit_length()},
        grid=(blocks, rows, 1),
        num_warps=4 if width <= 4096 else 8,  # 32 numbers of a token per thread
        num_stages=1,
        bytes=2 * rows * (tokens + blocks) * width * size,
        unique_bytes=((x_rows + rows) * tokens + 2 * own) * width * size,
        flops=8 * rows * tokens * width,
    )


def _body(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str) -> Tensor:
    y = _fake(x, shift, scale, eps, backend)
    if not (use_triton(x, backend) and x.dtype in POINTER and y.numel()):
        return modulated_norm_definition(x, shift, scale, eps)
    x = x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
    if shift.stride() != scale.stride() or shift.stride(2) != 1:
        shift, scale = shift.contiguous(), scale.contiguous()
    launch = modulated_launch(tuple(x.shape), shift.shape[0], (x.stride(0), shift.stride(0)), x.dtype, eps)
    launch(x, shift, scale, y)
    return y


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str) -> Tensor:
    return x.new_empty(max(x.shape[0], shift.shape[0]), *x.shape[1:])


_op = register("modulated_norm(Tensor x, Tensor shift, Tensor scale, float eps, str backend) -> Tensor", _body, _fake)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: Backend = "auto") -> Tensor:
    """Layer norm without weights, then (1 + scale) and shift, in one pass and in float32.

    Args:
        x: [rows, tokens, width].
        shift, scale: [own rows, 1, width] of x's dtype. Where there are fewer rows of one than of the other they
            repeat: row r is of row r modulo their number.
        eps: of the norm.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, tokens, width], with the rows of the larger.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend.
    """
    check_backend(backend)
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be [rows, tokens, width] of a float dtype, got {tuple(x.shape)} {x.dtype}")
    for name, t in (("shift", shift), ("scale", scale)):
        if t.shape != (shift.shape[0], 1, x.shape[2]) or t.dtype != x.dtype:
            raise ValueError(f"{name} must be [own rows, 1, {x.shape[2]}] {x.dtype}, got {tuple(t.shape)} {t.dtype}")
    check_rows("shift", shift.shape[0], x.shape[0])
    y: Tensor = _op(x, shift, scale, eps, backend)
    return y


def check_rows(name: str, rows: int, others: int) -> None:
    """Raise ValueError unless the fewer rows repeat a whole number of times."""
    fewer, more = sorted((rows, others))
    if more and (not fewer or more % fewer):
        raise ValueError(f"{name}'s rows must be a multiple or a part of {others}, got {rows}")
