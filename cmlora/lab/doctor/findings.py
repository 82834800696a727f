"""What a check found, and how it travels from the process that made it: one JSON line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        name: what was checked.
        state: "right", "wrong", "failed" (it raised or died) or "left out".
        detail: of a check that is not right: error and what was allowed, the exception, or why it was left out.
        error, allowed: the largest deviation, and the largest that is right; None where nothing was compared.
        seconds: that it took, compiling included.
    """

    name: str
    state: str
    detail: str = ""
    error: float | None = None
    allowed: float | None = None
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether something has to be mended."""
        return self.state in ("wrong", "failed")


def judge(name: str, error: float, allowed: float, seconds: float = 0.0) -> Finding:
    """Right where the error is at most what is allowed; NaN never is."""
    right = error <= allowed
    detail = "" if right else f"off by {error:.1e}, allowed {allowed:.1e}"
    return Finding(name, "right" if right else "wrong", detail, error, allowed, seconds)


def send(findings: Iterable[Finding]) -> None:
    """Print findings as they come."""
    for finding in findings:
        sys.stdout.write(json.dumps(asdict(finding)) + "\n")
        sys.stdout.flush()


def announce(name: str) -> None:
    """Say what is checked next: the last one announced is what a process died of."""
    sys.stdout.write(json.dumps({"begins": name}) + "\n")
    sys.stdout.flush()


def receive(lines: Iterable[str]) -> Iterator[Finding | str]:
    """What a process printed: findings, and the names of checks that begin; other output is passed over."""
    for line in lines:
        try:
            given = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(given, dict) and "begins" in given:
            yield str(given["begins"])
        elif isinstance(given, dict) and {"name", "state"} <= set(given):
            yield Finding(**given)
