"""The third part: the library's GEMM against our strategies, the cost of a launch, the memory's bandwidth.

On a CPU the same code runs on cut shapes with the torch definitions: it shows that it works, and its times are the
CPU's. Prints one JSON line a measurement.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional as F

from cmlora.lab.doctor.cases import Inputs, make_inputs
from cmlora_kernels import merge_weights, merged_linear, multi_lora_add_
from cmlora_kernels.cards import Measured, triton_version
from cmlora_kernels.costs import costs
from cmlora_kernels.launch import arch_of
from cmlora_kernels.multi_lora import linear_definition
from cmlora_kernels.multi_lora_linear import fused_linear
from cmlora_kernels.tiles import Problem, cdiv, linear_tile, rank_bucket

SHAPES = (  # rows, tokens, in, out: SD1.5's and SDXL's linear layers, by how much of a step they are
    (10, 4096, 320, 320),
    (10, 4096, 320, 2560),
    (10, 4096, 1280, 320),
    (10, 1024, 640, 640),
    (10, 1024, 640, 5120),
    (10, 256, 1280, 1280),
    (2, 4096, 640, 640),
    (2, 4096, 2560, 640),
    (2, 1024, 1280, 1280),
    (2, 1024, 1280, 10240),
    (2, 1024, 5120, 1280),
    (10, 1024, 1280, 1280),
)
ADAPTERS, RANK = 5, 16


@dataclass(frozen=True)
class Timed:
    """Seconds of one shape.

    Attributes:
        name: rows x tokens x in -> out.
        library: F.linear without any LoRA. fused, add, merged: the strategies, LoRAs included.
        chosen: which of them runs. padded: flops of the fused kernel in whole tiles, of the base layer's.
    """

    name: str
    library: float
    fused: float
    add: float
    merged: float
    chosen: str
    padded: float

    @property
    def share(self) -> float:
        """Speed of our GEMM, of the library's: per flop that the matrix units do."""
        return self.padded * self.library / self.fused


def time_shape(shape: tuple[int, int, int, int], device: torch.device, seconds: float) -> Timed:
    """Medians of all strategies in turn."""
    rows, tokens, inner, outer = shape
    gpu = device.type == "cuda"
    p = Problem(rows, tokens, inner, outer, RANK, 1, ADAPTERS, torch.float16 if gpu else torch.float32, True)
    i = make_inputs(p, device)
    bank, y = merge_weights(i.weight, i.a, i.b, i.scales), i.x.new_empty(rows, tokens, outer)
    runs: dict[str, Callable[[], object]] = {
        "library": lambda: F.linear(i.x, i.weight, i.bias),
        "fused": lambda: _fused(i, y, gpu),
        "add": lambda: multi_lora_add_(F.linear(i.x, i.weight, i.bias), i.x, *i[3:7]),
        "merged": lambda: merged_linear(i.x, bank, i.bias, i.slots),
    }
    took = alternate(runs, device, seconds)
    target = arch_of(device)
    tile = linear_tile(p, target)
    padded = cdiv(outer, tile.block_n) * (tile.block_n + rank_bucket(RANK)) / outer
    options = [option for option in costs(p, target) if not option.memory]
    return Timed(f"{rows}x{tokens}x{inner}->{outer}", **took, chosen=options[0].strategy, padded=padded)


def _fused(i: Inputs, y: torch.Tensor, gpu: bool) -> object:
    if gpu:
        return fused_linear(*i[:7], y)
    return linear_definition(*i[:7])


def alternate(runs: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """The median time of a call of each, one after the other in turn, so that all see the same clocks."""
    for run in runs.values():
        run()  # compiles
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while len(times["library" if "library" in runs else next(iter(runs))]) < 3 or time.perf_counter() < end:
        for name, run in runs.items():
            times[name].append(once(run, device))
    return {name: statistics.median(took) for name, took in times.items()}


def once(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of a call: on a GPU by events around several, so that launches overlap as they do in a step."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / repeats


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    size = 2**28 if device.type == "cuda" else 2**25
    x = torch.ones(size // 4, device=device)
    y = torch.empty_like(x)
    return 2 * size / alternate({"copy": lambda: y.copy_(x)}, device, 0.3)["copy"]


def library_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of the library's GEMM where it is at its best."""
    n = 4096 if device.type == "cuda" else 384
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / alternate({"gemm": lambda: a @ b}, device, 0.3)["gemm"]


def launch_seconds(device: torch.device) -> float:
    """Host seconds of one launch of ours, the device idle: the add kernel's on one token; on a CPU its definition's."""
    p = Problem(1, 1, 64, 64, RANK, 1, 1, torch.float16 if device.type == "cuda" else torch.float32, False)
    i = make_inputs(p, device)
    y = i.x.new_zeros(1, 1, 64)
    took = []
    for _ in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            multi_lora_add_(y, i.x, *i[3:7])
        took.append((time.perf_counter() - start) / 50)
    return statistics.median(took[2:])


@torch.inference_mode()
def measure(device: torch.device, card: str, seconds: float) -> Iterator[Timed | Measured]:
    """All shapes, and then what is written to the card's file."""
    gpu = device.type == "cuda"
    found: list[Timed] = []
    end = time.perf_counter() + seconds
    for rows, tokens, inner, outer in SHAPES:
        if found and time.perf_counter() > end:
            break
        shape = (rows, tokens, inner, outer) if gpu else (rows, max(tokens // 128, 8), inner // 5, outer // 5)
        found.append(time_shape(shape, device, min(0.5, seconds / 30)))
        yield found[-1]
    half = torch.float16 if gpu else torch.float32
    yield Measured(
        card,
        triton_version(),
        bandwidth=bandwidth(device),
        half_flops=library_flops(device, half),
        float_flops=library_flops(device, torch.float32),
        triton_share=min(1.5, statistics.median(timed.share for timed in found)),
        launch_seconds=launch_seconds(device),
    )


def main() -> None:
    """Arguments: the card's name and seconds."""
    card, seconds = sys.argv[1], float(sys.argv[2])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for result in measure(device, card, seconds):
        kind = "timed" if isinstance(result, Timed) else "measured"
        sys.stdout.write(json.dumps({kind: asdict(result)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
