"""Queries or keys of a joint attention: RMS norm per head, text before the image, rotary positions (arXiv 2104.09864).

y[token] = (x / sqrt(mean(x^2) + eps) * weight) turned by turns[token], pairs of x as complex numbers
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch
from cmlora_kernels.modulated_norm import check_rows
from cmlora_kernels.triton_shim import tl, triton

ELEMENTS = 4096  # per program: 32 numbers a thread, whole heads


@triton.jit
def _turn_heads(
    x_ptr, weight_ptr, turns_ptr, y_ptr, first, count, heads, width, eps, PADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`count` heads of some tokens, from `first` on; all pointers at the first of these tokens."""
    head, column = first + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    inside = (head[:, None] < count) & (column[None, :] < width)
    place = head[:, None] * width + column[None, :]
    x = tl.load(x_ptr + place, inside, 0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    x *= tl.load(weight_ptr + column, column < width, 0.0).to(tl.float32)[None, :]
    turns = tl.load(turns_ptr + (head // heads)[:, None] * width + column[None, :], inside, 0.0)
    cos, sin = tl.split(tl.reshape(turns, [BLOCK, PADDED // 2, 2]))
    real, imaginary = tl.split(tl.reshape(x, [BLOCK, PADDED // 2, 2]))
    y = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    tl.store(y_ptr + place, tl.reshape(y, [BLOCK, PADDED]).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def rotary_norm_kernel(
    x_ptr, weight_ptr, before_ptr, before_weight_ptr, turns_ptr, y_ptr,
    tokens, before_tokens, heads, width, x_rows, x_stride, before_rows, before_stride, eps,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's heads are all of `before` or all of `x`."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    y_ptr += row * (before_tokens + tokens) * heads * width
    before_blocks = tl.cdiv(before_tokens * heads, BLOCK)
    if block < before_blocks:
        if before_ptr is not None:
            before_ptr += row % before_rows * before_stride
            count = before_tokens * heads
            _turn_heads(
                before_ptr, before_weight_ptr, turns_ptr, y_ptr, block * BLOCK, count, heads, width, eps, PADDED, BLOCK
            )
    else:
        x_ptr += row % x_rows * x_stride
        y_ptr += before_tokens * heads * width
        turns_ptr += before_tokens * width
        first = (block - before_blocks) * BLOCK
        _turn_heads(x_ptr, weight_ptr, turns_ptr, y_ptr, first, tokens * heads, heads, width, eps, PADDED, BLOCK)


def rotary_norm_definition(
    x: Tensor, weight: Tensor, turns: Tensor, eps: float, before: Tensor | None, before_weight: Tensor | None
) -> Tensor:
    """`rotary_norm` in plain torch."""
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    if before is not None:
        earlier = F.rms_norm(before, x.shape[-1:], before_weight, eps)
        rows = max(x.shape[0], before.shape[0])
        y = torch.cat([t.repeat(rows // max(t.shape[0], 1), 1, 1, 1) for t in (earlier, y)], 1)
    pairs = torch.view_as_complex(y.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.view_as_complex(turns)[:, None])
    return turned.flatten(-2).to(x.dtype)


@functools.lru_cache(maxsize=256)
def rotary_launch(
    x: tuple[int, ...],
    before: tuple[int, int],
    strides: tuple[int, int],
    dtype: torch.dtype,
    weight: torch.dtype,
    eps: float,
) -> Launch:
    """The launch of `rotary_norm_kernel` on x [rows, tokens, heads, width]; `before`: rows and tokens of the text."""
    (x_rows, tokens, heads, width), (before_rows, before_tokens) = x, before
    size, rows, every = dtype.itemsize, max(x_rows, before_rows), tokens + before_tokens
    padded = 1 << (width - 1).bit_length()
    block = max(1, ELEMENTS // padded)
    blocks = -(-tokens * heads // block) + -(-before_tokens * heads // block)
    pointers = (POINTER[dtype], POINTER[weight]) if before_tokens else (None, None)
    read = x_rows * tokens + before_rows * before_tokens
    return Launch(
        kernel=rotary_norm_kernel,
        name=f"rotary_norm {rows}x({before_tokens}+{tokens})x{heads}x{width}",
        tensors={
            "x_ptr": POINTER[dtype],
            "weight_ptr": POINTER[weight],
            "before_ptr": pointers[0],
            "before_weight_ptr": pointers[1],
            "turns_ptr": "*fp32",
            "y_ptr": POINTER[dtype],
        },
        scalars={
            "tokens": tokens,
            "before_tokens": before_tokens,
            "heads": heads,
            "width": width,
            "x_rows": x_rows,
            "x_stride": strides[0],
            "before_rows": max(before_rows, 1),
            "before_stride": strides[1],
            "eps": float(eps),
        },
        constexprs={"PADDED": padded, "BLOCK": block},
        grid=(blocks, rows, 1),
        num_warps=4,
        num_stages=1,
        bytes=rows * width * (every * heads * (2 * size + 4) + blocks * weight.itemsize),
        unique_bytes=width
        * (heads * size * (read + rows * every) + 4 * every + weight.itemsize * (1 + bool(before_tokens))),
        flops=8 * rows * every * heads * width,
    )


def _body(
    x: Tensor,
    weight: Tensor,
    turns: Tensor,
    eps: float,
    before: Tensor | None,
    before_weight: Tensor | None,
    backend: str,
) -> Tensor:
    y = _fake(x, weight, turns, eps, before, before_weight, backend)
    if not (use_triton(x, backend) and {x.dtype, weight.dtype} <= POINTER.keys() and y.numel()):
        return rotary_norm_definition(x, weight, turns, eps, before, before_weight)
    x, sizes, stride = _by_tokens(x), (0, 0), 0
    if before is not None and before.shape[1]:
        before = _by_tokens(before)
        sizes, stride = (before.shape[0], before.shape[1]), before.stride(0)
        before_weight = None if before_weight is None else before_weight.contiguous()
    else:
        before = before_weight = None
    launch = rotary_launch(tuple(x.shape), sizes, (x.stride(0), stride), x.dtype, weight.dtype, eps)
    launch(x, weight.contiguous(), before, before_weight, turns.contiguous(), y)
    return y


def _by_tokens(x: Tensor) -> Tensor:
    """x with the tokens of a row one after the other."""
    return x if x.stride()[1:] == (x.shape[2] * x.shape[3], x.shape[3], 1) else x.contiguous()


def _fake(
    x: Tensor,
    weight: Tensor,
    turns: Tensor,
    eps: float,
    before: Tensor | None,
    before_weight: Tensor | None,
    backend: str,
) -> Tensor:
    rows = x.shape[0] if before is None else max(x.shape[0], before.shape[0])
    return x.new_empty(rows, turns.shape[0], *x.shape[2:])


_op = register(
    "rotary_norm(Tensor x, Tensor weight, Tensor turns, float eps, Tensor? before, Tensor? before_weight, "
    "str backend) -> Tensor",
    _body,
    _fake,
)


def rotary_norm(
    x: Tensor,
    weight: Tensor,
    turns: Tensor,
    eps: float,
    before: Tensor | None = None,
    before_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """RMS norm of every head and its turn by the token's position, in one pass and in float32.

    Args:
        x: [rows, tokens, heads, width].
        weight: [width] of the norm.
        turns: [all tokens, width / 2, 2] float32, cosine and sine of every pair.
        eps: of the norm.
        before: [rows, tokens, heads, width] that come before x's, of x's dtype, with a weight of their own. Where
            there are fewer rows of one than of the other they repeat: row r is of row r modulo their number.
        before_weight: [width], of weight's dtype.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, all tokens, heads, width] of x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend.
    """
    check_backend(backend)
    if x.ndim != 4 or x.shape[3] % 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be [rows, tokens, heads, even width] of a float dtype, got {tuple(x.shape)} {x.dtype}"
        )
    if (before is None) != (before_weight is None):
        raise ValueError("before and before_weight must be given together")
    heads, width = x.shape[2:]
    tokens = x.shape[1] + (0 if before is None else before.shape[1])
    for name, t in (("weight", weight), ("before_weight", before_weight)):
        if t is not None and (t.shape != (width,) or t.dtype != weight.dtype):
            raise ValueError(f"{name} must be [{width}] {weight.dtype}, got {tuple(t.shape)} {t.dtype}")
    if turns.shape != (tokens, width // 2, 2) or turns.dtype != torch.float32:
        raise ValueError(f"turns must be [{tokens}, {width // 2}, 2] float32, got {tuple(turns.shape)} {turns.dtype}")
    if before is not None:
        if before.ndim != 4 or before.shape[2:] != x.shape[2:] or before.dtype != x.dtype:
            raise ValueError(
                f"before must be [rows, tokens, {heads}, {width}] {x.dtype}, got {tuple(before.shape)} {before.dtype}"
            )
        check_rows("before", before.shape[0], x.shape[0])
    y: Tensor = _op(x, weight, turns, eps, before, before_weight, backend)
    return y
