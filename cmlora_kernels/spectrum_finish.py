"""What is made of a spectrum's partial sums: profile, high-frequency share, and which adapter dominates."""

from __future__ import annotations

import functools
import math

from cmlora_kernels.launch import Launch
from cmlora_kernels.radial import number_of_bins, padded
from cmlora_kernels.triton_shim import tl, triton


@triton.jit
def finish_kernel(
    partial_ptr,  # [rows, parts, BLOCK_BINS]
    scale_ptr,  # [BLOCK_BINS]
    profile_ptr,  # [rows, bins] or None
    share_ptr,  # [rows] or None
    dominant_ptr,  # [rows] or None
    weights_ptr,  # [adapters, rows] or None
    gate,
    early,
    late,
    dominant_weight,
    other_weight,
    parts,
    bins,
    first_high,
    adapters,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_ADAPTERS: tl.constexpr,
):
    """One row's partial sums -> profile, high-frequency share, dominant adapter and weights, whichever is asked for."""
    row = tl.program_id(0).to(tl.int64)
    bin = tl.arange(0, BLOCK_BINS)
    profile = tl.zeros((BLOCK_BINS,), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        sums = tl.load(partial_ptr + (row * parts + part) * BLOCK_BINS + bin[None, :], part < parts, 0.0)
        profile += tl.sum(sums, 0)
    profile *= tl.load(scale_ptr + bin)
    profile /= tl.max(profile, 0)
    if profile_ptr is not None:
        tl.store(profile_ptr + row * bins + bin, profile, bin < bins)
    if share_ptr is not None:
        high = (bin >= first_high) & (bin < bins)
        share = tl.sum(tl.where(high, profile, 0.0), 0) / (bins - first_high)
        tl.store(share_ptr + row, share)
        if dominant_ptr is not None:
            chosen = tl.where(share >= gate, early, late).to(tl.int64)
            tl.store(dominant_ptr + row, chosen)
            adapter = tl.arange(0, BLOCK_ADAPTERS)
            weight = tl.where(adapter == chosen, dominant_weight, other_weight)
            tl.store(weights_ptr + adapter * tl.num_programs(0) + row, weight, adapter < adapters)


def first_high_bin(bins: int, cutoff: float) -> int:
    """The first bin beyond `cutoff` times the largest radius; the last bin is always beyond it."""
    return min(math.floor(cutoff * (bins - 1)) + 1, bins - 1)


@functools.lru_cache(maxsize=256)
def finish_launch(
    rows: int,
    height: int,
    width: int,
    parts: int,
    cutoff: float | None,
    choice: tuple[float, int, int, int, float, float] | None,
) -> Launch:
    """The launch of `finish_kernel`: profile (no cutoff), share (cutoff), or share and choice of the dominant adapter.

    `choice` is (gate, early, late, adapters, dominant_weight, other_weight).
    """
    bins = number_of_bins(height, width)
    block_bins = padded(bins)
    gate, early, late, adapters, dominant_weight, other_weight = choice or (0.0, 0, 0, 1, 0.0, 0.0)
    out = 4 * rows * (bins if cutoff is None else 1) + (rows * (8 + 4 * adapters) if choice else 0)
    return Launch(
        kernel=finish_kernel,
        name=f"spectrum finish {rows}x{parts}x{bins}",
        tensors={
            "partial_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "profile_ptr": "*fp32" if cutoff is None else None,
            "share_ptr": None if cutoff is None else "*fp32",
            "dominant_ptr": "*i64" if choice else None,
            "weights_ptr": "*fp32" if choice else None,
        },
        # early and late travel as floats: Triton compiles anew for the integers 0 and 1, and they change every step
        scalars={
            "gate": float(gate),
            "early": float(early),
            "late": float(late),
            "dominant_weight": float(dominant_weight),
            "other_weight": float(other_weight),
            "parts": parts,
            "bins": bins,
            "first_high": 0 if cutoff is None else first_high_bin(bins, cutoff),
            "adapters": adapters,
        },
        constexprs={"BLOCK_PARTS": 16, "BLOCK_BINS": block_bins, "BLOCK_ADAPTERS": padded(adapters, 8)},
        grid=(rows, 1, 1),
        num_warps=1,
        num_stages=1,
        bytes=rows * (parts + 1) * block_bins * 4 + out,
        unique_bytes=(rows * parts + 1) * block_bins * 4 + out,
        flops=rows * bins * (parts + 3),
    )
