"""Runs a sweep: what is not there yet is drawn, by this process, by one of several, or by a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cmlora.errors import CMLoRAError
from cmlora.lab.sweep.folder import Folder
from cmlora.lab.sweep.jobs import Job, make_units
from cmlora.lab.sweep.settings import Sweep
from cmlora.lab.sweep.studio import Studio, describe_model, digests, identity, lora_files, versions


@dataclass(frozen=True)
class Place:
    """Which of several processes this one is, as torchrun and `accelerate launch` say in the environment."""

    rank: int = 0
    of: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Place:
        """Of this process."""
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(NAMES, "010", strict=True)))

    @property
    def device(self) -> str | None:
        """A GPU per process where there are several; None: whatever there is."""
        import torch

        several = self.of > 1 and torch.cuda.is_available()
        return f"cuda:{self.local % torch.cuda.device_count()}" if several else None


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass
class Report:
    """What a run did.

    Attributes:
        drawn, there, missing: pictures that it drew, that were there, and that are still to be drawn.
        others: versions of pictures that were there, where they are not this process's.
        alone: whether no other process draws for the same sweep.
    """

    drawn: int = 0
    there: int = 0
    missing: int = 0
    others: list[str] = field(default_factory=list)
    alone: bool = True

    def __str__(self) -> str:
        lines = [f"{self.drawn} pictures drawn, {self.there} were there, {self.missing} are missing"]
        if self.others:
            lines.append(f"of those that were there, some were drawn elsewhere: {'; '.join(self.others)}")
        if self.missing:
            waiting = "" if self.alone else "other processes may be at it; if not, "
            lines.append(f"{waiting}the same command draws what is missing")
        return "\n".join(lines)


def open_folder(sweep: Sweep, out: Path) -> Folder:
    """The sweep's folder, once it is certain that what it holds goes with the sweep.

    Raises:
        CMLoRAError: it holds another sweep; a LoRA's file is not there.
    """
    folder = Folder(out, sweep.layout, sweep.style.name)
    about = {"model": describe_model(sweep.model), "style": asdict(sweep.style), "layout": sweep.layout}
    ids = sorted({name for unit in make_units(sweep) for job in unit for name in job.ids})
    folder.settle(about, digests(lora_files(sweep, ids)))
    return folder


def missing_jobs(sweep: Sweep, folder: Folder, unit: Sequence[Job], others: set[str] | None = None) -> list[Job]:
    """Those of a set that are not there, whole.

    Args:
        others: versions that pictures were drawn with, where they are not ours, are added to it.
    """
    found = []
    for job in unit:
        record = folder.find(job, identity(job, sweep))
        if record is None:
            found.append(job)
        elif others is not None and record["versions"] != versions():
            changed = {name: had for name, had in record["versions"].items() if versions().get(name) != had}
            others.add(", ".join(f"{name} {had}" for name, had in changed.items()))
    return found


class Worker:
    """Draws sets, and loads the model when the first of them misses a picture. All LoRAs of the sweep are loaded then:
    one that does not fit is told of before anything is drawn.
    """

    def __init__(self, sweep: Sweep, folder: Folder, device: str | None = None) -> None:
        self.sweep, self.folder, self.device = sweep, folder, device
        self.studio: Studio | None = None
        self.others: set[str] = set()

    def draw(self, unit: Sequence[Job]) -> Iterator[Job]:
        """Draw and save what is missing of a set, one after the other."""
        for job in missing_jobs(self.sweep, self.folder, unit, self.others):
            if self.studio is None:
                ids = list(dict.fromkeys(name for one in make_units(self.sweep) for job in one for name in job.ids))
                self.studio = Studio(self.sweep, ids, self.device)
            self.folder.add(job, *self.studio.draw(job))
            yield job


def run(sweep: Sweep, out: Path, place: Place | None = None) -> Report:
    """Draw what is missing, or this process's share of it (sets are dealt out in turn), and write the manifest.

    Whatever ends it leaves whole pictures, and the same call goes on from there.

    Raises:
        CMLoRAError: a LoRA that does not fit; a folder of another sweep.
    """
    place = place or Place.here()
    folder = open_folder(sweep, out)
    units = make_units(sweep)
    jobs = [job for unit in units for job in unit]
    own = units[place.rank :: place.of]
    report = Report(alone=place.of == 1)
    worker = Worker(sweep, folder, place.device)
    bar = tqdm(total=sum(map(len, own)), desc=f"sweep {place.rank}" if place.of > 1 else "sweep", mininterval=2.0)
    try:
        for unit in own:
            drawn = 0
            for job in worker.draw(unit):
                drawn += 1
                bar.set_postfix_str(f"{job.method} {' '.join(job.ids)}", refresh=False)
                bar.update()
            report.drawn += drawn
            report.there += len(unit) - drawn
            bar.update(len(unit) - drawn)
    finally:
        bar.close()
        report.others = sorted(worker.others)
        report.missing = folder.write_manifest(jobs)
    return report


class _Actor:
    """A worker of a Ray cluster: sets in, how many pictures it drew of each out."""

    def __init__(self, sweep: Sweep, out: str) -> None:
        self.worker = Worker(sweep, Folder(Path(out), sweep.layout, sweep.style.name))
        self.units = make_units(sweep)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"drawn": [sum(1 for _ in self.worker.draw(self.units[int(unit)])) for unit in batch["id"]]}


def run_on_ray(sweep: Sweep, out: Path, workers: int, address: str | None = None) -> Report:
    """The same on a Ray cluster, one actor per GPU (per core where there is none), all with the folder at one path.

    A worker that is lost is started again, and its sets are drawn by others.

    Args:
        workers: actors. address: of the cluster; None: RAY_ADDRESS, or a local one that is started here.
    """
    try:
        import ray
    except ImportError as error:
        raise CMLoRAError("--ray N needs Ray: pip install 'cmlora[ray]'") from error
    folder = open_folder(sweep, out.resolve())
    units = make_units(sweep)
    ids = list(dict.fromkeys(name for unit in units for job in unit for name in job.ids))
    if any(missing_jobs(sweep, folder, unit) for unit in units):
        Studio(sweep, ids, "cpu")  # what does not fit is told of here
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    report = Report(there=sum(map(len, units)))
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        rows = ray.data.from_items([{"id": i} for i in range(len(units))], override_num_blocks=len(units)).map_batches(
            _Actor,
            fn_constructor_args=(sweep, str(out.resolve())),
            batch_size=1,
            concurrency=workers,
            num_gpus=1 if gpus else 0,
            num_cpus=0 if gpus else 0.5,  # a machine with as many cores as actors has some left for Ray's own tasks
        )
        report.drawn = sum(row["drawn"] for row in rows.iter_rows())
        report.there -= report.drawn
    finally:
        if started:
            ray.shutdown()
        report.missing = folder.write_manifest([job for unit in units for job in unit])
    return report
