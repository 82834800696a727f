"""What judgements come to: wins, ties and losses, where a win needs both orders, and how far to trust the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmlora.lab.judge.question import CRITERIA
from cmlora.lab.markdown import header, row
from cmlora.lab.report import mean_with_interval


@dataclass(frozen=True)
class Verdict:
    """One criterion, a against b, over the pairs that were judged.

    Attributes:
        wins, ties, losses: of a, numbers of pairs. Both orders must agree, or one of them be a tie; a judge that
            prefers the first picture in both orders, or the second, has contradicted itself: a tie.
        contradictions: how many of the ties are that.
        difference: mean over sets of the score's difference, and its 95 % bootstrap interval.
        first: share of decided answers that prefer the first picture; one half is fair. None: none was decided.
    """

    wins: int
    ties: int
    losses: int
    contradictions: int
    difference: tuple[float, float, float]
    first: float | None


def verdicts(records: Sequence[dict[str, Any]]) -> tuple[dict[str, Verdict], int, int]:
    """By criterion; then how many pairs were judged, and how many were not, because an order has no answer.

    People see a pair once ("order" is "once"): one answer is enough.
    """
    pairs: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        pairs.setdefault((record["judge"], *record["pair"]), {})[record["order"]] = record
    whole = [orders for orders in pairs.values() if _whole(orders)]
    found = {name: _verdict(whole, name) for name in CRITERIA} if whole else {}
    return found, len(whole), len(pairs) - len(whole)


def _whole(orders: dict[str, dict[str, Any]]) -> bool:
    answered = {order for order, record in orders.items() if "scores" in record}
    return answered in ({"ab", "ba"}, {"once"})


def _verdict(pairs: Sequence[dict[str, dict[str, Any]]], name: str) -> Verdict:
    outcome, contradictions, first = [], 0, []
    by_set: dict[tuple[str, ...], list[float]] = {}
    for orders in pairs:
        apart = {order: record["scores"][name][0] - record["scores"][name][1] for order, record in orders.items()}
        signs = [int(np.sign(value)) for value in apart.values()]
        contradictions += min(signs) < 0 < max(signs)
        outcome.append(int(np.sign(sum(signs))))
        seen = {**apart, "ba": -apart["ba"]} if "ba" in apart else apart  # first minus second, as it was shown
        first += [value > 0 for order, value in seen.items() if value and order != "once"]
        loras = tuple(next(iter(orders.values()))["loras"])
        by_set.setdefault(loras, []).append(float(np.mean(list(apart.values()))))
    difference = mean_with_interval([float(np.mean(values)) for values in by_set.values()])
    wins, ties, losses = (outcome.count(sign) for sign in (1, 0, -1))
    return Verdict(wins, ties, losses, contradictions, difference, float(np.mean(first)) if first else None)


def table(records: Sequence[dict[str, Any]], a: str, b: str) -> str:
    """Markdown: a row per criterion, and below what could not be judged."""
    found, judged, failed = verdicts(records)
    asked = sum(record.get("asked", 1) for record in records)
    lines = list(
        header(f"{a} against {b}", "difference", "wins", "ties", "losses", "contradictions", "first preferred")
    )
    for name, verdict in found.items():
        mean, low, high = verdict.difference
        shares = [f"{count / judged:.0%}" for count in (verdict.wins, verdict.ties, verdict.losses)]
        first = "" if verdict.first is None else f"{verdict.first:.0%}"
        apart = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(row(name, apart, *shares, f"{verdict.contradictions / judged:.0%}", first))
    lines += [
        "",
        f"{judged} pairs judged, {failed} not, for want of an answer in both orders; {asked} questions asked.",
    ]
    return "\n".join(lines)
