"""Predicted milliseconds per denoising step on GPUs; nothing is measured.

    python benchmarks/roofline.py [--model sd15|sdxl] [--adapters 2 3 ...] [--brief] [--gpus H100 ...] [--out DIR]

Prints the assumptions and the tables; --out writes every figure as JSON and a plot per model (matplotlib, the `plots`
extra). The model: cmlora/lab/bench/roofline.py, and what it leaves out: csrc_docs/roofline.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cmlora.lab.bench.roofline import GPUS, MOST_ADAPTERS, Assumptions, Prediction, predict_all, trace_all
from cmlora.lab.bench.roofline_tables import (
    assumptions_table,
    counts_table,
    parts_table,
    sensitivity_table,
    times_table,
    title,
)
from cmlora.lab.bench.steps import METHODS, MODELS

TIMED = ("plain", "loop", "cmlora", "routed", "merge")
"""For every number of adapters; the others for the one whose parts are shown."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Predicted ms per denoising step on GPUs.")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--adapters", nargs="+", type=int, choices=range(2, MOST_ADAPTERS + 1), metavar="N", default=[2, 3, 5, 8]
    )
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--brief", action="store_true", help="the table of times alone")
    parser.add_argument("--out", type=Path, help="folder for roofline.json and a plot per model")
    args = parser.parse_args(arguments)
    given, gpus = Assumptions(), [GPUS[name] for name in args.gpus]
    shown = 5 if 5 in args.adapters else args.adapters[-1]
    everything: list[Prediction] = []
    if not args.brief:
        print(*assumptions_table(given, gpus), sep="\n")
    for model in args.model:
        wanted = ((m, n) for n in args.adapters for m in METHODS if m in TIMED or (n == shown and not args.brief))
        traces = trace_all(model, wanted)
        found = predict_all(model, traces, gpus, given)
        everything += found
        tables = [times_table(model, found)]
        if not args.brief:
            gpu = GPUS["H100"] if "H100" in args.gpus else gpus[0]
            tables += [counts_table(model, found, gpu, shown), parts_table(model, found, shown)]
            tables.append(sensitivity_table(model, traces, gpu, shown, given))
        for table in tables:
            print("", *table, sep="\n")
        if args.out:
            from cmlora.lab.bench.roofline_plot import plot  # matplotlib, the `plots` extra

            args.out.mkdir(parents=True, exist_ok=True)
            plot(title(model), found, args.out / f"roofline_{model}.png")
    if args.out:
        record = {"predicted": [asdict(p) for p in everything], "assumptions": asdict(given)}
        (args.out / "roofline.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
