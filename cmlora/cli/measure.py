"""`cmlora quality`, `cmlora profile` and `cmlora inspect-kernels`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer

from cmlora import sprites
from cmlora.cli.base import LoraFile, app, load


@app.command()
def quality(
    out: Annotated[Path, typer.Option(help="Folder of the results; an interrupted run goes on.")] = Path(
        "cmlora-quality"
    ),
    preset: Annotated[
        str,
        typer.Option(help="Methods, published, partitions, frontier, search, masks, text, styles or trouble."),
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
    judge: Annotated[bool, typer.Option(help="Ask a network that was trained on photographs, too.")] = False,
) -> None:
    """Score the methods with the shipped model: does the picture show every LoRA's concept? Minutes to half an hour."""
    from cmlora.lab import report
    from cmlora.lab.plots import plot_frontier, plot_quality  # before the work: it may lack matplotlib
    from cmlora.lab.quality import Half, detector_report, run
    from cmlora.lab.settings import COMPARED, PRESETS, parse_setting

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
    parts += ["", "How often each concept is found:", "", report.concepts_table(pictures)]
    parts += ["", "Against cost:", "", report.cost_table(pictures)]
    for ours in (name for name in COMPARED if name in chosen):
        parts += ["", "Differences on the same combination and noise:", "", report.gains_table(pictures, ours)]
    if judge:
        from cmlora.lab.likeness import likeness_table

        parts += ["", likeness_table(pictures, out)]
    drawn = [path.name for path in (report.contact_sheet(pictures, out), report.settings_sheet(pictures, out)) if path]
    text = "\n".join(parts)
    (out / "quality.md").write_text(f"{text}\n")
    typer.echo(text)
    typer.echo(f"wrote {out}/{', '.join(['quality.jsonl', 'quality.md', 'quality.png', 'frontier.png', *drawn])}")


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
    pipe = load(model or Path(sprites.model_path()), files)
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
    model: Annotated[list[str] | None, typer.Option(help="sd15, sdxl, flux; default: the first two.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Of the LoRAs: 16, 32, 64, 128; default: 16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
) -> None:
    """Compile every kernel that the library launches, without a GPU; print registers, spills, instructions, bytes."""
    from cmlora_kernels.chips import TARGETS
    from cmlora_kernels.inspect import INSPECTED_RANKS, inspect_kernels, write_table
    from cmlora_kernels.variants import UNETS

    rows = inspect_kernels(target or TARGETS, model or tuple(UNETS), ranks=rank or INSPECTED_RANKS)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows], indent=1))
    else:
        write_table(rows)
