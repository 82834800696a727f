"""The peer of transformers: diffusers' own forward once per prediction, adapters switched by PEFT; nothing of ours.

A cached prediction skips the deep blocks of that forward: the first of them adds what they added when they ran last,
the others hand on what they get.
"""

from __future__ import annotations

import contextlib

import torch
from peft.tuners.lora.layer import LoraLayer
from torch.nn import functional as F

from cmlora.lab.bench.tiny_transformers import KINDS

BASE, ALL = "base", "all"


class Peer:
    """In the place of a transformer's forward.

    Args:
        rule: "mean", "deviation", "local", "routed" or "switch". dominance: weight of the dominant one, which rotates.
        cut: blocks at the beginning and at the end that run in every step.
        apart: calls of a step, the conditional half first. halves: of a call, the conditional one last (first: False).
    """

    def __init__(self, pipe, kind, names, rule, *, weights=None, interval=1, cut=(1, 1), dominance=None, apart=1,
                 halves=1, shared=(), prompts=None, regions=None, mask_steps=2, mask_text=1.0,
                 follow=True):  # fmt: skip
        self.pipe, self.kind, self.net, self.names, self.rule = pipe, kind, pipe.transformer, list(names), rule
        self.weights = dict(zip(names, weights or [1.0] * len(names), strict=True))
        self.interval, self.dominance, self.apart, self.halves = interval, dominance, apart, halves
        self.shared, self.prompts, self.regions = list(shared), prompts or {}, regions or {}
        self.mask_steps, self.mask_text, self.follow, self.calls = mask_steps, mask_text, follow, 0
        self.blocks = [b for name in KINDS[kind].blocks for b in getattr(self.net, name)]
        self.deep = self.blocks[cut[0] : len(self.blocks) - cut[1]]
        self.kept, self.masks, self.strength, self.seen = {}, {}, None, {}

    def __enter__(self):
        self.forward = self.net.forward
        self.net.forward = self
        return self

    def __exit__(self, *_):
        del self.net.__dict__["forward"]
        self.net.set_adapters(self.names, [self.weights[n] for n in self.names])

    def __call__(self, *args, return_dict=True, **kwargs):
        if args:
            kwargs |= dict(zip(("x", "t", "cap_feats"), args, strict=True))
        self.step, self.half = divmod(self.calls, self.apart)
        self.calls += 1
        self.dominant = self.names[self.step // self.interval % len(self.names)]
        for name in self.names if self.regions else ():
            region = self.regions.get(name, torch.ones(16, 16))
            self.masks[name] = F.adaptive_avg_pool2d(region[None, None], (16, 16))
        rule = {"routed": self._routed, "switch": self._switch}.get(self.rule, self._many)
        noise = self.packed(rule(kwargs))
        return (list(noise.unsqueeze(2)) if self.kind == "z_image" else noise,)

    # predictions as images [rows, channels, height, width]

    def image(self, noise):
        if self.kind in ("flux", "qwen"):
            image = self.pipe._unpack_latents(noise, 128, 128, 8)
            return image if image.ndim == 4 else image[:, :, 0]
        return torch.stack(noise)[:, :, 0] if self.kind == "z_image" else noise

    def packed(self, image):
        if self.kind in ("flux", "qwen"):
            return self.pipe._pack_latents(image, *image.shape)
        return image

    def predict(self, key, names, full, kwargs):
        active = [*names, *self.shared]
        self.net.set_adapters(active, [self.weights.get(n, 1.0) for n in active]) if active else None
        if not active:
            self.net.disable_adapters()
        try:
            with self._cached((key, self.half), full):
                return self.image(self.forward(**kwargs, return_dict=False)[0])
        finally:
            if not active:
                self.net.enable_adapters()

    @contextlib.contextmanager
    def _cached(self, key, full):
        given = {}

        def tokens(args, kwargs):
            return [args[0]] if args else [kwargs["encoder_hidden_states"], kwargs["hidden_states"]]

        def enter(block, args, kwargs):
            given["in"] = tokens(args, kwargs)

        def leave(block, args, kwargs, out):
            out = [out] if torch.is_tensor(out) else list(out)
            self.kept[key] = [None if o is None else o - i for o, i in zip(out, given["in"], strict=True)]

        def skip(first):
            def forward(*args, **kwargs):
                now = tokens(args, kwargs)
                if first:
                    now = [i if r is None else i + r for i, r in zip(now, self.kept[key], strict=True)]
                return now[0] if len(now) == 1 else tuple(now)

            return forward

        with contextlib.ExitStack() as stack:
            if full:
                first, last = self.deep[0], self.deep[-1]
                stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(last.register_forward_hook(leave, with_kwargs=True).remove)
            else:
                for i, block in enumerate(self.deep):
                    block.forward = skip(i == 0)
                    stack.callback(block.__dict__.pop, "forward")
            yield

    # rules

    def _switch(self, kwargs):
        name = self.names[max(self.step - 1, 0) // 2 % len(self.names)]
        return self.predict(
            name, [name], self.step % self.interval == 0 or (self.step > 1 and self.step % 2 == 1), kwargs
        )

    def _many(self, kwargs):
        refreshing, seen = self.step % self.interval == 0, {}
        compared = [] if self.rule == "mean" else [BASE, *(f"{BASE} of {n}" for n in self.prompts)]
        for key in [*compared, *self.names]:
            chosen = self.dominance is None or key == self.dominant or key in compared
            full = self.step == 0 or self.interval == 1 or (refreshing and chosen)
            before = self.kept.get((key, self.half))
            now = self._prompted(key.removeprefix(f"{BASE} of "), kwargs)
            seen[key] = self.predict(key, [key] if key in self.names else [], full, now)
            if key in compared and full and before is not None and self.follow:
                for name in self.names:
                    if self._base(name) == key:
                        moved = zip(self.kept[name, self.half], self.kept[key, self.half], before, strict=True)
                        self.kept[name, self.half] = [None if r is None else r + b - a for r, b, a in moved]
        n, w = len(self.names), self.dominance or 1.0
        weight = {name: (w if name == self.dominant else 1.0) * n / (w + n - 1) for name in self.names}
        if self.rule == "mean":
            placed = {name: weight[name] * self.masks.get(name, torch.ones(1, 1, 16, 16)) for name in self.names}
            return sum(placed[m] * seen[m] for m in self.names) / sum(placed.values())
        if self.rule == "local" and self.half == 0:
            self._make_masks([self._distance(seen[m], seen[self._base(m)]) for m in self.names], (0, 2, 3, 4), 0.25)
        spread = {m: mask.repeat(seen[BASE].shape[0] // mask.shape[0], 1, 1, 1) for m, mask in self.masks.items()}
        deviations = (weight[m] * spread.get(m, 1.0) * (seen[m] - seen[self._base(m)]) for m in self.names)
        return seen[BASE] + sum(deviations)

    def _routed(self, kwargs):
        full = self.step % self.interval == 0
        with self._masked():
            noise = self.predict(ALL, self.names, full, kwargs)
        if self.step < self.mask_steps and self.half == 0 and not self.regions:
            base = self.predict(BASE, [], full, kwargs)
            alone = torch.stack([self._distance(self.predict(n, [n], full, kwargs), base) for n in self.names])
            self.strength = alone if self.step == 0 else 0.7 * self.strength + 0.3 * alone
            self.next = self.strength
        if self.step < self.mask_steps and self.half == self.apart - 1 and not self.regions:
            self._make_masks(self.next, (2, 3, 4), 0.6)
        return noise

    def _base(self, name):
        return f"{BASE} of {name}" if name in self.prompts else BASE

    def _prompted(self, name, kwargs):
        return kwargs | self.prompts[name] if name in self.prompts and self.half == 0 else kwargs

    def _conditional(self, image):
        if self.halves == 1:
            return image
        first, last = image.chunk(2)
        return first if self.kind == "z_image" else last

    def _distance(self, one, base):
        return self._conditional(one - base).pow(2).sum(1, keepdim=True).sqrt()

    def _make_masks(self, strengths, over, temperature):
        box = torch.stack([F.avg_pool2d(F.pad(s, (1,) * 4, mode="replicate"), 3, stride=1) for s in strengths])
        share = torch.softmax(box / box.mean(over, keepdim=True) / temperature, 0)
        self.masks = dict(zip(self.names, share / share.amax(0), strict=True))

    @contextlib.contextmanager
    def _masked(self):
        """Every adapter's update times its mask, on image tokens: behind the text, in Z-Image before it."""
        with contextlib.ExitStack() as stack:
            for path, module in self.net.named_modules():
                text = any(part in path for part in ("context", "add_", "txt_", "cap_", "t_embedder", "time_text"))
                if isinstance(module, LoraLayer):
                    for name in (n for n in self.names if n in module.lora_B):
                        hook = module.lora_B[name].register_forward_hook(self._multiplier(name, text))
                        stack.callback(hook.remove)
            yield

    def _multiplier(self, name, text):
        def multiply(_, inputs, out):
            if text or out.ndim == 2:
                return out * self.mask_text
            places = self.masks.get(name, torch.ones(1, 1, 16, 16))
            if out.ndim == 4:
                mask = F.adaptive_avg_pool2d(places, out.shape[2:])
                return out * mask.repeat(out.shape[0] // mask.shape[0], 1, 1, 1)
            mask = F.adaptive_avg_pool2d(places, (8, 8)).flatten(2).transpose(1, 2)
            mask = mask.repeat(out.shape[0] // mask.shape[0], 1, 1)
            rest = torch.full((mask.shape[0], out.shape[1] - 64, 1), self.mask_text)
            return out * torch.cat([mask, rest] if self.kind == "z_image" else [rest, mask], 1)

        return multiply
