"""Our forward in the place of a UNet's, and its way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cmlora.engine.denoiser import Denoiser


class Hook:
    """A denoiser in the place of its UNet's forward, and what stood there."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.state = denoiser.unet.__dict__
        # An offload hook of accelerate keeps the forward that it wraps in _old_forward: ours goes there, where the
        # weights have been moved already. Set up after ours, such a hook moves ours there by itself.
        slot = "_old_forward" if "_old_forward" in self.state else "forward"
        self.slot = slot
        self.was_set = slot in self.state
        self.original = getattr(denoiser.unet, slot)
        self.forward = denoiser.make_forward(self.original)
        self.forward.cmlora = self  # type: ignore[attr-defined]  # how it is found again, with nothing global

    def install(self) -> None:
        self.denoiser.open()
        self.state[self.slot] = self.forward

    def uninstall(self) -> None:
        self.denoiser.close()
        if self.state.get("_old_forward") is self.forward:
            self.state["_old_forward"] = self.original
        if self.state.get("forward") is self.forward:
            if self.was_set:
                self.state["forward"] = self.original
            else:
                del self.state["forward"]


def find(pipe: Any) -> Hook | None:
    """The hook on the pipeline's UNet, if it is in force."""
    state = getattr(getattr(pipe, "unet", None), "__dict__", {})
    for slot in ("forward", "_old_forward"):
        hook = getattr(state.get(slot), "cmlora", None)
        # what wraps our forward may carry its attributes: only ours itself counts
        if isinstance(hook, Hook) and state[slot] is hook.forward:
            return hook
    return None


def install(pipe: Any, denoiser: Denoiser) -> None:
    """Put a denoiser in, in the place of another one."""
    remove(pipe)
    Hook(denoiser).install()


def remove(pipe: Any) -> None:
    """Take out what `install` put in; nothing happens where there is nothing."""
    hook = find(pipe)
    if hook is not None:
        hook.uninstall()


@contextmanager
def installed(pipe: Any, denoiser: Denoiser) -> Iterator[None]:
    """`install` for the length of a with block; what was there before comes back behind it."""
    previous = find(pipe)
    install(pipe, denoiser)
    try:
        yield
    finally:
        remove(pipe)
        if previous is not None:
            previous.install()
