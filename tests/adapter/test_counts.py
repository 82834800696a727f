"""What a step costs, counted: device operations, host reads, floating-point operations; on SD1.5 itself, on `meta`."""

import collections

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cmlora
from tests.models import Sequential, add_lora, call, sd_pipe

VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "detach",
    ),
    *("alias", "as_strided", "split", "chunk", "unbind", "reshape", "_reshape_alias", "lift_fresh"),
    *("empty", "empty_like", "new_empty", "split_with_sizes"),
}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(count for name, count in self.seen.items() if name not in VIEWS)


def pipe_with(count):
    """SD1.5's blocks, so that the number of operations is SD1.5's own, at a width that is quick."""
    pipe = sd_pipe()
    names = [add_lora(pipe.unet, f"lora_{i}", seed=i) for i in range(count)]
    pipe.set_adapters(names)
    return pipe, names


def per_step(pipe, short=2, long=6):
    """Operations and host reads of a step, averaged over whole calls; what a call costs once falls out."""
    counted = []
    for steps in (short, long):
        call(pipe, steps)
        with Operations() as operations:
            call(pipe, steps)
        counted.append((operations.total, operations.seen["_local_scalar_dense"]))
    return [(b - a) / (long - short) for a, b in zip(*counted, strict=True)]


@pytest.fixture(scope="module")
def counts():
    stage = {
        "combine": "mean",
        "partition": "offline",
        "offline_boundary": 1.0,
        "dominant_decay": 0,
        "cache_interval": 2,
    }
    counted = {"plain": per_step(sd_pipe())}
    for n in (2, 5, 8):
        pipe, names = pipe_with(n)
        cmlora.accelerate(pipe, **stage)
        counted[n] = per_step(pipe)
    pipe, names = pipe_with(5)
    Sequential(pipe.unet, names, interval=2, dominance=4.5)
    counted["loop"] = per_step_of_loop(pipe, names)
    return counted


def per_step_of_loop(pipe, names):
    counted = []
    for steps in (2, 6):
        pipe.unet.__dict__.pop("forward", None)
        Sequential(pipe.unet, names, interval=2, dominance=4.5)
        with Operations() as operations:
            call(pipe, steps)
        counted.append((operations.total, 0))
    return [(b - a) / 4 for a, b in zip(*counted, strict=True)]


def test_device_operations_are_at_most_a_fifth_of_the_loops(counts):
    assert counts[5][0] <= min(450, counts["loop"][0] / 5), counts


def test_device_operations_hardly_grow_with_the_number_of_adapters(counts):
    assert counts[8][0] < counts[2][0] * 1.05, counts


def test_no_host_read_beyond_the_plain_pipes_own(counts):
    assert all(counts[n][1] <= counts["plain"][1] for n in (2, 5, 8)), counts


def test_set_adapters_is_never_called_in_a_run(monkeypatch):
    pipe, _ = pipe_with(3)
    cmlora.accelerate(pipe)
    monkeypatch.setattr(type(pipe.unet), "set_adapters", lambda *a, **k: pytest.fail("set_adapters in a run"))
    call(pipe)


def test_flops_on_sd15_are_7_percent_below_the_loops():
    """One reuse and one refresh step of SD1.5 at 512 px, N = 5, on `meta`: shapes only, no weights."""

    def flops(run):
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
            ).eval()
        pipe = sd_pipe(unet)
        for i in range(5):
            add_lora_meta(unet, f"lora_{i}")
        return run(pipe)

    def add_lora_meta(unet, name):
        from peft import LoraConfig

        unet.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), adapter_name=name)

    def steps(pipe):
        sample = torch.empty(2, 4, 64, 64, device="meta")
        context = torch.empty(2, 77, 768, device="meta")
        pipe.scheduler.set_timesteps(4)
        counts = []
        for t in pipe.scheduler.timesteps:
            with FlopCounterMode(display=False) as counter:
                pipe.unet(sample, t, context, return_dict=False)
            counts.append(counter.get_total_flops())
        return counts[1] + counts[2]

    def ours(pipe):
        pipe.unet.set_adapters([f"lora_{i}" for i in range(5)])
        cmlora.accelerate(pipe, combine="mean", partition="offline", cache_interval=2)
        return steps(pipe)

    def loop(pipe):
        Sequential(pipe.unet, [f"lora_{i}" for i in range(5)], interval=2, dominance=4.5)
        return steps(pipe)

    assert flops(ours) <= 0.93 * flops(loop)
