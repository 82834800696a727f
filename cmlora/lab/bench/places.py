"""The peer of composition by place: `Loop` with masks, shared adapters, regions and prompts; none of our code in it.

Every prediction is diffusers' own UNet forward with the adapters that it has active by PEFT's `set_adapters`; a mask is
a hook on a LoRA layer's up projection. Plain and slow on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from diffusers import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from cmlora.lab.bench.loop import Loop

Rule = Literal["routed", "local", "mean", "deviation"]
ALL, BASE = "all", "base"
"""Names of the predictions with all adapters, and with none but the shared ones."""


class PlacesLoop(Loop):
    """Stands in for the UNet's forward, as `Loop`.

    Args:
        unet, names, weights, interval, branch, dominance, follow: as of `Loop`; `names` without the shared ones.
        rule: "routed" or how the adapters' predictions become one.
        halves: guidance halves of a call, the conditional one last.
        shared: adapters that act in every prediction.
        regions: {adapter: [height, width]}. prompts: {adapter: (embeddings, pooled or None)}, [images, ...] each.
        mask_steps, mask_text, temperature, blur: as of CMLoRAConfig; temperature None: the rule's own.
    """

    def __init__(
        self,
        unet: Any,
        names: Sequence[str],
        rule: Rule,
        *,
        weights: Sequence[float] | None = None,
        halves: int = 2,
        shared: Sequence[str] = (),
        regions: Mapping[str, Tensor] | None = None,
        prompts: Mapping[str, tuple[Tensor, Tensor | None]] | None = None,
        mask_steps: int = 2,
        mask_text: float = 1.0,
        temperature: float | None = None,
        blur: int = 3,
        **how: Any,
    ) -> None:
        super().__init__(unet, names, weights, **how)
        self.rule, self.halves, self.shared, self.mask_steps = rule, halves, list(shared), mask_steps
        self.mask_text, self.regions, self.prompts = mask_text, dict(regions or {}), dict(prompts or {})
        self.temperature = temperature or (0.6 if rule == "routed" else 0.25)
        self.blur, self.strength = blur, torch.zeros(0)
        self.masks: dict[str, Tensor] = {}  # [images, 1, height, width]

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["sample"]
        refreshing = self.calls % self.interval == 0
        self.dominant = self.names[self.calls // self.interval % len(self.names)]
        self.full_passes.append([])
        self._draw_regions(sample)
        noise = (
            self._routed(refreshing, args, kwargs) if self.rule == "routed" else self._many(refreshing, args, kwargs)
        )
        self.calls += 1
        return UNet2DConditionOutput(noise) if return_dict else (noise,)

    def _draw_regions(self, sample: Tensor) -> None:
        """The user's masks, at the size of the latents."""
        images, size = sample.shape[0] // self.halves, _size(sample)
        if self.regions and not self.masks:
            for name in self.names:
                region = self.regions.get(name, torch.ones(size)).to(sample)
                self.masks[name] = F.adaptive_avg_pool2d(region[None, None], size).expand(images, -1, -1, -1)

    # One prediction of all, each adapter where its mask is

    def _routed(self, full: bool, args: Any, kwargs: Any) -> Tensor:
        full = full or self.calls == 0
        with self._masked():
            noise = self._predict(ALL, self.names, full, args, kwargs)
        if self.calls < self.mask_steps and not self.regions:
            base = self._predict(BASE, [], full, args, kwargs)
            alone = [self._predict(name, [name], full, args, kwargs) for name in self.names]
            now = torch.stack([self._distance(one, base) for one in alone])
            self.strength = now if self.calls == 0 else 0.7 * self.strength + 0.3 * now
            self._make_masks(self.strength, mean_over=(2, 3, 4))
        return noise

    # One prediction per adapter

    def _many(self, refreshing: bool, args: Any, kwargs: Any) -> Tensor:
        seen: dict[str, Tensor] = {}
        compared = [] if self.rule == "mean" else [BASE, *(f"{BASE} of {name}" for name in self.prompts)]
        for key in [*compared, *self.names]:
            stale = refreshing and (self.dominance is None or key in (self.dominant, *compared))
            full, before = self.calls == 0 or stale or self.interval == 1, self.features.get(key)
            of = key.removeprefix(f"{BASE} of ")
            seen[key] = self._predict(key, [key] if key in self.names else [], full, args, self._prompted(of, kwargs))
            if key in compared and full and before is not None and self.follow:
                for name in self.names:
                    if self._base_of(name) == key:
                        self.features[name] = self.features[name] + self.features[key] - before
        return self._together(seen)

    def _together(self, seen: dict[str, Tensor]) -> Tensor:
        n, w = len(self.names), self.dominance or 1.0
        weight = {name: (w if name == self.dominant else 1.0) * n / (w + n - 1) for name in self.names}
        if self.rule == "local":
            distances = [self._distance(seen[name], seen[self._base_of(name)]) for name in self.names]
            drawn = {name: self.masks[name] for name in self.regions}
            self._make_masks(torch.stack(distances), mean_over=(0, 2, 3, 4))
            self.masks |= drawn
        if self.masks:
            placed = {name: weight[name] * torch.cat([self.masks[name]] * self.halves) for name in self.names}
        else:
            placed = {name: weight[name] * torch.ones_like(seen[name][:, :1]) for name in self.names}
        if self.rule == "mean":
            weights = torch.stack([placed[name] for name in self.names])
            return (weights * torch.stack([seen[name] for name in self.names])).sum(0) / weights.sum(0)
        return seen[BASE] + sum(placed[name] * (seen[name] - seen[self._base_of(name)]) for name in self.names)

    def _base_of(self, name: str) -> str:
        return f"{BASE} of {name}" if name in self.prompts else BASE

    def _prompted(self, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments with an adapter's own prompt in the conditional half."""
        if name not in self.prompts:
            return kwargs
        embeddings, pooled = self.prompts[name]
        changed = dict(kwargs, encoder_hidden_states=self._last(kwargs["encoder_hidden_states"], embeddings))
        if pooled is not None:
            added = kwargs["added_cond_kwargs"]
            changed["added_cond_kwargs"] = dict(added, text_embeds=self._last(added["text_embeds"], pooled))
        return changed

    def _last(self, own: Tensor, given: Tensor) -> Tensor:
        images = own.shape[0] // self.halves
        return torch.cat([own[: own.shape[0] - images], given.to(own).expand(images, *own.shape[1:])])

    # Parts of both

    def _predict(self, key: str, names: Sequence[str], full: bool, args: Any, kwargs: Any) -> Tensor:
        active = [*names, *self.shared]
        if active:
            self.unet.set_adapters(active, [self.weights.get(name, 1.0) for name in active])
        else:
            self.unet.disable_lora()
        try:
            return self._full(key, args, kwargs) if full else self._cached(key, args, kwargs)
        finally:
            if not active:
                self.unet.enable_lora()

    def _distance(self, one: Tensor, base: Tensor) -> Tensor:
        """[images, 1, height, width] of the conditional half."""
        images = one.shape[0] // self.halves
        return (one - base)[-images:].pow(2).sum(1, keepdim=True).sqrt()

    def _make_masks(self, strength: Tensor, mean_over: tuple[int, ...]) -> None:
        """From strengths [adapters, images, 1, height, width]."""
        side = (self.blur // 2,) * 4
        blurred = [F.avg_pool2d(F.pad(m, side, mode="replicate"), self.blur, stride=1) for m in strength]
        box = torch.stack(blurred)
        share = torch.softmax(box / box.mean(mean_over, keepdim=True) / self.temperature, 0)
        self.masks = dict(zip(self.names, share / share.amax(0), strict=True))

    @contextmanager
    def _masked(self) -> Iterator[None]:
        """Every adapter acts where its mask is, in the layers that work on places."""
        places: list[tuple[int, int]] = []  # of the transformer that runs

        def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            places[:] = [_size(inputs[0])]

        with ExitStack() as stack:
            for path, module in self.unet.named_modules():
                if isinstance(module, Transformer2DModel):
                    stack.callback(module.register_forward_pre_hook(enter).remove)
                if isinstance(module, LoraLayer):
                    text = path.endswith(("attn2.to_k", "attn2.to_v"))
                    for name in (name for name in self.names if name in module.lora_B):
                        hook = module.lora_B[name].register_forward_hook(self._multiplier(name, places, text))
                        stack.callback(hook.remove)
            yield

    def _multiplier(self, name: str, places: list[tuple[int, int]], text: bool) -> Any:
        def multiply(_: nn.Module, inputs: Any, out: Tensor) -> Tensor:
            if text or out.ndim == 2:  # time and class embeddings are no places
                return out * self.mask_text
            if not self.masks:
                return out
            mask = torch.cat([self.masks[name]] * self.halves)
            if out.ndim == 4:
                return out * F.adaptive_avg_pool2d(mask, _size(out))
            return out * F.adaptive_avg_pool2d(mask, places[0]).flatten(2).transpose(1, 2)

        return multiply


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
