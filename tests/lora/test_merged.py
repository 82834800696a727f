"""Merged weights: PEFT's own, made anew where something may have changed, without waiting for a device."""

import pytest
import torch
from torch import nn

import cmlora
from cmlora.batch.rows import Rows
from cmlora.batch.running import Running
from cmlora.engine import spending
from cmlora.lab.bench.counting import Operations
from cmlora.lab.bench.steps import MetaPipe
from cmlora.lab.bench.tiny import EVERYTHING, SMALL, call, relative, three_adapters
from cmlora.lora.bank import LayerBank, build_bank, fill_bank
from cmlora.lora.layers import forward_of, install, uninstall
from cmlora.lora.merged import MergedBank, Merging
from tests.lora.rows import EXACT, image, layers_of, unet_with

READS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero"}
BOTH = ((("a", 1.0), ("b", 1.0)),)


def whole(unet):
    """The one slot of a merge, its weights merged."""
    running, bank = Running(), build_bank(unet, BOTH, device=torch.device("cpu"))
    fill_bank(bank, 1.0)
    install(bank, running, "auto")
    merging = Merging(unet, {}, alone=True, convolutions=True)
    merging.switch(True)
    return running, merging


@pytest.mark.parametrize("alone", [True, False])
def test_off_the_cpu_nothing_is_compared(monkeypatch, alone):
    """torch.equal waits for the device."""
    tensors = [torch.zeros(size, device="meta") for size in ((2, 3, 4), (2, 8, 3), (2, 1))]
    bank = LayerBank(*tensors, torch.zeros(2, 3, dtype=torch.int32))
    merged = MergedBank(torch.zeros(8, 4, device="meta"), bank, alone=alone)
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("this waits for the device"))
    merged.renew()


@pytest.mark.parametrize("method", ["merge", "cmlora"])
def test_runs_with_merged_weights_read_nothing_back(method):
    """`meta` tensors have no values to be read; reads that torch would let pass are counted."""
    pipe = MetaPipe("sd15", 2)
    pipe.pipe.unet.set_adapters(pipe.names(2))
    with torch.no_grad(), cmlora.accelerated(pipe.pipe, method=method, merge_weights=True), Operations() as seen:
        for _ in range(2):
            list(pipe.run(first=0, last=1))
        assert merging_of(pipe.pipe).on
    assert not READS & set(seen.seen)


def test_one_weight_for_all_rows_is_pefts_own_fused_one():
    """In float64, of linear layers and convolutions, several adapters in one."""
    unet = unet_with("a", "b")
    _, merging = whole(unet)
    of = {id(forward.layer): bank for (forward, _, _), bank in zip(merging.layers, merging.banks, strict=True)}
    assert {bank.weights.ndim for bank in of.values()} == {2, 4}
    for layer in layers_of(unet).values():
        exact = layer.get_base_layer().weight.detach().double()
        for name in ("a", "b"):
            down, up = (part[name].weight.detach().double().flatten(1) for part in (layer.lora_A, layer.lora_B))
            exact = exact + layer.scaling[name] * (up @ down).view_as(exact)
            peft = layer.get_delta_weight(name).double()
            assert relative(layer.scaling[name] * (up @ down).view_as(exact), peft) < 1e-6
        if id(layer) in of:
            assert relative(of[id(layer)].weights, exact) < 1e-7


def test_layers_with_one_weight_give_what_pefts_give_in_the_launches_of_their_base_and_follow_a_hook():
    unet = unet_with("a", "b")
    running, merging = whole(unet)
    unet.set_adapters(["a", "b"])
    rows = Rows(torch.zeros(2, dtype=torch.int64), 1, 2, 1)
    for layer in (forward.layer for forward, _, _ in merging.layers):
        x = image(layer, 2)
        want = type(layer).forward(layer, x)
        with running.these(rows), Operations() as ours:
            got = layer(x)
        with Operations() as plain:
            layer.get_base_layer()(x)
        assert relative(got, want) < EXACT
        assert ours.total == plain.total
    base = layer.get_base_layer()
    handle = base.register_forward_hook(lambda _, __, out: 2 * out)
    with running.these(rows):
        assert relative(layer(x), type(layer).forward(layer, x)) < EXACT
    handle.remove()
    uninstall(unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 0.03], ids=["strong", "weak"])
def test_in_half_precision_a_merged_weight_is_not_farther_off_than_pefts_forward(dtype, size):
    """Rounding W + s B A once costs no more than the roundings of a low-rank update, whose sum PEFT rounds too."""
    generator = torch.Generator().manual_seed(0)
    unet = unet_with("a", "b").to(dtype)
    layer = next(iter(layers_of(unet, nn.Linear).values()))
    for name in ("a", "b"):
        layer.lora_B[name].weight.data.normal_(generator=generator).mul_(size * 0.1)
    unet.set_adapters(["a", "b"])
    x = torch.randn(200, layer.in_features, generator=generator).to(dtype)
    exact = x.double() @ layer.get_base_layer().weight.double().t()
    if layer.get_base_layer().bias is not None:
        exact = exact + layer.get_base_layer().bias.double()
    for name in ("a", "b"):
        down, up = (part[name].weight.double() for part in (layer.lora_A, layer.lora_B))
        exact = exact + layer.scaling[name] * (x.double() @ down.t() @ up.t())
    plain = relative(layer(x), exact)
    running, merging = whole(unet)
    assert forward_of(layer).whole.dtype == dtype
    with running.these(Rows(torch.zeros(200, dtype=torch.int64), 200, 1, 1)):
        assert relative(layer(x), exact) <= plain
    merging.switch(False)


@pytest.mark.parametrize("fits", [True, False])
def test_off_the_cpu_a_merge_has_merged_weights_where_half_of_the_free_memory_holds_them(monkeypatch, fits):
    """`meta` stands for a GPU; every other method goes on by low rank, and so does one that is told to."""
    pipe = MetaPipe("sd15", 2)
    pipe.pipe.unet.set_adapters(pipe.names(2))
    wanted = []

    def may_merge(**config):
        with cmlora.accelerated(pipe.pipe, **config):
            held = pipe.pipe.unet.forward.cmlora.denoiser.spending
            wanted.append(held.merging.bytes)
            return held.may_merge

    may_merge(method="merge")
    monkeypatch.setattr(spending, "free_bytes", lambda _: (wanted[0], wanted[0] - (not fits)))
    assert may_merge(method="merge") == fits
    assert not may_merge(method="merge", merge_weights=False)
    assert not any(may_merge(method=method) for method in ("cmlora", "composite", "switch", "routed"))


def test_a_merged_step_launches_what_the_plain_pipelines_linear_layers_do():
    """q, k and v are one, the prompt's keys and values none: fewer than the plain pipeline's, and none of low rank."""
    pipe = MetaPipe("sd15", 3)
    (plain,) = pipe.steps("plain", 3)
    products = []
    for trace in (plain.trace, *(step.trace for step in pipe.steps("merge", 3))):
        ops = trace.ops("sm_90")
        products.append(sum(op.unit == "library" and op.name != "convolution" for op in ops))
        assert not any(op.problem for op in ops)
    assert max(products[1:]) < products[0]


def test_a_merge_with_merged_weights_draws_what_the_plain_pipeline_draws_and_leaves_its_weights():
    pipe = three_adapters(EVERYTHING, device="cpu", **SMALL)
    pipe.set_adapters(["character", "style", "background"], [0.7, 1.0, 0.4])
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    want = call(pipe, 3)
    cmlora.accelerate(pipe, method="merge", merge_weights=True, cache_interval=1)
    assert relative(call(pipe, 3), want) < EXACT
    assert "merged" in cmlora.summary(pipe).strategies
    assert cmlora.summary(pipe).peak_bytes > sum(bank.weights.nbytes for bank in merging_of(pipe).banks)
    assert {bank.weights.ndim for bank in merging_of(pipe).banks} == {2, 4}
    pipe.set_adapters(["style"], [0.5])
    got = call(pipe, 3)
    layer = next(module for module in pipe.unet.modules() if "style" in getattr(module, "lora_B", {}))
    layer.get_base_layer().weight.data.mul_(1.5)
    edited = call(pipe, 3)
    cmlora.restore(pipe)
    assert relative(edited, call(pipe, 3)) < EXACT
    layer.get_base_layer().weight.data.copy_(before[weight_of(pipe.unet, layer)])
    assert relative(got, call(pipe, 3)) < EXACT
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def merging_of(pipe):
    return pipe.unet.forward.cmlora.denoiser.spending.merging


def weight_of(unet, layer):
    return next(name for name, value in unet.named_parameters() if value is layer.get_base_layer().weight)


def test_a_weight_edited_in_a_run_is_followed():
    pipe = three_adapters(EVERYTHING, device="cpu", **SMALL)
    layer = next(module for module in pipe.unet.modules() if "style" in getattr(module, "lora_B", {}))
    start = layer.lora_B["style"].weight.detach().clone()

    def edit(_, step, *__):
        with torch.no_grad():
            layer.lora_B["style"].weight.copy_(start * (step + 2))
        return {}

    def drawn():
        with torch.no_grad():
            layer.lora_B["style"].weight.copy_(start)
        return call(pipe, 3, callback_on_step_end=edit)

    want = drawn()
    cmlora.accelerate(pipe, method="merge", merge_weights=True, cache_interval=1)
    assert relative(drawn(), want) < EXACT
