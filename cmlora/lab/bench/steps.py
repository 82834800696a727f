"""Real denoising steps of SD1.5 and SDXL on `meta` tensors, by us and by the rivals, traced."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cmlora.accelerate import accelerated
from cmlora.lab.bench.counting import Trace
from cmlora.lab.bench.loop import CachedLoop
from cmlora.lab.bench.tiny import sd_pipe, sd_unet, sdxl_pipe, sdxl_unet

GUIDANCE, INTERVAL, IMAGES, PROMPT_TOKENS = 7.5, 2, 1, 77
RUN = 25  # steps of an image, over which the steps that find masks are averaged
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


@dataclass(frozen=True)
class Model:
    """A published UNet, from its config.json, and the size at which it draws."""

    title: str
    pipe: Callable[..., Any]
    unet: Callable[..., UNet2DConditionModel]
    config: dict[str, Any]
    added: dict[str, int] = field(default_factory=dict)  # added conditions: name -> width


MODELS = {
    "sd15": Model(
        "SD1.5 at 512 x 512",
        sd_pipe,
        sd_unet,
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "norm_num_groups": 32,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
    ),
    "sdxl": Model(
        "SDXL at 1024 x 1024",
        sdxl_pipe,
        sdxl_unet,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "norm_num_groups": 32,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"text_embeds": 1280, "time_ids": 6},
    ),
}


@dataclass(frozen=True)
class Step:
    """One denoising step: what it launches, how often it calls set_adapters, and for how many of a run it stands."""

    trace: Trace
    set_adapters: int
    times: int = 1


class MetaPipe:
    """A pipeline whose UNet lies on `meta` in float16, with LoRAs on attention.

    Args:
        model: key of MODELS.
        adapters: how many LoRAs it carries.
        rank: of each.
        targets: the layers that they change.
    """

    def __init__(self, model: str, adapters: int, rank: int = 16, targets: Sequence[str] = ATTENTION) -> None:
        self.model = MODELS[model]
        with torch.device("meta"):
            unet = self.model.unet(**self.model.config)
        # the last one is a background: low frequency, so that the device has to decide who dominates
        self._names = [*(f"character_{i}" for i in range(adapters - 1)), "background"]
        for name in self._names:
            unet.add_adapter(LoraConfig(r=rank, target_modules=list(targets)), adapter_name=name)
        self.pipe = self.model.pipe(unet.half(), device=None)
        self.pipe._guidance_scale = GUIDANCE  # the pipeline's call sets it

    def names(self, adapters: int) -> list[str]:
        """Some of the adapters, the background among them."""
        return self._names[-adapters:]

    def steps(self, method: str, adapters: int) -> list[Step]:
        """The steps of one cache interval, past the run's first: reuse and refresh; one step where all are alike.

        Of `routed`, whose first steps find the masks, those of a whole run.

        Args:
            method: key of METHODS. adapters: how many take part.
        """
        with torch.no_grad(), METHODS[method](self.pipe, self.names(adapters)):
            if method in ("plain", "PEFT merge"):
                return list(self.run(first=0, last=0))
            if method != "routed":
                return list(self.run(first=1, last=INTERVAL))
            *finding, refresh, reuse = self.run(first=0, last=2 * INTERVAL - 1)
            rest = RUN - len(finding)
            return [*finding, replace(refresh, times=-(-rest // INTERVAL)), replace(reuse, times=rest // INTERVAL)]

    def first_steps(self, adapters: int, **config: Any) -> list[Step]:
        """The first two cache intervals of a run by us.

        Args:
            adapters: how many take part. config: of CMLoRAConfig.
        """
        self.pipe.unet.set_adapters(self.names(adapters))
        with torch.no_grad(), accelerated(self.pipe, **config):
            return list(self.run(first=0, last=2 * INTERVAL - 1))

    def run(self, first: int, last: int) -> Iterator[Step]:
        """The steps `first` to `last` of a run of two cache intervals, those before them untraced."""
        pipe, unet = self.pipe, self.pipe.unet
        pipe.scheduler.set_timesteps(2 * INTERVAL)
        on_host = pipe.scheduler.timesteps.tolist()
        pipe.scheduler.set_timesteps(2 * INTERVAL, device="meta")
        side, width = unet.config.sample_size, unet.config.cross_attention_dim
        latents = _empty(IMAGES, 4, side, side)
        given: dict[str, Any] = {"encoder_hidden_states": _empty(2 * IMAGES, PROMPT_TOKENS, width)}
        if self.model.added:
            given["added_cond_kwargs"] = {k: _empty(2 * IMAGES, size) for k, size in self.model.added.items()}
        for i, (t, t_host) in enumerate(zip(pipe.scheduler.timesteps, on_host, strict=True)):
            if i > last:
                return
            with (
                Trace() if i >= first else contextlib.nullcontext() as trace,
                mock.patch.object(unet, "set_adapters", wraps=unet.set_adapters) as set_adapters,
                # this loop stands for the pipeline's own, whose guidance halves are known
                mock.patch("cmlora.models.unet.family.calling_pipeline", return_value=(pipe, True)),
            ):
                # what StableDiffusionPipeline's loop does; the scheduler's tables are read on the host
                doubled = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
                unconditional, conditional = unet(doubled, t, return_dict=False, **given)[0].chunk(2)
                noise = unconditional + GUIDANCE * (conditional - unconditional)
                latents = pipe.scheduler.step(noise, t_host, latents, return_dict=False)[0]
            if trace is not None:
                yield Step(trace, set_adapters.call_count)


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.float16)


@contextlib.contextmanager
def _plain(pipe: Any, names: Sequence[str]) -> Iterator[None]:
    pipe.unet.disable_adapters()
    yield
    pipe.unet.enable_adapters()


@contextlib.contextmanager
def _merge(pipe: Any, names: Sequence[str]) -> Iterator[None]:
    pipe.unet.set_adapters(names)
    yield


PASSES: weakref.WeakKeyDictionary[Any, dict[tuple[bool, bool], tuple[Tensor, Tensor, Any]]]
PASSES = weakref.WeakKeyDictionary()
"""Of a UNet: (whether full, whether traced) -> noise, feature, what was noted."""


class AlikeLoop(CachedLoop):
    """The loop on `meta`, where adapters launch alike: a pass of either kind runs once and is noted for all others."""

    def _full(self, name: str | None, args: Any, kwargs: Any) -> Tensor:
        return self._once(True, name, lambda: super(AlikeLoop, self)._full(name, args, kwargs))

    def _cached(self, name: str | None, args: Any, kwargs: Any) -> Tensor:
        return self._once(False, name, lambda: super(AlikeLoop, self)._cached(name, args, kwargs))

    def _once(self, full: bool, name: str | None, run: Callable[[], Tensor]) -> Tensor:
        trace = _get_current_dispatch_mode()
        known = PASSES.setdefault(self.unet, {})
        kind = (full, isinstance(trace, Trace))
        if kind in known:
            noise, self.features[name], noted = known[kind]
            if isinstance(trace, Trace):
                trace.repeat(noted)
            return noise
        before = trace.noted if isinstance(trace, Trace) else []
        noise = run()
        noted = trace.noted[len(before) :] if isinstance(trace, Trace) else []
        known[kind] = noise, self.features[name], noted
        return noise


@contextlib.contextmanager
def _loop(pipe: Any, names: Sequence[str]) -> Iterator[None]:
    with AlikeLoop(pipe.unet, names, interval=INTERVAL, dominance=len(names) - 0.5):
        yield


def _ours(**config: Any) -> Callable[[Any, Sequence[str]], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def ours(pipe: Any, names: Sequence[str]) -> Iterator[None]:
        pipe.unet.set_adapters(names)
        with accelerated(pipe, cache_interval=INTERVAL, **config):
            yield

    return ours


METHODS: dict[str, Callable[[Any, Sequence[str]], contextlib.AbstractContextManager[None]]] = {
    "plain": _plain,  # the pipeline without LoRA, or with its LoRAs fused by PEFT
    "PEFT merge": _merge,  # all adapters active in one pass
    "loop": _loop,  # PEFT, a pass per adapter, a feature cache per adapter
    "cmlora": _ours(),  # the default
    "cmlora, mean": _ours(combine="mean"),  # what the loop computes
    "routed": _ours(method="routed"),
    "merge": _ours(method="merge", merge_weights=True),  # as on a GPU that holds the copies
}
ALIKE = ("plain", "merge")
"""Those that launch the same for every number of adapters."""
