"""What the commands share: the app, LoRAs named on the command line, and pipelines from folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from cmlora import sprites
from cmlora.lab.load import load_loras, load_pipeline
from cmlora.lab.quiet import leave_out_harmless_messages

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Several LoRAs in one image, as one batch."""
    leave_out_harmless_messages()


@dataclass(frozen=True)
class LoraFile:
    """A LoRA named on the command line: FILE[:WEIGHT][=NAME]."""

    path: Path
    weight: float
    name: str

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """Split FILE[:WEIGHT][=NAME]; the name defaults to the file's stem, the weight to 1.

        A file that is not there may be the name of one of the shipped model's LoRAs.
        """
        rest, _, name = text.partition("=")
        path, weight = rest, 1.0
        head, colon, tail = rest.rpartition(":")
        if colon:
            try:
                path, weight = head, float(tail)
            except ValueError:
                path = rest  # a colon of the path itself
        if not Path(path).is_file() and path in (*sprites.CONCEPTS, *sprites.TROUBLE):
            return cls(Path(sprites.lora_path(path)), weight, name or path)
        if not Path(path).is_file():
            raise typer.BadParameter(f"--lora {text}: no such file: {path}")
        return cls(Path(path), weight, name or Path(path).stem.replace(".", "_"))


def load(model: Path, files: Sequence[LoraFile]) -> Any:
    """The pipeline on the GPU in float16 where there is one, on the CPU in float32 elsewhere, its LoRAs active."""
    names = [f.name for f in files]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"--lora: names must differ, got {', '.join(names)}; give some with FILE=NAME")
    pipe = load_pipeline(model)
    load_loras(pipe, {f.name: f.path for f in files})
    pipe.set_adapters(names, [f.weight for f in files])
    return pipe
