"""Block sizes: shape, dtype, target -> frozen tile. Pure functions; the only home of block sizes.

Nothing is tuned at run time: a tile is the same on every run, so results are too, and every variant can be compiled
and inspected without a GPU. Each threshold says its reason; csrc_docs/multi_lora.md has the compiled figures.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RANK_BUCKETS = (16, 32, 64, 128)  # 16 is the least K of an fp16 dot; above, powers of two


class Problem(NamedTuple):
    """Sizes of one multi-LoRA linear layer; a plain tuple, since every call makes one as a cache key.

    `outer` spans all parts; `adapters` is the number of slots; `rank` is one part's; `weights` counts the token weights
    that multiply the columns of x A^T, 0 without.
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


@dataclass(frozen=True)
class Chip:
    """What tiles and costs need to know of a target. Peaks are dense, from the vendors' data sheets.

    Attributes:
        shared: bytes of shared memory that one block may use.
        units: streaming multiprocessors or compute units.
        half_flops: fp16 and bf16 tensor-core peak per second.
        float_flops: the peak at fp32 accuracy: TF32 / 3 (tf32x3), fp32 matrices on CDNA, bf16 / 6 on RDNA.
        bandwidth: bytes per second.
    """

    shared: int
    units: int
    half_flops: float
    float_flops: float
    bandwidth: float


CHIPS = {
    "sm_80": Chip(166_912, 108, 312e12, 156e12 / 3, 2.04e12),  # A100 80 GB SXM
    "sm_90": Chip(232_448, 132, 989e12, 494e12 / 3, 3.35e12),  # H100 SXM
    "sm_100": Chip(232_448, 148, 2250e12, 1125e12 / 3, 8.0e12),  # B200
    "gfx942": Chip(65_536, 304, 1307e12, 163e12, 5.3e12),  # MI300X
    "gfx1100": Chip(65_536, 96, 123e12, 123e12 / 6, 0.96e12),  # RX 7900 XTX
}
_SMALL_CUDA = Chip(101_376, 82, 142e12, 71e12 / 3, 0.94e12)  # sm_86, sm_89, sm_120: 99 KB a block; RTX 3090's peaks
_OLD_CUDA = Chip(65_536, 72, 130e12, 16e12, 0.67e12)  # sm_75 and older: no kernels of ours (`has_kernels`)


def chip(arch: str) -> Chip:
    """The chip of a target; one that is not listed is taken for the smallest of its family."""
    if arch in CHIPS:
        return CHIPS[arch]
    if arch.startswith("sm_"):
        major = int(arch.removeprefix("sm_")) // 10
        return _OLD_CUDA if major < 8 else _SMALL_CUDA
    return CHIPS["gfx942"] if arch.startswith("gfx9") else CHIPS["gfx1100"]


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
    if arch.startswith("sm_"):
        return "tf32x3"
    return "ieee" if arch.startswith("gfx9") else "bf16x6"  # CDNA multiplies fp32 matrices; RDNA has bf16 only


def family(arch: str) -> str:
    """Whose matrix units work alike: "wgmma" (sm_90, sm_100), "mma" (other CUDA), "mfma" (CDNA), "wmma" (RDNA)."""
    if arch.startswith("sm_"):
        return "wgmma" if int(arch.removeprefix("sm_")) // 10 in (9, 10) else "mma"
    return "mfma" if arch.startswith("gfx9") else "wmma"


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


def has_kernels(arch: str) -> bool:
    """Whether there are kernels for a target.

    On sm_75 and older triton (since 3.3) has no matrix instructions, and tiles spill kilobytes: the definitions run.
    """
    return not arch.startswith("sm_") or int(arch.removeprefix("sm_")) >= 80


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
    per_stage = (block_m + rank) * block_k * size
    stages = _stages(arch, per_stage, (block_m + 64) * rank * size)
    # Four warps spill at rank 32 on sm_100, where accumulators come back from tensor memory all at once; at 16 tokens
    # eight would copy x 8 bytes at a time.
    wide = rank * size >= 256 or (arch == "sm_100" and rank > 16)
    warps = 8 if wide and block_m > 16 else 4
    if family(arch) == "mfma" and rank * size == 512:
        stages = 1  # a second tile spills
    block_n = 32 if family(arch) == "wmma" and size == 4 else 64
    if arch == "sm_100" and rank == 16 and size == 2 and p.outer // p.parts >= 128:
        block_n = 128  # 64 spills in the convolution
    return Tile(block_m, block_n, block_k, warps, stages)


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


def _stages(arch: str, per_stage: int, after: int) -> int:
    """Tiles of the K loop in flight.

    CUDA: 3 of the widest fill half of an H100 unit's shared memory, so two blocks share it and one's end hides under
    the other's loop. CDNA: 2, one in registers and one in LDS. RDNA: 1, registers are what it lacks.
    """
    kind, limit = family(arch), chip(arch).shared
    if kind == "mfma":
        return 2 if max(per_stage, after) <= limit else 1
    return next((n for n in (3, 2) if kind != "wmma" and n * per_stage + after <= limit), 1)


def _pow2(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, within [least, most]."""
    return min(most, max(least, 1 << (size - 1).bit_length()))


# The cost model: seconds of a layer per strategy, from counts and these constants. They are predictions until
# benchmarks/bench_multi_lora.py has run on a GPU.
BLAS_SHARE = 0.6  # of the peak: cuBLAS's 515-720 of 989 TFLOP/s at 2048 rows on an H100 (triton issue 2339)
TRITON_SHARE = 0.85  # of cuBLAS: 0.86-1.0 on an A100 above 2000 rows (triton issue 6523), 0.57-0.85 on an H100 in 2023
LAUNCH_SECONDS = 4e-6  # a raw Triton launch takes the host 3-5 microseconds


@dataclass(frozen=True)
class Cost:
    """What one strategy costs for one layer: `seconds` is predicted; bytes, flops and launches are counted.

    Attributes:
        strategy: "fused" (base GEMM and update in one kernel), "add" (cuBLAS, then y += update), "merged" (W + dW), or
            "definition" (cuBLAS and two batched GEMMs) for dtypes that no kernel serves. What a rank
            has beyond one chunk is added by further launches.
        memory: bytes that the strategy keeps beside the model and the adapters.
    """

    strategy: str
    seconds: float
    bytes: int
    flops: int
    launches: int
    memory: int = 0


@functools.lru_cache(maxsize=4096)
def costs(p: Problem, arch: str) -> tuple[Cost, ...]:
    """The strategies that can serve a layer, cheapest first."""
    size, m = p.dtype.itemsize, p.rows * p.tokens
    target, update = chip(arch), p.rank * (p.inner * p.parts + p.outer)
    blas = BLAS_SHARE * (target.half_flops if size == 2 else target.float_flops)
    triton = TRITON_SHARE * blas
    base_flops, weight, x, y = 2 * m * p.inner * p.outer, p.inner * p.outer, m * p.inner, m * p.outer

    def cost(strategy: str, parts: list[tuple[float, int, float]], flops: int, memory: int = 0) -> Cost:
        # Every part is one launch: (padded flops, elements moved, flops per second); it waits for the slower of two.
        seconds = sum(
            max(work / speed, size * moved / target.bandwidth) + LAUNCH_SECONDS for work, moved, speed in parts
        )
        return Cost(strategy, seconds, size * sum(part[1] for part in parts), flops, len(parts), memory)

    weights = min(p.rows, p.adapters)
    merged = cost(
        "merged",
        [(_padded_flops(p._replace(rank=0, parts=1), arch, 0), x + y + weights * weight, triton)],
        base_flops,
        size * (p.adapters + 1) * weight,  # the bank holds the base weight too
    )
    if not supports(p.rank, p.dtype) or not has_kernels(arch):
        down = m * p.rank * p.parts
        shrink = (2.0 * down * p.inner, x + down + weights * update, blas)
        expand = (2.0 * m * p.rank * p.outer, down + 2 * y, blas)
        definition = cost(
            "definition", [(base_flops, x + y + weight, blas), shrink, expand], base_flops + 2 * m * update
        )
        return tuple(sorted((definition, merged), key=lambda option: option.seconds))
    chunks = [p._replace(rank=rank) for _, rank in rank_chunks(p.rank, p.dtype, arch)]
    adds = [(_add_flops(c, arch), x + 2 * y + _lora(c), triton) for c in chunks]
    inside = (_padded_flops(chunks[0], arch, rank_bucket(chunks[0].rank)), x + y + weight + _lora(chunks[0]), triton)
    flops = base_flops + 2 * m * update
    fused = cost("fused", [inside, *adds[1:]], flops)
    add = cost("add", [(base_flops, x + y + weight, blas), *adds], flops)
    return tuple(sorted((fused, add, merged), key=lambda option: option.seconds))


def _lora(p: Problem) -> int:
    """Elements of A and B that the rows name, and the token weights, counted in elements of x."""
    token_weights = 4 * p.rows * p.tokens * p.weights // p.dtype.itemsize
    return min(p.rows, p.adapters) * p.rank * (p.inner * p.parts + p.outer) + token_weights


def _add_flops(p: Problem, arch: str) -> int:
    """As `_padded_flops`, of the update added in place."""
    block_m = add_tile(p, arch).block_m
    return 2 * p.rows * cdiv(p.tokens, block_m) * block_m * rank_bucket(p.rank) * (p.inner * p.parts + p.outer)


@functools.lru_cache(maxsize=4096)
def choose(p: Problem, arch: str, budget: int = 0) -> Cost:
    """The cheapest strategy that keeps at most `budget` bytes."""
    return next(option for option in costs(p, arch) if option.memory <= budget)


def _padded_flops(p: Problem, arch: str, rank: int) -> int:
    """What the tensor cores really do: whole tiles, and a shrink in every tile along n."""
    tile, out = linear_tile(p, arch), p.outer // p.parts
    tokens = cdiv(p.tokens, tile.block_m) * tile.block_m
    columns = p.parts * cdiv(out, tile.block_n) * (tile.block_n + rank)
    return 2 * p.rows * tokens * (p.inner * columns + rank * p.outer)
