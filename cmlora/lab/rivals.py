"""PEFT's own ways to make one adapter of several, drawn by the plain pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel

DENSITY = 0.5
"""Share of an adapter's values that ties and dare keep, as in diffusers' guide to merging LoRAs."""


@contextmanager
def merged_by_peft(pipe: Any, names: Sequence[str], kind: str, seed: int = 0) -> Iterator[None]:
    """Within it the pipeline's UNet has one adapter that PEFT made of `names`, each with weight 1.

    Args:
        pipe: a pipeline whose UNet holds the adapters; it gets another UNet for the while.
        kind: combination_type of `LoraModel.add_weighted_adapter`. seed: for those that draw at random (dare).
    """
    original = pipe.unet
    plain = copy.deepcopy(original)
    configs = {name: original.peft_config[name] for name in names}
    states = {name: get_peft_model_state_dict(original, adapter_name=name) for name in names}
    for name in list(plain.peft_config):
        plain.delete_adapters(name)
    plain.unload_lora()
    model = LoraModel(plain, configs, names[0])
    for name in names[1:]:
        model.inject_adapter(plain, name)
    for name in names:
        set_peft_model_state_dict(plain, states[name], adapter_name=name)
    how = {} if kind == "cat" else {"density": DENSITY}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_weighted_adapter(list(names), [1.0] * len(names), "together", combination_type=kind, **how)
    model.set_adapter("together")
    pipe.unet = plain
    try:
        yield
    finally:
        pipe.unet = original
