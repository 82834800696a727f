"""The command line: a file per group of commands."""

from __future__ import annotations

import typer

import cmlora.cli.draw
import cmlora.cli.laboratory
import cmlora.cli.measure  # noqa: F401  # these register their commands
from cmlora.cli.base import app
from cmlora.errors import CMLoRAError

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: what this library says on purpose is printed without a traceback."""
    try:
        app()
    except (CMLoRAError, OSError, RuntimeError, ValueError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from None
