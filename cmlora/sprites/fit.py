"""One training loop for all four parts: seeded per step, resumable, logged, with a running mean of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """steps, peak learning rate after `warmup` steps (then a cosine to 2 % of it), weight mean's decay (0: none)."""

    steps: int
    lr: float
    warmup: int = 50
    ema: float = 0.0
    weight_decay: float = 0.01

    def lr_at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        return self.lr * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    schedule: Schedule,
    work: Path,
    save_seconds: float = 120.0,
) -> None:
    """Minimise loss_at(step) over the module's trainable parameters, in place; ends with the mean weights if any.

    `loss_at` draws all its randomness from the step number, so a resumed run sees the batches of an unbroken one.
    State lies in work/name.pt, one line per 20 steps in work/name.log. A finished run is only loaded.
    """
    trained: list[torch.Tensor] = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.lr, betas=(0.9, 0.99), weight_decay=schedule.weight_decay)
    mean = [p.detach().clone() if schedule.ema else p for p in trained]
    start = _resume(work / f"{name}.pt", module, optimizer, mean)
    bar = tqdm(range(start, schedule.steps), desc=name, initial=start, total=schedule.steps, mininterval=2.0)
    saved, began = time.monotonic(), time.monotonic()
    recent = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_at(step)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if schedule.ema:
            decay = min(schedule.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(mean, trained, 1 - decay)
        recent = loss.item() if recent == 0.0 else 0.95 * recent + 0.05 * loss.item()
        if step % 20 == 19:
            bar.set_postfix(loss=f"{recent:.4f}")
            with (work / f"{name}.log").open("a") as log:
                log.write(f"{time.monotonic() - began:8.1f} s  step {step + 1:5d}  loss {recent:.5f}\n")
        if time.monotonic() - saved > save_seconds or step + 1 == schedule.steps:
            _save(work / f"{name}.pt", module, optimizer, mean, step + 1)
            saved = time.monotonic()
    with torch.no_grad():
        for parameter, value in zip(trained, mean, strict=True):
            parameter.copy_(value)


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, mean: list[Any], step: int) -> None:
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean, "step": step}
    partial = path.with_suffix(".tmp")
    torch.save(state, partial)
    partial.replace(path)  # an interrupted save leaves the earlier one


def _resume(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, mean: list[Any]) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for value, kept in zip(mean, state["mean"], strict=True):
            value.copy_(kept)
    return int(state["step"])
