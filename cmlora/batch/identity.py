"""Whether a tensor is still the one that was seen before, without reading it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Identity = tuple[object, ...]


def memory(t: Any) -> Identity:
    """Which part of which memory a tensor is: equal for two views of the same elements.

    Holds as long as the tensor, or another view of its memory, is held.
    """
    if type(t) not in (Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(t):
        # quantised weights: they have no memory of their own, their parts do
        names, _ = t.__tensor_flatten__()
        return (type(t), *(memory(getattr(t, name)) for name in names))
    return (_address(t), t.shape, t.stride(), t.dtype, t.device)


def _address(t: Any) -> int:
    if isinstance(t, FakeTensor):  # sizes are being traced: no memory at all, and torch warns when asked
        return id(t)
    try:
        return int(t.data_ptr()) or id(t)
    except RuntimeError:  # no memory at all
        return id(t)


def version(t: Tensor) -> int | None:
    """How often a tensor was written to; None for one made in torch.inference_mode, which does not count.

    Writing through `.data` is not counted, either.
    """
    return None if t.is_inference() else t._version


def identity(t: Tensor) -> Identity:
    """`memory` and `version`: equal where nothing has changed that leaves a trace. A None at the end: none is left."""
    return (*memory(t), version(t))
