"""Which body an op runs: the Triton kernel or its plain-torch definition; and how an op is registered."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from cmlora_kernels.chips import arch_part, has_kernels
from cmlora_kernels.launch import arch_of
from cmlora_kernels.triton_shim import HAS_TRITON, triton

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
    """Whether `tensor`'s op runs as Triton.

    "auto" does on CUDA and ROCm where Triton can run, and says once why it cannot; "triton" insists, on the CPU in
    Triton's interpreter.

    Raises:
        ValueError: backend "triton" where no kernel can run, and why.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return tensor.is_cuda and _usable(arch_of(tensor.device))
    missing = why_not(arch_of(tensor.device)) if tensor.is_cuda else _why_not_on_the_cpu()
    if missing:
        raise ValueError(f"backend='triton' cannot run on {tensor.device}: {missing}")
    return True


@functools.cache
def why_not(arch: str) -> str:
    """Why no kernel can run on a GPU of this target, such as "sm_75"; "" where they can. Asked once per process."""
    if not HAS_TRITON:
        return "triton is not installed"
    if not has_kernels(arch):
        return f"the kernels need compute capability 8.0 or newer, got {arch_part(arch)}"
    try:  # as the first launch would: triton compiles its own helper, for which it needs a C compiler
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"triton cannot reach the GPU: {error}"
    return ""


@functools.cache
def _usable(arch: str) -> bool:
    missing = why_not(arch)
    if missing:
        warnings.warn(
            f"cmlora_kernels runs in plain torch, without its kernels: {missing}", RuntimeWarning, stacklevel=2
        )
    return not missing


def _why_not_on_the_cpu() -> str:
    if not HAS_TRITON:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "kernels need a CUDA or ROCm tensor; on a machine without a GPU set TRITON_INTERPRET=1 before the first "
            "import to run them in Triton's interpreter"
        )
    return ""


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is one of the three names."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
