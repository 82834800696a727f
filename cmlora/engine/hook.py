"""Our forward in the place of a module's, and its way back."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cmlora.batch.replaced import give_back_forward, replace_forward
from cmlora.engine.denoiser import Denoiser
from cmlora.errors import UnsupportedModelError
from cmlora.lora.text import activate, active_text
from cmlora.models import modules_of

_hooks: weakref.WeakSet[Hook] = weakref.WeakSet()
"""Those in force. A module holds its hook by its forward; here it is only found again, also where the pipeline has
another module by now, or a wrapper stands around our forward."""


class Hook:
    """A denoiser in the place of its module's forward, and what stood there.

    Raises:
        UnsupportedModelError: forward is somebody else's already.
    """

    def __init__(self, pipe: Any, denoiser: Denoiser) -> None:
        self.pipe = weakref.ref(pipe)
        self.denoiser = denoiser
        self.module: nn.Module = denoiser.module
        state = self.module.__dict__
        # An offload hook of accelerate keeps the forward that it wraps in _old_forward: ours goes there, where the
        # weights have been moved already. Set up after ours, such a hook moves ours there by itself.
        self.slot = "_old_forward" if "_old_forward" in state else "forward"
        own = find_on(self.module)
        original = own.original if own is not None else getattr(self.module, self.slot)
        _must_be_its_own(self.module, original)
        self.original: Callable[..., Any] = original
        self.forward = self._make_forward()
        self._undo_text: Callable[[], None] | None = None
        self._text: dict[str, tuple[str, ...]] = {}

    def _make_forward(self) -> Callable[..., Any]:
        """A stand-in for the module's forward with the same signature; eager in a compiled model."""
        signature = inspect.signature(self.original)

        @functools.wraps(self.original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self not in _hooks:  # taken out, but a wrapper around it goes on calling it
                return self.original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            with torch.no_grad():
                return self.denoiser(**bound.arguments)

        eager: Callable[..., Any] = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]  # torch's
        eager.cmlora = self  # type: ignore[attr-defined]  # how a module finds it
        return eager

    def install(self) -> None:
        self.denoiser.open()
        pipe = self.pipe()
        if pipe is not None and self.denoiser.config.method != "merge":
            # loaded one after the other, only the last LoRA acts on the prompt, while all are composed in the model
            self._undo_text = activate(pipe, self.denoiser.everyone)
            self._text = active_text(pipe)
        replace_forward(self.module, self.forward, self.slot)
        _hooks.add(self)

    def uninstall(self) -> None:
        _hooks.discard(self)
        self.denoiser.close()
        give_back_forward(self.module)
        pipe = self.pipe()
        if pipe is not None and self._undo_text is not None and active_text(pipe) == self._text:
            self._undo_text()  # else the user has chosen anew since
        self._undo_text = None


def _must_be_its_own(module: nn.Module, forward: Any) -> None:
    if isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward:
        return
    code = getattr(forward, "__code__", None)  # functools.wraps gives a wrapper the name of what it wraps
    name = type(forward).__name__ if code is None else f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
    raise UnsupportedModelError(
        f"{type(module).__name__}.forward was replaced by {name} already, which ours "
        "would bypass: take that out first (del module.forward, or the helper's own disable), call "
        "cmlora.accelerate, and put it around ours afterwards"
    )


def find_on(module: nn.Module) -> Hook | None:
    """The hook in force on a module."""
    return next((hook for hook in _hooks if hook.module is module), None)


def find(pipe: Any) -> Hook | None:
    """The hook in force on one of the pipeline's modules, else the one that was installed through this pipeline."""
    for module in modules_of(pipe):
        hook = find_on(module)
        if hook is not None:
            return hook
    return next((hook for hook in _hooks if hook.pipe() is pipe), None)


def install(pipe: Any, denoiser: Denoiser) -> None:
    """Put a denoiser in, in the place of another one."""
    hook = Hook(pipe, denoiser)
    remove(pipe)
    hook.install()


def remove(pipe: Any) -> None:
    """Take out what `install` put in; nothing happens where there is nothing."""
    while (hook := find(pipe)) is not None:
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
