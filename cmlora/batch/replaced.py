"""A module's forward replaced by ours: how it is put in, taken back, and left out of copies.

Only the instance's own attributes change, never a class. `copy.deepcopy`, pickle and `torch.save` ask an object for its
state: a module whose forward is replaced gives the state that it would have without us, so that a copy is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

SLOTS = ("forward", "_old_forward")
"""Where ours may be by now: a hook of accelerate's that is set up around it moves it to the second."""


class _PlainState:
    """A module's __getstate__ while its forward is replaced."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], slot: str) -> None:
        self.module, self.forward = module, forward
        self.before = module.__dict__.get(slot)

    def __call__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.module.__dict__.items() if name != "__getstate__"}
        self.without_ours(state)
        return state

    def without_ours(self, state: dict[str, Any]) -> None:
        """What was there before, in the place of ours."""
        for slot in SLOTS:
            if state.get(slot) is self.forward:
                if self.before is not None:
                    state[slot] = self.before
                elif slot == "forward":
                    del state[slot]
                else:  # a hook that was set up around ours goes on around the class's own
                    state[slot] = type(self.module).forward.__get__(self.module)


def replace_forward(module: nn.Module, forward: Callable[..., Any], slot: str = "forward") -> None:
    """Put `forward` in an attribute of the instance: its forward, or where a hook around it keeps the inner one."""
    state = module.__dict__
    state["__getstate__"] = _PlainState(module, forward, slot)
    state[slot] = forward


def give_back_forward(module: nn.Module) -> None:
    """Take ours out, wherever hooks that came later have moved it; what was there before comes back."""
    plain = module.__dict__.get("__getstate__")
    if isinstance(plain, _PlainState):
        del module.__dict__["__getstate__"]
        plain.without_ours(module.__dict__)
