"""Which body an op runs: the Triton kernel or its plain-torch definition; and how an op is registered."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

Backend = Literal["auto", "torch", "triton"]

_library = torch.library.Library("cmlora_kernels", "DEF")


def register(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register one op: its schema, one body for CPU and GPU (it picks the backend itself), its shape function.

    define/impl and not custom_op: the eager call is half the price, and a UNet step makes hundreds.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, body, key)
    torch.library.register_fake(f"cmlora_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.cmlora_kernels, name).default


def use_triton(tensor: torch.Tensor, backend: str) -> bool:
    """Whether `tensor`'s op runs as Triton: on CUDA and ROCm by default, on the CPU only in Triton's interpreter."""
    if backend == "torch":
        return False
    if backend == "auto":
        return tensor.is_cuda
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs a CUDA or ROCm tensor, got one on {tensor.device}; on a machine without a GPU set "
            "TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
        )
    return True


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is one of the three names."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
