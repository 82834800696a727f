"""What a step costs, counted: device operations, host reads, floating-point operations; on SD1.5 itself, on `meta`."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cmlora
from cmlora.lab.bench.counting import Operations
from cmlora.lab.bench.loop import CachedLoop
from cmlora.lab.bench.steps import MetaPipe
from cmlora.lab.bench.tiny import ATTENTION, EVERYTHING, add_lora, call, sd_pipe
from cmlora_kernels.flops import FLOPS


def pipe_with(count):
    """SD1.5's blocks, so that the number of operations is SD1.5's own, at a width that is quick."""
    pipe = sd_pipe()
    names = [add_lora(pipe.unet, f"lora_{i}", seed=i) for i in range(count)]
    pipe.set_adapters(names)
    return pipe, names


def per_step(pipe, peer_of=None, short=2, long=6):
    """Operations and host reads of a step, averaged over whole calls; what a call costs once falls out.

    peer_of: adapters of the loop that runs in the place of the UNet's forward.
    """
    counted = []
    for steps in (short, long):
        call(pipe, steps)
        peer = CachedLoop(pipe.unet, peer_of, interval=2, dominance=len(peer_of) - 0.5) if peer_of else nullcontext()
        with peer, Operations() as operations:
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
        pipe, _ = pipe_with(n)
        cmlora.accelerate(pipe, **stage)
        counted[n] = per_step(pipe)
    counted["loop"] = per_step(*pipe_with(5))
    return counted


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


def test_flops_on_sd15_are_7_percent_below_the_loops(sd15):
    """One reuse and one refresh step of SD1.5 at 512 px, N = 5, on `meta`: shapes only, no weights."""
    ours, loop = (
        sum(op.flops for step in sd15.steps(method, 5) for op in step.trace.ops("sm_90"))
        for method in ("cmlora, mean", "loop")
    )
    assert ours <= 0.93 * loop


@pytest.fixture(scope="module")
def sd15():
    return MetaPipe("sd15", 5)


@pytest.mark.parametrize("interval", [1, 2])
def test_a_routed_image_takes_at_most_a_quarter_more_flops_than_a_merged_one(sd15, interval):
    """25 steps of SD1.5 at 512 px, N = 5; two of them have masks to make, from the conditional half."""

    def flops(**config):
        first, second, refresh, reuse = (
            sum(op.flops for op in step.trace.ops("sm_90"))
            for step in sd15.first_steps(5, cache_interval=interval, **config)
        )
        refreshes = len(range(2, 25, interval))
        return first + second + refreshes * refresh + (23 - refreshes) * reuse, (refresh, reuse)

    routed, behind = flops(method="routed", mask_steps=2)
    merge, merged = flops(method="merge", merge_weights=False)
    assert behind == pytest.approx(merged, rel=5e-3)
    assert routed <= 1.25 * merge


@pytest.mark.parametrize("interval", [1, 2])
def test_behind_its_mask_steps_routed_launches_what_a_merge_does(interval):
    pipe, _ = pipe_with(5)
    counted = {}
    for method in ("merge", "routed"):
        cmlora.accelerate(pipe, method=method, cache_interval=interval, merge_weights=False, winograd=False)
        counted[method] = per_step(pipe, short=4, long=8)
    assert counted["routed"][0] <= 1.05 * counted["merge"][0]
    assert counted["routed"][1] <= counted["merge"][1]


@pytest.mark.parametrize("pattern", [ATTENTION, EVERYTHING], ids=["attention", "convolutions too"])
def test_torchs_flop_counter_sees_our_ops(pattern):
    """One adapter as a batch of one costs what PEFT's own layers cost, by torch's counter."""
    pipe = sd_pipe()
    add_lora(pipe.unet, "one", pattern=pattern)

    def flops():
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            call(pipe, 2, guidance=1.0)
        return counter.get_total_flops()

    want = flops()
    with cmlora.accelerated(pipe, method="merge", cache_interval=1, merge_weights=False):
        got = flops()
    with cmlora.accelerated(pipe, method="merge", cache_interval=1, merge_weights=True):
        assert 0.8 * want < flops() < got
    # the prompt's keys and values, and the time embeddings, are computed once instead of twice
    assert 0.95 * want < got <= want


def test_attention_on_the_cpu_counts_as_elsewhere():
    """Torch's counter takes the CPU's kernel for nothing; on `meta` attention is made of products that it knows."""
    query, key, value = (torch.randn(2, 3, tokens, 16) for tokens in (40, 24, 24))
    counts = []
    for device in ("cpu", "meta"):
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            torch.nn.functional.scaled_dot_product_attention(*(x.to(device) for x in (query, key, value)))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 2 * 3 * 40 * 24 * 16
