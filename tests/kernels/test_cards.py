"""A card's own figures: by name, by number of units, from its file; and what is done with a file that must be wrong."""

import json
import warnings

import pytest
import torch

from cmlora_kernels import cards, costs, tiles
from cmlora_kernels.cards import Measured, chip, path_of, read, write
from cmlora_kernels.chips import CARDS, TARGETS, UNITS, data_sheet, family
from cmlora_kernels.tiles import Problem

CARD = "NVIDIA GeForce RTX 3060"
TARGET = f"sm_86/28/{CARD}"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (chip, costs.costs, costs.choose, tiles.linear_tile, tiles.add_tile):
        cached.cache_clear()
    yield
    for cached in (chip, costs.costs, costs.choose):
        cached.cache_clear()


def slow(**fields: float) -> Measured:
    given = {"bandwidth": 3e11, "half_flops": 2e13, "float_flops": 4e12, "triton_share": 0.5, "launch_seconds": 5e-6}
    return Measured(CARD, cards.triton_version(), **{**given, **fields})


def test_every_target_has_cards_and_a_unit() -> None:
    assert set(CARDS) == set(UNITS) == set(TARGETS)
    for arch in TARGETS:
        assert data_sheet(arch).shared == UNITS[arch].block_shared
        assert data_sheet(arch).half_flops > data_sheet(arch).float_flops


def test_geforce_cards_count_what_they_do_with_fp32_accumulation() -> None:
    """Advertised are the fp16-accumulate peaks, 142 TFLOP/s for the RTX 3090: twice what a GEMM of ours can reach."""
    peaks = {"sm_86/82/NVIDIA GeForce RTX 3090": 71e12, "sm_89/128/NVIDIA GeForce RTX 4090": 165.2e12}
    for target, peak in peaks.items():
        assert chip(target).half_flops == peak


def test_a_card_that_is_not_listed_is_scaled_from_the_nearest_one() -> None:
    found = chip("sm_86/30/NVIDIA GeForce RTX 3050 Ti of the future")
    assert (found.name, found.units) == (CARD, 30)
    assert found.half_flops == pytest.approx(25.5e12 * 30 / 28)
    assert chip("sm_121/48/NVIDIA GB10").shared == UNITS["sm_120"].block_shared
    assert family("gfx1201/64/AMD Radeon RX 9070 XT") == "wmma"


def test_a_cards_file_decides_which_strategy_runs_and_no_tile() -> None:
    p = Problem(2, 4096, 320, 320, 16, 1, 1, torch.float16, True)
    target = "sm_90/132/NVIDIA H100 80GB HBM3"
    before, tile = costs.choose(p, target), tiles.linear_tile(p, target)
    assert before.strategy == "fused"
    name = "NVIDIA H100 80GB HBM3"
    write(Measured(name, cards.triton_version(), 3e12, 6e14, 1e14, triton_share=0.05, launch_seconds=4e-6))
    for cached in (chip, costs.costs, costs.choose, tiles.linear_tile):
        cached.cache_clear()
    assert chip(target).measured
    assert chip(target).library(2) == pytest.approx(6e14)
    assert costs.choose(p, target).strategy == "add", "our GEMMs were measured as slow"
    assert tiles.linear_tile(p, target) == tile


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89/58/NVIDIA L4", "sm_90", "gfx942"])
def test_without_a_file_the_choice_is_the_one_that_loses_least_at_worst(target) -> None:
    """Of two ways the one that at its worst share takes fewer times the other's seconds."""
    for inner, outer in ((320, 320), (1280, 1280), (5120, 1280), (1280, 10240)):
        p = Problem(4, 1024, inner, outer, 16, 1, 3, torch.float16, True)
        ratios = []
        for share in (0.65, 0.75, 0.85, 1.0):
            seconds = {cost.strategy: cost.seconds for cost in costs.costs(p, target, share)}
            ratios.append(seconds["fused"] / seconds["add"])
        fused, add = max(1.0, *ratios), max(1.0, *(1 / ratio for ratio in ratios))
        assert costs.choose(p, target).strategy == ("fused" if fused <= add else "add"), (inner, outer)


def test_without_a_file_nothing_is_said_and_the_table_serves() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chip(TARGET) == data_sheet("sm_86", 28, CARD)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is broken"),
        ("[]", "is no card file"),
        (json.dumps({"format": 1, "device": "another", "triton": "9"}), "is a foreign file: its device is 'another'"),
        (slow(bandwidth=-1.0), "bandwidth must be a positive number, got -1.0"),
        (slow(triton_share=float("nan")), "triton_share must be a positive number, got nan"),
    ],
    ids=["broken", "other", "foreign", "negative", "nan"],
)
def test_a_file_that_cannot_be_right_is_warned_of_and_not_used(content, says: str) -> None:
    if isinstance(content, Measured):
        write(content)
    else:
        path_of(CARD).parent.mkdir(parents=True)
        path_of(CARD).write_text(content)
    with pytest.raises(ValueError, match=says):
        read(CARD)
    with pytest.warns(RuntimeWarning, match=f"{says}.*`cmlora doctor` writes it anew"):
        assert chip(TARGET) == data_sheet("sm_86", 28, CARD)
