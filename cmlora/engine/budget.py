"""A memory budget -> what a run gives up to keep it. Pure; standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cmlora.errors import RunError


@dataclass(frozen=True)
class Strategy:
    """What a run spends memory on.

    Attributes:
        at_once: predictions that run together.
        stack: whether q, k and v of a self-attention are copied one below the other, to be one launch.
        keep_prompt: whether keys and values of the prompt are kept for the run, or made anew in every step.
        merge: whether layers have merged weights instead of a low-rank update (`Spending.may_merge`).
        transform: whether wide 3x3 convolutions keep their weights transformed (on the CPU).
    """

    at_once: int
    stack: bool = True
    keep_prompt: bool = True
    merge: bool = False
    transform: bool = False


def candidates(predictions: int, most: int | None, *, merge: bool = False, transform: bool = False) -> list[Strategy]:
    """All that there are, from the fastest to the smallest.

    First the transformed and then the merged weights are given up, where they are an option, then the copies (two more
    launches per self-attention), then the prompt's keys and values (two small GEMMs per cross-attention and step), then
    rows: two parts, three, ... (every launch once per part).

    Args:
        predictions: of a step.
        most: upper bound of `at_once`; None: none.
        merge, transform: whether merged and transformed weights are an option at all.
    """
    counts = {-(-predictions // parts) for parts in range(1, predictions + 1)}
    whole, *fewer = sorted({min(count, most or count) for count in counts}, reverse=True)
    return [
        *([Strategy(whole, merge=merge, transform=True)] if transform else []),
        *([Strategy(whole, merge=True)] if merge else []),
        Strategy(whole),
        Strategy(whole, stack=False),
        Strategy(whole, stack=False, keep_prompt=False),
        *(Strategy(count, stack=False, keep_prompt=False) for count in fewer),
    ]


def first_that_fits(options: Sequence[Strategy], peak: Callable[[Strategy], int], budget: int) -> Strategy:
    """The first of the options that keeps the budget.

    Args:
        options: from the fastest to the smallest.
        peak: bytes that a run takes with one; asked only for those that come before the one that is taken.
        budget: bytes.

    Raises:
        RunError: none does; it names the least that is possible.
    """
    peaks = []
    for strategy in options:
        peaks.append(peak(strategy))
        if peaks[-1] <= budget:
            return strategy
    least = min(peaks)
    raise RunError(
        f"memory_budget must be at least {least} bytes for this run (adapters, caches and the activations of a step, "
        f"in the smallest parts), got {budget}; fewer images per call, a smaller size or fewer adapters need less"
    )
