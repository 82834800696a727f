"""Block sizes against what a chip has; `test_inspect.py` holds the compiled code of some of them."""

import pytest
import torch

from cmlora_kernels.chips import TARGETS, UNITS, family
from cmlora_kernels.tiles import RANK_BUCKETS, Problem, add_tile, linear_tile, pipeline_bytes, rank_chunks

SMALL = ("sm_86", "sm_89", "sm_120")
"""Targets whose blocks may use 99 KB."""


def layer(rank: int, dtype: torch.dtype = torch.float16) -> Problem:
    return Problem(10, 1024, 640, 640, rank, 1, 5, dtype, True)


@pytest.mark.parametrize("target", SMALL)
@pytest.mark.parametrize("rank", RANK_BUCKETS)
def test_small_cards_keep_their_pipeline(target: str, rank: int) -> None:
    """Three stages hold two tiles on mma.sync, and two of the widest (80 KB) fit."""
    assert linear_tile(layer(rank), target).num_stages == linear_tile(layer(rank), "sm_80").num_stages == 3


@pytest.mark.parametrize("target", SMALL)
def test_both_loops_of_an_update_in_place_fit(target: str) -> None:
    """Its expand is pipelined, too: in float32 at rank 128 three stages compile to 104 KB, two to 72."""
    assert add_tile(layer(128, torch.float32), target).num_stages == 2
    assert add_tile(layer(128), target).num_stages == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_no_pipeline_exceeds_a_blocks_shared_memory(target: str, dtype: torch.dtype) -> None:
    for rank in RANK_BUCKETS:
        p = layer(rank_chunks(rank, dtype, target)[0][1], dtype)
        tile = linear_tile(p, target)
        per_stage = (tile.block_m + tile.block_n + p.rank) * tile.block_k * dtype.itemsize
        after = (tile.block_m + tile.block_n) * p.rank * dtype.itemsize
        most = pipeline_bytes(family(target), tile.num_stages, per_stage, after)
        assert most <= UNITS[target].block_shared, (rank, tile)
