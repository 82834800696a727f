"""The prediction of folds: which launches are replaced, their work and bytes by hand, tables against the documents."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cmlora.lab.bench.counting import Trace
from cmlora.lab.bench.folding import (
    concat_folds,
    dearer,
    expanding,
    fused_work,
    geglu_folds,
    layers,
    shrink_folds,
    table,
    wide_folds,
)
from cmlora.lab.bench.roofline import GPUS
from cmlora_kernels import concat_channels, multi_lora_linear
from cmlora_kernels.tiles import linear_tile

H100, DOCUMENTS = GPUS["H100"], Path(__file__).resolve().parents[1] / "csrc_docs"


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, device="meta", dtype=dtype)


def linear(x, outer, parts=1):
    """Five adapters of rank 16 on the rows of x."""
    rows, _, inner = x.shape
    slots, scales = meta(rows, dtype=torch.int64), meta(5, parts, dtype=torch.float32)
    a, b = meta(5, parts * 16, inner), meta(5, outer, 16)
    return multi_lora_linear(x, meta(outer, inner), meta(outer), slots, a, b, scales)


def block():
    """A transformer block's launches in order; the wide linears have their update in place."""
    with Trace() as trace:
        x = linear(F.layer_norm(meta(10, 256, 1280), (1280,)), 3840, parts=3)
        x = linear(F.scaled_dot_product_attention(*(x.view(10, 256, 24, 160).transpose(1, 2).chunk(3, 1)))[:, 0], 1280)
        x = linear(F.layer_norm(meta(10, 256, 1280), (1280,)), 1280)
        hidden, gate = linear(F.layer_norm(meta(10, 256, 1280), (1280,)), 10240).chunk(2, -1)
        linear(hidden * F.gelu(gate), 1280)
    return trace.ops("sm_90")


def test_folds_are_the_layers_whose_input_a_norm_or_a_geglu_makes():
    ops = block()
    found = [(kind, producer.name, len(launches)) for kind, producer, launches, _ in layers(ops)]
    assert found == [
        ("q, k, v", "native_layer_norm", 1),
        ("attn2.to_q", "native_layer_norm", 1),
        ("ff.net.0.proj", "native_layer_norm", 2),
        ("ff.net.2", "geglu", 2),
    ]
    assert sum(op.problem is not None for op in ops) == 5, "attention's output is the fifth"


def test_bytes_and_flops_of_a_fold_are_those_by_hand():
    ops = block()
    m, width, elements = 2560, 1280, {}
    for fold in shrink_folds(ops, H100):
        assert sum(op.flops for op in fold.then) == sum(op.flops for op in fold.now), "a fold moves the shrink"
        elements[fold.kind] = [op.bytes // 2 for op in fold.then]
    norm = next(op for op in ops if op.name == "native_layer_norm").bytes // 2
    shrunk, a = m * 48, 5 * 48 * width
    assert elements["q, k, v"] == [norm + shrunk + a, m * 4 * width + 3840 * 1281 + shrunk + 5 * 3840 * 16]
    shrunk, a = m * 16, 5 * 16 * 4 * width
    geglu = 3 * m * 4 * width  # two halves read, their product written
    base, expand = m * 5 * width + width * (4 * width + 1), 2 * m * width + shrunk + 5 * width * 16
    assert elements["ff.net.2"] == [geglu + shrunk + a, base, expand]
    (fold,) = geglu_folds(ops)
    assert [op.bytes // 2 for op in fold.now + fold.then] == [2 * m * 4 * width, geglu, geglu]


@pytest.mark.parametrize(("tokens", "inner", "outer", "parts"), [(4096, 320, 960, 3), (77, 640, 650, 1)])
def test_work_of_a_fused_launch_is_what_its_grid_does(tokens, inner, outer, parts):
    with Trace() as trace:
        linear(meta(10, tokens, inner), outer, parts)
    (op,) = trace.ops("sm_90")
    tile, p = linear_tile(op.problem, "sm_90"), op.problem
    assert op.work == fused_work(p, tile.block_m, tile.block_n)
    shrinks = op.work - fused_work(p, tile.block_m, tile.block_n, shrinks=0)
    assert dearer(op, H100).work == op.work + shrinks > op.work
    assert expanding(p, H100)[0].work < op.work


def test_wide_tiles_never_cost_more_than_those_that_are_shipped():
    for fold in wide_folds(block(), H100):
        assert [op.bytes for op in fold.then] == [op.bytes for op in fold.now]
        assert all(then.work <= now.work for then, now in zip(fold.then, fold.now, strict=True))


def test_statistics_in_the_concat_spare_one_reading_of_it():
    with Trace() as trace:
        F.group_norm(concat_channels(meta(10, 640, 8, 8), meta(10, 320, 8, 8)), 32)
        F.group_norm(meta(2, 64, 8, 8), 32)
    (fold,) = concat_folds(trace.ops("sm_90"))
    spared = sum(op.bytes for op in fold.now) - sum(op.bytes for op in fold.then)
    assert spared == pytest.approx(2 * 10 * 960 * 64, rel=1e-2), "mean and deviation of every group lie beside y"


def test_the_documents_show_what_the_command_prints():
    pages = [(DOCUMENTS / name).read_text() for name in ("multi_lora.md", "feature_bank.md")]
    for line in table("sd15", H100):
        assert any(line in page for page in pages), line
