"""Code inside a UNet that a batch of more rows may not suit, named where it is."""

import functools
import types

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import HookRegistry, apply_group_offloading, apply_layerwise_casting
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.attention_processor import SlicedAttnProcessor
from diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion import LEDITSCrossAttnProcessor
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from cmlora.lora.foreign import foreign, offloaded
from tests.lora.rows import in_force, unet_with
from tests.lora.test_behaviour import Half, own_convolution

RESNET, TO_Q = "down_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def unet():
    return unet_with("a")


class Mixing(nn.Linear):
    pass


class Processor:
    def __call__(self, attn, x, **kwargs):
        return x


class Module(nn.Module):
    def forward(self, attn, x, **kwargs):
        return x


class Hooked(ModelHook):
    pass


class Registered(DiffusersHook):
    pass


def hook(unet):
    unet.get_submodule(RESNET).register_forward_hook(lambda module, args, y: y)


def hook_before_a_lora_layer(unet):
    unet.get_submodule(TO_Q).register_forward_pre_hook(lambda module, args: args)


def hook_on_a_base(unet):
    unet.get_submodule(TO_Q).base_layer.register_forward_hook(lambda module, args, y: y)


def own_forward(unet):
    block = unet.get_submodule(RESNET)
    block.forward = types.MethodType(lambda self, *args: type(self).forward(self, *args), block)


def own_forward_that_lends_its_name(unet):
    block = unet.get_submodule(RESNET)
    original = block.forward
    block.forward = functools.wraps(original)(lambda *args: original(*args))


def accelerates_hook(unet):
    add_hook_to_module(unet.get_submodule(RESNET), Hooked())


def diffusers_hook(unet):
    HookRegistry.check_if_exists_or_initialize(unet.get_submodule(RESNET)).register_hook(Registered(), "own")


def processor(unet):
    unet.set_attn_processor(Processor())


def processor_that_is_a_module(unet):
    unet.set_attn_processor(Module())


def a_pipelines_own_processor(unet):
    unet.set_attn_processor(LEDITSCrossAttnProcessor(None, "down", False, 1))


def subclass(unet):
    unet.get_submodule(RESNET).conv1.base_layer.__class__ = type("Conv", (nn.Conv2d,), {"__module__": "own.package"})


FOREIGN = (
    (hook, RESNET),
    (hook_before_a_lora_layer, TO_Q),
    (hook_on_a_base, f"{TO_Q}.base_layer"),
    (own_forward, RESNET),
    (own_forward_that_lends_its_name, RESNET),
    (accelerates_hook, RESNET),
    (diffusers_hook, RESNET),
    (processor, "down_blocks.0.attentions.0.transformer_blocks.0.attn1"),
    (processor_that_is_a_module, "down_blocks.0.attentions.0.transformer_blocks.0.attn1"),
    (a_pipelines_own_processor, "down_blocks.0.attentions.0.transformer_blocks.0.attn1"),
    (subclass, f"{RESNET}.conv1.base_layer"),
)


@pytest.mark.parametrize(("change", "name"), FOREIGN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_users_own_code_is_named(change, name, unet):
    assert foreign(unet) == []
    change(unet)
    assert foreign(unet)[0].startswith(f"{name}: ")


def test_a_class_whose_method_was_replaced(unet, monkeypatch):
    kind = type(unet.get_submodule(RESNET))
    monkeypatch.setattr(kind, "forward", lambda self, *args: args[0])
    assert foreign(unet)[0].startswith(f"{RESNET}: {kind.__name__}.forward, replaced by {__name__}")


def test_a_hook_on_all_modules(unet):
    handle = register_module_forward_hook(lambda module, args, y: None)
    assert foreign(unet) == ["all modules: a global forward hook"]
    handle.remove()
    assert foreign(unet) == []


def test_what_treats_each_row_on_its_own_is_not_foreign(unet):
    unet.set_attn_processor(SlicedAttnProcessor(1))
    apply_layerwise_casting(unet.up_blocks, torch.float8_e4m3fn, torch.float32)
    add_hook_to_module(unet.mid_block, ModelHook())
    parametrize.register_parametrization(unet.get_submodule(RESNET).conv1.base_layer, "weight", Half())
    own_convolution(unet.conv_in)
    unet.forward = lambda *args: None  # of the model itself: not looked at
    assert foreign(unet) == []
    assert offloaded(unet) == []


def test_weights_of_8_bits_that_look_at_the_outliers_of_all_rows(unet):
    class Linear8bitLt(torch.nn.Linear):
        __module__ = "bitsandbytes.nn.modules"

    layer = unet.get_submodule(TO_Q).base_layer
    layer.__class__, layer.state = Linear8bitLt, types.SimpleNamespace(threshold=0.0)
    assert foreign(unet) == []
    layer.state.threshold = 6.0
    assert foreign(unet) == [f"{TO_Q}.base_layer: weights of 8 bits with llm_int8_threshold=6"]


def test_ours_is_not_foreign(unet):
    with in_force(unet, ((("a", 1.0),),), [0]):
        assert foreign(unet) == []


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload_is_named(level, unet):
    kind = {"num_blocks_per_group": 1} if level == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(unet, onload_device=cpu, offload_device=cpu, offload_type=level, **kind)
    assert any("group_offloading" in line for line in offloaded(unet))
    assert foreign(unet) == []


def test_accelerates_offload_by_layer_is_named(unet):
    accelerate.cpu_offload(unet.mid_block, execution_device=torch.device("cpu"))
    assert offloaded(unet)[0].startswith("mid_block")
    assert "AlignDevicesHook" in offloaded(unet)[0]


def test_offload_of_the_model_as_a_whole_is_none(unet):
    accelerate.cpu_offload_with_hook(unet, torch.device("cpu"))
    assert offloaded(unet) == []
