"""One kernel launch as a value: what a launcher runs is what the inspection compiles and counts.

A kernel's parameters come in this order: pointers, run-time numbers, constexprs. A plain function per kernel (pure:
shape, dtype, arch) returns its `Launch`; the launcher caches that and calls it with the tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with everything but its tensors.

    Attributes:
        kernel: the @triton.jit function.
        name: what a table calls this variant, e.g. "linear 10x4096x320->320 r16".
        tensors: the pointer parameters in order, name -> type such as "*fp16"; None for an absent (None) tensor.
        scalars: the run-time numbers in order, name -> value.
        constexprs: compile-time parameters, name -> value.
        grid: programs per axis.
        bytes: global bytes loaded and stored by all programs together, masked lanes not counted, caches ignored.
        unique_bytes: the same with every element counted once: what must cross the memory bus.
        flops: multiplications and additions on unpadded sizes (2 per multiply-add).
    """

    kernel: Any
    name: str
    tensors: Mapping[str, str | None]
    scalars: dict[str, int | float]
    constexprs: dict[str, Any]
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    bytes: int
    unique_bytes: int
    flops: int

    @functools.cached_property
    def _keywords(self) -> dict[str, Any]:
        return {**self.constexprs, "num_warps": self.num_warps, "num_stages": self.num_stages}

    @functools.cached_property
    def _numbers(self) -> tuple[int | float, ...]:
        return tuple(self.scalars.values())

    @functools.cached_property
    def _rest(self) -> tuple[Any, ...]:
        return (*self._numbers, *self.constexprs.values())

    @functools.cached_property
    def _compiled(self) -> dict[int, Any]:
        """Per device what runs the compiled kernel on tensors that begin at multiples of 16 bytes."""
        return {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Run on `tensors`, given in the order of `self.tensors`, the first of them not None."""
        first = tensors[0]
        assert first is not None
        device = first.get_device()
        if first.is_cuda and device != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                self._run(device, tensors)
        else:
            self._run(device, tensors)

    def _run(self, device: int, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """As Triton would, but without asking what each argument is: all that can differ is where tensors begin.

        Of AMD's compiled kernels some are for tensors below 2 GiB alone, so that there Triton is asked each time.
        """
        begin = 0
        for tensor in tensors:
            if tensor is not None:
                begin |= tensor.data_ptr()
        usual = not begin & 15
        run = self._compiled.get(device) if usual else None
        if run is not None:
            run(*tensors, *self._rest)
            return
        compiled = self.kernel.run(*tensors, *self._numbers, grid=self.grid, warmup=False, **self._keywords)
        if usual and hasattr(compiled, "__getitem__") and torch.version.hip is None:  # the interpreter has none
            self._compiled[device] = compiled[self.grid]

    def source(self, gpu: Any) -> Any:
        """The kernel as `triton.compile` takes it for a GPUTarget.

        It is specialised as the launch would be on tensors that begin at multiples of 16 bytes and are below 2 GiB.
        """
        from triton.compiler import ASTSource, make_backend

        names = [*self.tensors, *self.scalars, *self.constexprs]
        if names != list(self.kernel.arg_names):
            raise ValueError(f"{self.name}: parameters must be {list(self.kernel.arg_names)}, got {names}")
        absent = {name: None for name, kind in self.tensors.items() if kind is None}
        ones = {name: 1 for name, value in self.scalars.items() if type(value) is int and value == 1}
        constants = {**absent, **ones, **self.constexprs}
        signature = {**self.tensors, **{name: _scalar_type(value) for name, value in self.scalars.items()}}
        signature = {name: "constexpr" if name in constants else signature[name] for name in names}
        parse = make_backend(gpu).parse_attr  # of the letters, what a backend knows: NVIDIA's has no use for the size
        known = {n: "D" for n, v in self.scalars.items() if type(v) is int and v % 16 == 0}
        known |= {n: "DS" for n, kind in self.tensors.items() if kind is not None}  # divisible by 16, small
        return ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): parse(letters) for name, letters in known.items()},
        )


def _scalar_type(value: int | float) -> str:
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@functools.cache
def arch_of(device: torch.device) -> str:
    """The target that kernels are chosen for, such as "sm_86/28/NVIDIA GeForce RTX 3060": see `chips`.

    The CPU's interpreter stands in for "sm_80".
    """
    if device.type != "cuda":
        return "sm_80"
    card = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    arch = str(card.gcnArchName).split(":", 1)[0] if hip else f"sm_{card.major}{card.minor}"
    return f"{arch}/{card.multi_processor_count}/{card.name}"
