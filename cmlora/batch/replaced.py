"""A module's forward replaced by ours: how it is put in, taken back, and left out of copies.

Only the instance's own attributes change, never a class. `copy.deepcopy`, pickle and `torch.save` ask an object for its
state: a module whose forward is replaced gives the state that it would have without us, so that a copy is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class _PlainState:
    """A module's __getstate__ while its forward is replaced."""

    def __init__(self, module: nn.Module, slot: str) -> None:
        self.module, self.slot = module, slot
        self.before = module.__dict__.get(slot)

    def __call__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.module.__dict__.items() if name != "__getstate__"}
        if self.before is None:
            del state[self.slot]
        else:
            state[self.slot] = self.before
        return state


def replace_forward(module: nn.Module, forward: Callable[..., Any], slot: str = "forward") -> None:
    """Put `forward` in an attribute of the instance: its forward, or where a hook around it keeps the inner one."""
    state = module.__dict__
    state["__getstate__"] = _PlainState(module, slot)
    state[slot] = forward


def give_back_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Take `forward` out, wherever hooks that came later have moved it; what was there before comes back."""
    state = module.__dict__
    plain = state.pop("__getstate__", None)
    before = plain.before if isinstance(plain, _PlainState) else None
    for slot in ("forward", "_old_forward"):
        if state.get(slot) is forward:
            if before is not None:
                state[slot] = before
            elif slot == "forward":
                del state[slot]
            else:  # a hook that was set up around ours goes on around the class's own
                state[slot] = type(module).forward.__get__(module)
