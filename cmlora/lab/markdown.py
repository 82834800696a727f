"""Rows of Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator


def row(*cells: object) -> str:
    """One row."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*names: str) -> Iterator[str]:
    """The names of the columns and the line below them."""
    yield row(*names)
    yield row(*["---"] * len(names))
