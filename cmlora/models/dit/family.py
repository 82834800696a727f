"""What the transformers of diffusers have in common: how a call is read, its clock, its guidance halves."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from cmlora.errors import ConfigError, RunError, UnsupportedModelError
from cmlora.lora.bank import outline
from cmlora.lora.check import CASTING
from cmlora.lora.foreign import OFFLOADS
from cmlora.lora.plain import origin
from cmlora.models.caller import calling_frame
from cmlora.models.clock import index_in
from cmlora.models.family import Call, Family, Place
from cmlora.models.prompts import own_rows

HARMLESS = ("layerwise_casting", CASTING)
"""Hooks of diffusers that leave nothing behind."""


class TransformerFamily(Family):
    """One class of transformers.

    Attributes:
        kind: the class. kwargs: by which name its forward takes the adapters' scale.
        text_kinds: names of what `encode_prompt` returns of a prompt, in order; None: nothing that the model takes.
    """

    attribute = "transformer"
    kind: ClassVar[type[nn.Module]]
    kwargs: ClassVar[str] = "joint_attention_kwargs"
    text_kinds: ClassVar[tuple[str | None, ...]] = ("encoder_hidden_states",)

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, self.kind)

    def check(self, module: Any) -> None:
        name = type(module).__name__
        if type(module).forward is not self.kind.forward or not origin(self.kind.forward).startswith("diffusers."):
            raise UnsupportedModelError(
                f"{name}.forward is not diffusers' {self.kind.__name__}'s, and would be bypassed"
            )
        if getattr(module, "is_cache_enabled", False):
            raise UnsupportedModelError(
                f"this {name} has a cache of its own, which ours would meet: call disable_cache()"
            )
        if getattr(module, "_transformer_norm_layers", None):
            raise UnsupportedModelError(
                f"a control LoRA has replaced norms of this {name}, for all rows alike; call "
                "pipe.unload_lora_weights() and load LoRAs without norms"
            )
        for where, part in outline(module):
            if getattr(part, "fused_projections", False):
                raise UnsupportedModelError(
                    f"{where}: q, k, v are fused, past its LoRA layers: unfuse_qkv_projections()"
                )
            processor = getattr(part, "processor", None)
            if "IPAdapter" in type(processor).__name__:
                raise UnsupportedModelError(
                    f"{where}: IP-Adapters of transformers are not supported: unload_ip_adapter()"
                )
            if getattr(processor, "_parallel_config", None) is not None:
                raise UnsupportedModelError(f"{where}: a transformer that runs on several devices is not supported")
            for hook in _keeping(part):
                raise UnsupportedModelError(
                    f"{where or name}: diffusers' hook {hook!r} keeps something from call to call, which rows of "
                    "several predictions would share: take it off (pipe.transformer.disable_cache())"
                )

    def take_kwargs(self, given: dict[str, Any]) -> float:
        """The adapters' scale, out of a call's arguments; all else in their dictionary is refused."""
        kwargs = dict(given.pop(self.kwargs, None) or {})
        scale = float(kwargs.pop("scale", 1.0))
        if kwargs:
            raise RunError(f"{self.kwargs} may hold 'scale' alone, got {', '.join(map(repr, sorted(kwargs)))}")
        return scale

    def passed(self, timesteps: Tensor) -> Tensor:
        """A schedule's timesteps as pipelines pass them to the model."""
        return timesteps

    def place(self, pipe: Any, scheduler: Any, call: Call) -> Place:
        """By the variables of the pipeline that is calling; in a loop of one's own by the scheduler's count."""
        frame, by_itself = calling_frame(self.pipelines)
        said: Mapping[str, Any] = {} if frame is None else frame.f_locals
        if frame is not None:
            scheduler = getattr(said["self"], "scheduler", scheduler)
        schedule = getattr(scheduler, "timesteps", None)
        index = index_in(schedule, call.inputs.timestep)
        index = index_in(schedule, said.get("t")) if index is None else index
        index = self._count(scheduler, call.inputs.timestep) if index is None else index
        halves, whole, conditional = self.guidance(frame, by_itself, call.inputs)
        return Place(scheduler.timesteps, index, halves, whole, conditional)

    def guidance(self, frame: FrameType | None, by_itself: bool, inputs: Any) -> tuple[int, bool, bool | None]:
        """`halves`, `whole` and `conditional` of a call. Here: one half a call where there is guidance at all."""
        if frame is None:
            return 1, False, None
        said = frame.f_locals
        if not said.get("do_true_cfg", False):
            return 1, True, None
        halves = {"prompt_embeds": True, "negative_prompt_embeds": False}
        mine = (half for name, half in halves.items() if said.get(name) is inputs.encoder_hidden_states)
        return 1, False, next(mine, None)

    def _count(self, scheduler: Any, timestep: Tensor) -> int:
        """Where a loop of the user's own is: the scheduler counts its steps; before the first the value tells."""
        schedule = getattr(scheduler, "timesteps", None)
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None)
        if index is None and isinstance(schedule, Tensor) and len(schedule):
            given = timestep.reshape(-1)[:1].double().to(schedule.device)
            candidates = [(s.double() - given).abs() for s in (self.passed(schedule), schedule)]
            away, nearest = min((float(d.min()), int(d.argmin())) for d in candidates)
            spread = float((candidates[0].max() - candidates[0].min()).abs())
            index = nearest if away <= max(1e-2 * spread, 1e-6) else None
        if index is None or not isinstance(schedule, Tensor) or index >= len(schedule):
            raise RunError(
                "timestep must be an element of pipe.scheduler.timesteps, as the pipeline passes it, so that a step's "
                f"position is known; got {timestep!r}. Call set_timesteps of the scheduler of the pipeline that was "
                "accelerated before each image, and its step in every step"
            )
        return int(index)

    def prompt(self, pipe: Any, name: str, given: Any) -> dict[str, Tensor]:
        if isinstance(given, str):
            if getattr(pipe, "tokenizer", None) is None or getattr(pipe, "text_encoder", None) is None:
                raise ConfigError(f"prompts[{name!r}] is text, but the pipeline has no tokenizer or text encoder")
            given = self.encode(functools.partial(pipe.encode_prompt, device=pipe._execution_device), given)
        tensors = given if isinstance(given, list | tuple) else (given,)
        kinds = self.text_kinds
        if not all(isinstance(t, Tensor) for t in tensors) or len(tensors) > len(kinds) or tensors[0].ndim != 3:
            raise ConfigError(
                f"prompts[{name!r}] must be text, or what encode_prompt returns of one: {', '.join(map(str, kinds))}; "
                f"got {type(given).__name__}"
            )
        return {kind: t for kind, t in zip(kinds, tensors, strict=False) if kind is not None}

    def encode(self, encode_prompt: Any, text: str) -> tuple[Tensor, ...]:
        """The tensors of `text_kinds` of a prompt."""
        with torch.no_grad():
            encoded: tuple[Tensor, ...] = encode_prompt(prompt=text)[: len(self.text_kinds)]
        return encoded

    def spread_prompts(
        self, inputs: Any, prompts: Sequence[dict[str, Tensor] | None], images: int
    ) -> tuple[dict[str, Tensor] | None, ...]:
        own = {kind: getattr(inputs, kind) for kind in self.text_kinds if kind is not None}
        return tuple(p and {key: own_rows(key, t, p, images) for key, t in own.items()} for p in prompts)

    def result(self, noise: Tensor, call: Call) -> Any:
        return Transformer2DModelOutput(sample=noise) if call.return_dict else (noise,)


def _keeping(module: nn.Module) -> list[str]:
    """Names of hooks of diffusers' own on a module that do more than to cast or to move its weights."""
    registry = module.__dict__.get("_diffusers_hook")
    hooks = {} if registry is None else registry.hooks
    return [
        name
        for name, hook in hooks.items()
        if type(hook).__module__.startswith("diffusers.hooks.") and name not in (*HARMLESS, *OFFLOADS)
    ]


def layers_in(parts: Iterable[nn.Module | None]) -> set[nn.Module]:
    """All modules of some parts."""
    return {module for part in parts if part is not None for module in part.modules()}


def unpacked(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens of 2 x 2 latent pixels each: [rows, height * width, channels * 4] -> [rows, channels, 2 h, 2 w]."""
    rows, (height, width) = x.shape[0], size
    pixels = x.reshape(rows, height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return pixels.reshape(rows, -1, 2 * height, 2 * width)


def packed(image: Tensor) -> Tensor:
    """The way back of `unpacked`."""
    rows, channels, height, width = image.shape
    tokens = image.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(rows, height * width // 4, channels * 4)
