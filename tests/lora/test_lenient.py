"""method="merge" is what the plain pipeline draws, in whatever state PEFT's layers are; the others say what to do."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn

import cmlora
from cmlora.lab.bench.tiny import EVERYTHING, add_lora, call, relative, sd_pipe
from cmlora.lora.bank import active_adapters, tuner_layers
from tests.lora.rows import EXACT, in_force, unet_with
from tests.lora.test_behaviour import hooked_down


@pytest.fixture
def pipe():
    pipe = sd_pipe(unet_with("a", "b", pattern=EVERYTHING))
    add_lora(pipe.unet, "c", rank=5, pattern=r"(to_q|conv1)$", seed=8)
    pipe.set_adapters(["a", "b", "c"], [0.8, 1.2, 0.6])
    return pipe


def nothing(pipe):
    pass


def none_active(pipe):
    pipe.unet.set_adapters([])


def disabled(pipe):
    pipe.disable_lora()


def disabled_and_set(pipe):
    pipe.disable_lora()
    pipe.set_adapters(["b"])


def disabled_and_enabled(pipe):
    pipe.disable_lora()
    pipe.enable_lora()


def some_layers_disabled(pipe):
    for _, layer in list(tuner_layers(pipe.unet))[::2]:
        layer.enable_adapters(False)


def middle_deleted(pipe):
    pipe.delete_adapters("b")


def all_deleted(pipe):
    pipe.delete_adapters(["a", "b", "c"])


def unloaded(pipe):
    pipe.unload_lora_weights()


def fused(pipe):
    pipe.fuse_lora()


def fused_safely_with_a_scale(pipe):
    pipe.fuse_lora(lora_scale=0.5, safe_fusing=True)


def one_fused(pipe):
    pipe.fuse_lora(adapter_names=["a"])


def fused_and_unfused(pipe):
    pipe.fuse_lora()
    pipe.unfuse_lora()


def fused_and_disabled(pipe):
    pipe.fuse_lora()
    pipe.disable_lora()


def fused_and_unloaded(pipe):
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    add_lora(pipe.unet, "d", seed=5)


def fused_and_deleted(pipe):
    pipe.fuse_lora(adapter_names=["a"])
    pipe.delete_adapters("a")


def scaled_by_block(pipe):
    pipe.set_adapters(["a", "c"], [{"unet": {"down": 0.9, "mid": 0.2, "up": {"block_1": [0.3, 0.7]}}}, 0.4])


def one_of_the_last(pipe):
    pipe.set_adapters(["c"], [0.5])


def another_with_other_layers(pipe):
    add_lora(pipe.unet, "d", pattern=r"(time_emb_proj|conv_out)$", seed=5)


def dora(pipe):
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], use_dora=True), "d")
    pipe.set_adapters(["a", "d"])


def loha(pipe):
    pipe.unload_lora_weights()
    pipe.unet.add_adapter(peft.LoHaConfig(r=2, target_modules=["time_emb_proj"], init_weights=False), "h")
    add_lora(pipe.unet, "a")
    pipe.unet.set_adapters(["a", "h"])


def biased(pipe):
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], lora_bias=True, init_lora_weights=False)
    pipe.unet.add_adapter(config, "d")
    pipe.set_adapters(["a", "d"])


def one_hooked(pipe):
    hooked_down(next(tuner_layers(pipe.unet))[1])


def cast(pipe):
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def cast_with_loras(pipe):
    patterns = ("norm",)
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=patterns)


def cast_but_loras(pipe):
    patterns = ("norm", "lora")
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=patterns)


STATES = (nothing, none_active, disabled, disabled_and_set, disabled_and_enabled, some_layers_disabled, middle_deleted,
          all_deleted, unloaded, fused, fused_safely_with_a_scale, one_fused, fused_and_unfused, fused_and_disabled,
          fused_and_unloaded, fused_and_deleted, scaled_by_block, one_of_the_last, another_with_other_layers, dora,
          loha, biased, one_hooked, cast, cast_with_loras, cast_but_loras)  # fmt: skip


@pytest.mark.parametrize("change", STATES, ids=lambda change: change.__name__)
def test_a_merge_is_the_plain_picture(change, pipe):
    warnings.simplefilter("ignore")
    change(pipe)
    given = (torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 7, 24))
    recipe = tuple((name, 1.0) for name in active_adapters(pipe.unet))
    with in_force(pipe.unet, (recipe,), [0, 0], lenient=True):
        got = pipe.unet(*given).sample
    assert relative(got, pipe.unet(*given).sample) < EXACT
    assert not any("forward" in layer.__dict__ for _, layer in tuner_layers(pipe.unet) if change.__name__[:4] != "cast")


@pytest.mark.parametrize("change", STATES, ids=lambda change: change.__name__)
def test_the_methods_of_single_adapters_compose_it_or_refuse_it(change, pipe):
    """What they refuse names what it is about and what to do; what they compose is what PEFT gives with one adapter."""
    warnings.simplefilter("ignore")
    change(pipe)
    names = [name for name in ("a", "b", "c", "d", "h") if name in getattr(pipe.unet, "peft_config", {})]
    given = (torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 7, 24))
    fine = {nothing, none_active, disabled_and_enabled, middle_deleted, fused_and_unfused, fused_and_unloaded,
            fused_and_deleted, scaled_by_block, one_of_the_last, another_with_other_layers, cast, cast_but_loras,
            unloaded, all_deleted}  # fmt: skip
    if change not in fine:
        with (
            pytest.raises(cmlora.AdapterError, match=r"(call|remove it with|take|layer by layer)"),
            in_force(pipe.unet, [((name, 1.0),) for name in names], [0]),
        ):
            pass
        return
    for slot, name in enumerate(names):
        with in_force(pipe.unet, [((name, 1.0),) for name in names], [slot]):
            got = pipe.unet(*given).sample
        if (
            change is fused_and_deleted
        ):  # PEFT forgets about the others where one was fused; unfusing what is gone mends it
            pipe.unfuse_lora()
        before = pipe.unet.active_adapters()
        for _, layer in tuner_layers(pipe.unet):
            layer.set_adapter([name])
        assert relative(got, pipe.unet(*given).sample) < EXACT
        for _, layer in tuner_layers(pipe.unet):
            layer.set_adapter(before)


# --- every advice that an error of this room gives, tried


def composite(pipe):
    cmlora.accelerate(pipe, method="composite", cache_interval=1)
    return call(pipe, 1)


def refuses(pipe, *parts):
    with pytest.raises(cmlora.AdapterError) as error:
        composite(pipe)
    for part in parts:
        assert part in str(error.value)


def merge_is_plain(pipe):
    cmlora.restore(pipe)
    want = call(pipe, 1)
    with cmlora.accelerated(pipe, method="merge", cache_interval=1):
        assert relative(call(pipe, 1), want) < EXACT


@pytest.mark.parametrize("change", [fused, one_fused, fused_safely_with_a_scale], ids=lambda change: change.__name__)
def test_unfuse(change, pipe):
    want = composite(pipe)
    cmlora.restore(pipe)
    change(pipe)
    refuses(pipe, "fused", "pipe.unfuse_lora()", "method='merge'")
    merge_is_plain(pipe)
    pipe.unfuse_lora()
    if change is not fused_safely_with_a_scale:  # which leaves the scalings scaled
        assert relative(composite(pipe), want) < EXACT
    assert composite(pipe).isfinite().all()


def test_enable(pipe):
    want = composite(pipe)
    cmlora.restore(pipe)
    pipe.disable_lora()
    refuses(pipe, "disabled", "pipe.enable_lora()", "method='no_lora'")
    with cmlora.accelerated(pipe, method="no_lora", cache_interval=1):
        assert relative(call(pipe, 1), call(pipe, 1)) == 0
    pipe.enable_lora()
    assert relative(composite(pipe), want) < EXACT


def test_activate(pipe):
    want = composite(pipe)
    none_active(pipe)
    refuses(pipe, "no adapter is active", "pipe.set_adapters")
    pipe.set_adapters(["a", "b", "c"], [0.8, 1.2, 0.6])
    assert relative(composite(pipe), want) < EXACT


@pytest.mark.parametrize("change", [dora, loha, biased], ids=lambda change: change.__name__)
def test_delete(change, pipe):
    warnings.simplefilter("ignore")
    change(pipe)
    name = "h" if change is loha else "d"
    add_lora(pipe.unet, "b2", seed=6)
    pipe.unet.set_adapters(["a", "b2", name])
    refuses(pipe, f"pipe.delete_adapters({name!r})", "method='merge'")
    merge_is_plain(pipe)
    pipe.delete_adapters(name)
    assert composite(pipe).isfinite().all()


def test_take_hooks_off(pipe):
    layer = next(tuner_layers(pipe.unet))[1]
    want = composite(pipe)
    hooked_down(layer)
    refuses(pipe, "take them off")
    layer.lora_A["a"]._forward_hooks.clear()
    assert relative(composite(pipe), want) < EXACT


def test_take_a_forward_off(pipe):
    want = composite(pipe)
    layer, _ = next(tuner_layers(pipe.unet))[::-1]
    cmlora.restore(pipe)
    layer.forward = lambda x: type(layer).forward(layer, x)
    refuses(pipe, "take it off", __name__)
    merge_is_plain(pipe)
    del layer.forward
    assert relative(composite(pipe), want) < EXACT


def test_dropout_in_training(pipe):
    config = peft.LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.5, init_lora_weights=False)
    pipe.unet.add_adapter(config, "d")
    pipe.set_adapters(["a", "d"])
    pipe.unet.train()
    refuses(pipe, "dropout", "pipe.unet.eval()")
    with pytest.raises(cmlora.AdapterError, match="dropout"):  # the plain picture depends on the order of its numbers
        cmlora.accelerate(pipe, method="merge")
    pipe.unet.eval()
    merge_is_plain(pipe)
    assert composite(pipe).isfinite().all()


def test_keep_loras_out_of_layerwise_casting():
    pipe = sd_pipe(unet_with("a", "b"))
    cast_with_loras(pipe)
    refuses(pipe, "layer by layer", "load it before", "skip_modules_pattern", "'lora'")
    pipe = sd_pipe(unet_with())
    cast(pipe)
    add_lora(pipe.unet, "a")
    add_lora(pipe.unet, "b")
    refuses(pipe, "layer by layer", "load it before")
    for change in (cast, cast_but_loras):
        pipe = sd_pipe(unet_with("a", "b"))
        change(pipe)
        pipe.set_adapters(["a", "b"])
        assert composite(pipe).isfinite().all()


def test_nothing_loaded():
    pipe = sd_pipe(unet_with())
    refuses(pipe, "no LoRA layer", "load_lora_weights")
    with_two = sd_pipe(unet_with("a", "b"))
    assert composite(with_two).isfinite().all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_in_force_is_a_plain_one(duplicate, pipe):
    unet, given = pipe.unet, (torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 7, 24))
    unet.set_adapters(["b"])
    with in_force(unet, ((("a", 1.0),),), [0]):
        other = duplicate(unet)
        got = other(*given).sample
    assert torch.equal(got, unet(*given).sample)
    other.set_adapters(["a"])
    with in_force(other, ((("b", 1.0),),), [0]):
        got = other(*given).sample
    assert relative(got, unet(*given).sample) < EXACT


def test_lora_on_an_embedding():
    """A layer that holds an adapter outside of lora_A is not passed by."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(5, 4)

    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["words"]), Model(), "a")
    with (
        pytest.raises(cmlora.AdapterError, match=r"words: LoRA on Embedding .*delete_adapters\('a'\)"),
        in_force(model, ((("a", 1.0),),), [0]),
    ):
        pass
