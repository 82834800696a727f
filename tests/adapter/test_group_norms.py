"""Resnets whose norm and SiLU are one kernel, against diffusers' own; what is not exactly these two is called."""

import types

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import cmlora
from cmlora.lab.bench.tiny import ATTENTION, EVERYTHING, call, relative, three_adapters
from cmlora.models.unet import layers, step


@pytest.fixture
def asked(monkeypatch):
    """Shapes that the kernel was asked for, as they come, as if kernels ran."""
    shapes, kernel, run = [], layers.group_norm_silu, layers.norm_silu

    def noted(x, *rest):
        shapes.append(tuple(x.shape))
        return kernel(x, *rest)

    for module in (layers, step):
        monkeypatch.setattr(module, "norm_silu", lambda norm, silu, x, _: run(norm, silu, x, "triton"))
    monkeypatch.setattr(layers, "group_norm_silu", noted)
    return shapes


def pair(channels=8, groups=4):
    torch.manual_seed(0)
    norm, x = nn.GroupNorm(groups, channels), torch.randn(2, channels, 5, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, nn.SiLU(), x


def test_the_two_are_one_kernel_and_change_nothing(asked):
    norm, silu, x = pair()
    assert relative(layers.norm_silu(norm, silu, x, None), silu(norm.double()(x.double()))) < 1e-6
    assert asked == [(2, 8, 5, 6)]


def test_on_the_cpu_the_modules_are_called():
    norm, silu, x = pair()
    assert torch.equal(layers.norm_silu(norm, silu, x, "auto"), silu(norm(x)))


class OwnNorm(nn.GroupNorm):
    """A class of a user's."""

    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(norm, silu):
    norm.forward = types.MethodType(lambda self, x: 2 * nn.GroupNorm.forward(self, x), norm)


OTHERS = {
    "hook on the norm": lambda norm, silu: norm.register_forward_hook(lambda module, _, y: 2 * y),
    "hook before the norm": lambda norm, silu: norm.register_forward_pre_hook(lambda module, x: (2 * x[0] + 1,)),
    "hook on the activation": lambda norm, silu: silu.register_forward_hook(lambda module, _, y: 2 * y),
    "forward of its own": own_forward,
    "class of a user's": lambda norm, silu: setattr(norm, "__class__", OwnNorm),
    "no weights": lambda norm, silu: norm.__init__(4, 8, affine=False),
    "weights set by parametrisation": lambda norm, silu: nn.utils.parametrizations.weight_norm(norm),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_is_not_exactly_norm_and_silu_is_called(change, asked):
    norm, silu, x = pair()
    change(norm, silu)
    assert torch.equal(layers.norm_silu(norm, silu, x, None), silu(norm(x)))
    assert not asked


def test_weights_of_another_dtype_are_torchs_to_refuse(asked):
    norm, silu, x = pair()
    with pytest.raises(RuntimeError):
        layers.norm_silu(norm.bfloat16(), silu, x, None)
    assert not asked


def test_methods_replaced_in_torchs_classes_are_called(asked, monkeypatch):
    norm, silu, x = pair()
    for kind in (nn.GroupNorm, nn.SiLU):
        with monkeypatch.context() as patched:
            own = kind.forward
            patched.setattr(kind, "forward", lambda self, x, own=own: 2 * own(self, x))
            assert torch.equal(layers.norm_silu(norm, silu, x, None), silu(norm(x)))
    assert not asked
    layers.norm_silu(norm, silu, x, None)
    assert asked


def test_other_activations_are_called(asked):
    norm, _, x = pair()
    for other in (nn.GELU(), nn.Mish(), nn.ReLU()):
        assert torch.equal(layers.norm_silu(norm, other, x, None), other(norm(x)))
    assert not asked


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "with time projections"])
@pytest.mark.parametrize("method", ["cmlora", "merge"])
def test_a_step_runs_them_wherever_a_resnet_is_plain_and_restores_the_model(method, targets, asked):
    pipe = three_adapters(targets, device="cpu")
    before, names = call(pipe, 2), {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()}
    resnets = [module for module in pipe.unet.modules() if type(module) is ResnetBlock2D]
    cmlora.accelerate(pipe, method=method, cache_interval=2)
    got = call(pipe, 2)
    assert len(asked) > 2 * len(resnets), "norm1 and norm2 of each, and what is behind the last"
    heard = []
    handle = resnets[-1].norm2.register_forward_hook(lambda *_: heard.append(1))
    asked.clear()
    assert relative(call(pipe, 2), got) < 1e-5, "a hook that changes nothing: the norm called as it is"
    assert heard
    assert asked
    handle.remove()
    cmlora.restore(pipe)
    assert {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()} == names
    asked.clear()
    assert torch.equal(call(pipe, 2), before)
    assert not asked
