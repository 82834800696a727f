"""`cmlora ui`: a page to compose LoRAs on; needs gradio (the extra `ui`).

What the page does is `Composer.draw`; the rest is where things stand on it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmlora.accelerate import accelerated, summary
from cmlora.errors import CMLoRAError
from cmlora.lab.pictures import masks_over, timeline

METHODS = ("routed", "merge", "cmlora", "composite", "switch", "no_lora")
INTERVAL = 2
WITH_REGIONS = ("routed", "cmlora", "composite")


@dataclass(frozen=True)
class Drawn:
    """What the page shows of one picture.

    Attributes:
        masks: the picture beside where each LoRA acts; None where the run had no masks.
        run: step by step, who dominated; None without LoRAs. text: the summary and the seconds.
    """

    image: Image.Image
    masks: Image.Image | None
    run: Image.Image | None
    text: str


class Composer:
    """A pipeline with LoRAs loaded, and the one thing that the page does with it."""

    def __init__(self, pipe: Any, names: tuple[str, ...]) -> None:
        self.pipe, self.names = pipe, names
        pipe.set_progress_bar_config(disable=True)

    def draw(
        self,
        prompt: str,
        weights: Mapping[str, float],
        method: str,
        regions: Mapping[str, Tensor],
        *,
        negative: str = "",
        steps: int = 20,
        guidance: float = 4.0,
        seed: int = 0,
        interval: int = INTERVAL,
    ) -> Drawn:
        """One picture.

        Args:
            weights: of the LoRAs that take part. regions: masks [height, width] of those that were drawn; methods
                that know none leave them out.

        Raises:
            CMLoRAError: LoRAs that are not loaded, or none where some are needed.
        """
        unknown = [name for name in weights if name not in self.names]
        if unknown:
            raise CMLoRAError(f"LoRAs must be of {', '.join(self.names)}, got {', '.join(unknown)}")
        if not weights and method != "no_lora":
            raise CMLoRAError(f"{method} needs a LoRA: pick some")
        if weights:
            self.pipe.set_adapters(list(weights), list(weights.values()))
        own = {name: mask for name, mask in regions.items() if name in weights} if method in WITH_REGIONS else {}
        config: dict[str, Any] = {"method": method, "cache_interval": interval} | ({"regions": own} if own else {})
        began = time.perf_counter()
        with accelerated(self.pipe, **config):
            image = self.pipe(
                prompt,
                negative_prompt=negative or None,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            seconds, run = time.perf_counter() - began, summary(self.pipe)
            text = f"{seconds:.2f} s\n{run}"
        masks = masks_over(image, run.masks) if run.masks else None
        return Drawn(image, masks, timeline(run, image) if run.adapters and run.steps else None, text)


def region_of(drawn: Mapping[str, Any] | None) -> Tensor | None:
    """The mask [height, width] of what was painted: 1 where any layer has paint; None where there is none."""
    layers = [np.asarray(layer) for layer in (drawn or {}).get("layers") or () if layer is not None]
    painted = [layer[..., 3] > 0 for layer in layers if layer.ndim == 3 and layer.shape[2] == 4]
    mask = np.any(painted, axis=0) if painted else np.zeros((1, 1), bool)
    return torch.from_numpy(mask.astype(np.float32)) if mask.any() else None


def make_page(composer: Composer, prompt: str, guidance: float) -> Any:
    """The gradio page; `.launch()` serves it. prompt, guidance: to begin with."""
    try:
        import gradio as gr
    except ImportError as error:
        raise CMLoRAError("cmlora ui needs gradio: pip install 'cmlora[ui]'") from error

    names = list(composer.names)
    with gr.Blocks(title="cmlora", analytics_enabled=False) as page:  # what is drawn here is nobody else's business
        regions = gr.State({})
        gr.Markdown("# cmlora: several LoRAs in one image")
        with gr.Row():
            with gr.Column():
                inputs = _inputs(gr, names, prompt, guidance)
                _painting(gr, names, regions)
                button = gr.Button("Draw", variant="primary")
            with gr.Column():
                labels = ("Picture", "Where each LoRA acts", "Who dominated, step by step")
                outputs = [gr.Image(label=label, type="pil", format="png") for label in labels]
                outputs.append(gr.Textbox(label="What ran", lines=12))

        def draw(regions: dict[str, Tensor], *given: Any) -> tuple[Any, ...]:
            try:
                return _draw(composer, regions, *given)
            except CMLoRAError as error:
                raise gr.Error(str(error)) from None

        button.click(draw, [regions, *inputs], outputs)
    return page


def _inputs(gr: Any, names: Sequence[str], prompt: str, guidance: float) -> list[Any]:
    """What `_draw` takes behind the regions, in its order."""
    words = gr.Textbox(prompt, label="Prompt", lines=2)
    negative = gr.Textbox("", label="Negative prompt")
    chosen = gr.CheckboxGroup(names, value=names[:3], label="LoRAs")
    with gr.Accordion("Weights", open=False), gr.Row():
        weights = [gr.Slider(0, 2, 1, step=0.05, label=name) for name in names]
    method = gr.Dropdown(list(METHODS), value=METHODS[0], label="Method")
    with gr.Row():
        steps = gr.Slider(1, 100, 20, step=1, label="Steps")
        scale = gr.Slider(1, 15, guidance, step=0.5, label="Guidance")
        interval = gr.Slider(1, 10, INTERVAL, step=1, label="Cache interval")
        seed = gr.Number(0, precision=0, label="Seed")
    return [words, negative, chosen, method, steps, scale, interval, seed, *weights]


def _draw(composer: Composer, regions: dict[str, Tensor], *given: Any) -> tuple[Any, ...]:
    prompt, negative, chosen, method, steps, guidance, interval, seed, *weights = given
    every = dict(zip(composer.names, weights, strict=True))
    made = composer.draw(
        prompt,
        {name: every[name] for name in composer.names if name in chosen},
        method,
        regions,
        negative=negative,
        steps=int(steps),
        guidance=float(guidance),
        seed=int(seed),
        interval=int(interval),
    )
    return made.image, made.masks, made.run, made.text


def _painting(gr: Any, names: Sequence[str], regions: Any) -> None:
    """A canvas for the region of one LoRA at a time."""
    with gr.Accordion("Draw where a LoRA acts", open=False):
        whose = gr.Dropdown(names, value=names[0], label="Whose region")
        brush = gr.Brush(default_size=80, colors=["#3366cc"], color_mode="fixed")
        canvas = gr.Sketchpad(label="Paint; the square is the whole picture", type="numpy", height=400, brush=brush)
        with gr.Row():
            keep, forget = gr.Button("Use as its region"), gr.Button("Forget all regions")
        told = gr.Markdown("No regions.")

    def use(name: str, drawn: Any, regions: dict[str, Tensor]) -> tuple[Any, str]:
        mask = region_of(drawn)
        if mask is None:
            raise gr.Error("nothing is painted")
        return _told({**regions, name: mask})

    keep.click(use, [whose, canvas, regions], [regions, told])
    forget.click(lambda: _told({}), None, [regions, told])


def _told(regions: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    shares = (f"{name} in {float(mask.mean()):.0%} of the picture" for name, mask in regions.items())
    return regions, "; ".join(shares) or "No regions."
