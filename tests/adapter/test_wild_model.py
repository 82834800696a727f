"""The model itself, as people had them in public bug reports, through the public API: the plain
pipeline's picture, that of a loop of plain calls, or an error that says what to do. Never silently another picture."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

import cmlora
from cmlora.lab.bench.tiny import ATTENTION, add_lora, call, embeddings, relative, sd_pipe
from tests.adapter.loop import NAMES, WEIGHTS, small_unet, with_loras
from tests.adapter.wild import DEVIATION, KINDS, MEAN, MERGE, NEAR, or_refused, ours, right, right_or_refused
from tests.lora.test_behaviour import own_convolution, quantise


@KINDS
@pytest.mark.parametrize("around", ["load", "accelerate", "call", "every other call"])
def test_inference_mode(kind, around):
    with torch.inference_mode(around == "load"):
        pipe = with_loras(sd_pipe(small_unet()))
        if around == "load":
            want = right(pipe, kind)
            pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))
    want = want if around == "load" else right(pipe, kind)
    with torch.inference_mode(around == "accelerate"):
        cmlora.accelerate(pipe, **kind)
    for mode in {"call": (True,), "every other call": (False, True, False)}.get(around, (False, True)):
        with torch.inference_mode(mode):
            assert relative(call(pipe, 3), want) < NEAR


# --- convolutions that are more than torch's


def circular(pipe):
    for module in pipe.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


@KINDS
@pytest.mark.parametrize("when", ["before loading", "before accelerate", "between calls"])
@pytest.mark.parametrize("pattern", [ATTENTION, r"(conv1|conv2|conv)$"], ids=["attention", "convolutions"])
def test_circular_padding(kind, when, pattern):
    """Seamless textures: set on every Conv2d there is."""
    pipe = sd_pipe(small_unet())
    if when == "before loading":
        circular(pipe)
    for seed, name in enumerate(NAMES):
        add_lora(pipe.unet, name, pattern=pattern, seed=seed)
    pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))
    if when == "before accelerate":
        circular(pipe)
    cmlora.accelerate(pipe, **kind)
    before = call(pipe, 3)
    if when == "between calls":
        circular(pipe)
    got = call(pipe, 3)
    assert relative(got, right(cmlora.restore(pipe), kind)) < NEAR
    assert (relative(got, before) > NEAR) == (when == "between calls")


def test_circular_padding_of_convolutions_with_transformed_weights():
    pipe = sd_pipe(small_unet(block_out_channels=(32, 1024)))
    for seed, name in enumerate(NAMES):
        add_lora(pipe.unet, name, seed=seed)
    pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))
    with cmlora.accelerated(pipe, winograd=True, **MERGE):
        call(pipe, 1)
        circular(pipe)
        got = call(pipe, 1)
    assert relative(got, call(pipe, 1)) < NEAR


@KINDS
@pytest.mark.parametrize("pattern", [ATTENTION, r"conv1$"], ids=["attention", "convolutions"])
def test_a_convolution_of_ones_own(kind, pattern):
    """Tiling along one side; on the adapters' own convolutions, too, since they are Conv2d."""
    pipe = sd_pipe(small_unet())
    for seed, name in enumerate(NAMES):
        add_lora(pipe.unet, name, pattern=pattern, seed=seed)
    for module in pipe.unet.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
            own_convolution(module)
    right_or_refused(pipe, kind, match="of its own")


@KINDS
def test_weights_of_eight_bits(kind, sd):
    for name, module in sd.unet.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name and "attentions" in name:
            quantise(module)
    want = right(sd, kind)
    assert relative(ours(sd, kind), want) < NEAR


@KINDS
@pytest.mark.parametrize("patterns", [("norm", "lora"), ("norm",)], ids=["without loras", "with loras"])
@pytest.mark.parametrize("behind", [False, True], ids=["before accelerate", "behind accelerate"])
def test_layerwise_casting(kind, patterns, behind, sd):
    def enable():
        sd.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=patterns)

    if behind:
        cmlora.accelerate(sd, **kind)
        enable()
        with or_refused("layer by layer", "of its own"):
            got = call(sd, 3)
            assert relative(got, right(cmlora.restore(sd), kind)) < NEAR
    else:
        enable()
        right_or_refused(sd, kind, match="layer by layer")


# --- weights and adapters that change


@KINDS
def test_base_weights_written_through_data(kind, sd):
    """An exponential moving average that is swapped in."""
    cmlora.accelerate(sd, **kind)
    before = call(sd, 3)
    for name, weight in sd.unet.named_parameters():
        if "lora_" not in name:
            weight.data.mul_(0.9)
    got = call(sd, 3)
    assert relative(got, right(cmlora.restore(sd), kind)) < NEAR
    assert relative(got, before) > NEAR


class Together:
    """Self-attention in which every image also sees the first of its guidance half."""

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        if encoder_hidden_states is None:
            k, v = self.joined(k), self.joined(v)
        q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)

    def joined(self, x):
        halves = x.unflatten(0, (2, -1))
        return torch.cat([halves, halves[:, :1].expand_as(halves)], 2).flatten(0, 1)


@pytest.mark.parametrize("kind", [MERGE, MEAN, DEVIATION], ids=["merge", "mean", "deviation"])
def test_a_processor_that_mixes_the_images_of_a_batch(kind, sd):
    sd.unet.set_attn_processor(Together())
    run = functools.partial(call, steps=3, given=embeddings(sd, 3))
    right_or_refused(sd, kind, run, match="Together")


def louder(forward):
    def wrapped(*args, **kwargs):
        return (1.1 * forward(*args, **{**kwargs, "return_dict": False})[0],)

    return wrapped


@pytest.mark.parametrize("kind", [MERGE, MEAN], ids=["merge", "mean"])
@pytest.mark.parametrize("lends_its_name", [False, True])
@pytest.mark.parametrize("behind", [False, True], ids=["before accelerate", "behind accelerate"])
def test_a_wrapper_around_the_unets_forward(kind, lends_its_name, behind, sd):
    def wrap():
        forward = sd.unet.forward
        sd.unet.forward = functools.wraps(forward)(louder(forward)) if lends_its_name else louder(forward)

    want = right(sd, kind)
    with or_refused("forward"):
        if not behind:
            wrap()
        cmlora.accelerate(sd, **kind)
        if behind:
            wrap()
        got = call(sd, 3)
        assert relative(got, want) > NEAR
        if kind is MERGE:
            cmlora.restore(sd)
            sd.unet.__dict__.pop("forward", None)
            wrap()
            assert relative(got, call(sd, 3)) < NEAR


@pytest.mark.parametrize("block", ["down_blocks.0", "up_blocks.1"])
@KINDS
def test_a_hook_on_a_whole_block(kind, block, sd):
    """We do not call blocks as a whole."""

    def hook(module, args, y):
        return (y[0] * 1.1, *y[1:]) if isinstance(y, tuple) else y * 1.1

    sd.unet.get_submodule(block).register_forward_hook(hook)
    right_or_refused(sd, kind, match=block)


@pytest.fixture
def _dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def as_a_module(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def in_place(pipe):
    pipe.unet.compile(backend="eager")


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize("compiling", [as_a_module, in_place], ids=lambda compiling: compiling.__name__)
@pytest.mark.parametrize("behind", [False, True], ids=["before accelerate", "behind accelerate"])
def test_torch_compile(compiling, behind, sd):
    want = call(sd, 2)
    with or_refused("compile"):
        if not behind:
            compiling(sd)
        cmlora.accelerate(sd, **MERGE)
        if behind:
            compiling(sd)
        assert relative(call(sd, 2), want) < NEAR
        assert cmlora.summary(sd).steps
        cmlora.restore(sd)
    assert relative(call(sd, 2), want) < NEAR


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("behind", [False, True], ids=["before accelerate", "behind accelerate"])
@KINDS
def test_group_offload_is_refused(kind, behind, level, sd):
    cpu = torch.device("cpu")
    groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
    if behind:
        cmlora.accelerate(sd, **kind)
    apply_group_offloading(sd.unet, onload_device=cpu, offload_device=cpu, offload_type=level, **groups)
    with pytest.raises(cmlora.CMLoRAError, match="offload"):
        cmlora.accelerate(sd, **kind)
        call(sd, 1)
