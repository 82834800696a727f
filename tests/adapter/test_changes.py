"""What happens to an accelerated pipeline: errors, other adapters and weights, offload; nothing is ever ignored."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import UNet2DConditionModel
from peft.utils.hotswap import hotswap_adapter_from_state_dict

import cmlora
from cmlora.lab.bench.tiny import DEVICE, EVERYTHING, add_lora, call, relative, sd_pipe
from tests.adapter.loop import EXACT, loop, refused, small_unet, with_loras


@pytest.fixture
def sd():
    return with_loras(sd_pipe(small_unet()))


def test_an_exception_in_mid_step(sd):
    want = loop(sd, lambda p: call(p, 2))
    cmlora.accelerate(sd, method="composite", combine="mean")

    def fail(*_):
        raise ValueError("from a user's hook")

    handle = sd.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="user's hook"):
        call(sd, 2)
    handle.remove()
    assert relative(call(sd, 2), want) < EXACT


# --- adapters that change after accelerate


def test_weights_set_after_accelerate(sd):
    cmlora.accelerate(sd, method="merge", cache_interval=1)
    call(sd, 1)
    sd.set_adapters(["a", "b"], [0.2, 1.9])
    got = call(sd, 2)
    assert relative(got, call(cmlora.restore(sd), 2)) < EXACT


def test_weights_swapped_for_a_larger_rank(sd):
    """PEFT's hot swap keeps the layers and the parameters and exchanges what lies in them."""
    other = sd_pipe(small_unet())
    add_lora(other.unet, "a", rank=8, pattern=EVERYTHING, seed=5)
    state = {key: weight for key, weight in other.unet.state_dict().items() if "lora_" in key}
    sd.set_adapters(["a", "b"], [1.0, 1.0])  # the swap sets them to one
    cmlora.accelerate(sd, method="merge", cache_interval=1)
    before = call(sd, 2)
    hotswap_adapter_from_state_dict(sd.unet, state, "a", config=other.unet.peft_config["a"])
    got = call(sd, 2)
    assert relative(got, before) > 100 * EXACT
    assert relative(got, call(cmlora.restore(sd), 2)) < EXACT


def test_adapter_deleted_after_accelerate(sd):
    cmlora.accelerate(sd, method="composite", combine="mean")
    call(sd, 1)
    sd.delete_adapters("b")
    with pytest.raises(cmlora.AdapterError, match="at least two adapters, got a"):
        call(sd, 1)
    add_lora(sd.unet, "b", rank=6, alpha=3, seed=2)
    sd.unet.set_adapters(["a", "b"], [0.8, 1.2])
    got = call(sd, 2)
    cmlora.restore(sd)
    assert relative(got, loop(sd, lambda p: call(p, 2))) < EXACT


def test_named_adapter_deleted_after_accelerate(sd):
    cmlora.accelerate(sd, method="merge", adapters=["a", "b"])
    sd.delete_adapters("b")
    with pytest.raises(cmlora.AdapterError, match=r"'b' changed no layer .*adapters are a\).*deleted"):
        call(sd, 1)


def test_adapter_added_after_accelerate(sd):
    cmlora.accelerate(sd, method="merge", cache_interval=1)
    call(sd, 1)
    add_lora(sd.unet, "c", rank=3, pattern=EVERYTHING, seed=7)
    sd.set_adapters(["a", "b", "c"], [0.5, 0.6, 0.7])
    got = call(sd, 2)
    assert relative(got, call(cmlora.restore(sd), 2)) < EXACT


def test_unloaded_and_loaded_again(sd):
    cmlora.accelerate(sd, method="composite", combine="mean")
    sd.unload_lora_weights()
    with pytest.raises(cmlora.AdapterError, match="no LoRA layer"):
        call(sd, 1)
    with_loras(sd)
    got = call(sd, 2)
    cmlora.restore(sd)
    assert relative(got, loop(sd, lambda p: call(p, 2))) < EXACT


@pytest.mark.parametrize(
    ("change", "undo", "message"),
    [("fuse_lora", "unfuse_lora", "unfuse_lora"), ("disable_lora", "enable_lora", "enable_lora")],
)
def test_fused_or_disabled_after_accelerate(sd, change, undo, message):
    cmlora.accelerate(sd, method="composite", combine="mean")
    call(sd, 1)
    getattr(sd, change)()
    with pytest.raises(cmlora.AdapterError, match=message):
        call(sd, 1)
    getattr(sd, undo)()
    got = call(sd, 2)
    cmlora.restore(sd)
    assert relative(got, loop(sd, lambda p: call(p, 2))) < EXACT


# --- offload hooks of the accelerate library, whose forward wraps the UNet's


class Moves(ModelHook):
    """Counts its calls, as the offload hook moves weights."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("restore_first", [True, False])
@pytest.mark.parametrize("hook_first", [True, False])
def test_offload_hook_and_restore_in_each_order(sd, hook_first, restore_first):
    plain, want, hook = call(sd, 2), loop(sd, lambda p: call(p, 2)), Moves()
    if hook_first:
        add_hook_to_module(sd.unet, hook)
    cmlora.accelerate(sd, method="composite", combine="mean")
    if not hook_first:
        add_hook_to_module(sd.unet, hook)
    assert relative(call(sd, 2), want) < EXACT
    assert hook.calls == 2
    assert len(cmlora.summary(sd).steps) == 2
    # what diffusers does after each call of an offloaded pipeline: all hooks off and on again
    remove_hook_from_module(sd.unet, recurse=True)
    add_hook_to_module(sd.unet, hook)
    cmlora.accelerate(sd, method="composite", combine="mean", cache_interval=1)
    cmlora.accelerate(sd, method="composite", combine="mean")
    assert relative(call(sd, 2), want) < EXACT
    assert hook.calls == 4
    if restore_first:
        cmlora.restore(sd)
        assert torch.equal(call(sd, 2), plain)
        assert hook.calls == 6
        remove_hook_from_module(sd.unet)
    else:
        remove_hook_from_module(sd.unet)
        assert relative(call(sd, 2), want) < EXACT
        cmlora.restore(sd)
    assert torch.equal(call(sd, 2), plain)
    assert sd.unet.forward.__func__ is UNet2DConditionModel.forward


@pytest.fixture
def sd_on_the_cpu():
    """The CPU stands in for the GPU of offload hooks."""
    return with_loras(sd_pipe(small_unet(), device="cpu"))


def test_sequential_offload_is_refused(sd_on_the_cpu):
    """Its weights lie on no device between calls, so nothing can be stacked."""
    sd = sd_on_the_cpu
    plain = call(sd, 1)
    accelerate.cpu_offload(sd.unet, execution_device=torch.device("cpu"))
    refused(sd, cmlora.UnsupportedModelError, "AlignDevicesHook", "enable_model_cpu_offload", method="composite")
    remove_hook_from_module(sd.unet, recurse=True)
    assert torch.equal(call(sd, 1), plain)


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_offload_of_the_pipeline(sd_on_the_cpu, offload_first, monkeypatch):
    """Diffusers calls the CPU cpu:0, which torch takes for another device than its own."""
    sd = sd_on_the_cpu
    original = accelerate.cpu_offload_with_hook

    def on_the_cpu(model, device, prev_module_hook=None):
        return original(model, torch.device("cpu"), prev_module_hook=prev_module_hook)

    monkeypatch.setattr(accelerate, "cpu_offload_with_hook", on_the_cpu)
    plain, want = call(sd, 2), loop(sd, lambda p: call(p, 2))
    if offload_first:
        sd.enable_model_cpu_offload(device="cpu")
    cmlora.accelerate(sd, method="composite", combine="mean")
    if not offload_first:
        sd.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert relative(call(sd, 2), want) < EXACT
        assert len(cmlora.summary(sd).steps) == 2
    assert torch.equal(call(cmlora.restore(sd), 2), plain)


def test_autocast_is_refused_by_name(sd):
    cmlora.accelerate(sd, method="composite", combine="mean")
    with torch.autocast(DEVICE), pytest.raises(cmlora.RunError, match="torch_dtype"):
        call(sd, 1)
    want = loop(cmlora.restore(sd), lambda p: call(p, 2))
    cmlora.accelerate(sd, method="composite", combine="mean")
    assert relative(call(sd, 2), want) < EXACT
