"""The prediction of folds: which launches are replaced, their work and bytes by hand, tables against the documents."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cmlora.lab.bench.columns import cards_table, column_folds, unpadded
from cmlora.lab.bench.counting import Trace
from cmlora.lab.bench.folding import (
    concat_folds,
    dearer,
    expanding,
    fused_work,
    gate_folds,
    geglu_folds,
    layers,
    lora_layers,
    shrink_folds,
    silu_folds,
    table,
    wide_folds,
)
from cmlora.lab.bench.roofline import GPUS
from cmlora_kernels import concat_channels, geglu, group_norm_silu, multi_lora_geglu, multi_lora_linear
from cmlora_kernels.tiles import linear_tile

H100, DOCUMENTS = GPUS["H100"], Path(__file__).resolve().parents[1] / "csrc_docs"


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, device="meta", dtype=dtype)


def linear(x, outer, parts=1, layer=multi_lora_linear):
    """Five adapters of rank 16 on the rows of x."""
    rows, _, inner = x.shape
    slots, scales = meta(rows, dtype=torch.int64), meta(5, parts, dtype=torch.float32)
    a, b = meta(5, parts * 16, inner), meta(5, outer, 16)
    return layer(x, meta(outer, inner), meta(outer), slots, a, b, scales)


def norm(x):
    return group_norm_silu(x, 32, *(meta(x.shape[1]) for _ in range(2)))


def block():
    """A transformer block's launches in order; the wide linears have their update in place."""
    with Trace() as trace:
        x = linear(F.layer_norm(meta(10, 256, 1280), (1280,)), 3840, parts=3)
        x = linear(F.scaled_dot_product_attention(*(x.view(10, 256, 24, 160).transpose(1, 2).chunk(3, 1)))[:, 0], 1280)
        x = linear(F.layer_norm(meta(10, 256, 1280), (1280,)), 1280)
        x = linear(F.layer_norm(meta(10, 256, 1280), (1280,)), 10240, layer=multi_lora_geglu)
        linear(x, 1280)
        geglu(meta(10, 256, 10240))
    return trace.ops("sm_90")


def test_folds_are_the_layers_whose_input_a_norm_makes():
    ops = block()
    found = [(kind, producer.name, len(launches)) for kind, producer, launches, _ in layers(ops)]
    assert found == [
        ("q, k, v", "native_layer_norm", 1),
        ("attn2.to_q", "native_layer_norm", 1),
        ("ff.net.0.proj", "native_layer_norm", 2),
    ]
    assert sum(op.problem is not None for op in ops) == 5, "attention's output and the gate's are the others"


def test_bytes_and_flops_of_a_fold_are_those_by_hand():
    ops = block()
    m, width, elements = 2560, 1280, {}
    for fold in shrink_folds(ops, H100):
        assert sum(op.flops for op in fold.then) == sum(op.flops for op in fold.now), "a fold moves the shrink"
        elements[fold.kind] = [op.bytes // 2 for op in fold.then]
    norm = next(op for op in ops if op.name == "native_layer_norm").bytes // 2
    shrunk, a = m * 48, 5 * 48 * width
    assert elements["q, k, v"] == [norm + shrunk + a, m * 4 * width + 3840 * 1281 + shrunk + 5 * 3840 * 16]
    half, wide = m * 4 * width, 8 * width
    shrunk, a = m * 16, 5 * 16 * width
    fused = m * width + half + wide * (width + 1) + shrunk + 5 * wide * 16  # the gate's half is what is written
    assert elements["ff.net.0.proj"] == [norm + shrunk + a, fused]
    for fold in geglu_folds(ops):
        assert [op.bytes // 2 for op in fold.now + fold.then] == [2 * half, 3 * half, 3 * half]
    assert len(geglu_folds(ops)) == 2
    (fold,) = gate_folds(ops, H100)
    spared = sum(op.bytes for op in fold.now) - sum(op.bytes for op in fold.then)
    assert spared == 2 * (half + 3 * half), "half of y is not written, and nothing of a gate's own moves"
    assert sum(op.flops for op in fold.now) == sum(op.flops for op in fold.then)


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
        norm(concat_channels(meta(10, 640, 8, 8), meta(10, 320, 8, 8)))
        norm(meta(2, 64, 8, 8))
    (fold,) = concat_folds(trace.ops("sm_90"))
    spared = sum(op.bytes for op in fold.now) - sum(op.bytes for op in fold.then)
    assert spared == pytest.approx(2 * 10 * 960 * 64, rel=1e-2), "weights lie beside y"


def test_silu_in_its_norm_spares_a_reading_and_a_writing_and_two_launches_one_of_them():
    """A single large row is cut into slices on an H100, whose statistics read x in a launch of their own."""
    with Trace() as trace:
        norm(meta(10, 640, 32, 32))
        F.silu(meta(4))
        norm(meta(1, 960, 128, 128))
    whole, slices = silu_folds(trace.ops("sm_90"))
    for fold, count, spared, elements in ((whole, 1, 2, 10 * 640 * 32 * 32), (slices, 2, 1, 960 * 128 * 128)):
        assert [op.name for op in fold.now] == ["native_group_norm", "silu"]
        assert len(fold.then) == count
        moved = sum(op.bytes for op in fold.now) - sum(op.bytes for op in fold.then)
        assert moved == pytest.approx(2 * spared * elements, rel=1e-2)


def test_columns_of_k_move_and_do_what_is_written_down():
    ops = block()
    for (p, launches), copied, free in zip(
        lora_layers(ops), column_folds(ops, H100, copied=True), column_folds(ops, H100, copied=False), strict=True
    ):
        m, ranks = p.rows * p.tokens, p.adapters * p.parts * p.rank
        assert copied.now == free.now == launches
        base = m * (p.inner + p.outer) + p.outer * (p.inner + p.bias)
        gate = 3 * m * p.outer // 2 if p.gated else 0
        moved = base + gate + m * p.inner + 4 * m * ranks + ranks * (p.inner + p.outer)
        assert sum(op.bytes for op in free.then) == 2 * moved
        assert sum(op.bytes for op in copied.then) == 2 * (moved + 2 * m * p.inner)
        assert sum(op.work for op in free.then) == 2 * m * (p.inner * p.outer + ranks * (p.inner + p.outer))
    assert len(list(lora_layers(ops))) == 5


def test_heads_of_40_are_the_only_ones_that_flash_kernels_pad_to_64():
    with Trace() as trace:
        for width in (40, 64, 80):
            F.scaled_dot_product_attention(*(meta(2, 8, 64, width) for _ in range(3)))
    ops = trace.ops("sm_90")
    (fold,) = unpadded(ops)
    assert (fold.now[0].work, fold.then[0].work) == (fold.now[0].flops * 64 // 40, fold.now[0].flops * 48 // 40)


def test_the_documents_show_what_the_command_prints():
    pages = [(DOCUMENTS / name).read_text() for name in ("multi_lora.md", "feature_bank.md", "geglu.md")]
    for line in (*table("sd15", H100), *cards_table("sd15", GPUS.values())):
        assert any(line in page for page in pages), line
