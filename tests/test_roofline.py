"""The prediction for GPUs: counts against torch's own, times against sums by hand, tables against the documents."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cmlora.lab.bench.counting import Trace
from cmlora.lab.bench.launched import Op
from cmlora.lab.bench.loop import CachedLoop
from cmlora.lab.bench.roofline import (
    GPUS,
    Assumptions,
    Gpu,
    predict_all,
    step_time,
    trace_all,
)
from cmlora.lab.bench.roofline_tables import assumptions_table, times_table
from cmlora.lab.bench.steps import INTERVAL, RUN, MetaPipe
from cmlora_kernels import multi_lora_linear
from cmlora_kernels.chips import data_sheet, split

ROOT = Path(__file__).resolve().parents[1]
SIMPLE = Gpu("simple", "sm_90", half_flops=100e12, bandwidth=1e12, source="round numbers", best=0.8)
GIVEN = Assumptions(host_us=10, kernel_us=3, size_share=0.625, triton_share=0.8, attention_share=0.25)


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.mark.parametrize(
    ("op", "part", "milliseconds"),
    [
        (Op("gemm", 1000, work=int(50e9), unit="library"), "compute", 1.0),  # 50 GFLOP at half of 100 TFLOP/s
        (Op("triton gemm", 1000, work=int(40e9), unit="triton"), "compute", 1.0),
        (Op("attention", 1000, work=int(25e9), unit="attention"), "compute", 1.0),
        (Op("addition", int(0.8e9)), "memory", 1.0),  # 0.8 GB at 0.8 of 1 TB/s
        (Op("thin gemm", int(1.6e9), work=int(50e9), unit="library"), "memory", 2.0),
        (Op("small", 1000), "small", 0.003),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else None,
)
def test_a_kernel_takes_as_long_as_the_slowest_of_its_bounds(op, part, milliseconds):
    time = step_time([op], SIMPLE, GIVEN)
    assert getattr(time, part) == pytest.approx(milliseconds * 1e-3)
    assert time.device == getattr(time, part)


def test_a_gpus_library_is_as_fast_as_was_measured_on_it():
    """Half of the share that a GPU's best GEMM reaches of its peak is twice the time."""
    op = Op("gemm", 1000, work=int(50e9), unit="library")
    slow = replace(SIMPLE, best=SIMPLE.best / 2)
    assert step_time([op], slow, GIVEN).device == pytest.approx(2 * step_time([op], SIMPLE, GIVEN).device)
    for gpu in GPUS.values():
        known = data_sheet(*split(gpu.arch))
        assert known.half_share == Assumptions().size_share * gpu.best
    assert len({gpu.best for gpu in GPUS.values()}) > 3


def test_the_loop_launches_what_it_does_pass_by_pass():
    pipe = MetaPipe("sd15", 3)
    noted = pipe.steps("loop", 3)
    with torch.no_grad(), CachedLoop(pipe.pipe.unet, pipe.names(3), interval=INTERVAL, dominance=2.5):
        passes = list(pipe.run(first=1, last=INTERVAL))
    for short, whole in zip(noted, passes, strict=True):
        assert short.trace.ops("sm_90") == whole.trace.ops("sm_90")
        assert short.set_adapters == whole.set_adapters == 3


def test_the_default_has_the_base_models_row_and_a_merge_none_of_low_rank():
    """Rows of the widest layer: N + 1 predictions of two halves by default, N with the papers' mean, one of a merge."""
    pipe = MetaPipe("sd15", 3)
    widest = {
        method: max(op.problem.rows for step in pipe.steps(method, 3) for op in step.trace.ops("sm_90") if op.problem)
        for method in ("cmlora", "cmlora, mean")
    }
    assert widest == {"cmlora": 8, "cmlora, mean": 6}
    routed = pipe.steps("routed", 3)
    assert sum(step.times for step in routed) == RUN
    assert [step.times for step in routed] == [1, 1, 12, 11], "two steps find masks"


def test_a_step_takes_as_long_as_the_slower_of_device_and_host():
    small = [Op("small", 1000)] * 100
    by_host = step_time(small, SIMPLE, GIVEN, extra_host=20e-3)
    assert (by_host.step, by_host.waiting) == pytest.approx((21e-3, 20.7e-3))
    by_device = step_time([*small, Op("addition", int(8e9))], SIMPLE, GIVEN)
    assert (by_device.step, by_device.waiting) == pytest.approx((10.3e-3, 0))


def test_bytes_are_those_of_distinct_elements():
    x, row = meta(4, 8), meta(1, 8)
    with Trace() as trace:
        x + row.expand(4, 8)  # 32 + 8 read, 32 written
        x.copy_(row)  # 8 read, 32 written
        x.add_(row)  # 32 + 8 read, 32 written
        x.index_select(0, meta(2, dtype=torch.int64))  # 16 of its elements read and written, two int64
        x.transpose(0, 1)  # nothing
    assert [op.bytes for op in trace.ops("sm_90")] == [2 * 72, 2 * 40, 2 * 72, 2 * 32 + 16]


def test_flops_of_the_plain_unet_are_those_that_torch_counts():
    pipe = MetaPipe("sd15", 2)
    (step,) = pipe.steps("plain", 1)
    unet = pipe.pipe.unet
    unet.disable_adapters()
    with FlopCounterMode(display=False) as counter:
        unet(meta(2, 4, 64, 64), 1, meta(2, 77, 768))
    assert sum(op.flops for op in step.trace.ops("sm_90")) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("tokens", "inner", "outer", "parts", "kernels"),
    [(64, 1280, 3840, 3, 1), (256, 5120, 1280, 1, 2)],
    ids=["fused", "add"],
)
def test_flops_of_our_linear_are_those_of_its_formula(tokens, inner, outer, parts, kernels):
    x, weight, slots = meta(10, tokens, inner), meta(outer, inner), meta(10, dtype=torch.int64)
    a, b, scales = meta(5, parts * 16, inner), meta(5, outer, 16), meta(5, parts, dtype=torch.float32)
    with Trace() as trace:
        multi_lora_linear(x, weight, None, slots, a, b, scales)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(x, weight)
        down = torch.bmm(x, a[slots].transpose(1, 2)).chunk(parts, 2)
        for part, up in zip(down, b[slots].chunk(parts, 1), strict=True):
            torch.bmm(part, up.transpose(1, 2))
    ops = trace.ops("sm_90")
    assert len(ops) == kernels
    assert sum(op.flops for op in ops) == counter.get_total_flops()
    assert sum(op.work for op in ops) >= sum(op.flops for op in ops)


def test_the_documents_show_what_the_command_prints():
    given = Assumptions()
    wanted = [(method, 2) for method in ("plain", "loop", "cmlora", "routed", "merge")]
    found = predict_all("sd15", trace_all("sd15", wanted), GPUS.values(), given)
    page = (ROOT / "csrc_docs" / "roofline.md").read_text()
    for line in (*times_table("sd15", found), *assumptions_table(given, GPUS.values())):
        assert line in page
    named = ("RTX 4090", "L4", "A100 SXM", "H100 SXM", "MI300X")
    brief = [p for p in found if p.gpu in named]
    readme = (ROOT / "README.md").read_text()
    for line in times_table("sd15", brief):
        assert line in readme
