"""How much memory a run will take, from shapes alone: its steps on tensors without data, live bytes counted."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from cmlora.batch.inputs import Inputs, map_tensors
from cmlora.batch.placing import Placing
from cmlora.batch.rows import Rows
from cmlora.compose.plan import Step
from cmlora.engine.budget import Strategy
from cmlora.lora.layers import unseen
from cmlora.models.family import Batched, Conditions
from cmlora_kernels.flops import FLOPS

LARGEST_BLOCK = 2**25 - 2**16
"""Bytes; just under the 32 MiB from which on the C library (glibc) gives freed blocks back to the system at once."""


def keep_freed_memory() -> None:
    """On the CPU: have the C library keep what a step frees for the next one, which then finds its pages made.

    glibc keeps freed memory up to twice the largest block that was ever handed back, at first 256 KB. One large block,
    never written to and so never made, is handed back here.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Runs everything on fake tensors of one device; real ones that come along (weights) stand outside the count.

    To be entered within a FakeTensorMode.

    Attributes:
        peak: the most bytes that were alive together.
        launches: operations that are no views. moved: bytes that they read and write. flops: of matrix products.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor this
        self.device = device
        self.peak = self._live = self.launches = self.moved = self.flops = 0
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}  # by identity, the real one held so that it stays its own
        self._known: set[int] = set()

    def fake(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape, on the device, without data."""
        if isinstance(tensor, FakeTensor):
            return tensor
        _, fake = self._fakes.get(id(tensor), (None, None))
        if fake is None:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
            self._fakes[id(tensor)] = (tensor, fake)
            self._known.add(fake.untyped_storage()._cdata)
        return fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it leaves."""
        args, kwargs = map_tensors(args, self.fake), map_tensors(kwargs or {}, self.fake)
        out = func(*args, **kwargs)
        self.peak = max(self.peak, self._live + _workspace(func, args, out))
        self._work(func, args, kwargs, out)
        map_tensors(out, self._count)
        return out

    def _work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if any(given.alias_info is not None and not given.alias_info.is_write for given in func._schema.returns):
            return  # a view

        def moved(tensor: Tensor) -> Tensor:
            self.moved += tensor.numel() * tensor.element_size()
            return tensor

        self.launches += 1
        map_tensors((args, kwargs, out), moved)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            size = storage.nbytes()
            self._known.add(storage._cdata)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, storage._cdata, size)
        return tensor

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


_of_shapes: Any = flop_counter.shape_wrapper
_FORMULAS = {**flop_counter.flop_registry, **{op: _of_shapes(formula) for op, formula in FLOPS.items()}}


def _workspace(func: Any, args: Any, out: Any) -> int:
    """Bytes that an operation takes while it runs, its result among them.

    On the CPU a float32 convolution with a kernel wider than one pixel lays x, weight and result anew, channels
    innermost, and then the result back (seen with torch.profiler; other formats and devices, and ATen's own convolution
    of one small image, are not modelled).
    """
    if func.overloadpacket.__name__ not in ("convolution", "multi_lora_conv2d") or out.device.type != "cpu":
        return 0
    x, weight = args[:2]
    if weight[0, 0].numel() == 1 or x.dtype != torch.float32 or not x.is_contiguous():
        return 0
    return int(max(x.nbytes + weight.nbytes + out.nbytes, 2 * out.nbytes))


@dataclass(frozen=True)
class RunShape:
    """All that a run's memory depends on beside the model and its adapters.

    Attributes:
        inputs: of a step, on the meta device.
        steps: of the run.
        predictions: the slots of the steps' predictions, what of a slot's adapters they have, and whether they are
            probes; each set once.
        halves: of guidance that start alike.
        device: where it runs.
    """

    inputs: Inputs
    steps: int
    predictions: tuple[tuple[tuple[int, ...], tuple[int, ...], bool], ...]
    halves: int
    device: torch.device

    @classmethod
    def of(cls, inputs: Inputs, plan: Sequence[Step], halves: int) -> RunShape:
        """The shape of a run whose first step has these inputs."""
        like = inputs.map(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
        kinds = [(step, False) for step in plan] + [(step.probe, True) for step in plan if step.probe is not None]
        predictions = tuple(dict.fromkeys((step.slots, step.who, probe) for step, probe in kinds))
        return cls(like, len(plan), predictions, halves, inputs.sample.device)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for runs that take the same memory."""
        return (self.inputs.signature(), self.steps, self.predictions, self.halves, self.device)


class Traced(NamedTuple):
    """What was counted of a run; see `LiveBytes`."""

    peak: int
    launches: int
    moved: int
    flops: int


def trace_run(batched: Batched[Any, Any], shape: RunShape, strategy: Strategy) -> Traced:
    """What a run takes. `peak`: bytes beside the weights and the adapters: caches, q, k, v copies, and the most that is
    alive in a step.

    A step in which all rows run the whole UNet, behind others that filled the caches; no other kind takes more.

    Args:
        batched: the model; `predictable`.
        shape: of the run.
        strategy: what the run spends memory on.
    """
    own = shape.inputs.sample.shape[0]
    traced = copy.copy(batched)
    live = LiveBytes(shape.device)
    with torch.no_grad(), unseen(batched.module), FakeTensorMode(), live:
        traced.keep_prompt = strategy.keep_prompt
        traced.stacked = batched.stack() if strategy.stack else {}
        inputs = shape.inputs.map(torch.empty_like)  # fake from here on
        timesteps = torch.empty(shape.steps, device=shape.device)
        conditions: dict[bool, Conditions] = {}
        caches: dict[bool, Tensor] = {}
        height, width = traced.latents(inputs).shape[-2:]
        images = own // shape.halves
        for slots, who, probe in (*shape.predictions, shape.predictions[0]):
            caches.pop(probe, None)  # let go of before its successor is made
            halves = 1 if probe else shape.halves
            given = inputs.last(images * halves)
            rows = torch.empty(len(slots) * images * halves, dtype=torch.int64, device=shape.device)
            everyone = Rows(rows, len(slots), halves, images, None, slots)
            conditions[probe] = traced.prepare(given, everyone, conditions.get(probe), timesteps)
            placing = None
            if who:  # as many adapters as are alone in some step
                count = max(1, *(1 + only for _, others, _ in shape.predictions for only in others))
                masks = torch.empty(count, images, height, width, device=shape.device)
                placing = Placing(who, masks, count, shape.device)
            with traced.running.placed(placing):
                _, caches[probe] = traced.run(given, everyone, everyone, None, conditions[probe], 0, strategy.at_once)
    return Traced(live.peak, live.launches, live.moved, live.flops)
