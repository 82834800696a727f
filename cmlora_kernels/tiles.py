"""Block sizes: shape, dtype, target -> frozen tile. Pure functions; the only home of block sizes.

Nothing is tuned at run time: a tile is the same on every run, so results are too, and every variant can be compiled
and inspected without a GPU. Each threshold says its reason; csrc_docs/multi_lora.md has the compiled figures.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cmlora_kernels.cards import chip
from cmlora_kernels.chips import arch_part, family

RANK_BUCKETS = (16, 32, 64, 128)  # 16 is the least K of an fp16 dot; above, powers of two


class Problem(NamedTuple):
    """Sizes of one multi-LoRA linear layer; a plain tuple, since every call makes one as a cache key.

    `outer` spans all parts; `adapters` is the number of slots; `rank` is one part's; `weights` counts the token weights
    that multiply the columns of x A^T, 0 without. `gated`: the output's halves are value and gate of a GEGLU, and
    what it makes of them is written.
    """

    rows: int
    tokens: int
    inner: int
    outer: int
    rank: int
    parts: int
    adapters: int
    dtype: torch.dtype
    bias: bool
    weights: int = 0
    gated: bool = False

    @property
    def written(self) -> int:
        """Columns of the layer's answer."""
        return self.outer // 2 if self.gated else self.outer

    @staticmethod
    def of(
        x: Tensor, slots: Tensor, b: Tensor, scales: Tensor, bias: bool, token_weights: Tensor | None = None
    ) -> Problem:
        """The problem that these tensors pose; shapes as in `multi_lora_linear`."""
        (rows, tokens, inner), (adapters, outer, rank) = x.shape, b.shape
        weights = 0 if token_weights is None else token_weights.shape[1]
        return Problem(rows, tokens, inner, outer, rank, scales.shape[1], adapters, x.dtype, bias, weights)

    def describe(self) -> str:
        """For tables: "10x4096x320->960/3 r16 float16"."""
        parts = f"/{self.parts}" if self.parts > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.") + (f" weights {self.weights}" if self.weights else "")
        dtype += " gated" if self.gated else ""
        return f"{self.rows}x{self.tokens}x{self.inner}->{self.outer}{parts} r{self.rank} {dtype}"


@dataclass(frozen=True)
class Tile:
    """Block sizes of one launch; `group` m tiles share their walk over n."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8

    def blocks(self) -> dict[str, int]:
        """The kernel's constexprs BLOCK_M, BLOCK_N and BLOCK_K."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def rank_bucket(rank: int) -> int:
    """The padded rank of one chunk."""
    return next(bucket for bucket in RANK_BUCKETS if rank <= bucket)


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """tl.dot's input_precision: fp32 must stay fp32-accurate, and use matrix units where a target lets it."""
    if dtype != torch.float32:
        return "ieee"
    kind = family(arch)  # CDNA multiplies fp32 matrices; RDNA has bf16 only
    return {"mfma": "ieee", "wmma": "bf16x6"}.get(kind, "tf32x3")


# (family, 16-bit?) -> rank bucket -> largest (block_m, block_n, block_k, warps) without a spill (compiled, Triton 3.9).
# block_k is 128 bytes of x, a whole cache line, where registers allow it. At rank 16 four warps, not eight: a thread
# then copies 16 bytes of A at a time. mma.sync keeps all operands in registers, so its tiles are the smaller ones; on
# wmma every fp32 number is three bf16 ones (bf16x6), and no tile holds rank 64.
_LINEAR: dict[tuple[str, bool], dict[int, tuple[int, int, int, int]]] = {
    ("mma", True): {16: (64, 128, 64, 4), 32: (128, 128, 64, 8), 64: (128, 128, 64, 8), 128: (64, 64, 64, 8)},
    ("mma", False): {16: (32, 64, 32, 4), 32: (32, 64, 16, 4), 64: (32, 64, 32, 4), 128: (32, 64, 32, 8)},
    ("wgmma", True): {16: (128, 128, 64, 4), 32: (128, 128, 64, 8), 64: (128, 128, 64, 8), 128: (128, 64, 64, 8)},
    ("wgmma", False): {16: (64, 64, 32, 4), 32: (64, 64, 32, 4), 64: (64, 64, 32, 4), 128: (64, 64, 32, 8)},
    ("mfma", True): {16: (128, 128, 64, 4), 32: (128, 128, 64, 8), 64: (128, 128, 64, 8), 128: (128, 64, 64, 8)},
    ("mfma", False): {16: (64, 64, 32, 4), 32: (64, 64, 32, 4), 64: (64, 64, 32, 4), 128: (64, 64, 32, 8)},
    ("wmma", True): {16: (128, 128, 32, 8), 32: (128, 128, 32, 8), 64: (64, 128, 32, 8), 128: (64, 64, 32, 8)},
    ("wmma", False): {16: (32, 64, 16, 4), 32: (32, 64, 16, 4)},
}


def supports(rank: int, dtype: torch.dtype) -> bool:
    """Whether the kernels serve this rank and dtype; what they do not serve runs as its definition."""
    return rank > 0 and dtype in (torch.float16, torch.bfloat16, torch.float32)


@functools.lru_cache(maxsize=4096)
def rank_chunks(rank: int, dtype: torch.dtype, arch: str) -> tuple[tuple[int, int], ...]:
    """First rank and ranks of each launch: a wider update costs more than half of a 128-wide tile, or spills.

    The widest tiles first, so that only the last chunk is padded.
    """
    widest = max(_LINEAR[family(arch), dtype.itemsize == 2])
    return tuple((first, min(widest, rank - first)) for first in range(0, rank, widest))


@functools.lru_cache(maxsize=4096)
def linear_tile(p: Problem, arch: str) -> Tile:
    """The tile of the base GEMM with the update inside, and of the merged bank's GEMM (rank 0)."""
    rank, out, size = rank_bucket(max(p.rank, 1)), p.outer // p.parts, p.dtype.itemsize
    most_m, most_n, block_k, warps = _LINEAR[family(arch), size == 2][rank]
    block_m, block_n = _pow2(p.tokens, 16, most_m), _linear_width(out, rank, most_n)
    if p.gated and rank == 16 and arch_part(arch) == "sm_100":
        block_n = min(block_n, 64)  # its accumulator comes back all at once: with the gate 128 columns spill
    # Fill the chip before reusing more: a narrower tile costs a little more x traffic, an idle unit costs all of it.
    units = chip(arch).units
    while block_n > 64 and _programs(p, block_m, block_n) < units:
        block_n //= 2
    while block_m > 64 and _programs(p, block_m, block_n) < units:
        block_m //= 2
    if 2 * block_m <= most_m:
        warps = 4  # half the accumulator is left
    elif p.rank == 0 and size == 4 and family(arch) == "wgmma":
        warps = 8  # sm_100 spills with four; there is no A to copy
    if p.gated and rank == 128 and size == 2 and family(arch) == "mma":
        block_k = 32  # 64 spill four bytes
    if arch.startswith("sm_"):
        block_k = max(block_k, 2048 // (block_m * size))  # 16 bytes of x for each of 128 threads
    per_stage = (block_m + block_n + rank) * block_k * size
    stages = _stages(arch, per_stage, (block_m + block_n) * rank * size)
    if block_m == 16 and size == 4 and family(arch) == "wgmma":
        stages = min(stages, 2)  # three spill four bytes at rank 16 (a resnet's time projection)
    return Tile(block_m, block_n, block_k, warps, stages)


@functools.lru_cache(maxsize=4096)
def add_tile(p: Problem, arch: str) -> Tile:
    """The tile of `multi_lora_add_`: block_m x rank in the shrink, block_m x block_n in the expand."""
    rank, size = rank_bucket(p.rank), p.dtype.itemsize
    block_m, block_k = _pow2(p.tokens, 16, 64 if size == 2 else 32), 64 if size == 2 else 32
    if family(arch) == "wmma":
        block_k = 32 if size == 2 else 16  # two tiles of 64 do not fit its 256 registers
    block_n = 32 if family(arch) == "wmma" and size == 4 else 64
    if arch_part(arch) == "sm_100" and rank == 16 and size == 2 and p.outer // p.parts >= 128:
        block_n = 128  # 64 spills in the convolution
    # The expand is a loop of its own, pipelined as deep: tiles of B, one more that is laid anew, and a tile of y.
    tile_b = block_n * rank * size
    stages = _stages(arch, (block_m + rank) * block_k * size, tile_b + block_m * block_n * size, tile_b)
    # Four warps spill at rank 32 on sm_100, where accumulators come back from tensor memory all at once; at 16 tokens
    # eight would copy x 8 bytes at a time.
    wide = rank * size >= 256 or (arch_part(arch) == "sm_100" and rank > 16)
    warps = 8 if wide and block_m > 16 else 4
    if family(arch) == "mfma" and rank * size == 512:
        stages = 1  # a second tile spills
    if arch_part(arch) == "sm_80" and rank == 128 and size == 2 and p.weights:
        stages = 2  # three spill four bytes in the channels-last convolution
    return Tile(block_m, block_n, block_k, warps, stages)


def gate_tile(p: Problem, arch: str) -> Tile:
    """The tile of the update that goes on to a GEGLU's gate: as `add_tile`, but of two tiles of y half as wide."""
    if arch.startswith("sm_") and p.dtype.itemsize == 4 and rank_bucket(p.rank) == 128:
        p = p._replace(tokens=min(p.tokens, 16))  # 32 tokens spill: both tiles and tf32x3's three parts of all operands
    tile = add_tile(p, arch)
    return replace(tile, block_n=max(tile.block_n // 2, 16))


def expand_piece(programs: int, out: int, block_n: int, arch: str) -> int:
    """Columns that one program expands: all of them on a full chip, fewer (at least block_n) where units would idle.

    Every piece shrinks anew and so reads x again (from L2): 8 pieces at most.
    """
    pieces = max(1, min(8, cdiv(out, block_n), chip(arch).units // max(programs, 1)))
    return cdiv(cdiv(out, pieces), block_n) * block_n


def _linear_width(out: int, rank: int, widest: int) -> int:
    """block_n: fewest tensor-core columns with each tile's shrink; within a tenth the wider, which rereads x less."""
    widths = [width for width in (128, 64, 32, 16) if width <= widest]
    columns = {width: cdiv(out, width) * (width + rank) for width in widths}
    least = min(columns.values())
    return next(width for width in widths if columns[width] <= 1.1 * least)


def _programs(p: Problem, block_m: int, block_n: int) -> int:
    return p.rows * cdiv(p.tokens, block_m) * p.parts * cdiv(p.outer // p.parts, block_n)


def _stages(arch: str, per_stage: int, after: int, per_stage_after: int = 0) -> int:
    """Tiles of the K loop in flight.

    CUDA: 3 of the widest fill half of an H100 unit's shared memory, so two blocks share it and one's end hides under
    the other's loop. CDNA: 2, one in registers and one in LDS. RDNA: 1, registers are what it lacks.
    """
    kind, limit = family(arch), chip(arch).shared
    most = {"wgmma": 3, "mma": 3, "mfma": 2, "wmma": 1}[kind]
    fitting = (n for n in range(most, 1, -1) if pipeline_bytes(kind, n, per_stage, after, per_stage_after) <= limit)
    return next(fitting, 1)


def pipeline_bytes(kind: str, stages: int, per_stage: int, after: int, per_stage_after: int = 0) -> int:
    """Shared memory of a K loop of so many stages and of what comes after it, which may be pipelined, too; at most.

    wgmma reads shared memory while later tiles arrive: a buffer per stage. Elsewhere the tile that is being multiplied
    is in registers: a buffer less, and all of them are free for what comes after the loop.
    """
    if kind == "wgmma":
        return stages * (per_stage + per_stage_after) + after
    return max((stages - 1) * per_stage, (stages - 1) * per_stage_after + after)


def _pow2(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, within [least, most]."""
    return min(most, max(least, 1 << (size - 1).bit_length()))
