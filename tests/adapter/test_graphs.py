"""Captured steps: the same noise as eager ones, whatever changes between runs, and nothing but their buffers in use.

On a GPU the steps are captured as CUDA graphs. Elsewhere a tape stands in for one: it records every operation with the
very tensors that it was given, and replaying repeats the operations on them, with no Python of a step in between.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmlora
from cmlora.engine import spending
from cmlora.engine.footprint import Traced
from cmlora.engine.graphs import CudaCapture
from cmlora.engine.spending import waits_for_host
from cmlora.lab.bench.tiny import ATTENTION, DEVICE, SMALL, noises, three_adapters


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.played = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.played.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.played:
            for before, now in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
                    before.copy_(now)


def capture_tape(work):
    with Tape() as tape:
        work()
    return tape.replay


class Captures:
    """Counts what is captured and replayed."""

    def __init__(self):
        self.made = self.replayed = 0
        self.capture = CudaCapture() if DEVICE == "cuda" else capture_tape

    def __call__(self, work):
        self.made += 1
        replay = self.capture(work)

        def counted():
            self.replayed += 1
            replay()

        return counted


def accelerated(**choice):
    pipe = three_adapters(ATTENTION, **SMALL)
    cmlora.accelerate(pipe, **choice)
    if choice.get("cuda_graphs"):
        pipe.unet.forward.cmlora.denoiser.spending.capture = Captures()
    return pipe


CHOICES = (
    {"partition": "online", "online_gate": 0.9},
    {"partition": "offline", "combine": "deviation", "max_rows": 8},
    {"partition": "async", "max_cache_age": 2},
    {"method": "switch", "switch_step": 1},
    {"method": "composite", "cache_interval": 1},
)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_replayed_steps_equal_eager_ones_bit_for_bit(choice):
    """Prompts, schedules, weights, sizes, guidance and residuals change from run to run."""
    runs = (
        {"steps": 5},
        {"steps": 5},
        {"steps": 7, "seed": 1},
        {"steps": 5, "seed": 2, "cross_attention_kwargs": {"scale": 0.5}},
        {"steps": 5, "seed": 3, "size": 12},
        {"steps": 5, "seed": 4, "guidance": 1.0},
        {"steps": 5, "seed": 5, "controlled": True},
    )
    found = []
    for graphs in (False, True):
        pipe = accelerated(cuda_graphs=graphs, **{"cache_interval": 2, **choice})
        found.append([])
        for i, how in enumerate(runs):
            if i == 2:
                pipe.set_adapters(["character", "style", "background"], [0.3, 1.2, 0.7])
            found[-1] += noises(pipe, **how)
    captures = pipe.unet.forward.cmlora.denoiser.spending.capture
    assert captures.replayed > 12
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)


def test_replayed_steps_follow_merged_weights_that_come_and_go(monkeypatch):
    """As on a GPU whose free memory holds them in some runs: the next ones lie elsewhere, and weights are edited."""
    found = []
    for graphs in (False, True):
        pipe = accelerated(cuda_graphs=graphs, method="merge", cache_interval=2)
        found.append([])
        for seed, merged in enumerate((True, True, False, True, True)):
            monkeypatch.setattr(spending.Spending, "may_merge", merged)
            if seed == 4:
                layer = next(module for module in pipe.unet.modules() if "style" in getattr(module, "lora_B", {}))
                layer.lora_B["style"].weight.data.mul_(3)
            with monkeypatch.context() as context:
                if not merged:  # eagerly, so that what was captured before would still fit the next run
                    context.setattr(spending.Spending, "captured_steps", lambda *_: None)
                found[-1] += noises(pipe, steps=5, seed=seed)
    assert pipe.unet.forward.cmlora.denoiser.spending.capture.replayed > 8
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)


def test_one_graph_per_kind_of_step_serves_all_runs_of_a_shape():
    pipe = accelerated(cuda_graphs=True, partition="offline", cache_interval=2)
    denoiser = pipe.unet.forward.cmlora.denoiser
    for seed in range(5):
        noises(pipe, steps=6, seed=seed)
        if seed == 1:
            assert denoiser.spending.capture.made == 3, "first, refresh and reuse, each at its second occurrence"
            held = addresses(denoiser.spending.captured[0][1])
        if seed == 2:
            allocated = device_allocations()
    assert device_allocations() == allocated, "the allocator has a block for what a step hands out"
    assert denoiser.spending.capture.made == 3
    assert addresses(denoiser.spending.captured[0][1]) == held
    noises(pipe, steps=6, size=12)
    assert addresses(denoiser.spending.captured[0][1]) != held


def device_allocations():
    """Blocks that torch's allocator took from the GPU so far; without one there are none."""
    return torch.cuda.memory_stats()["num_device_alloc"] if DEVICE == "cuda" else 0


def addresses(captured):
    kept = [captured.cache, captured.noise, captured.one_step.times, *captured.inputs.tensors()]
    kept += [keys_values for keys_values, _ in captured.conditions._keys_values.values()]
    return [tensor.data_ptr() for tensor in kept]


class Allocations(TorchDispatchMode):
    """The tensors that operations return in memory which none of their arguments has."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.made += [t for t in made if t.untyped_storage().data_ptr() not in given]
        return out


def test_a_step_in_steady_state_allocates_nothing_but_what_it_hands_out():
    pipe = accelerated(cuda_graphs=True, partition="offline", cache_interval=2)
    denoiser = pipe.unet.forward.cmlora.denoiser
    denoiser.spending.capture = lambda work: (
        lambda: None
    )  # what a graph does on the device is none of Python's allocations
    noises(pipe, steps=6)
    seen = []
    forward = pipe.unet.forward

    def watched(*args, **kwargs):
        with Allocations() as allocations:
            out = forward(*args, **kwargs)
        seen.append((allocations.made, out.sample))
        return out

    pipe.unet.forward = watched
    noises(pipe, steps=6)
    for made, handed_out in (seen[3], seen[5]):
        (fresh,) = made
        assert fresh is handed_out


def test_all_kinds_of_steps_share_one_pool_which_counts_in_the_peak(monkeypatch):
    """A pool per kind of step held a step's activations for each of them, and no prediction knew of any."""
    handles, pools = iter(range(9)), []

    @contextmanager
    def recording(graph, pool):
        pools.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", EmptyGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    capture = CudaCapture()
    replays = [capture(lambda: None) for _ in range(3)]
    assert pools == [0, 0, 0]
    replays.clear()
    capture(lambda: None)
    assert pools[3] == 1, "the first pool went with its graphs"
    peaks = []
    for graphs in (False, True):
        pipe = accelerated(cuda_graphs=graphs, partition="offline", cache_interval=2)
        noises(pipe, steps=4)
        peaks.append(cmlora.summary(pipe).peak_bytes - cmlora.summary(pipe).adapter_bytes)
    assert peaks[1] > 1.5 * peaks[0]


class EmptyGraph:
    def replay(self):
        pass


def test_hooks_and_foreign_processors_run_eagerly():
    pipe = accelerated(cuda_graphs=True, partition="offline")
    seen = []
    pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(1))
    noises(pipe, steps=6)
    assert len(seen) == 6 * 4, "one prediction at a time, three adapters and the base model"
    assert pipe.unet.forward.cmlora.denoiser.spending.capture.made == 0


def test_without_cuda_the_call_says_so():
    pipe = three_adapters(ATTENTION, device="cpu", **SMALL)
    cmlora.accelerate(pipe, cuda_graphs=True)
    with pytest.raises(cmlora.RunError, match="needs a pipeline on a CUDA device, got one on cpu"):
        noises(pipe)


def test_auto_captures_where_it_is_worth_it_and_gives_up_with_one_warning(monkeypatch):
    """On the CPU nothing is captured; where the host is what a run waits for a capture that fails costs a warning."""
    want = noises(accelerated(partition="offline", cache_interval=2), steps=6)
    pipe = accelerated(cuda_graphs="auto", partition="offline", cache_interval=2)
    denoiser = pipe.unet.forward.cmlora.denoiser
    captures = denoiser.spending.capture
    if DEVICE == "cpu":
        assert all(map(torch.equal, noises(pipe, steps=6), want))
        assert captures.made == 0
    monkeypatch.setattr(denoiser.spending, "_worth_capturing", lambda *_: True)

    def failing(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(denoiser.spending, "capture", failing)
    with pytest.warns(RuntimeWarning, match="steps run eagerly.*not permitted") as warned:
        got = noises(pipe, steps=6)
    assert len([w for w in warned if "eagerly" in str(w.message)]) == 1
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    ("steps", "reserve", "waits", "worth"),
    [
        (2.1, 0.0, True, True),
        (1.9, 0.0, True, False),
        (1.1, 1.0, True, True),
        (0.9, 9.0, True, False),
        (9.0, 9.0, False, False),
    ],
    ids=["fits", "too little", "a step in reserve", "no pool from the reserve", "waits for the device"],
)
def test_auto_captures_where_a_pool_of_one_more_step_fits(steps, reserve, waits, worth, monkeypatch):
    """Memory in steps, as the driver and torch would tell it of a GPU."""
    pipe = accelerated(cuda_graphs="auto", partition="offline", cache_interval=2)
    noises(pipe, steps=2)
    denoiser = pipe.unet.forward.cmlora.denoiser
    held, run = denoiser.spending, denoiser.last_run
    held.predicted_peak(run)
    peak = held._peaks[run.lanes[0].footprint.key, run.strategy][1].peak
    monkeypatch.setattr(type(held), "device", torch.device("cuda"))
    monkeypatch.setattr(spending, "free_bytes", lambda _: (int(steps * peak), int(reserve * peak)))
    monkeypatch.setattr(spending, "arch_of", lambda _: "sm_90")
    monkeypatch.setattr(spending, "waits_for_host", lambda *_: waits)
    assert held._worth_capturing(run, run.lanes[0]) == worth


def test_what_waits_for_the_host_is_told_from_counts():
    """SD1.5's few rows on a large GPU are launched more slowly than they run; on a small one they are not."""
    traced = Traced(peak=0, launches=700, moved=3_000_000_000, flops=1_600_000_000_000)
    assert waits_for_host(traced, "sm_90/132/NVIDIA H100 80GB HBM3", torch.float16)
    assert not waits_for_host(traced, "sm_86/28/NVIDIA GeForce RTX 3060", torch.float16)
