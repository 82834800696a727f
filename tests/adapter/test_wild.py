"""What people did in public bug reports, through the public API: the plain pipeline's picture, that of a loop of plain
calls, or an error that says what to do. Never silently another picture."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

import cmlora
from tests.adapter.loop import NAMES, WEIGHTS, Loop, small_unet, with_loras
from tests.lora.test_behaviour import own_convolution, quantise
from tests.models import ATTENTION, add_lora, call, embeddings, relative, sd_pipe

NEAR = 1e-4  # rounding of a run of some steps, ours and theirs being summed in another order
MERGE = {"method": "merge", "cache_interval": 1}
MEAN = {"method": "composite", "combine": "mean", "cache_interval": 1}
DEVIATION = {"method": "composite", "combine": "deviation", "cache_interval": 1}
KINDS = pytest.mark.parametrize("kind", [MERGE, MEAN], ids=["merge", "mean"])


@pytest.fixture
def sd():
    return with_loras(sd_pipe(small_unet()))


def three_steps(pipe):
    return call(pipe, 3)


def refused(error, *parts):
    """One of ours, that says what it is about."""
    return len(str(error.value)) > 30 and any(part in str(error.value) for part in parts)


@contextmanager
def or_refused(*parts):
    """What runs inside may end in an error of ours that names one of the parts."""
    with pytest.raises((cmlora.CMLoRAError, DoneError)) as error:
        yield
        raise DoneError
    assert error.type is DoneError or refused(error, *parts), str(error.value)


class DoneError(Exception):
    """Nothing was refused."""


class Deviations(Loop):
    """The loop that adds every adapter's difference from the base model."""

    def __call__(self, *args, return_dict=True, **kwargs):
        self.unet.disable_adapters()
        base = self.original(*args, **kwargs, return_dict=False)[0]
        self.unet.enable_adapters()
        total = 2 * super().__call__(*args, **kwargs, return_dict=False)[0] - base
        return type(self.original(*args, **kwargs))(total) if return_dict else (total,)


def right(pipe, kind, run=three_steps):
    """`run` on the plain pipeline, or with a loop in the place of its UNet's forward."""
    pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))
    if kind is MERGE:
        return run(pipe)
    with (Loop if kind is MEAN else Deviations)(pipe.unet):
        return run(pipe)


def ours(pipe, kind, run=three_steps):
    pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))
    with cmlora.accelerated(pipe, **kind):
        return run(pipe)


def right_or_refused(pipe, kind, run=three_steps, match=""):
    """Ours is right, or an error that names `match`."""
    want = right(pipe, kind, run)
    with or_refused(match):
        assert relative(ours(pipe, kind, run), want) < NEAR


# --- torch.inference_mode


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


@pytest.mark.parametrize("kind", [MERGE, MEAN, DEVIATION], ids=["merge", "mean", "deviation"])
def test_another_scale_in_every_step(kind, sd):
    def run(pipe):
        given, seen = embeddings(pipe), []
        pipe.scheduler.set_timesteps(4)
        x = given["latents"]
        for t, scale in zip(pipe.scheduler.timesteps, (1.0, 0.6, 0.2, 0.0), strict=True):
            noise = pipe.unet(x, t, given["prompt_embeds"], cross_attention_kwargs={"scale": scale}).sample
            x = pipe.scheduler.step(noise, t, x).prev_sample
            seen.append(noise)
        return torch.stack(seen)

    assert relative(ours(sd, kind, run), right(sd, kind, run)) < NEAR


def weaker(pipe, i):
    pipe.set_adapters(list(NAMES), [WEIGHTS[0] * (1 - 0.25 * (i + 1)), WEIGHTS[1]])


def one_less(pipe, i):
    pipe.set_adapters(["b"] if i == 1 else list(NAMES))


def off_and_on(pipe, i):
    pipe.disable_lora() if i == 0 else pipe.enable_lora()


def swapped(pipe, i):
    for module in pipe.unet.modules():
        if hasattr(module, "lora_A") and i == 1:
            module.lora_A["a"].weight.data.mul_(1.5)


@pytest.mark.parametrize("switch", [weaker, one_less, off_and_on], ids=lambda switch: switch.__name__)
@KINDS
def test_adapters_switched_in_a_step_callback(kind, switch, sd):
    def run(pipe):
        def callback(pipe, i, t, tensors):
            switch(pipe, i)
            return tensors

        return call(pipe, 4, callback_on_step_end=callback)

    if kind is MERGE:
        want = right(sd, kind, run)
        sd.enable_lora()
        assert relative(ours(sd, kind, run), want) < NEAR
        return
    sd.unet.set_adapters(list(NAMES), list(WEIGHTS))
    unswitched = right(sd, kind, functools.partial(call, steps=4))
    with or_refused("adapter", "set_adapters"):
        assert relative(ours(sd, kind, run), unswitched) > NEAR, "the switch was passed by"


@KINDS
def test_weights_of_an_adapter_swapped_between_calls(kind, sd):
    cmlora.accelerate(sd, **kind)
    before = call(sd, 3)
    swapped(sd, 1)
    got = call(sd, 3)
    assert relative(got, right(cmlora.restore(sd), kind)) < NEAR
    assert relative(got, before) > NEAR


# --- code of the user's own in the UNet


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


# --- copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_the_unet_is_a_plain_one(duplicate, sd):
    cmlora.accelerate(sd, **MERGE)
    want = call(sd, 2)
    other = sd_pipe(duplicate(sd.unet))
    assert relative(call(other, 2), want) < NEAR
    other.unet.set_adapters(list(NAMES), [0.0, 0.0])
    assert relative(call(other, 2), want) > NEAR
    assert relative(call(sd, 2), want) < NEAR
    cmlora.restore(other)
    assert len(cmlora.summary(sd).steps) == 2
    other.unet.set_adapters(list(NAMES), list(WEIGHTS))
    with cmlora.accelerated(other, **MERGE):
        assert relative(call(other, 2), want) < NEAR
        assert len(cmlora.summary(other).steps) == 2


def test_a_copy_of_the_pipeline_is_a_plain_one(sd):
    cmlora.accelerate(sd, **MERGE)
    want = call(sd, 2)
    other = copy.deepcopy(sd)
    other.unet.set_adapters(list(NAMES), [0.0, 0.0])
    assert relative(call(other, 2), want) > NEAR
    cmlora.restore(other)
    assert len(cmlora.summary(sd).steps) == 2
    assert relative(call(sd, 2), want) < NEAR


# --- torch.compile, offload


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


# --- loops of one's own, threads


@KINDS
def test_two_prompts_from_one_noise_behind_a_guided_call(kind, sd):
    def run(pipe):
        given = embeddings(pipe, 2)
        x = given["latents"][:1].repeat(2, 1, 1, 1)
        pipe.scheduler.set_timesteps(3)
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t, given["prompt_embeds"]).sample, t, x).prev_sample
        return x

    want = right(sd, kind, run)
    cmlora.accelerate(sd, **kind)
    call(sd, 2)
    assert relative(run(sd), want) < NEAR


def test_prompts_sliced_anew_and_written_to_in_every_step(sd):
    """New views of the same memory are the same prompt, until it is written to."""

    def run(pipe):
        given = embeddings(pipe, 2)
        context, x = given["prompt_embeds"].clone(), given["latents"][:1]
        pipe.scheduler.set_timesteps(4)
        for i, t in enumerate(pipe.scheduler.timesteps):
            if i == 2:
                context[0] *= 2
            x = pipe.scheduler.step(pipe.unet(x, t, context[:1]).sample, t, x).prev_sample
        return x

    for mode in (False, True):
        with torch.inference_mode(mode):
            assert relative(ours(sd, MEAN, run), right(sd, MEAN, run)) < NEAR


@KINDS
def test_two_threads_on_one_pipeline(kind, sd):
    want = right(sd, kind)
    cmlora.accelerate(sd, **kind)
    seen: list[object] = []

    def draw():
        try:
            with torch.no_grad():
                seen.append(call(sd, 3))
        except cmlora.CMLoRAError as error:
            seen.append(str(error))

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2
    for one in seen:
        assert "thread" in one if isinstance(one, str) else relative(one, want) < NEAR
    assert relative(call(sd, 3), want) < NEAR


# --- a merge of whatever is there


def disabled(pipe):
    pipe.disable_lora()


def deleted(pipe):
    pipe.delete_adapters(list(NAMES))


def fused(pipe):
    pipe.fuse_lora()


def unfused(pipe):
    pipe.fuse_lora()
    pipe.unfuse_lora()


def unloaded(pipe):
    pipe.unload_lora_weights()


@pytest.mark.parametrize("behind", [False, True], ids=["before accelerate", "behind accelerate"])
@pytest.mark.parametrize("change", [disabled, deleted, fused, unfused, unloaded], ids=lambda change: change.__name__)
def test_a_merge_draws_what_the_plain_pipeline_draws(change, behind, sd):
    if behind:
        cmlora.accelerate(sd, **MERGE)
        call(sd, 1)
    change(sd)
    if not behind:
        cmlora.accelerate(sd, **MERGE)
    got = call(sd, 2)
    assert relative(got, call(cmlora.restore(sd), 2)) < NEAR
