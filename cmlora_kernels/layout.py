"""How a batch of images lies in memory, as far as a copying kernel needs to know."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last where all of the tensors are [rows, channels, height, width] and lie so, else contiguous."""
    if any(not t.is_contiguous() for t in tensors) and all(
        t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in tensors
    ):
        return torch.channels_last
    return torch.contiguous_format


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor lies without gaps in one of the two formats: it can be written through its address."""
    return tensor.is_contiguous(memory_format=dense_format(tensor))
