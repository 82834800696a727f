"""What folding LoRA's shrink into the norm or GEGLU that makes x would save in a step, and its neighbours; predicted.

    python benchmarks/folding.py [--model sd15|sdxl ...] [--gpu H100]

Prints a Markdown table per model; nothing is measured. How it is counted: cmlora/lab/bench/folding.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cmlora.lab.bench.folding import table
from cmlora.lab.bench.roofline import GPUS
from cmlora.lab.bench.steps import MODELS


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What folding would save in a step, predicted.")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    args = parser.parse_args(arguments)
    for model in args.model:
        print(*table(model, GPUS[args.gpu]), "", sep="\n")


if __name__ == "__main__":
    main()
