"""LoRA layers in a pipeline's text encoders: they act on the prompt, once for all rows, and so must all be active.

Loading LoRAs one after the other leaves the last one alone active, in the UNet and in the text encoders alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cmlora.errors import AdapterError
from cmlora.lora.bank import tuner_layers
from cmlora.lora.check import holds

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def text_layers(pipe: Any) -> dict[str, list[BaseTunerLayer]]:
    """PEFT's layers of every text encoder that has some."""
    encoders = ((name, getattr(pipe, name, None)) for name in ENCODERS)
    found = {name: [layer for _, layer in tuner_layers(m)] for name, m in encoders if isinstance(m, nn.Module)}
    return {name: layers for name, layers in found.items() if layers}


def text_adapters(pipe: Any) -> dict[str, tuple[str, ...]]:
    """Which adapters have layers in which text encoder."""
    return {name: tuple(dict.fromkeys(_all(layers))) for name, layers in text_layers(pipe).items()}


def _all(layers: Sequence[BaseTunerLayer]) -> Iterator[str]:
    for layer in layers:
        for attribute in layer.adapter_layer_names:
            yield from getattr(layer, attribute, ())


def active_text(pipe: Any) -> dict[str, tuple[str, ...]]:
    """Which of them act there: active in every layer that they have, or fused; none where adapters are disabled."""
    found = {}
    for name, layers in text_layers(pipe).items():
        found[name] = tuple(
            adapter
            for adapter in dict.fromkeys(_all(layers))
            if all(_acts(layer, adapter) for layer in layers if holds(layer, adapter))
        )
    return found


def _acts(layer: BaseTunerLayer, adapter: str) -> bool:
    if layer.disable_adapters:
        return False
    return adapter in (layer.merged_adapters if layer.merged else layer.active_adapters)


def activate(pipe: Any, names: Sequence[str]) -> Callable[[], None]:
    """Make adapters active in all text encoders, as `pipe.set_adapters` does; scalings are left as they are.

    Args:
        pipe: a pipeline.
        names: adapters; those without layers in a text encoder are none of its business.

    Returns:
        What puts everything back as it was: active adapters and which weights take gradients.
    """
    before: list[tuple[BaseTunerLayer, Any, list[tuple[nn.Parameter, bool]]]] = []
    for layers in text_layers(pipe).values():
        there = set(_all(layers))
        wanted = [name for name in names if name in there]
        for layer in layers if wanted else ():
            flags = [(p, p.requires_grad) for p in layer.parameters()] if isinstance(layer, nn.Module) else []
            before.append((layer, layer._active_adapter, flags))
            layer.set_adapter(wanted, inference_mode=True)

    def undo() -> None:
        for layer, active, flags in before:
            layer._active_adapter = active
            for parameter, flag in flags:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)

    return undo


def check(pipe: Any, names: Sequence[str]) -> None:
    """Raise an AdapterError where the UNet composes adapters whose part in a text encoder does not act.

    A text encoder whose adapters are disabled as a whole is the user's choice, and no error.
    """
    active = active_text(pipe)
    for encoder, there in text_adapters(pipe).items():
        disabled = all(layer.disable_adapters for layer in text_layers(pipe)[encoder])
        missing = [name for name in names if name in there and name not in active[encoder]]
        if missing and not disabled:
            raise AdapterError(
                f"{', '.join(missing)} also changes the {encoder}, where it is not active: the prompt would be encoded "
                f"without it. Activate all of them with pipe.set_adapters({list(names)!r}), or switch the text "
                f"encoder's part off with pipe.{encoder}.disable_adapters()"
            )
