"""What folding LoRA's shrink into the norm or GEGLU that makes x would save in a step, and its neighbours; predicted.

    python benchmarks/folding.py [--model sd15|sdxl ...] [--gpu H100]
    python benchmarks/folding.py --cards

Prints a Markdown table per model, of one GPU or of all; nothing is measured. How it is counted:
cmlora/lab/bench/folding.py and columns.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cmlora.lab.bench.columns import cards_table
from cmlora.lab.bench.folding import table
from cmlora.lab.bench.roofline import GPUS
from cmlora.lab.bench.steps import MODELS


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What folding would save in a step, predicted.")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--cards", action="store_true", help="what each idea saves, on every card")
    args = parser.parse_args(arguments)
    for model in args.model:
        lines = cards_table(model, GPUS.values()) if args.cards else table(model, GPUS[args.gpu])
        print(*lines, "", sep="\n")


if __name__ == "__main__":
    main()
