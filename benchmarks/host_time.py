"""Host time of one call of a multi-LoRA layer, without a GPU: a driver that launches nothing stands in for one.

    python benchmarks/host_time.py [--against FOLDER] [--rounds 5]

Prints microseconds of this process's own time, the least of several rounds, for aligned fp16 tensors of an SD1.5 layer;
--against: a second checkout of this project is timed in turn with this one. What the device and the driver's launch
itself would take is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = r"""
import importlib, json, sys, time, types
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import cmlora_kernels as ck

class Compiled:
    function = packed_metadata = None
    def __init__(self):
        self.run, self.launch_metadata = (lambda *_: None), (lambda *_: None)
    def __getitem__(self, grid):
        def runner(*args):
            device = driver.active.get_current_device()
            stream = driver.active.get_current_stream(device)
            self.launch_metadata(grid, stream, *args)
            self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, None, None, None, *args)
        return runner

driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
    get_current_stream=lambda device: 0))
triton.compiler.compile = lambda *a, **k: Compiled()
for name in [n for n in sys.modules if n.startswith("cmlora_kernels.")]:
    module = importlib.import_module(name)
    if hasattr(module, "use_triton"):
        module.use_triton = lambda tensor, backend: backend == "triton"
    if hasattr(module, "arch_of"):
        module.arch_of = lambda device: "sm_90"

half = torch.float16
x, weight, slots = torch.zeros(2, 64, 320, dtype=half), torch.zeros(320, 320, dtype=half), torch.tensor([0, 1])
a, b, scales = torch.zeros(2, 16, 320, dtype=half), torch.zeros(2, 320, 16, dtype=half), torch.ones(2, 1)
y, tiny = torch.zeros(2, 64, 320, dtype=half), torch.zeros(1, 1, 1)
one = torch.nn.Linear(1, 1)
calls = {
    "multi_lora_linear": lambda: ck.multi_lora_linear(x, weight, None, slots, a, b, scales, "triton"),
    "multi_lora_add_": lambda: ck.multi_lora_add_(y, x, slots, a, b, scales, "triton"),
    "nn.Linear of one number": lambda: one(tiny),
}
found = {}
with torch.inference_mode():
    for name, call in calls.items():
        for _ in range(50):
            call()
        least = 1e9
        for _ in range(int(sys.argv[1])):
            start = time.process_time()
            for _ in range(300):
                call()
            least = min(least, (time.process_time() - start) / 300)
        found[name] = least * 1e6
print(json.dumps(found))
"""


def timed(checkout: Path, rounds: int) -> dict[str, float]:
    """Microseconds per call in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(checkout)
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=checkout)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Host microseconds of a multi-LoRA layer's call.")
    parser.add_argument("--against", type=Path, help="another checkout, timed in turn with this one")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    checkouts = {"this": ROOT} | ({"the other": args.against.resolve()} if args.against else {})
    best: dict[str, dict[str, float]] = {name: {} for name in checkouts}
    for _ in range(3):
        for name, checkout in checkouts.items():
            for call, microseconds in timed(checkout, args.rounds).items():
                best[name][call] = min(microseconds, best[name].get(call, microseconds))
    for call in best["this"]:
        listed = ", ".join(f"{name} {found[call]:.1f}" for name, found in best.items())
        print(f"{call}: {listed} us of the host")


if __name__ == "__main__":
    main()
