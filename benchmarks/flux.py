"""What a step of FLUX.1-dev launches, counted on `meta`, and how long it is predicted to take; nothing is timed.

    python benchmarks/flux.py [--adapters N] [--brief] [--blocks FIRST DOUBLE SINGLE LAST]

--brief: the table of predicted times alone. --blocks: of a smaller model, quickly. How the blocks are counted:
cmlora/lab/bench/transformer_steps.py; the model of the times: csrc_docs/roofline.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cmlora.lab.bench.transformer_steps import INTERVAL, STEPS, Blocks, Flux, all_blocks, counts_table, times_table

MEAN: dict[str, Any] = {"method": "cmlora", "combine": "mean", "partition": "offline"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A step of FLUX.1-dev, counted and predicted.")
    parser.add_argument("--adapters", type=int, default=3, metavar="N")
    parser.add_argument("--brief", action="store_true", help="the table of predicted times alone")
    parser.add_argument(
        "--blocks",
        type=int,
        nargs=4,
        default=all_blocks(),
        metavar=tuple(name.upper() for name in Blocks._fields),
        help="that run in every step, are cached (of two streams, of one), and run in every step",
    )
    args = parser.parse_args(arguments)
    flux, blocks = Flux(args.adapters), Blocks(*args.blocks)
    rows = {
        "loop of set_adapters, no cache": flux.count_loop(blocks, interval=1),
        "the same with our cache": flux.count_loop(blocks),
        "cmlora, mean": flux.count(blocks, **MEAN),
        "cmlora, local": flux.count(blocks, **(MEAN | {"combine": "local"})),
        "routed": flux.count(blocks, method="routed"),
        "merge": flux.count(blocks, method="merge"),
        "merge, no cache": flux.count(blocks, method="merge", cache_interval=1),
    }
    if not args.brief:
        print(f"FLUX.1-dev, 1024 px, {args.adapters} LoRAs, {STEPS} steps, interval {INTERVAL}; a step, on sm_90")
        print(f"the first {blocks.first} and the last {blocks.last} of {sum(blocks)} blocks run in every step\n")
        print(*counts_table(rows), "", sep="\n")
    print(*times_table(rows), sep="\n")


if __name__ == "__main__":
    main()
