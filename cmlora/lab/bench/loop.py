"""The peer: one adapter after the other, with PEFT's own set_adapters and forward; it shares no code with ours.

`Loop` runs diffusers' whole UNet forward for every adapter in every step, and a hook puts the kept feature in the place
of what came up to the cut; so it follows every condition that diffusers does, and spares nothing. `CachedLoop` runs a
cached step as people do, without the deep blocks: what is timed and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn


class Loop:
    """Stands in for the UNet's forward: N passes, one adapter after the other, with a feature cache each.

    Close it, or use it as a context manager. The adapter of the last pass is then left active.

    Args:
        unet: with the adapters loaded.
        names: adapters, in order. weights: of set_adapters; None: all 1.
        interval: calls between refreshes; the dominant adapter is refreshed, in turn.
        branch: (level, layer) of the up path whose input is cached, as CMLoRAConfig.cache_branch.
        dominance: weight of the dominant adapter before normalisation; None: a plain mean, all refreshed together.
        deviation: add the adapters' differences from the base model instead of taking their mean.
        follow: whenever the base model's feature is refreshed, all cached features move by its difference.
    """

    def __init__(
        self,
        unet: Any,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        interval: int = 1,
        branch: tuple[int, int] | None = None,
        dominance: float | None = None,
        deviation: bool = False,
        follow: bool = False,
    ) -> None:
        self.unet, self.names, self.interval = unet, list(names), interval
        self.weights = dict(zip(self.names, weights or [1.0] * len(self.names), strict=True))
        self.dominance, self.deviation, self.follow = dominance, deviation, follow
        self.calls, self.dominant = 0, self.names[0]
        self.features: dict[str | None, Tensor] = {}  # None: of the base model
        self.full_passes: list[list[str | None]] = []
        self.entry, self.channels = _entry(unet, branch or (0, len(unet.down_blocks[0].resnets) - 1))
        self.original = unet.forward
        unet.forward = self

    def close(self) -> None:
        """Give the UNet its forward back."""
        del self.unet.__dict__["forward"]

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        refreshing = self.calls % self.interval == 0
        self.dominant = self.names[self.calls // self.interval % len(self.names)]
        self.full_passes.append([])
        seen: dict[str | None, Tensor] = {}
        for name in [None, *self.names] if self.deviation else self.names:
            stale = refreshing and (self.dominance is None or name in (self.dominant, None))
            full, before = self.calls == 0 or stale or self.interval == 1, self.features.get(name)
            seen[name] = self._pass(name, full, args, kwargs)
            if name is None and full and before is not None and self.follow:
                moved = self.features[None] - before
                self.features |= {adapter: self.features[adapter] + moved for adapter in self.names}
        self.calls += 1
        noise = self._combine(seen)
        return UNet2DConditionOutput(noise) if return_dict else (noise,)

    def _combine(self, seen: dict[str | None, Tensor]) -> Tensor:
        n = len(self.names)
        weight = 1.0 if self.dominance is None else self.dominance
        other = n / (weight + n - 1)
        w = {name: weight * other if name == self.dominant and self.dominance else other for name in self.names}
        if self.deviation:
            base = seen[None]
            return base + sum(w[name] * (seen[name] - base) for name in self.names)
        return torch.stack([w[name] * seen[name] for name in self.names]).mean(0)

    def _pass(self, name: str | None, full: bool, args: Any, kwargs: Any) -> Tensor:
        if name is None:
            self.unet.disable_lora()
        else:
            self.unet.set_adapters([name], [self.weights[name]])
        try:
            return self._full(name, args, kwargs) if full else self._cached(name, args, kwargs)
        finally:
            if name is None:
                self.unet.enable_lora()

    def _full(self, name: str | None, args: Any, kwargs: Any) -> Tensor:
        self.full_passes[-1].append(name)

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.features[name] = inputs[0][:, : self.channels]

        return self._hooked(keep, args, kwargs)

    def _cached(self, name: str | None, args: Any, kwargs: Any) -> Tensor:
        def put(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept, hidden = self.features[name], inputs[0]
            batch = hidden.shape[0]  # guidance that was switched off leaves the conditional half, which is the last one
            return torch.cat([kept[-batch:], hidden[:, self.channels :]], 1), *inputs[1:]

        return self._hooked(put, args, kwargs)

    def _hooked(self, hook: Any, args: Any, kwargs: Any) -> Tensor:
        handle = self.entry.register_forward_pre_hook(hook)
        # diffusers empties the lists that it is given
        own = {key: list(value) if isinstance(value, list) else value for key, value in kwargs.items()}
        try:
            noise: Tensor = self.original(*args, **own, return_dict=False)[0]
            return noise
        finally:
            handle.remove()


def _entry(unet: Any, branch: tuple[int, int]) -> tuple[nn.Module, int]:
    """The resnet whose input is cached at a branch, and how many of its channels come from below."""
    level, layer = branch
    skip = layer + sum(len(block.resnets) + len(block.downsamplers or ()) for block in unet.down_blocks[:level])
    resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
    below = resnets[-skip - 3 : -skip - 2] or [unet.mid_block.resnets[-1]]
    return resnets[-skip - 2], below[0].out_channels


class CachedLoop(Loop):
    """The same, a cached step being the ends of the UNet alone; at the default branch, without residuals."""

    def _cached(self, name: str | None, args: Any, kwargs: Any) -> Tensor:
        return self._shallow(name, *args, **kwargs)

    def _shallow(
        self,
        name: str | None,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **_: Any,
    ) -> Tensor:
        unet = self.unet
        emb = unet.time_embedding(unet.get_time_embed(sample, timestep))
        extra = unet.get_aug_embed(emb, encoder_hidden_states, added_cond_kwargs)
        emb = emb if extra is None else emb + extra
        context = {"encoder_hidden_states": encoder_hidden_states, "return_dict": False}
        hidden = unet.conv_in(sample)
        skips = [hidden]
        for resnet, attention in _layers(unet.down_blocks[0]):
            hidden = resnet(hidden, emb)
            hidden = hidden if attention is None else attention(hidden, **context)[0]
            skips.append(hidden)
        hidden = self.features[name]
        for resnet, attention in _layers(unet.up_blocks[-1]):
            hidden = resnet(torch.cat([hidden, skips.pop()], 1), emb)
            hidden = hidden if attention is None else attention(hidden, **context)[0]
        noise: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        return noise


def _layers(block: Any) -> Iterator[tuple[Any, Any]]:
    return zip(block.resnets, getattr(block, "attentions", [None] * len(block.resnets)), strict=True)


class MergedLoop(CachedLoop):
    """All adapters at once, in one pass with one cache: a merge with DeepCache."""

    def __init__(self, unet: Any, interval: int) -> None:
        super().__init__(unet, ["merged"], interval=interval)

    def _pass(self, name: str | None, full: bool, args: Any, kwargs: Any) -> Tensor:
        return self._full(name, args, kwargs) if full else self._cached(name, args, kwargs)
