"""`cmlora generate` draws with LoRAs from files, `cmlora demo` with the shipped model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from cmlora import accelerate, restore, summary
from cmlora.cli.base import LoraFile, app, load
from cmlora.config import CMLoRAConfig
from cmlora.lab.pictures import labelled_grid, masks_over

REGION_METHODS, PROMPT_METHODS = ("routed", "composite", "cmlora"), ("composite", "cmlora")
BOX = 256  # side of the mask that a box is drawn on


def read_places(
    names: Sequence[str],
    methods: Sequence[str],
    shared: Sequence[str],
    regions: Sequence[str],
    prompts: Sequence[str],
) -> dict[str, Any]:
    """Fields of CMLoRAConfig from --shared, --region and --lora-prompt."""
    fields: dict[str, Any] = {}
    for name in shared:
        _must_be_loaded(f"--shared {name}", name, names)
    if shared:
        fields["shared"] = tuple(shared)
    for option, field, texts, known in (
        ("--region", "regions", regions, REGION_METHODS),
        ("--lora-prompt", "prompts", prompts, PROMPT_METHODS),
    ):
        others = [method for method in methods if method not in known]
        if texts and others:
            raise typer.BadParameter(f"{option} goes with {', '.join(known)}, not with {', '.join(others)}")
        given = _by_name(option, texts, names)
        for name in set(given) & set(shared):
            raise typer.BadParameter(f"{option} {name}=...: {name} is --shared, and acts everywhere")
        if given:
            fields[field] = given
    if "regions" in fields:
        fields["regions"] = {name: _region(name, text) for name, text in fields["regions"].items()}
    return fields


def check_masks(methods: Sequence[str], combine: str, regions: bool) -> None:
    """Raise where --masks would have nothing to show."""
    if len(methods) > 1:
        raise typer.BadParameter("--masks shows one run: use --method instead of --compare")
    local = combine == "local" and methods[0] in PROMPT_METHODS
    if not (methods[0] == "routed" or local or regions):
        raise typer.BadParameter(
            "--masks needs --method routed, --combine local with composite or cmlora, or --region; "
            f"got --method {methods[0]} --combine {combine}"
        )


def _must_be_loaded(given: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise typer.BadParameter(f"{given}: no --lora of the name {name}; there are {', '.join(names)}")


def _by_name(option: str, texts: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """What stands behind NAME= of a repeated option."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not value:
            raise typer.BadParameter(f"{option} {text}: must be NAME=...")
        _must_be_loaded(f"{option} {text}", name, names)
        if name in found:
            raise typer.BadParameter(f"{option} names {name} twice")
        found[name] = value
    return found


def _region(name: str, text: str) -> Any:
    """A mask: a picture from a file, or [BOX, BOX] with 1 in a box given in shares of the image."""
    given = f"--region {name}={text}"
    if Path(text).is_file():
        try:
            return Image.open(text).convert("L")
        except OSError as error:
            raise typer.BadParameter(f"{given}: no picture: {error}") from None
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{given}: neither a file nor x0,y0,x1,y1") from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise typer.BadParameter(f"{given}: must be 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, shares of the image")
    mask = np.zeros((BOX, BOX), np.float32)
    mask[round(top * BOX) : round(bottom * BOX), round(left * BOX) : round(right * BOX)] = 1
    return mask


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Folder of a diffusers pipeline.", exists=True, file_okay=False)],
    lora: Annotated[list[str], typer.Option(help="FILE[:WEIGHT][=NAME]; repeat for each LoRA.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("cmlora.png"),
    method: Annotated[str, typer.Option(help="no_lora, merge, switch, composite, cmlora or routed.")] = "cmlora",
    compare: Annotated[str, typer.Option(help="Methods side by side in one image: merge,composite,routed.")] = "",
    negative: Annotated[str, typer.Option(help="What not to draw.")] = "",
    partition: Annotated[str, typer.Option(help="offline, online or async.")] = CMLoRAConfig.partition,
    combine: Annotated[str, typer.Option(help="mean, deviation or local.")] = CMLoRAConfig.combine,
    cache_interval: Annotated[str, typer.Option(help="1, 2, ..., nonuniform or quadratic.")] = "2",
    shared: Annotated[list[str] | None, typer.Option(help="NAME of a LoRA that acts everywhere; repeat.")] = None,
    region: Annotated[
        list[str] | None, typer.Option(help="NAME=MASK.png or NAME=x0,y0,x1,y1 in shares of the image; repeat.")
    ] = None,
    lora_prompt: Annotated[list[str] | None, typer.Option(help='NAME="that LoRA\'s own prompt"; repeat.')] = None,
    mask_text: Annotated[
        float, typer.Option(min=0, max=1, help="routed: how much of the LoRAs acts in the prompt; try 0.5.")
    ] = CMLoRAConfig.mask_text,
    masks: Annotated[Path | None, typer.Option(help="PNG to write: where in the image each LoRA acts.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    seed: int = 0,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
) -> None:
    """Draw one prompt with several LoRAs."""
    files = [LoraFile.parse(text) for text in lora]
    methods = compare.split(",") if compare else [method]
    places = read_places([f.name for f in files], methods, shared or (), region or (), lora_prompt or ())
    if masks is not None:
        check_masks(methods, combine, "regions" in places)
    pipe = load(model, files)
    interval: int | str = int(cache_interval) if cache_interval.isdigit() else cache_interval
    how: dict[str, Any] = {
        "partition": partition,
        "combine": combine,
        "cache_interval": interval,
        "mask_text": mask_text,
    }
    images = []
    for name in methods:
        accelerate(pipe, method=name, **how, **places)
        pipe.set_progress_bar_config(desc=name)
        images.append(_draw(pipe, prompt, negative, steps, guidance, seed, height, width))
        run = summary(pipe)
        typer.echo(run)
        restore(pipe)
    image = labelled_grid([images], methods) if compare else images[0]
    image.save(out)
    typer.echo(f"wrote {out}")
    if masks is not None:
        masks_over(images[0], run.masks).save(masks)
        typer.echo(f"wrote {masks}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.", file_okay=False)] = Path("cmlora-demo"),
    steps: Annotated[int, typer.Option(min=2)] = 16,
    seed: int = 1,
) -> None:
    """Draw the methods side by side with the shipped model: no GPU needed."""
    from cmlora.lab.demo import run_demo

    for path in run_demo(out, steps, seed):
        typer.echo(f"wrote {path}")
    typer.echo((out / "run.txt").read_text())


def _draw(
    pipe: Any,
    prompt: str,
    negative: str,
    steps: int,
    guidance: float,
    seed: int,
    height: int | None,
    width: int | None,
) -> Image.Image:
    import torch

    image: Image.Image = pipe(
        prompt,
        negative_prompt=negative or None,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return image
