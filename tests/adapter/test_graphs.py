"""Captured steps: the same noise as eager ones, whatever changes between runs, and nothing but their buffers in use.

On a GPU the steps are captured as CUDA graphs. Elsewhere a tape stands in for one: it records every operation with the
very tensors that it was given, and replaying repeats the operations on them, with no Python of a step in between.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmlora
from cmlora.engine.graphs import capture_cuda
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

    def __call__(self, work):
        self.made += 1
        replay = (capture_cuda if DEVICE == "cuda" else capture_tape)(work)

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
