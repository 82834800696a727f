"""Which diffusers pipeline is calling the module right now.

What a pipeline says of its call (whether there is guidance) is left over from its last one while somebody else calls
the module: a loop of one's own, a callback, another pipeline that shares it. So the flag counts only where the
pipeline's own __call__ is what stands behind the call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import accelerate
import diffusers
import torch

_OURS = Path(__file__).parents[1]
_HANDING_ON = tuple(
    f"{folder}/"
    for folder in (
        *(Path(package.__file__ or "").parent for package in (torch, accelerate)),
        Path(diffusers.__file__ or "").parent / "hooks",
        *(_OURS / room for room in ("engine", "models")),
    )
)
"""Frames of these lie between a pipeline and our forward where nothing changes the call: Module.__call__, the hooks
that move a whole model to its device, ourselves."""


def calling_pipeline(names: Sequence[str]) -> tuple[Any, bool]:
    """The pipeline whose __call__, as diffusers wrote it, is calling, and whether it does so by itself.

    None: no pipeline is. Not by itself: code of somebody else's stands between, which may have changed what is passed.

    Args:
        names: of classes in diffusers whose __call__ is known.
    """
    call, by_itself = calling_frame(names)
    return (None if call is None else call.f_locals["self"]), by_itself


def calling_frame(names: Sequence[str]) -> tuple[FrameType | None, bool]:
    """As `calling_pipeline`, with the frame of that __call__: its local variables say what it passes."""
    frame = direct = _caller()
    while frame is not None:
        if _pipeline_of(frame, names) is not None:
            return frame, frame is direct
        frame = frame.f_back
    return None, False


def _pipeline_of(frame: FrameType, names: Sequence[str]) -> Any:
    """The pipeline whose __call__ a frame is; None: it is something else."""
    if frame.f_code.co_name != "__call__":
        return None
    pipe = frame.f_locals.get("self")
    for kind in type(pipe).__mro__:
        if "__call__" in kind.__dict__:  # the one that runs; a subclass may have one of its own
            known = kind.__name__ in names and kind.__module__.startswith("diffusers.")
            return pipe if known and inspect.unwrap(kind.__dict__["__call__"]).__code__ is frame.f_code else None
    return None


def calling_code() -> CodeType | None:
    """Code of whoever is calling the module."""
    frame = _caller()
    return None if frame is None else frame.f_code


def _caller() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_HANDING_ON):
        frame = frame.f_back
    return frame
