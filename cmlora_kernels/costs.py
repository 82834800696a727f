"""The cost model: seconds of a multi-LoRA layer per strategy, from counts and a chip's figures, and which one runs.

They are predictions. What they hang on most is the speed of our GEMMs as a share of the library's: where
`cmlora doctor` has measured it, the cheapest strategy runs; elsewhere the one that loses least if the share lies
anywhere in `SHARES`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from cmlora_kernels.cards import chip
from cmlora_kernels.chips import has_kernels
from cmlora_kernels.tiles import Problem, add_tile, cdiv, linear_tile, rank_bucket, rank_chunks, supports

SHARES = (0.65, 0.75, 0.85, 1.0)
"""Shares that are possible where none was measured: 0.57 to 1 were, on several GPUs (triton issues 2339 and 6523)."""


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
def costs(p: Problem, target: str, share: float | None = None) -> tuple[Cost, ...]:
    """The strategies that can serve a layer, cheapest first.

    Args:
        p: the layer.
        target: "sm_90", or a card of it.
        share: speed of our GEMMs, of the library's; None: the chip's.
    """
    size, m = p.dtype.itemsize, p.rows * p.tokens
    known, update = chip(target), p.rank * (p.inner * p.parts + p.outer)
    blas = known.library(size)
    triton = (known.triton_share if share is None else share) * blas
    base_flops, weight, x, y = 2 * m * p.inner * p.outer, p.inner * p.outer, m * p.inner, m * p.outer
    z = m * p.written  # where a gate follows, the last launch writes half of y

    def cost(strategy: str, parts: list[tuple[float, int, float]], flops: int, memory: int = 0) -> Cost:
        # Every part is one launch: (padded flops, elements moved, flops per second); it waits for the slower of two.
        seconds = sum(
            max(work / speed, size * moved / known.bandwidth) + known.launch_seconds for work, moved, speed in parts
        )
        return Cost(strategy, seconds, size * sum(part[1] for part in parts), flops, len(parts), memory)

    weights = min(p.rows, p.adapters)
    merged = cost(
        "merged",
        [(_padded_flops(p._replace(rank=0, parts=1), target, 0), x + y + weights * weight, triton)],
        base_flops,
        size * (p.adapters + 1) * weight,  # the bank holds the base weight too
    )
    if not supports(p.rank, p.dtype) or not has_kernels(target):
        down = m * p.rank * p.parts
        shrink = (2.0 * down * p.inner, x + down + weights * update, blas)
        expand = (2.0 * m * p.rank * p.outer, down + 2 * y, blas)
        definition = cost(
            "definition", [(base_flops, x + y + weight, blas), shrink, expand], base_flops + 2 * m * update
        )
        return tuple(sorted((definition, merged), key=lambda option: option.seconds))
    chunks = [p._replace(rank=rank) for _, rank in rank_chunks(p.rank, p.dtype, target)]
    last = len(chunks) - 1
    adds = [(_add_flops(c, target), x + y + (y, z)[i == last] + _lora(c), triton) for i, c in enumerate(chunks)]
    work, made = _padded_flops(chunks[0], target, rank_bucket(chunks[0].rank)), y if last else z
    inside = (work, x + made + weight + _lora(chunks[0]), triton)
    flops = base_flops + 2 * m * update
    fused = cost("fused", [inside, *adds[1:]], flops)
    add = cost("add", [(base_flops, x + y + weight, blas), *adds], flops)
    return tuple(sorted((fused, add, merged), key=lambda option: option.seconds))


@functools.lru_cache(maxsize=4096)
def choose(p: Problem, target: str, budget: int = 0) -> Cost:
    """The strategy that runs, of those that keep at most `budget` bytes: the cheapest, by what was measured.

    Where nothing was, that whose loss against the best one is the least in the worst case of `SHARES`.
    """
    options = without_memory(costs(p, target), budget)
    if len(options) == 1 or chip(target).measured:
        return options[0]
    return min(options, key=lambda option: _worst_loss(p, target, budget, option.strategy))


def without_memory(options: Sequence[Cost], budget: int = 0) -> list[Cost]:
    """Those that keep at most `budget` bytes."""
    return [option for option in options if option.memory <= budget]


def _worst_loss(p: Problem, target: str, budget: int, strategy: str) -> float:
    """How many times the best one's seconds a strategy takes, at most."""
    losses = []
    for share in SHARES:
        seconds = {option.strategy: option.seconds for option in without_memory(costs(p, target, share), budget)}
        losses.append(seconds[strategy] / min(seconds.values()))
    return max(losses)


def _lora(p: Problem) -> int:
    """Elements of A and B that the rows name, and the token weights, counted in elements of x."""
    token_weights = 4 * p.rows * p.tokens * p.weights // p.dtype.itemsize
    return min(p.rows, p.adapters) * p.rank * (p.inner * p.parts + p.outer) + token_weights


def _add_flops(p: Problem, target: str) -> int:
    """As `_padded_flops`, of the update added in place."""
    block_m = add_tile(p, target).block_m
    return 2 * p.rows * cdiv(p.tokens, block_m) * block_m * rank_bucket(p.rank) * (p.inner * p.parts + p.outer)


def _padded_flops(p: Problem, target: str, rank: int) -> int:
    """What the tensor cores really do: whole tiles, and a shrink in every tile along n."""
    tile, out = linear_tile(p, target), p.outer // p.parts
    tokens = cdiv(p.tokens, tile.block_m) * tile.block_m
    columns = p.parts * cdiv(out, tile.block_n) * (tile.block_n + rank)
    return 2 * p.rows * tokens * (p.inner * columns + rank * p.outer)
