"""What the library knows of GPUs: the one table that tiles, costs, inspection and predictions read.

A *target* is a string: an architecture such as "sm_86", or that with a card of it, "sm_86/28/NVIDIA GeForce RTX 3060"
(`launch.arch_of`): one architecture spans cards with 20 to 84 units. Where `cmlora doctor` has measured the card, that
takes the place of the data sheet (`cards.chip`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

BEST_SHARE = 0.8  # of the peak in the library's fastest GEMM, where no measurement of the card was found
SIZE_SHARE = 0.75  # of that at our layers' sizes: cuBLAS's 515-720 of 794 TFLOP/s, 2048 rows, H100 (triton issue 2339)
TRITON_SHARE = 0.85  # of cuBLAS: 0.86-1.0 on an A100 above 2000 rows (triton issue 6523), 0.57-0.85 on an H100 in 2023
LAUNCH_SECONDS = 4e-6  # a raw Triton launch takes the host 3-5 microseconds


@dataclass(frozen=True)
class Unit:
    """One streaming multiprocessor (NVIDIA) or compute unit (AMD) of an architecture, from the vendors' guides.

    Attributes:
        registers: that a unit's threads share, in registers per lane: per lane and scheduler times schedulers.
        step: granularity of a warp's allocation, in registers per lane.
        warps, blocks: most of either that reside at once.
        schedulers: warp schedulers; a warp stays on one.
        shared: bytes of shared memory; `reserved` of it per block.
        block_shared: bytes of shared memory that one block may use.
    """

    registers: int
    step: int
    warps: int
    blocks: int
    schedulers: int
    shared: int
    reserved: int
    block_shared: int


UNITS = {
    # CUDA programming guide, compute capabilities: 64 K registers = 2048 per lane; 1 KB of each block is the system's
    "sm_80": Unit(2048, 8, 64, 32, 4, 167_936, 1024, 166_912),
    "sm_86": Unit(2048, 8, 48, 16, 4, 102_400, 1024, 101_376),
    "sm_89": Unit(2048, 8, 48, 24, 4, 102_400, 1024, 101_376),
    "sm_90": Unit(2048, 8, 64, 32, 4, 233_472, 1024, 232_448),
    "sm_100": Unit(2048, 8, 64, 32, 4, 233_472, 1024, 232_448),
    "sm_120": Unit(2048, 8, 48, 24, 4, 102_400, 1024, 101_376),
    "gfx90a": Unit(4 * 512, 8, 32, 32, 4, 65_536, 0, 65_536),  # CDNA2 ISA guide: 512 per SIMD lane, 8 waves a SIMD
    "gfx942": Unit(4 * 512, 8, 32, 32, 4, 65_536, 0, 65_536),  # CDNA3 ISA guide: as CDNA2
    "gfx1100": Unit(2 * 1536, 24, 32, 32, 2, 65_536, 0, 65_536),  # RDNA3 ISA guide: 1536 at wave32, 16 waves a SIMD
    "gfx1201": Unit(2 * 1536, 24, 32, 32, 2, 65_536, 0, 65_536),  # RDNA4 ISA guide: as RDNA3
}
TARGETS = tuple(UNITS)
"""Architectures that are tuned, inspected and predicted for."""


class Card(NamedTuple):
    """A card's data sheet: its name as the driver gives it, units, dense peaks with fp32 accumulation, bytes a second.

    GeForce cards reach half of the advertised fp16 peak where products are summed in fp32, which is what models need.
    `best` is no data sheet's: what others measured of the fp16 peak in the library's fastest large GEMM.
    """

    name: str
    units: int
    half_flops: float
    tf32_flops: float  # fp32 matrices on CDNA; on RDNA, which multiplies no fp32 matrices, half precision
    bandwidth: float
    best: float = BEST_SHARE


MAMF = "github.com/stas00/ml-engineering, Maximum Achievable Matmul FLOPS, BF16"
BEST_FROM = {  # where `best` was measured; a card that is not in here has BEST_SHARE
    "NVIDIA A100-SXM4-80GB": MAMF,
    "NVIDIA A100-SXM4-40GB": f"{MAMF}, of the 80 GB card",
    "NVIDIA A100 80GB PCIe": MAMF,
    "NVIDIA GeForce RTX 3060": "as the RTX 3090",
    "NVIDIA GeForce RTX 3070": "as the RTX 3090",
    "NVIDIA GeForce RTX 3080": "as the RTX 3090",
    "NVIDIA GeForce RTX 3090": "torch, 66 of 80 TFLOP/s on a 3090 Ti (github.com/bewantbe/busy-gemm-benchmark)",
    "NVIDIA GeForce RTX 4060": "as the RTX 4090",
    "NVIDIA GeForce RTX 4070": "as the RTX 4090",
    "NVIDIA GeForce RTX 4080": "as the RTX 4090",
    "NVIDIA GeForce RTX 4090": "163.5 TFLOP/s at 8192 cubed (github.com/xytpai/gpuk), torch 165 (tinygrad pull 13623)",
    "NVIDIA L4": "a guess: capped at 72 W; the T4, capped at 70 W, reached 0.37 (forums.developer.nvidia.com 264462)",
    "NVIDIA H100 80GB HBM3": MAMF,
    "NVIDIA H200": f"{MAMF}, as the H100",
    "NVIDIA B200": MAMF,
    "NVIDIA GeForce RTX 5070": "as the RTX 5090",
    "NVIDIA GeForce RTX 5080": "as the RTX 5090",
    "NVIDIA GeForce RTX 5090": "torch, 224 TFLOP/s at a higher clock (main-horse.github.io/posts/5090-mm-perf)",
    "AMD Instinct MI300X": f"{MAMF}, tuned",
}

# The first card of an architecture stands for it where no card is named.
CARDS: dict[str, tuple[Card, ...]] = {
    "sm_80": (  # NVIDIA A100 datasheet
        Card("NVIDIA A100-SXM4-80GB", 108, 312e12, 156e12, 2.039e12, 0.87),
        Card("NVIDIA A100 80GB PCIe", 108, 312e12, 156e12, 1.935e12, 0.81),
        Card("NVIDIA A100-SXM4-40GB", 108, 312e12, 156e12, 1.555e12, 0.87),
    ),
    "sm_86": (  # NVIDIA Ampere GA102 whitepaper, fp32 accumulate; smaller ones by units and clock
        Card("NVIDIA GeForce RTX 3060", 28, 25.5e12, 12.7e12, 0.360e12, 0.83),
        Card("NVIDIA GeForce RTX 3070", 46, 40.6e12, 20.3e12, 0.448e12, 0.83),
        Card("NVIDIA GeForce RTX 3080", 68, 59.5e12, 29.8e12, 0.760e12, 0.83),
        Card("NVIDIA GeForce RTX 3090", 82, 71.0e12, 35.6e12, 0.936e12, 0.83),
        Card("NVIDIA A10", 72, 125e12, 62.5e12, 0.600e12),
        Card("NVIDIA RTX A6000", 84, 154.8e12, 77.4e12, 0.768e12),
    ),
    "sm_89": (  # NVIDIA Ada whitepaper, fp32 accumulate; L4 and L40S datasheets
        Card("NVIDIA GeForce RTX 4090", 128, 165.2e12, 82.6e12, 1.008e12, 0.99),
        Card("NVIDIA GeForce RTX 4060", 24, 30.2e12, 15.1e12, 0.272e12, 0.99),
        Card("NVIDIA GeForce RTX 4070", 46, 58.3e12, 29.1e12, 0.504e12, 0.99),
        Card("NVIDIA GeForce RTX 4080", 76, 97.5e12, 48.7e12, 0.717e12, 0.99),
        Card("NVIDIA L4", 58, 121e12, 60e12, 0.300e12, 0.5),
        Card("NVIDIA L40S", 142, 362e12, 183e12, 0.864e12),
    ),
    "sm_90": (  # NVIDIA H100 and H200 datasheets
        Card("NVIDIA H100 80GB HBM3", 132, 989e12, 494e12, 3.35e12, 0.8),
        Card("NVIDIA H100 PCIe", 114, 756e12, 378e12, 2.0e12),
        Card("NVIDIA H200", 132, 989e12, 494e12, 4.8e12, 0.8),
    ),
    "sm_100": (Card("NVIDIA B200", 148, 2250e12, 1125e12, 8.0e12, 0.78),),
    "sm_120": (  # NVIDIA RTX Blackwell whitepaper, fp32 accumulate
        Card("NVIDIA GeForce RTX 5090", 170, 209.5e12, 104.8e12, 1.792e12, 1.0),
        Card("NVIDIA GeForce RTX 5070", 48, 61.7e12, 30.9e12, 0.672e12, 1.0),
        Card("NVIDIA GeForce RTX 5080", 84, 112.6e12, 56.3e12, 0.960e12, 1.0),
    ),
    "gfx90a": (  # AMD Instinct MI200 datasheet; a device is one of the MI250X's two dies
        Card("AMD Instinct MI250X", 110, 191.5e12, 47.9e12, 1.638e12),
        Card("AMD Instinct MI210", 104, 181e12, 45.3e12, 1.638e12),
    ),
    "gfx942": (Card("AMD Instinct MI300X", 304, 1307e12, 163e12, 5.3e12, 0.51),),
    "gfx1100": (Card("AMD Radeon RX 7900 XTX", 96, 123e12, 123e12, 0.96e12),),
    "gfx1201": (Card("AMD Radeon RX 9070 XT", 64, 195e12, 195e12, 0.64e12),),
}


@dataclass(frozen=True)
class Chip:
    """What tiles and costs need to know of a target.

    Attributes:
        name: of the card that the figures are of, or were scaled from.
        shared: bytes of shared memory that one block may use.
        units: streaming multiprocessors or compute units.
        half_flops: fp16 and bf16 matrix peak per second with fp32 accumulation, dense.
        float_flops: the peak at fp32 accuracy: TF32 / 3 (tf32x3), fp32 matrices on CDNA, bf16 / 6 on RDNA.
        bandwidth: bytes per second.
        half_share, float_share: of these peaks in cuBLAS and its like.
        triton_share: of the library's speed in our GEMMs.
        launch_seconds: of the host, per launch.
        measured: whether the last five are `cmlora doctor`'s, else they are assumed.
    """

    name: str
    shared: int
    units: int
    half_flops: float
    float_flops: float
    bandwidth: float
    half_share: float = SIZE_SHARE * BEST_SHARE
    float_share: float = SIZE_SHARE * BEST_SHARE
    triton_share: float = TRITON_SHARE
    launch_seconds: float = LAUNCH_SECONDS
    measured: bool = False

    def peak(self, itemsize: int) -> float:
        """Flops per second of numbers of so many bytes, by the data sheet."""
        return self.half_flops if itemsize == 2 else self.float_flops

    def library(self, itemsize: int) -> float:
        """Flops per second that cuBLAS and its like reach."""
        return self.peak(itemsize) * (self.half_share if itemsize == 2 else self.float_share)


def arch_part(target: str) -> str:
    """The architecture of a target: "sm_86" of "sm_86/28/NVIDIA GeForce RTX 3060"."""
    return target.partition("/")[0]


def split(target: str) -> tuple[str, int, str]:
    """Architecture, units and card name; 0 and "" where the target names none."""
    arch, units, name = (*target.split("/", 2), "", "")[:3]
    return arch, int(units or 0), name


def has_kernels(target: str) -> bool:
    """Whether there are kernels for a target.

    On sm_75 and older triton (since 3.3) has no matrix instructions, and tiles spill kilobytes: the definitions run.
    """
    arch = arch_part(target)
    return not arch.startswith("sm_") or int(arch.removeprefix("sm_")) >= 80


@functools.lru_cache(maxsize=256)
def family(target: str) -> str:
    """Whose matrix units work alike: "wgmma" (sm_90, sm_100), "mma" (other CUDA), "mfma" (CDNA), "wmma" (RDNA)."""
    arch = arch_part(target)
    if arch.startswith("sm_"):
        return "wgmma" if int(arch.removeprefix("sm_")) // 10 in (9, 10) else "mma"
    return "mfma" if arch.startswith("gfx9") else "wmma"


def listed(arch: str) -> str:
    """The architecture of the table that stands for another one: one of its kind, the smallest in memory."""
    if arch in UNITS:
        return arch
    if arch.startswith("sm_"):
        major = int(arch.removeprefix("sm_")) // 10
        return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86" if major < 12 else "sm_120")
    return "gfx942" if arch.startswith("gfx9") else "gfx1201" if arch.startswith("gfx12") else "gfx1100"


def data_sheet(arch: str, units: int = 0, name: str = "") -> Chip:
    """The figures of an architecture, or of a card of it, by the table.

    A card that is not listed has those of the listed card with the nearest number of units, scaled by it; of the share
    that libraries reach of its peak nothing is known.
    """
    arch = listed(arch)
    cards = CARDS[arch]
    same = [card for card in cards if card.name == name]
    nearest = min(cards, key=lambda card: abs(card.units - units)) if units else cards[0]
    card = same[0] if same else nearest
    exact = {"mfma": 1, "mma": 3, "wgmma": 3, "wmma": 6}[family(arch)]  # products per product at fp32 accuracy
    found = Chip(
        name=card.name,
        shared=UNITS[arch].block_shared,
        units=card.units,
        half_flops=card.half_flops,
        float_flops=card.tf32_flops / exact,
        bandwidth=card.bandwidth,
        half_share=SIZE_SHARE * (card.best if same or not units else BEST_SHARE),
    )
    if same or not units or units == card.units:
        return found
    scale = units / card.units
    return replace(
        found,
        units=units,
        half_flops=found.half_flops * scale,
        float_flops=found.float_flops * scale,
        bandwidth=found.bandwidth * scale,
    )
