"""Slots of several adapters' ranks, a weight per token for each, and ranks wider than one chunk, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cmlora_kernels.multi_lora as ops
from cmlora_kernels import multi_lora_add_, multi_lora_conv2d, multi_lora_conv2d_add_, multi_lora_linear
from cmlora_kernels.costs import Cost, choose, costs
from cmlora_kernels.multi_lora_add import triton_add
from cmlora_kernels.tiles import Problem, rank_chunks
from tests.kernels.test_multi_lora import DEVICE, DTYPES, Case, assert_as_good, expected, make, poisoned

SHAPES = {  # rows, tokens, in, out, rank, parts
    "five_adapters_of_8": (3, 128, 128, 128, 40),
    "prompt_77_tokens": (3, 77, 96, 80, 16),
    "nothing_divides": (2, 33, 70, 45, 5),
    "qkv_stacked": (3, 40, 64, 120, 8, 3),
    "size_one_everywhere": (1, 1, 1, 1, 1),
    "two_chunks": (3, 20, 48, 64, 136),
    "qkv_stacked_three_chunks": (3, 20, 32, 48, 257, 3),
}


def routed(c: Case, weights: int = 3) -> tuple[Tensor, Tensor]:
    """Token weights, one adapter's of them 0 and 1, and groups that leave some columns alone."""
    g = torch.Generator().manual_seed(c.x.shape[1])
    token_weights = torch.rand(c.x.shape[0], weights, c.x.shape[1], generator=g)
    token_weights[:, 0] = token_weights[:, 0].round()
    groups = torch.randint(-1, weights, c.a.shape[:2], generator=g, dtype=torch.int32)
    return token_weights.to(DEVICE), groups.to(DEVICE)


def exact(
    c: Case, token_weights: Tensor, groups: Tensor, y: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
    """The layer (or y + update) in NumPy float64, one column of x A^T after the other."""
    x, a, b, scales, weights = (t.double().cpu().numpy() for t in (c.x, c.a, c.b, c.scales, token_weights))
    if y is None:
        y = expected(c._replace(slots=torch.full_like(c.slots, -1)))
    rank, parts = b.shape[2], scales.shape[1]
    width = b.shape[1] // parts
    for row, slot in enumerate(c.slots.tolist()):
        for column, group in enumerate(groups[slot].tolist() if slot >= 0 else []):
            part = column // rank
            down = x[row] @ a[slot, column] * scales[slot, part] * (1 if group < 0 else weights[row, group])
            outputs = slice(part * width, (part + 1) * width)
            y[row, :, outputs] += np.outer(down, b[slot, outputs, column % rank])
    return y


@pytest.mark.parametrize("strategy", ["fused", "add"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_adapter_acts_where_its_weights_let_it(shape, dtype: torch.dtype, strategy: str, monkeypatch) -> None:
    c = make(*shape, dtype=dtype)
    token_weights, groups = routed(c)
    definition = ops.linear_definition(*c, token_weights, groups)
    monkeypatch.setattr(ops, "choose", lambda *_: Cost(strategy, 0.0, 0, 0, 0))
    monkeypatch.setattr(ops, "_route", ops._route.__wrapped__)
    monkeypatch.setattr(ops, "linear_definition", None)
    got = multi_lora_linear(*c, "triton", token_weights=token_weights, groups=groups)
    assert_as_good(got, definition, exact(c, token_weights, groups))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weighted_update_added_in_place(shape, dtype: torch.dtype) -> None:
    c = make(*shape, dtype=dtype)
    token_weights, groups = routed(c)
    base = F.linear(c.x, c.weight)
    update = (c.x, c.slots, c.a, c.b, c.scales)
    got, definition = (
        multi_lora_add_(base.clone(), *update, backend, token_weights=token_weights, groups=groups)
        for backend in ("triton", "torch")
    )
    assert_as_good(got, definition, exact(c, token_weights, groups, base.double().cpu().numpy()))
    assert torch.equal(got[c.slots < 0], base[c.slots < 0])


@pytest.mark.parametrize("rank", [129, 200, 256])
@pytest.mark.parametrize("parts", [1, 2])
def test_wide_ranks_run_in_chunks(rank: int, parts: int, monkeypatch) -> None:
    c = make(3, 33, 40, 48, rank, parts, dtype=torch.float16)
    definition = ops.linear_definition(*c)
    monkeypatch.setattr(ops, "linear_definition", None)
    monkeypatch.setattr(ops, "add_definition", None)
    monkeypatch.setattr(ops, "_route", ops._route.__wrapped__)
    for strategy in ("fused", "add"):
        monkeypatch.setattr(ops, "choose", lambda *_, s=strategy: Cost(s, 0.0, 0, 0, 0))
        assert_as_good(multi_lora_linear(*c, "triton"), definition, expected(c))


def test_chunks_cover_the_rank_and_padding_is_the_last_ones() -> None:
    assert rank_chunks(80, torch.float16, "sm_90") == ((0, 80),)
    assert rank_chunks(300, torch.float16, "sm_90") == ((0, 128), (128, 128), (256, 44))
    assert rank_chunks(80, torch.float32, "gfx1100") == ((0, 32), (32, 32), (64, 16))  # no wider tile fits there


def test_costs_count_a_launch_per_chunk() -> None:
    p = Problem(2, 64, 32, 48, 256, 1, 1, torch.float16, False)
    launches = {cost.strategy: (cost.launches, cost.bytes) for cost in costs(p, "sm_90")}
    x, y, weight, lora = 128 * 32, 128 * 48, 32 * 48, 256 * 80
    assert launches["fused"] == (2, 2 * (2 * x + 3 * y + weight + lora))
    assert launches["add"] == (3, 2 * (3 * x + 5 * y + weight + lora))
    assert choose(p, "sm_90").strategy in launches


@pytest.mark.parametrize("rank", [6, 136])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)], ids=["3", "down", "1"])
def test_weights_of_a_convolution_are_its_outputs_pixels(kernel, stride, padding, memory_format, rank) -> None:
    c = make(3, 1, 12 * kernel**2, 20, rank)
    x = torch.randn(3, 12, 7, 9, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x = x.contiguous(memory_format=memory_format)
    weight, a, geometry = (
        c.weight.view(20, 12, kernel, kernel),
        c.a.view(2, rank, 12, kernel, kernel),
        (stride, padding),
    )
    base = F.conv2d(x.double(), weight.double(), c.bias.double() if c.bias is not None else None, *geometry)
    columns = F.unfold(x.double(), kernel, 1, padding, stride).transpose(1, 2)
    pixels = c._replace(x=columns)
    token_weights, groups = routed(pixels)
    want = exact(pixels, token_weights, groups, base.flatten(2).transpose(1, 2).cpu().numpy())
    want = want.swapaxes(1, 2).reshape(base.shape)
    masks = token_weights.view(3, -1, *base.shape[2:])
    pairs = {"stride": (stride, stride), "padding": (padding, padding), "groups": groups}
    lora = (c.slots, a, c.b, c.scales)
    definition = multi_lora_conv2d(x, weight, c.bias, *lora, backend="torch", token_weights=masks, **pairs)
    got = multi_lora_conv2d(x, weight, c.bias, *lora, backend="triton", token_weights=masks, **pairs)
    assert_as_good(got, definition, want)
    for backend in ("torch", "triton"):
        into = F.conv2d(x, weight, c.bias, *geometry)
        multi_lora_conv2d_add_(into, x, *lora, backend=backend, token_weights=token_weights, **pairs)
        assert_as_good(into, definition, want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_expanded_and_strided_weights_are_taken_as_they_lie(backend: str) -> None:
    c = make(4, 20, 48, 40, 8)
    token_weights, groups = routed(c)
    halves = token_weights[:1].expand(4, -1, -1)
    tokens_first = token_weights.transpose(1, 2).contiguous().transpose(1, 2)
    adapters_first = token_weights.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (halves, tokens_first, adapters_first):
        got = multi_lora_linear(*c, backend, token_weights=view, groups=groups)
        assert torch.equal(got, multi_lora_linear(*c, backend, token_weights=view.clone(), groups=groups))


def test_ones_change_nothing_and_a_base_row_reads_no_weight() -> None:
    c = make(3, 33, 48, 40, 8)
    token_weights, groups = routed(c)
    plain = multi_lora_linear(*c, "triton")
    got = multi_lora_linear(*c, "triton", token_weights=torch.ones_like(token_weights), groups=groups)
    assert torch.equal(got, plain)
    token_weights[c.slots < 0] = float("nan")
    got = multi_lora_linear(*c, "triton", token_weights=token_weights, groups=groups)
    assert torch.equal(got[c.slots < 0], plain[c.slots < 0])


def test_an_adapter_that_is_masked_out_leaves_the_others_exactly() -> None:
    """Two adapters of rank 4 in one slot, the second one's weight 0, against the first one alone in that slot."""
    c = make(2, 24, 48, 32, 8, adapters=1)._replace(slots=torch.zeros(2, dtype=torch.int64, device=DEVICE))
    groups = torch.tensor([[0] * 4 + [1] * 4], dtype=torch.int32, device=DEVICE)
    token_weights = torch.tensor([1.0, 0.0], device=DEVICE).view(1, 2, 1).expand(2, 2, 24)
    alone = c._replace(b=c.b.clone())
    alone.b[:, :, 4:] = 0
    for backend in ("torch", "triton"):
        got = multi_lora_linear(*c, backend, token_weights=token_weights, groups=groups)
        assert_as_good(got, ops.linear_definition(*alone), expected(alone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": None}, "given together, got no groups"),
        ({"token_weights": None}, "given together, got no token_weights"),
        ({"token_weights": torch.ones(2, 3, 5)}, r"token_weights must be \[2, weights, 4\]"),
        ({"token_weights": torch.ones(2, 3, 4).half()}, "token_weights must be float32"),
        ({"groups": torch.zeros(2, 4, dtype=torch.int64)}, "groups must be int32"),
        ({"groups": torch.zeros(2, 5, dtype=torch.int32)}, "groups must be"),
    ],
)
def test_wrong_weights_are_named(change: dict[str, Tensor | None], message: str) -> None:
    c = make(2, 4, 16, 16, 4)
    good = {"token_weights": torch.ones(2, 3, 4), "groups": torch.zeros(2, 4, dtype=torch.int32)}
    changed = {name: None if t is None else t.to(DEVICE) for name, t in {**good, **change}.items()}
    with pytest.raises(ValueError, match=message):
        multi_lora_linear(*c, **changed)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_registered_ops_pass_opcheck_with_weights(backend: str) -> None:
    c = make(2, 4, 16, 16, 4)
    weights = routed(c)
    x, a = torch.randn(2, 16, 2, 2, device=DEVICE), c.a.view(2, 4, 16, 1, 1)
    conv = (
        x,
        c.weight.view(16, 16, 1, 1),
        c.bias,
        c.slots,
        a,
        c.b,
        c.scales,
        [1, 1],
        [0, 0],
        [1, 1],
        backend,
        *weights,
    )
    library = torch.ops.cmlora_kernels
    torch.library.opcheck(library.multi_lora_linear.default, (*c, backend, *weights))
    torch.library.opcheck(library.multi_lora_add_.default, (torch.zeros_like(c.x), c.x, *c[3:], backend, *weights))
    torch.library.opcheck(library.multi_lora_conv2d.default, conv)
    torch.library.opcheck(library.multi_lora_conv2d_add_.default, (torch.zeros_like(x), x, *conv[3:]))


def test_kernels_leave_nothing_unwritten() -> None:
    c = make(2, 33, 70, 45, 140)
    token_weights, groups = routed(c)
    y = ops.fused_all(*c, poisoned(c), token_weights, groups)
    assert not y.isnan().any()
    wide = c.x.new_zeros(2, 33, 90)
    triton_add(wide[:, :, :45], c.x, c.slots, c.a, c.b, c.scales, token_weights, groups)
    assert not wide[:, :, 45:].any()
