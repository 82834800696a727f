"""What a step launches: the operations of a dispatch trace, with the bytes and flops of each.

On `meta` tensors a step runs in full, as shapes alone, so what is counted is what a GPU would be asked to do. Each of
our own ops counts as the kernels that it launches there, by the kernels' own counts (`cmlora_kernels.launch.Launch`).
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from cmlora.lab.bench.launched import KERNELS, Op, Unit, bytes_of, tensors_in

VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select"),
    *("alias", "as_strided", "split", "chunk", "unbind", "reshape", "_reshape_alias", "lift_fresh", "detach"),
    *("empty", "empty_like", "new_empty", "split_with_sizes", "empty_strided", "new_empty_strided"),
    *("view_as_complex", "view_as_real"),
}
WRITE_ONLY = {"copy_", "fill_", "zero_"}  # what they write is not read before
PICKING = {"index_select", "index", "gather", "embedding"}  # of their source they read what they return


class Operations(TorchDispatchMode):
    """Counts dispatched operations by name; `total` leaves out the views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Operations that launch something."""
        return sum(count for name, count in self.seen.items() if name not in VIEWS)


class Trace(TorchDispatchMode):
    """Records what runs on `meta`; operations on the host's own numbers (a scheduler's tables) are no launches."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Callable[[str], Iterator[Op]]] = []
        self._one_kernel = _OneKernel(self)

    def __enter__(self) -> Trace:
        self._one_kernel.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._one_kernel.__exit__(*error)

    def ops(self, arch: str) -> list[Op]:
        """The kernels in order, as a target such as "sm_90" launches them."""
        return [op for entry in self._seen for op in entry(arch)]

    @property
    def noted(self) -> list[Callable[[str], Iterator[Op]]]:
        """What was recorded so far, for `repeat`."""
        return list(self._seen)

    def repeat(self, noted: Iterable[Callable[[str], Iterator[Op]]]) -> None:
        """Record the same once more."""
        self._seen += noted

    def add(self, op: Op) -> None:
        """Record a kernel that is the same on every target."""
        self._seen.append(lambda arch: iter((op,)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), func.overloadpacket.__name__
        if func.namespace == "cmlora_kernels":
            self._seen.append(KERNELS[name](*args, **kwargs))
        elif name not in VIEWS and any(t.is_meta for t in tensors_in((args, kwargs, out))):
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            unit: Unit = "library" if flops else "none"
            self.add(Op(name, _moved(func, name, args, kwargs, out), flops, flops, unit))
        return out


class _OneKernel(TorchFunctionMode):
    """What `meta` takes apart and CUDA runs as one kernel: scaled dot-product attention, and torch's RMS norm."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = list(tensors_in((args, kwargs)))
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(tensors)
        if func is torch.nn.functional.rms_norm and len({t.dtype for t in tensors}) == 1:
            self.trace.add(Op("rms_norm", sum(map(bytes_of, tensors)) + bytes_of(tensors[0])))
            return torch.empty_like(tensors[0])
        return func(*args, **(kwargs or {}))

    def _attention(self, tensors: list[Tensor]) -> Tensor:
        query, key, value = tensors[:3]
        rows, heads, tokens, width = query.shape
        flops = sdpa_flop_count(query.shape, key.shape, value.shape)
        padded = -(-width // 32) * 32  # flash kernels hold whole multiples of 32 columns of a head
        moved = sum(map(bytes_of, tensors)) + bytes_of(query)
        self.trace.add(Op("attention", moved, flops, flops * padded // width, "attention"))
        return query.new_empty(rows, tokens, heads, width).transpose(1, 2)  # as the CUDA kernels lay it


def _moved(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    given, made = list(tensors_in((args, kwargs))), list(tensors_in(out))
    if name in PICKING:
        return 2 * sum(map(bytes_of, made)) + sum(map(bytes_of, given[1:]))
    read = given[1:] if name in WRITE_ONLY else given
    written = made or given[:1]  # an op that returns nothing wrote into its first argument
    return sum(map(bytes_of, read)) + sum(map(bytes_of, written))
