"""Rows in parts give the same result, and memory is what it was predicted to be."""

import re

import pytest
import torch

import cmlora
from cmlora.engine.budget import Strategy, candidates, first_that_fits
from cmlora.lab.bench.tiny import ATTENTION, EVERYTHING, SMALL, noises, relative, three_adapters
from cmlora.models.unet.step import UNetPart

CHOICES = (
    {"method": "no_lora"},
    {"method": "merge"},
    {"method": "switch", "switch_step": 1},
    {"method": "composite", "combine": "deviation"},
    {"method": "cmlora", "partition": "offline", "cache_branch": (1, 0)},
    {"method": "cmlora", "partition": "online", "online_gate": 0.9, "combine": "deviation"},
    {"method": "cmlora", "partition": "async", "max_cache_age": 2},
    {"method": "cmlora", "partition": "online", "cache_interval": 1},
)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_rows_in_parts_give_the_same_predictions(choice, monkeypatch):
    """All rows at once; two predictions; one, as few as there can be. Every row is compared, before its weight."""
    pipe = three_adapters(**SMALL)
    parts = []
    tail = UNetPart.tail

    def watched(part, *args):  # no hook on a module: code of a user's would run one prediction at a time
        parts.append(tail(part, *args))
        return parts[-1]

    monkeypatch.setattr(UNetPart, "tail", watched)
    for guidance in (7.5, 1.0):
        least, found = 4 if guidance > 1 else 2, []
        for most in (None, 2 * least + 1, least):
            cmlora.accelerate(pipe, max_rows=most, **{"cache_interval": 2, **choice})
            parts.clear()
            noises(pipe, guidance=guidance, controlled=guidance == 1.0)
            assert most is None or max(part.shape[0] for part in parts) <= most
            found.append(torch.cat(parts))
        assert relative(found[1], found[0]) < 1e-6
        assert relative(found[2], found[0]) < 1e-6


def test_fewer_rows_than_the_pipelines_own_batch_are_refused():
    pipe = three_adapters(**SMALL)
    cmlora.accelerate(pipe, max_rows=3)
    with pytest.raises(cmlora.RunError, match="max_rows must be at least the 4 rows"):
        noises(pipe, images=2)


def measured_peak(pipe, **how):
    """Bytes alive together in a run on the CPU, as torch's profiler saw the allocator, and the adapters' before it."""
    before = cmlora.summary(pipe).adapter_bytes
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        noises(pipe, **how)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + before


SD15 = {  # half its width
    "block_out_channels": (160, 320, 640, 640),
    "norm_num_groups": 32,
    "cross_attention_dim": 384,
    "attention_head_dim": 8,
}


@pytest.mark.parametrize(
    ("unet", "pattern", "how", "choice"),
    [
        ({}, EVERYTHING, {"size": 16}, {}),
        (SMALL, ATTENTION, {"size": 24, "images": 2}, {"max_rows": 5}),
        (SMALL, ATTENTION, {"size": 16}, {"method": "switch", "switch_step": 1}),
        (SMALL, ATTENTION, {"size": 16}, {"method": "composite", "combine": "deviation", "cache_interval": 1}),
        (SD15, ATTENTION, {"size": 16}, {}),
    ],
    ids=["convolutions", "parts", "switch", "no cache", "SD1.5"],
)
def test_the_peak_is_what_was_predicted(unet, pattern, how, choice):
    pipe = three_adapters(pattern, device="cpu", **unet)
    cmlora.accelerate(pipe, **choice)
    how = {"images": 1, **how}
    measured = measured_peak(pipe, **how)
    assert cmlora.summary(pipe).peak_bytes == pytest.approx(measured, rel=0.1)


def test_a_budget_is_kept_and_changes_no_prediction():
    """From what an unbounded run takes down to the least that there is, which the error names."""
    pipe = three_adapters(ATTENTION, device="cpu", **SMALL)
    cmlora.accelerate(pipe, combine="mean")
    want = noises(pipe, images=1, size=16)
    most = cmlora.summary(pipe).peak_bytes
    cmlora.accelerate(pipe, combine="mean", memory_budget=1)
    with pytest.raises(cmlora.RunError, match="memory_budget must be at least") as refused:
        noises(pipe, images=1, size=16)
    least = int(re.search(r"at least (\d+) bytes", str(refused.value)).group(1))
    assert least < 0.8 * most
    spent = []
    for budget in (most, most - 1, (least + most) // 2, least):
        cmlora.accelerate(pipe, combine="mean", memory_budget=budget)
        found = noises(pipe, images=1, size=16)
        assert measured_peak(pipe, images=1, size=16) <= 1.1 * budget
        assert max(relative(x, y) for x, y in zip(found, want, strict=True)) < 1e-6
        summary = cmlora.summary(pipe)
        assert summary.peak_bytes <= budget
        spent.append(summary.strategy)
    assert spent[0] == Strategy(3, merge=True)
    assert spent[1] == Strategy(3)
    assert spent[3] == Strategy(1, stack=False, keep_prompt=False)


def test_what_a_budget_gives_up_in_which_order():
    every = candidates(5, None)
    assert [(s.at_once, s.stack, s.keep_prompt) for s in every] == [
        (5, True, True),
        (5, False, True),
        (5, False, False),
        (3, False, False),
        (2, False, False),
        (1, False, False),
    ]
    assert candidates(5, None, merge=True) == [Strategy(5, merge=True), *every]
    both = candidates(5, None, merge=True, transform=True)
    assert both == [Strategy(5, merge=True, transform=True), Strategy(5, merge=True), *every]
    assert candidates(5, None, transform=True) == [Strategy(5, transform=True), *every]
    assert [s.at_once for s in candidates(8, 4)] == [4, 4, 4, 3, 2, 1]
    assert candidates(1, None) == [Strategy(1), Strategy(1, stack=False), Strategy(1, stack=False, keep_prompt=False)]

    def peak(strategy):
        return 100 + 10 * strategy.at_once + 30 * strategy.stack + 5 * strategy.keep_prompt

    assert first_that_fits(every, peak, 185) == Strategy(5)
    assert first_that_fits(every, peak, 184) == Strategy(5, stack=False)
    assert first_that_fits(every, peak, 129) == Strategy(2, stack=False, keep_prompt=False)
    with pytest.raises(cmlora.RunError, match=r"at least 110 bytes .* got 109"):
        first_that_fits(every, peak, 109)
