"""A second model family, thirty lines long: all methods, a clock of its own, a residual cache, halves called apart."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

import cmlora
from cmlora.batch.inputs import Inputs
from cmlora.batch.rows import Shared, whole
from cmlora.lab.bench.tiny import add_lora, relative
from cmlora.models import FAMILIES
from cmlora.models.family import Batched, Call, Conditions, Family, Place

EXACT = 1e-5
WIDTH = 8


class Toy(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Three residual blocks on tokens [rows, tokens, width]; time is a number in [0, 1]."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.out = nn.Linear(WIDTH, WIDTH)

    def block(self, i, x, prompt, time):
        return x + torch.tanh(self.blocks[i](x) + prompt + time)

    def forward(self, tokens, time, prompt):
        x = tokens
        for i in range(3):
            x = self.block(i, x, prompt, time)
        return self.out(x)


# --- the family


class ToyPipeline:
    def __init__(self, toy):
        self.toy, self.scheduler, self.step = toy, SimpleNamespace(sigmas=torch.linspace(1, 0.1, 6)), 0


class ToyInputs(Inputs):
    CONSTANT = ("prompt",)

    def __init__(self, sample, timestep, prompt):
        super().__init__(sample, timestep)
        self.prompt = prompt

    def map(self, change):
        return ToyInputs(change(self.sample), change(self.timestep), change(self.prompt))


class ToyPart:
    """Head: the first block; deep: what the others add; tail: the sum, and the output layer."""

    def __init__(self, batched, inputs, rows):
        self.model, self.running, self.rows = batched.module, batched.running, rows
        self.given = [whole(Shared(t, False, True), rows) for t in (inputs.sample, inputs.prompt)]
        self.time = inputs.timestep

    def head(self):
        with self.running.at((4, 4)):
            x = Shared(self.model.block(0, *self.given, self.time), True, True)
        return x, [x]

    def deep(self, hidden, kept):
        x = start = whole(hidden, self.rows)
        with self.running.at((4, 4)):
            for i in (1, 2):
                x = self.model.block(i, x, self.given[1], self.time)
        return x - start

    def tail(self, feature, kept):
        return self.model.out(whole(kept[0], self.rows) + feature)


class ToyBatched(Batched):
    def begin(self, inputs, timesteps):
        return Conditions(inputs)

    def part(self, inputs, conditions, rows, everyone, step):
        return ToyPart(self, inputs, rows)

    def latents(self, inputs):
        return self.as_image(inputs.sample, inputs)

    def as_image(self, noise, inputs):
        return noise.transpose(1, 2).unflatten(2, (4, 4))

    def as_noise(self, image):
        return image.flatten(2).transpose(1, 2)


class ToyFamily(Family):
    attribute, pipelines = "toy", ("ToyPipeline",)

    def owns(self, module):
        return isinstance(module, Toy)

    def check(self, module):
        pass

    def read(self, arguments):
        return Call(ToyInputs(arguments["tokens"], arguments["time"], arguments["prompt"]))

    def place(self, pipe, scheduler, call):
        return Place(scheduler.sigmas, pipe.step)  # its clock: the pipeline says

    def batched(self, module, config, running):
        return ToyBatched(module, config, running)

    def result(self, noise, call):
        return noise


# --- what is asked of it


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr("cmlora.models.FAMILIES", [*FAMILIES, ToyFamily()])
    torch.manual_seed(0)
    pipe = ToyPipeline(Toy())
    for i, name in enumerate(("character", "style", "background")):
        add_lora(pipe.toy, name, rank=2 + i, pattern=r"blocks\.[0-2]$", seed=i)
    pipe.toy.set_adapters(["character", "style", "background"], [1.0, 0.7, 1.3])
    return pipe


def run(pipe, apart):
    """Six steps of two images with guidance; apart: a call per half. All noises, one behind the other."""
    generator = torch.Generator().manual_seed(1)
    prompts, x = (torch.randn(2, 1, WIDTH, generator=generator) for _ in range(2)), None
    negative, positive = prompts
    x, seen = torch.randn(2, 16, WIDTH, generator=generator), []
    both = torch.cat([negative, positive])
    for step, time in enumerate(pipe.scheduler.sigmas):
        pipe.step = step
        if apart:
            halves = [pipe.toy(x, time, prompt) for prompt in (negative, positive)]
        else:
            halves = pipe.toy(torch.cat([x, x]), time, both).chunk(2)
        seen += halves
        x = x + 0.1 * (halves[0] + 3 * (halves[1] - halves[0]))
    return torch.cat(seen)


class Peer:
    """In the place of the toy's forward: one adapter after the other, a residual kept for each and each half."""

    def __init__(self, pipe, interval, rule):
        self.pipe, self.toy, self.interval, self.rule = pipe, pipe.toy, interval, rule
        self.kept, self.names = {}, ["character", "style", "background"]
        self.weights = dict(zip(self.names, [1.0, 0.7, 1.3], strict=True))

    def one(self, name, tokens, time, prompt, refresh):
        if name is None:
            self.toy.disable_adapters()
        else:
            self.toy.set_adapters([name], [self.weights[name]])
        head = self.toy.block(0, tokens, prompt, time)
        key = (name, prompt.data_ptr())
        if refresh or key not in self.kept:
            x = self.toy.block(2, self.toy.block(1, head, prompt, time), prompt, time)
            self.kept[key] = x - head
        if name is None:
            self.toy.enable_adapters()
        return self.toy.out(head + self.kept[key])

    def __call__(self, tokens, time, prompt):
        step = self.pipe.step
        refresh = step % self.interval == 0
        dominant = self.names[step // self.interval % 2]  # the background is low: not in the early stage
        if self.rule == "switch":
            name = self.names[max(step - 1, 0) // 2 % 3]
            return self.one(name, tokens, time, prompt, refresh or (step > 1 and step % 2 == 1))
        if self.rule == "cmlora":
            fresh = {n: refresh and (n == dominant or self.interval == 1) for n in self.names}
            seen = {n: self.one(n, tokens, time, prompt, fresh[n]) for n in self.names}
            return sum((2.5 if n == dominant else 1.0) * e for n, e in seen.items()) / 4.5
        seen = [self.one(n, tokens, time, prompt, refresh) for n in self.names]
        if self.rule == "mean":
            return sum(seen) / 3
        if self.rule == "local":
            base = self.one(None, tokens, time, prompt, refresh)
            strength = torch.stack([(e - base).norm(dim=2) for e in seen])  # [adapters, rows, tokens]
            sizes = blur(strength) / blur(strength).mean((0, 2), keepdim=True)
            masks = torch.softmax(sizes / 0.25, 0)
            masks = masks / masks.amax(0)
            return base + sum(m[..., None] * (e - base) for m, e in zip(masks, seen, strict=True))
        base = self.one(None, tokens, time, prompt, refresh)
        return base + sum(e - base for e in seen)


def blur(strength):
    image = strength.unflatten(2, (4, 4))
    padded = nn.functional.pad(image, (1, 1, 1, 1), mode="replicate")
    return nn.functional.avg_pool2d(padded, 3, stride=1).flatten(2)


RULES = {
    "local": {"method": "composite", "combine": "local"},
    "mean": {"method": "composite", "combine": "mean"},
    "deviation": {"method": "composite", "combine": "deviation", "cache_follow": False},
    "cmlora": {"combine": "mean", "partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0.0},
    "switch": {"method": "switch", "switch_step": 2},
}


@pytest.mark.parametrize("apart", [False, True], ids=["halves together", "halves apart"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_methods_on_a_family_of_one_s_own_equal_a_loop(toy, rule, interval, apart):
    if rule == "local" and apart:
        cmlora.accelerate(toy, **RULES[rule])
        with pytest.raises(cmlora.RunError, match="masks come from the conditional half"):
            run(toy, apart)
        return
    peer = Peer(toy, interval, rule)
    toy.toy.forward = peer
    want = run(toy, apart)
    del toy.toy.forward
    toy.toy.set_adapters(["character", "style", "background"], [1.0, 0.7, 1.3])
    cmlora.accelerate(toy, cache_interval=interval, **RULES[rule])
    assert relative(run(toy, apart), want) < EXACT
    assert len(cmlora.summary(toy).steps) == 6
    cmlora.restore(toy)
    assert "forward" not in toy.toy.__dict__


def test_merge_and_no_lora_are_the_plain_model(toy):
    want = run(toy, apart=False)
    with cmlora.accelerated(toy, method="merge", cache_interval=1):
        assert relative(run(toy, apart=False), want) < EXACT
    with cmlora.accelerated(toy, method="no_lora", cache_interval=1):
        got = run(toy, apart=True)
    toy.toy.disable_adapters()
    assert relative(got, run(toy, apart=True)) < EXACT


@pytest.mark.parametrize(
    "limits", [{"max_rows": 4}, {"memory_budget": 10**6}, {"partition": "online", "low": ["style"]}]
)
def test_limits_and_the_gate_serve_any_family(toy, limits):
    cmlora.accelerate(toy, cache_interval=2, **{"partition": "offline", **limits})
    got = run(toy, apart=False)
    free = {name: value for name, value in limits.items() if name not in ("max_rows", "memory_budget")}
    cmlora.accelerate(toy, cache_interval=2, **{"partition": "offline", **free})
    assert relative(got, run(toy, apart=False)) < EXACT
    assert cmlora.summary(toy).peak_bytes > 0


def test_routed_on_a_family_of_one_s_own_equals_all_adapters_times_their_masks(toy):
    cmlora.accelerate(toy, method="routed", cache_interval=1)
    first = run(toy, apart=False)
    masks = cmlora.summary(toy).masks
    assert {m.shape for m in masks.values()} == {(4, 4, 4)}  # of every row: no half is known here
    cmlora.accelerate(toy, method="routed", cache_interval=1, regions={n: m[:1] for n, m in masks.items()})
    assert not torch.equal(first, run(toy, apart=False))
    toy.toy.set_adapters(["style"])
    cmlora.accelerate(toy, method="routed", cache_interval=1)
    one = run(toy, apart=False)
    cmlora.restore(toy)
    assert relative(one, run(toy, apart=False)) < EXACT, "a single adapter is the strongest everywhere"


def test_a_pipeline_without_a_known_module_names_the_families():
    with pytest.raises(cmlora.UnsupportedModelError, match=r"has no unet.*StableDiffusionXLPipeline"):
        cmlora.accelerate(SimpleNamespace())
