"""`cmlora sweep` draws a test bed; `score`, `judge` and `spectra` look at it; `ui` is a page to play with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmlora import sprites
from cmlora.cli.base import LoraFile, app, load


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
    ray: Annotated[
        int, typer.Option(min=0, help="Actors on a Ray cluster (RAY_ADDRESS), or a local one; 0: none.")
    ] = 0,
) -> None:
    """Draw a test bed: every set of LoRAs with every method, from the same noise; resumable, on one GPU or many."""
    from cmlora.lab.sweep import options, run

    drawing: dict[str, Any] = {"steps": steps, "guidance": guidance, "scale": scale, "scheduler": scheduler}
    drawing |= {"height": height, "width": width}
    made = options.make_sweep(
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
        drawing=drawing,
    )
    typer.echo(run.run_on_ray(made, out, ray) if ray else run.run(made, out))


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


@app.command()
def judge(
    folder: Annotated[Path, typer.Argument(help="Of a sweep, or in a published layout.", exists=True, file_okay=False)],
    methods: Annotated[
        str, typer.Option(help='Two, with a comma: "merge,routed"; with intervals: "merge, interval 2".')
    ],
    url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible endpoint, up to /v1.")] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's, or without --url a folder or hub id.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoint's key.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer.")] = 120.0,
    wait: Annotated[float, typer.Option(min=0, help="Seconds before asking again; doubled each time.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many pairs.")] = None,
    export: Annotated[Path | None, typer.Option(help="Folder to write for people, instead of asking.")] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="A ratings.csv that a person filled in; key.json beside it.")
    ] = None,
    loras: Annotated[str | None, typer.Option(help="INFO.json of a folder without a manifest.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the judgements; default: FOLDER/judge.")] = None,
) -> None:
    """Compare two methods pair by pair, in both orders, by a vision-language model or by people."""
    from cmlora.lab.judge import people, run, verdicts
    from cmlora.lab.judge.models import Endpoint, Judge, Local
    from cmlora.lab.score.pictures import read_shots

    a, b = run.split_methods(methods)
    pairs = run.find_pairs(read_shots(folder, loras), a, b)[:limit]
    target = out or folder / "judge"
    path = target / f"{run.file_name(a)}_{run.file_name(b)}.jsonl"
    if export is not None:
        for written in people.export_pairs(pairs, export):
            typer.echo(f"wrote {written}")
        return
    if import_ is not None:
        records = people.import_ratings(import_, import_.with_name(people.KEY), import_.stem)
        run.add_records(path, records)
    else:
        if model is None:
            raise typer.BadParameter("--model, with --url for an endpoint's; or --export, or --import")
        who: Judge = Endpoint(url, model, key_env, timeout) if url else Local(model)
        records = run.judge(pairs, who, path, wait=wait)
    typer.echo(verdicts.table(records, a, b))
    typer.echo(f"wrote {path}")


@app.command()
def spectra(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, folders of them, or a sweep's folder.", exists=True)
    ],
    out: Annotated[Path, typer.Option(help="Folder of plots and numbers.", file_okay=False)] = Path("cmlora-spectra"),
    cutoff: Annotated[float, typer.Option(help="High is what lies beyond this share of the largest radius.")] = 0.2,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two image files of one size: where they differ.")
    ] = None,
) -> None:
    """Radial spectra of pictures, how much high frequency is in each, and LoRAs or methods ranked by it."""
    from cmlora.lab.spectra_plot import write_spectra

    for path in write_spectra(images, out, cutoff, compare):
        typer.echo(f"wrote {path}")
    typer.echo((out / "spectra.md").read_text())


@app.command()
def ui(
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a diffusers pipeline; default: the shipped one.", exists=True, file_okay=False),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE[:WEIGHT][=NAME]; repeat; default: the shipped ones.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="To begin with.")] = "",
    port: Annotated[int, typer.Option(min=1, max=65535, help="On this machine alone.")] = 7860,
) -> None:
    """A page on this machine: pick LoRAs and weights, draw regions, see picture, masks, who dominated, seconds."""
    from cmlora.lab.ui import Composer, make_page

    files = [LoraFile.parse(text) for text in lora or (sprites.CONCEPTS if model is None else ())]
    pipe = load(model or Path(sprites.model_path()), files)
    shipped = model is None and not prompt
    begin = "a zebrin creature, wearing a tophat, sketch style" if shipped else prompt
    page = make_page(Composer(pipe, tuple(file.name for file in files)), begin, 4.0 if model is None else 7.5)
    page.launch(server_name="127.0.0.1", server_port=port)
