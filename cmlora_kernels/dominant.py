"""Which adapter dominates the next step, chosen on the device from the latents' spectrum (CMLoRA, arXiv 2502.04923)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import Launch
from cmlora_kernels.radial import bin_scales, padded
from cmlora_kernels.spectrum import check_image, finish_launch, fits, partial_sums, share_definition
from cmlora_kernels.triton_shim import tl, triton


@triton.jit
def select_kernel(
    share_ptr, dominant_ptr, weights_ptr, gate, early, late, dominant_weight, other_weight, rows, adapters,
    BLOCK_ROWS: tl.constexpr, BLOCK_ADAPTERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    share = tl.load(share_ptr + row, row < rows, 0.0)
    chosen = tl.where(share >= gate, early, late).to(tl.int64)  # [BLOCK_ROWS]; NaN compares false: late
    tl.store(dominant_ptr + row, chosen, row < rows)
    adapter = tl.arange(0, BLOCK_ADAPTERS)[:, None]
    weight = tl.where(adapter == chosen[None, :], dominant_weight, other_weight)  # [BLOCK_ADAPTERS, BLOCK_ROWS]
    tl.store(weights_ptr + adapter * rows + row[None, :], weight, (adapter < adapters) & (row[None, :] < rows))


def select_definition(
    share: Tensor, gate: float, early: int, late: int, adapters: int, dominant_weight: float, other_weight: float
) -> tuple[Tensor, Tensor]:
    """`select_dominant` in plain torch."""
    dominant = torch.where(share >= gate, early, late)
    is_dominant = torch.arange(adapters, device=share.device).unsqueeze(1) == dominant
    return dominant, torch.where(is_dominant, dominant_weight, other_weight)


@functools.lru_cache(maxsize=256)
def select_launch(
    rows: int, gate: float, early: int, late: int, adapters: int, dominant_weight: float, other_weight: float
) -> Launch:
    """The launch of `select_kernel`."""
    block_rows = min(128, padded(rows))
    return Launch(
        kernel=select_kernel,
        name=f"select {rows} rows of {adapters}",
        tensors={"share_ptr": "*fp32", "dominant_ptr": "*i64", "weights_ptr": "*fp32"},
        # early and late travel as floats: Triton compiles anew for the integers 0 and 1, and they change every step
        scalars={
            "gate": float(gate),
            "early": float(early),
            "late": float(late),
            "dominant_weight": float(dominant_weight),
            "other_weight": float(other_weight),
            "rows": rows,
            "adapters": adapters,
        },
        constexprs={"BLOCK_ROWS": block_rows, "BLOCK_ADAPTERS": padded(adapters, 8)},
        grid=(-(-rows // block_rows), 1, 1),
        num_warps=1,
        num_stages=1,
        bytes=rows * (4 + 8 + 4 * adapters),
        unique_bytes=rows * (4 + 8 + 4 * adapters),
        flops=0,
    )


def _select_body(
    share: Tensor,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not (use_triton(share, backend) and share.numel()):
        return select_definition(share, gate, early, late, adapters, dominant_weight, other_weight)
    dominant, weights = _empty(share, share.shape[0], adapters)
    launch = select_launch(share.shape[0], gate, early, late, adapters, dominant_weight, other_weight)
    launch(share.contiguous(), dominant, weights)
    return dominant, weights


def _select_fake(
    share: Tensor,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty(share, share.shape[0], adapters)


def _latents_body(
    x: Tensor,
    cutoff: float,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    choice = (gate, early, late, adapters, dominant_weight, other_weight)
    if not (use_triton(x, backend) and fits(x)):
        share = share_definition(x, cutoff)
        return *select_definition(share, *choice), share
    rows, _, height, width = x.shape
    partial = partial_sums(x, True)
    dominant, weights, share = *_empty(x, rows, adapters), x.new_empty((rows,), dtype=torch.float32)
    launch = finish_launch(rows, height, width, partial.shape[1], cutoff, choice)
    launch(partial, bin_scales(height, width, partial.shape[2], x.device), None, share, dominant, weights)
    return dominant, weights, share


def _latents_fake(
    x: Tensor,
    cutoff: float,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty(x, x.shape[0], adapters), x.new_empty((x.shape[0],), dtype=torch.float32)


def _empty(like: Tensor, rows: int, adapters: int) -> tuple[Tensor, Tensor]:
    return like.new_empty((rows,), dtype=torch.int64), like.new_empty((adapters, rows), dtype=torch.float32)


_select = register(
    "select_dominant(Tensor share, float gate, int early, int late, int adapters, float dominant_weight, "
    "float other_weight, str backend) -> (Tensor, Tensor)",
    _select_body,
    _select_fake,
)
_latents = register(
    "dominant_from_latents(Tensor x, float cutoff, float gate, int early, int late, int adapters, "
    "float dominant_weight, float other_weight, str backend) -> (Tensor, Tensor, Tensor)",
    _latents_body,
    _latents_fake,
)


def select_dominant(
    share: Tensor,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Dominant adapter and weights per row, chosen on the device.

    Args:
        share: [rows] float32, from `high_frequency_share`; NaN counts as below the gate.
        gate: a row is in the early stage while share >= gate.
        early, late: the adapter that dominates in either stage.
        adapters: their number.
        dominant_weight, other_weight: what the weights are made of.

    Returns:
        dominant [rows] int64 and weights [adapters, rows] float32.

    Raises:
        ValueError: share of another rank, early or late out of range, or an unknown backend.
    """
    check_backend(backend)
    if share.ndim != 1:
        raise ValueError(f"share must be [rows], got {tuple(share.shape)}")
    _check_choice(early, late, adapters)
    dominant, weights = _select(share, gate, early, late, adapters, dominant_weight, other_weight, backend)
    return dominant, weights


def dominant_from_latents(
    x: Tensor,
    cutoff: float,
    gate: float,
    early: int,
    late: int,
    adapters: int,
    dominant_weight: float,
    other_weight: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`high_frequency_share` and `select_dominant` as one op: a launch and an op call less per step.

    Args:
        x: [rows, channels, height, width]; the others as in those two.

    Returns:
        dominant [rows] int64, weights [adapters, rows] float32, share [rows] float32.

    Raises:
        ValueError: x of another rank, cutoff, early or late out of range, or an unknown backend.
    """
    check_image(x, backend, cutoff)
    _check_choice(early, late, adapters)
    dominant, weights, share = _latents(x, cutoff, gate, early, late, adapters, dominant_weight, other_weight, backend)
    return dominant, weights, share


def _check_choice(early: int, late: int, adapters: int) -> None:
    for name, slot in (("early", early), ("late", late)):
        if not 0 <= slot < adapters:
            raise ValueError(f"{name} must be in [0, {adapters}), got {slot}")
