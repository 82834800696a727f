"""Which step of a schedule a call is, told without reading the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def index_in(schedule: Any, timestep: Any) -> int | None:
    """Where a timestep lies in a schedule, by memory; None: elsewhere."""
    if not isinstance(timestep, Tensor) or not isinstance(schedule, Tensor):
        return None
    if timestep.untyped_storage()._cdata != schedule.untyped_storage()._cdata:
        return None
    return int(timestep.storage_offset() - schedule.storage_offset())
