"""`cmlora sweep` draws a test bed with every method, `cmlora score` scores it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmlora.cli.base import app


@app.command()
def sweep(
    out: Annotated[Path, typer.Option(help="Folder of the pictures; what is there already is not drawn again.")],
    loras: Annotated[str, typer.Option(help="INFO.json of ComposLoRA's form; sprites: the shipped LoRAs.")] = "sprites",
    lora_dir: Annotated[Path | None, typer.Option(help="Folder of ID.safetensors.", file_okay=False)] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a pipeline; default: the shipped one.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="A published code's settings: composition-anime, composition-reality or cmlora.")
    ] = None,
    style: Annotated[str, typer.Option(help='none, anime, reality or a JSON file {"prefix", "negative"}.')] = "none",
    methods: Annotated[str | None, typer.Option(help="merge,switch,composite,cmlora,routed; no_lora.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="NAME:field=value,... of CMLoRAConfig as one method more; repeat.")
    ] = None,
    intervals: Annotated[str | None, typer.Option(help="Of the cache: 1,2,3,5,nonuniform,quadratic.")] = None,
    sizes: Annotated[str, typer.Option(help="Numbers of LoRAs in a set.")] = "2,3,4,5",
    seeds: Annotated[str | None, typer.Option(help="0,1,...: pictures of a set, method and interval.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many sets of a size.")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    scale: Annotated[float | None, typer.Option(help="Weight of every LoRA.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the preset's or the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the preset's or the model's.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="model (its own) or dpmsolver++.")] = None,
    layout: Annotated[str | None, typer.Option(help="Names of the files: own, composition or cmlora.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="On a Ray cluster (RAY_ADDRESS), or a local one.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Of --ray: actors.")] = 1,
) -> None:
    """Draw a test bed: every set of LoRAs with every method, from the same noise; resumable, on one GPU or many.

    Under `accelerate launch -m cmlora.cli sweep ...` the sets are dealt out to the processes.
    """
    from cmlora.lab.sweep import run
    from cmlora.lab.sweep.options import make_sweep

    made = make_sweep(
        loras=loras,
        lora_dir=lora_dir,
        model=model,
        preset=preset,
        style=style,
        methods=methods,
        settings=setting or (),
        intervals=intervals,
        sizes=sizes,
        seeds=seeds,
        limit=limit,
        layout=layout,
        drawing={
            "steps": steps,
            "guidance": guidance,
            "scale": scale,
            "height": height,
            "width": width,
            "scheduler": scheduler,
        },
    )
    try:
        typer.echo(run.run_on_ray(made, out, workers) if ray else run.run(made, out))
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on: what is drawn lies in {out}", err=True)
        raise typer.Exit(130) from None


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="Of a sweep, or in a published layout.", exists=True, file_okay=False)],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME[=MODEL]: detector, clip, clip-image, dino, imagereward, hpsv2; MODEL: folder or hub id; repeat."
        ),
    ] = None,
    loras: Annotated[str | None, typer.Option(help="INFO.json of a folder without a manifest.")] = None,
    style: Annotated[str, typer.Option(help="Of the prompts of such a folder.")] = "none",
    out: Annotated[Path | None, typer.Option(help="Folder of the scores; default: FOLDER/scores.")] = None,
    reference: Annotated[str, typer.Option(help="What the others are compared with.")] = "merge",
    tie: Annotated[float, typer.Option(min=0, help="A difference of at most so much is a tie.")] = 0.0,
) -> None:
    """Score pictures: a line of JSON per picture and metric, tables with intervals over sets, and plots."""
    from cmlora.lab.score import plot, run, tables  # plot before the work: it may lack matplotlib
    from cmlora.lab.score.pictures import read_shots

    shots = read_shots(folder, loras, style)
    target = out or folder / "scores"
    found = run.score(shots, target, dict(run.parse_metric(text) for text in metric or ["detector"]))
    parts = [f"{len(shots)} pictures. Means and 95 % bootstrap intervals over sets of LoRAs.", ""]
    for name, scores in found.items():
        columns = tables.columns(shots, name, scores)
        for column in columns:
            parts += [tables.table(column), "", tables.versus_table(column, reference, tie), ""]
        if columns:
            plot.plot_columns(columns, target / f"{name}.png")
    text = "\n".join(parts)
    (target / "scores.md").write_text(text)
    typer.echo(text)
    typer.echo(f"wrote {target}/scores.md and, for each metric, its .jsonl and .png")
