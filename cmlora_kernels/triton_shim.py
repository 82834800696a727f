"""triton and triton.language, or, where triton is not installed, stand-ins that let kernel files be imported.

A kernel file does `from cmlora_kernels.triton_shim import tl, triton`. Without triton its @triton.jit functions stay
plain Python functions that nobody runs: the ops run their torch definitions (`dispatch.use_triton`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Absent:
    """Answers every attribute with itself, so that `tl.constexpr` and the like can be named at import."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, value: Any = None, *_: Any, **__: Any) -> Any:
        return value

    def jit(self, function: Callable[..., Any] | None = None, **_: Any) -> Any:
        """`@triton.jit` and `@triton.jit(...)`: the function as it is."""
        return function if function is not None else lambda inner: inner


try:
    import triton as _triton
    import triton.language as _language

    HAS_TRITON = True
except ImportError:
    _triton = _language = _Absent()
    HAS_TRITON = False

triton: Any = _triton
tl: Any = _language
