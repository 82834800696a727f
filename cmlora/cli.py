"""The command line: `cmlora generate` draws with LoRAs from files, `cmlora profile` measures each alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from PIL import Image

from cmlora import CMLoRAError, accelerate, restore, sprites, summary
from cmlora.config import CMLoRAConfig
from cmlora.lab.pictures import labelled_grid, masks_over
from cmlora.lab.quiet import leave_out_harmless_messages

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Several LoRAs in one image, as one batch."""
    leave_out_harmless_messages()


@dataclass(frozen=True)
class LoraFile:
    """A LoRA named on the command line: FILE[:WEIGHT][=NAME]."""

    path: Path
    weight: float
    name: str

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """Split FILE[:WEIGHT][=NAME]; the name defaults to the file's stem, the weight to 1.

        A file that is not there may be the name of one of the shipped model's LoRAs.
        """
        rest, _, name = text.partition("=")
        path, weight = rest, 1.0
        head, colon, tail = rest.rpartition(":")
        if colon:
            try:
                path, weight = head, float(tail)
            except ValueError:
                path = rest  # a colon of the path itself
        if not Path(path).is_file() and path in sprites.CONCEPTS:
            return cls(Path(sprites.lora_path(path)), weight, name or path)
        if not Path(path).is_file():
            raise typer.BadParameter(f"--lora {text}: no such file: {path}")
        return cls(Path(path), weight, name or Path(path).stem.replace(".", "_"))


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
    pipe = _load(model, files)
    interval: int | str = int(cache_interval) if cache_interval.isdigit() else cache_interval
    images = []
    for name in methods:
        accelerate(pipe, method=name, partition=partition, combine=combine, cache_interval=interval, **places)
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


@app.command()
def quality(
    out: Annotated[Path, typer.Option(help="Folder of the results; an interrupted run goes on.")] = Path(
        "cmlora-quality"
    ),
    preset: Annotated[
        str, typer.Option(help="What to compare: methods, frontier, search, places or masks.")
    ] = "methods",
    setting: Annotated[
        list[str] | None, typer.Option(help="NAME:field=value,... of CMLoRAConfig; repeat; instead of the preset.")
    ] = None,
    half: Annotated[str, typer.Option(help="Of the combinations: choose, report or all.")] = "report",
    sizes: Annotated[str, typer.Option(help="Numbers of LoRAs.")] = "2,3,4,5",
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per combination and setting.")] = 1,
    steps: Annotated[int, typer.Option(min=2)] = 20,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many combinations of a size.")] = None,
    detector: Annotated[bool, typer.Option(help="Measure the detector itself first.")] = True,
) -> None:
    """Score the methods with the shipped model: does the picture show every LoRA's concept? Minutes to half an hour."""
    from cmlora.lab import report
    from cmlora.lab.plots import plot_frontier, plot_quality  # before the work: it may lack matplotlib
    from cmlora.lab.quality import PRESETS, Half, detector_report, parse_setting, run

    if half not in ("choose", "report", "all"):
        raise typer.BadParameter(f"--half must be choose, report or all, got {half!r}")
    if preset not in PRESETS:
        raise typer.BadParameter(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    named = dict(parse_setting(text) for text in setting or ())
    chosen = named or PRESETS[preset]
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    if detector:
        parts += ["The detector itself:", "", detector_report(), ""]
        typer.echo("\n".join(parts))
    numbers = [int(size) for size in sizes.split(",")]
    pictures = run(out, chosen, numbers, cast(Half, half), range(seeds), steps, limit)
    parts += [
        f"{len(pictures)} pictures, {steps} steps, half: {half}. All concepts present:",
        "",
        report.table(pictures),
    ]
    plot_quality(report.scores_by_size(pictures), out / "quality.png")
    plot_frontier(report.scores_over_sizes(pictures), out / "frontier.png")
    parts += ["", "Against cost:", "", report.cost_table(pictures)]
    if preset == "places" and not named:
        composites = [p for p in pictures if p.setting.startswith("composite")]
        parts += ["", "Masks on the deviations:", "", report.cost_table(composites, "composite, deviation")]
    report.contact_sheet(pictures, out)
    text = "\n".join(parts)
    (out / "quality.md").write_text(f"{text}\n")
    typer.echo(text)
    typer.echo(f"wrote {out}/quality.jsonl, quality.md, quality.png, frontier.png, look.png")


@app.command()
def profile(
    lora: Annotated[
        list[str], typer.Option(help="FILE[:WEIGHT][=NAME]; repeat for each LoRA. zebrin, ...: shipped ones.")
    ],
    prompt: Annotated[str, typer.Option(help="What to draw with each LoRA alone.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a diffusers pipeline; default: the shipped one.", exists=True, file_okay=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the plots and numbers.", file_okay=False)] = Path(
        "cmlora-profile"
    ),
    steps: Annotated[int, typer.Option(min=2)] = 25,
    seed: int = 0,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    every: Annotated[int, typer.Option(min=1, help="Radial spectra of every so many steps.")] = 5,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two LoRAs or image files for the difference; default: highest and lowest intensity."),
    ] = None,
) -> None:
    """Draw with each LoRA alone: which are high, which low frequency; spectra, and similarity of cached features."""
    from cmlora.lab.plots import write_profile  # first of all: without matplotlib nothing is drawn in vain
    from cmlora.profile import profile_loras

    files = [LoraFile.parse(text) for text in lora]
    names = [f.name for f in files]
    for name in compare or ():
        if name not in names and not Path(name).is_file():
            raise typer.BadParameter(f"--compare {name}: neither a LoRA ({', '.join(names)}) nor an image file")
    pipe = _load(model or Path(sprites.model_path()), files)
    measured = profile_loras(pipe, names, steps=steps, seed=seed, prompt=prompt, guidance_scale=guidance)
    setting = {"prompt": prompt, "steps": steps, "seed": seed, "guidance": guidance}
    typer.echo(measured)
    for path in write_profile(measured, out, every, compare, setting):
        typer.echo(f"wrote {path}")


@app.command()
def doctor(
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Everything that was found, as JSON.", dir_okay=False)
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="For everything; what they do not suffice for is named.")] = 4,
    keep: Annotated[bool, typer.Option(help="Write what was measured where the kernels' cost model reads it.")] = True,
) -> None:
    """Is it right, and how fast is it, on this machine? Its last ten lines belong in a bug report."""
    from cmlora.lab.doctor.examination import examine
    from cmlora.lab.doctor.machine import examine_machine
    from cmlora.lab.doctor.progress import progress_bar
    from cmlora.lab.doctor.report import as_dict, machine_lines, summary_lines

    machine = examine_machine()
    typer.echo("\n".join([*machine_lines(machine), ""]))
    with progress_bar(60 * minutes) as say:
        found = examine(machine, 60 * minutes, say, keep=keep)
    typer.echo("\n".join(summary_lines(found)))
    if as_json is not None:
        as_json.write_text(json.dumps(as_dict(found), indent=1) + "\n")
        typer.echo(f"wrote {as_json}")
    if not found.healthy:
        raise typer.Exit(1)


@app.command("inspect-kernels")
def inspect(
    target: Annotated[list[str] | None, typer.Option(help="sm_80 to sm_120, gfx90a to gfx1201; default: all.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="sd15, sdxl; default: both.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
) -> None:
    """Compile every kernel that the library launches, without a GPU; print registers, spills, instructions, bytes."""
    from cmlora_kernels.chips import TARGETS
    from cmlora_kernels.inspect import inspect_kernels, write_table
    from cmlora_kernels.variants import UNETS

    rows = inspect_kernels(target or TARGETS, model or tuple(UNETS))
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows], indent=1))
    else:
        write_table(rows)


def _load(model: Path, files: Sequence[LoraFile]) -> Any:
    """The pipeline on the GPU in float16 where there is one, on the CPU in float32 elsewhere, its LoRAs active."""
    import torch
    from diffusers import DiffusionPipeline

    names = [f.name for f in files]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"--lora: names must differ, got {', '.join(names)}; give some with FILE=NAME")
    gpu = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16 if gpu else torch.float32)
    pipe = pipe.to("cuda" if gpu else "cpu")
    for file in files:
        pipe.load_lora_weights(str(file.path), adapter_name=file.name)
    known = {name for part in pipe.get_list_adapters().values() for name in part}
    for file in files:
        if file.name not in known:
            raise CMLoRAError(
                f"{file.path} changed no layer of this model: its keys fit another model or lack a prefix"
            )
    pipe.set_adapters(names, [f.weight for f in files])
    return pipe


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


def main() -> None:
    """Entry point: what this library says on purpose is printed without a traceback."""
    try:
        app()
    except (CMLoRAError, OSError, RuntimeError, ValueError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from None
