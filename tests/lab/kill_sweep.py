"""A sweep through INFO.json with five methods, by one process, by several, by Ray: killed on the way, it ends bit for
bit as one that was left alone. To be run by name: it takes minutes, and needs Ray beside what the other tests need.

    pip install '.[test,ray]'
    python -m pytest tests/lab/kill_sweep.py
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cmlora import sprites
from cmlora.lab.sweep.run import Place, run
from tests.lab.test_sweep import ROOT, pictures, small, told

INFO = ROOT / "cmlora" / "lab" / "sweep" / "sprites.json"
METHODS = "merge,switch,composite,cmlora,routed"
LORAS = Path(sprites.lora_path("zebrin")).parent
SWEEP = ["sweep", "--loras", INFO, "--lora-dir", LORAS, "--model", sprites.model_path(), "--methods", METHODS]
SMALL = ["--sizes", "2,3", "--limit", "2", "--steps", "2", "--guidance", "4"]
MODULE = ["-m", "cmlora.cli", *SWEEP, *SMALL]
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
PATIENCE = 900.0
"""Seconds for anything at all: a busy machine is no failure."""

Kill = Callable[[subprocess.Popen], None]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """By one process that nobody disturbs, on as many threads as the others."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start([*MODULE, "--out", folder]))
    assert {record["method"] for record in told(folder)} == {*METHODS.split(","), "no_lora", "solo"}
    return folder


def start(command: list) -> subprocess.Popen:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}  # its workers yield to all else
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, cwd=ROOT, env=os.environ | own, start_new_session=True)


def finish(process: subprocess.Popen) -> None:
    assert process.wait(PATIENCE) == 0


def kill_all(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_one(what: str) -> Kill:
    """The first of its processes with this in its command line."""

    def kill(process: subprocess.Popen) -> None:
        every = psutil.Process(process.pid).children(recursive=True)
        next(one for one in every if what in " ".join(one.cmdline())).kill()

    return kill


def kill_at(count: int, folder: Path, process: subprocess.Popen, kill: Kill) -> None:
    until = time.monotonic() + PATIENCE
    while len(pictures(folder)) < count:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.05)
    kill(process)


@pytest.mark.parametrize("way", ["one process", "accelerate launch"])
def test_killed_twice_it_ends_as_an_unbroken_one(unbroken, tmp_path, way):
    """Of several processes first one is killed, which ends the others, then all at once."""
    several = way == "accelerate launch"
    command = [*(LAUNCH if several else ()), *MODULE, "--out", tmp_path]
    for count, kill in ((5, kill_one("cmlora.cli") if several else kill_all), (15, kill_all)):
        process = start(command)
        kill_at(count, tmp_path, process, kill)
        assert process.wait(PATIENCE) != 0
        assert count <= len(pictures(tmp_path)) < len(pictures(unbroken))
    finish(start(command))
    assert pictures(tmp_path) == pictures(unbroken)
    assert told(tmp_path) == told(unbroken)


def test_two_workers_of_ray_one_of_them_killed_end_as_one_process(unbroken, tmp_path):
    process = start([*MODULE, "--out", tmp_path, "--ray", "2"])
    kill_at(5, tmp_path, process, kill_one("_Actor"))
    finish(process)
    assert pictures(tmp_path) == pictures(unbroken)
    assert told(tmp_path) == told(unbroken)


def test_the_info_is_the_shipped_one(unbroken):
    """Named as a file or by its word: the same pictures."""
    shipped = small(sizes="2,3", limit=2, methods=METHODS)
    assert run(shipped, unbroken, Place()).drawn == 0
