"""Layers are judged by what they do: whatever sits on one, ours gives what PEFT's forward gives, or names the layer."""

import types

import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from cmlora.errors import AdapterError
from cmlora.lab.bench.tiny import relative
from cmlora.lora.bank import build_bank
from cmlora.lora.plain import computes_plainly
from cmlora.lora.state import fingerprint
from tests.lora.rows import EXACT, image, in_force, layers_of, pefts, unet_with

RECIPES = ((("a", 0.7),), (("a", 0.5), ("b", 1.5)))


class Int8(torch.Tensor):
    """A weight of 8 bits with a scale, as quantising libraries make them: a wrapper without memory of its own."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, shape, stride):
        return Int8(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, kinds, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = tree_map(lambda x: x.values * x.scale if isinstance(x, Int8) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def quantise(base):
    scale = base.weight.detach().abs().amax() / 127
    base.weight = nn.Parameter(Int8((base.weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)


class Linear4bit(nn.Module, LoraLayer):
    """PEFT's layer on one of bitsandbytes': no `Linear` of PEFT's, whose sum it computes."""

    __module__ = "peft.tuners.lora.bnb"
    forward = PeftLinear.forward


def of_bitsandbytes(base, layer):
    quantise(base)
    layer.__class__ = Linear4bit


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


class Louder(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def another_class(base):
    base.__class__ = Louder


def hook(base):
    base.register_forward_hook(lambda module, args, y: y * 1.5)


def hook_before(base):
    base.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def own_forward(base):
    base.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2, base)


def parametrized(base):
    parametrize.register_parametrization(base, "weight", Half())


def circular(base):
    base.padding_mode = "circular"


def circular_everywhere(base, layer):
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def circular_for_one(base, layer):
    layer.lora_A["a"].padding_mode = "circular"


def same(base):
    base.padding = "same"
    base._reversed_padding_repeated_twice = [1, 1, 1, 1]


def own_convolution(base):
    def convolve(self, x, weight, bias):
        x = nn.functional.pad(nn.functional.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        return nn.functional.conv2d(x, weight, bias, self.stride)

    base._conv_forward = types.MethodType(convolve, base)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((nn.Linear, c) for c in (quantise, hook, hook_before, own_forward, parametrized, another_class)),
        (nn.Linear, of_bitsandbytes),
        *((nn.Conv2d, c) for c in (quantise, hook, own_forward, parametrized, circular, own_convolution, same)),
        *((nn.Conv2d, c) for c in (circular_everywhere, circular_for_one)),
    ],
    ids=lambda value: value.__name__,
)
@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_base_layer_that_is_more_than_its_weight(kind, change, when):
    unet = unet_with("a", "b")
    name = "down_blocks.0.resnets.0.conv1" if kind is nn.Conv2d else "down_blocks.0.attentions.0.proj_in"
    name = name if kind is nn.Conv2d else "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = layers_of(unet)[name]
    given = (layer.get_base_layer(), layer)[: change.__code__.co_argcount]
    x = image(layer, 2)
    if when == "before":
        change(*given)
    with in_force(unet, RECIPES, [0, 1]):
        if when == "behind":
            change(*given)
        got = layer(x)
    assert change is circular_for_one or not computes_plainly(layer.get_base_layer(), kind)
    for row, recipe in enumerate(RECIPES):
        assert relative(got[row : row + 1], pefts(unet, recipe, layer, x[row : row + 1])) < EXACT


def test_what_a_hook_keeps_is_not_written_to():
    unet, kept = unet_with("a"), []
    layer = next(iter(layers_of(unet).values()))
    layer.get_base_layer().register_forward_hook(lambda module, args, y: kept.append((y, y.clone())) and None)
    with in_force(unet, RECIPES[:1], [0]):
        layer(image(layer))
    assert torch.equal(*kept[0])


def test_torchs_own_classes_replaced(monkeypatch):
    """What tiling extensions do: the method of the class, for all layers at once, the adapters' own among them."""
    unet, original = unet_with("a", "b"), nn.Conv2d._conv_forward
    unet.set_adapters(["a", "b"], [0.5, 1.5])
    layer = layers_of(unet)["down_blocks.0.resnets.0.conv1"]
    before = fingerprint(unet)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: original(self, x, 2 * w, b))
    assert fingerprint(unet) != before
    with pytest.raises(AdapterError, match=r"down_blocks\.0\.attentions\.0\.proj_in"):
        build_bank(unet, RECIPES, device=torch.device("cpu"))
    with in_force(unet, RECIPES[1:], [0], lenient=True):
        got = layer(image(layer))
    assert relative(got, layer(image(layer))) < EXACT


def hooked_down(layer):
    layer.lora_A["a"].register_forward_hook(lambda module, args, y: 2 * y)


def hooked_up(layer):
    layer.lora_B["a"].register_forward_hook(lambda module, args, y: 2 * y)


def own_down(layer):
    layer.lora_A["a"].forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), layer.lora_A["a"])


def biased(layer):
    layer.lora_B["a"].bias = nn.Parameter(torch.ones(layer.out_features))


def dropping(layer):
    layer.lora_dropout["a"] = nn.Dropout(0.5).train()


def own_layer(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


ADAPTERS = (hooked_down, hooked_up, own_down, biased, dropping, own_layer)


@pytest.mark.parametrize("change", ADAPTERS, ids=lambda change: change.__name__)
def test_an_adapter_that_is_more_than_its_weights_is_refused_by_name(change):
    unet = unet_with("a", "b")
    name, layer = next(iter(layers_of(unet).items()))
    change(layer)
    with pytest.raises(AdapterError, match=name):
        build_bank(unet, RECIPES, device=torch.device("cpu"))
    build_bank(unet, ((("b", 1.0),),) if change is not own_layer else (), device=torch.device("cpu"))


@pytest.mark.parametrize("change", [c for c in ADAPTERS if c is not dropping], ids=lambda change: change.__name__)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_and_a_merge_leaves_it_to_peft(change, scale):
    unet = unet_with("a", "b")
    unet.set_adapters(["a", "b"], [0.5, 1.5])
    layer = next(iter(layers_of(unet).values()))
    change(layer)
    x, before = image(layer), dict(layer.scaling)
    torch.manual_seed(0)
    with in_force(unet, RECIPES[1:], [0], scale, lenient=True) as bank:
        assert bank.kept == (layer,)
        got = layer(x)
    assert layer.scaling == before
    layer.scale_layer(scale)
    torch.manual_seed(0)
    assert relative(got, layer(x)) < EXACT


def test_a_forward_of_the_layers_own_comes_back():
    unet = unet_with("a")
    layer = next(iter(layers_of(unet).values()))
    own_layer(layer)
    forward = layer.forward
    with in_force(unet, RECIPES[:1], [0], lenient=True):
        assert layer.forward is not forward
    assert layer.forward is forward
