"""Layers of a small UNet with rows of our own, and PEFT's forward as the peer."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from cmlora.batch.rows import Rows
from cmlora.batch.running import Running
from cmlora.lab.bench.tiny import EVERYTHING, SMALL, add_lora, sd_unet
from cmlora.lora.bank import build_bank, fill_bank, tuner_layers
from cmlora.lora.layers import install, uninstall

EXACT = 1e-5


def unet_with(*names, pattern=EVERYTHING, **config):
    unet = sd_unet(**(SMALL | config))
    for i, name in enumerate(names):
        add_lora(unet, name, rank=3 + i, alpha=2 * i or None, pattern=pattern, seed=i + 1)
    return unet


def layers_of(unet, kind=(nn.Linear, nn.Conv2d)):
    """Names and LoRA layers whose base is of a kind."""
    return {name: layer for name, layer in tuner_layers(unet) if isinstance(layer.get_base_layer(), kind)}


def image(layer, rows=1, seed=0):
    """What goes into a layer: an image or tokens."""
    base, generator = layer.get_base_layer(), torch.Generator().manual_seed(seed)
    shape = (base.in_channels, 6, 5) if isinstance(base, nn.Conv2d) else (7, base.in_features)
    return torch.randn(rows, *shape, generator=generator)


@contextmanager
def in_force(unet, recipes, slots, scale=1.0, **kwargs):
    """Our forwards on the layers, with a row per slot."""
    bank, running = build_bank(unet, recipes, device=torch.device("cpu"), **kwargs), Running()
    fill_bank(bank, scale)
    install(bank, running, "auto")
    try:
        with running.these(Rows(torch.tensor(slots), len(slots), 1, 1)):
            yield bank
    finally:
        uninstall(unet)


def pefts(unet, recipe, layer, x):
    """PEFT's own forward with the adapters of a recipe."""
    if not recipe:
        unet.disable_adapters()
        y = layer(x)
        unet.enable_adapters()
        return y
    unet.set_adapters([name for name, _ in recipe], [weight for _, weight in recipe])
    return layer(x)
