"""Runs the three parts, each in a process of its own, and gathers what they find."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cmlora.lab.doctor.findings import Finding, receive
from cmlora.lab.doctor.machine import Machine, command, environment
from cmlora.lab.doctor.speed import Timed
from cmlora_kernels.cards import Measured, read, write

PART = "cmlora.lab.doctor"
RESTARTS = 3  # of the kernels' part, behind a kernel that took its process with it
SLOW = 2.0  # a file that is further off than this from what was measured now is said to be wrong


@dataclass
class Examination:
    """All that was found.

    Attributes:
        machine: where. findings: of kernels and compositions. timed: seconds per shape.
        measured: of the card; None where that part did not come to its end.
        file: where it was written to; None: it was not.
        file_said: what the card's file said that was there before, if it was wrong; "" else.
        seconds: of everything.
    """

    machine: Machine
    findings: list[Finding] = field(default_factory=list)
    timed: list[Timed] = field(default_factory=list)
    measured: Measured | None = None
    file: Path | None = None
    file_said: str = ""
    seconds: float = 0.0

    @property
    def healthy(self) -> bool:
        """Whether everything that was checked is right, and everything that can be measured was."""
        return not any(finding.bad for finding in self.findings) and self.measured is not None


Progress = Callable[[str], None]


def examine(machine: Machine, seconds: float, progress: Progress, *, keep: bool = True) -> Examination:
    """Kernels, compositions, speed; then the card's file.

    Args:
        machine: from `examine_machine`.
        seconds: for all parts together; a kernel that compiles when they are over is waited for.
        progress: told what is being done.
        keep: whether the card's file is written.
    """
    start = time.perf_counter()
    found = Examination(machine)
    found.findings += check_kernels(machine, 0.55 * seconds, progress)
    found.findings += check_compositions(machine, 0.3 * seconds, progress)
    _measure(found, 0.15 * seconds, progress)
    _card_file(found, keep)
    found.seconds = time.perf_counter() - start
    return found


def check_kernels(machine: Machine, seconds: float, progress: Progress) -> list[Finding]:
    """Every kernel variant; a process that dies costs its case, and the next one goes on behind it."""
    found: list[Finding] = []
    end = time.perf_counter() + seconds
    for _ in range(RESTARTS):
        left = end - time.perf_counter()
        part = _Part("kernels", [machine.backend, f"{left:.0f}", str(len(found))], machine, left + 60)
        last = ""
        for item in receive(part.lines()):
            if isinstance(item, Finding):
                found.append(item)
                last = ""
            else:
                progress(f"kernel {len(found) + 1}: {item}")
                last = item
        if not part.died:
            break
        found.append(Finding(last or "the process of the kernels", "failed", part.last_words))
        if not last:
            break
    return found


def check_compositions(machine: Machine, seconds: float, progress: Progress) -> list[Finding]:
    """The shipped model in every way."""
    found: list[Finding] = []
    part = _Part("composing", [machine.backend, f"{seconds:.0f}"], machine, seconds + 120)
    last = "the process of the compositions"
    for item in receive(part.lines()):
        if isinstance(item, Finding):
            found.append(item)
        else:
            progress(item)
            last = item
    return [*found, Finding(last, "failed", part.last_words)] if part.died else found


def _measure(found: Examination, seconds: float, progress: Progress) -> None:
    part = _Part("speed", [found.machine.card, f"{seconds:.0f}"], found.machine, 3 * seconds + 120)
    progress("speed")
    for line in part.lines():
        try:
            given = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "timed" in given:
            found.timed.append(Timed(**given["timed"]))
            progress(f"speed of {found.timed[-1].name}")
        elif "measured" in given:
            found.measured = Measured(**given["measured"])
    if part.died:
        found.findings.append(Finding("speed", "failed", part.last_words))


def _card_file(found: Examination, keep: bool) -> None:
    """Hold the file that is there against what was measured now, and write the new one."""
    if found.measured is None:
        return
    try:
        before = read(found.measured.device)
        found.file_said = "" if before is None else disagreement(before, found.measured)
    except ValueError as error:
        found.file_said = str(error)
    if keep and not any(finding.bad for finding in found.findings):
        found.file = write(found.measured)


def disagreement(before: Measured, now: Measured) -> str:
    """What a card's file says that is further off than `SLOW`; "" where it agrees."""
    off = []
    for name in ("bandwidth", "half_flops", "float_flops", "triton_share"):
        said, is_now = getattr(before, name), getattr(now, name)
        if not 1 / SLOW <= said / is_now <= SLOW:
            off.append(f"{name} {said:.3g}, measured now {is_now:.3g}")
    return f"the card's file says {'; '.join(off)}: was something else running then, or now?" if off else ""


class _Part:
    """A part in its process, which ends with it."""

    def __init__(self, name: str, arguments: Sequence[str], machine: Machine, seconds: float) -> None:
        self.process = subprocess.Popen(
            command(f"{PART}.{name}", *arguments),
            env=environment(machine),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.seconds = seconds
        self.late = False
        self._errors: list[str] = []

    def lines(self) -> Iterator[str]:
        """What it prints, until it ends or its time is over."""
        waiting: queue.Queue[str | None] = queue.Queue()

        def read_output() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                waiting.put(line)
            waiting.put(None)

        def read_errors() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self._errors = [*self._errors[-20:], line.strip()]

        readers = [threading.Thread(target=read, daemon=True) for read in (read_output, read_errors)]
        for reader in readers:
            reader.start()
        end = time.monotonic() + self.seconds
        try:
            while (line := waiting.get(timeout=max(0.1, end - time.monotonic()))) is not None:
                yield line
        except queue.Empty:
            self.late = True
        finally:
            if self.process.poll() is None and self.late:
                self.process.kill()
            self.process.wait()
            for reader in readers:
                reader.join(timeout=5)

    @property
    def died(self) -> bool:
        return self.late or self.process.returncode != 0

    @property
    def last_words(self) -> str:
        """Why it ended."""
        if self.late:
            return f"did not come to its end in {self.seconds:.0f} seconds"
        said = [line for line in self._errors if line]
        return f"its process died ({self.process.returncode}): {said[-1] if said else 'without a word'}"[:300]
