"""Whole pipeline calls of this checkout against another one of this project, in turn, each in a process of its own.

    python benchmarks/against.py FOLDER [--pairs 9]

Prints the median of the ratios (the other's seconds / this one's) and their spread; the machine should be otherwise
idle. Both checkouts must have benchmarks/bench_pipeline.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUNT, STEPS = 3, {"sprites": 8, "sd15": 2}
"""LoRAs, and denoising steps by model."""
CASES = {
    "merge": {"method": "merge", "cache_interval": 1},
    "merge, cached": {"method": "merge", "cache_interval": 2},
    "composite": {"method": "composite", "cache_interval": 1, "combine": "mean"},
    "cmlora, offline": {"method": "cmlora", "partition": "offline", "offline_boundary": 1.0, "combine": "mean"},
    "cmlora, online": {"method": "cmlora", "partition": "online", "combine": "mean"},
}
WORKER = """
import ast, sys, time
import bench_pipeline, cmlora
for line in sys.stdin:
    model, count, steps, config = ast.literal_eval(line)
    pipe, names, given = bench_pipeline.MODELS[model](count)
    pipe.unet.set_adapters(names)
    cmlora.accelerate(pipe, **config)
    bench_pipeline.call(pipe, 4, given=given)
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "end\\n":
            break
        start = time.perf_counter()
        bench_pipeline.call(pipe, steps, given=given)
        print(time.perf_counter() - start, flush=True)
"""


class Checkout:
    """A process that imports the project from one folder."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'benchmarks'}"}
        command = [sys.executable, "-W", "ignore", "-c", WORKER]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes)

    def tell(self, line: object) -> None:
        """Send one line."""
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def ask(self, line: object) -> str:
        """Send one line and wait for the answer."""
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its own error says more, below
            self.tell(line)
        answer = self.process.stdout.readline().strip()
        if not answer:
            status = self.process.wait()
            self.errors.seek(0)
            raise SystemExit(f"the worker stopped with {status} behind {line}:\n{self.errors.read()[-2000:]}")
        return answer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Whole pipeline calls against another checkout of this project.")
    parser.add_argument("folder", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    this, other = Checkout(ROOT), Checkout(args.folder.resolve())
    for model, steps in STEPS.items():
        for name, config in CASES.items():
            for side in (this, other):
                side.ask((model, COUNT, steps, config))
            times = []
            for pair in range(args.pairs):
                order = (this, other) if pair % 2 else (other, this)
                taken = {side: float(side.ask("go")) for side in order}
                times.append((taken[this], taken[other]))
            ratios = sorted(theirs / ours for ours, theirs in times)
            print(
                f"{model} N={COUNT}, {name}: {statistics.median(ratios):.2f} times as fast as the other"
                f" ({ratios[0]:.2f} to {ratios[-1]:.2f}), {statistics.median(t for t, _ in times):.3f} s",
                flush=True,
            )
            for side in (this, other):
                side.tell("end")


if __name__ == "__main__":
    main()
