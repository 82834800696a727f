"""Draws the pictures of a sweep: the model with all its LoRAs, and one call per picture."""

from __future__ import annotations

import functools
import hashlib
import io
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cmlora.accelerate import accelerated, summary
from cmlora.errors import CMLoRAError
from cmlora.lab.load import load_loras, load_pipeline
from cmlora.lab.sweep.folder import digest
from cmlora.lab.sweep.jobs import FLOOR, Job
from cmlora.lab.sweep.settings import Sweep
from cmlora.summary import Summary

PACKAGES = ("cmlora", "torch", "diffusers", "transformers", "peft")
SMALL = 2**20


def describe_model(model: str) -> str:
    """What tells one model's folder from another: names, sizes, and the content of small files; a hub id is itself."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    told = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file())
    for path in sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)):
        size = path.stat().st_size
        told.update(f"{path.relative_to(folder).as_posix()} {size} ".encode())
        told.update(path.read_bytes() if size <= SMALL else b"")
    return told.hexdigest()


def lora_files(sweep: Sweep, ids: Sequence[str]) -> dict[str, Path]:
    """id -> file.

    Raises:
        CMLoRAError: names all that are not there.
    """
    files = {name: Path(sweep.lora_dir) / f"{name}.safetensors" for name in ids}
    absent = [str(path) for path in files.values() if not path.is_file()]
    if absent:
        raise CMLoRAError(f"no such LoRA file: {', '.join(absent)}")
    return files


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """id -> sha256 of its file."""
    return {name: digest(path.read_bytes()) for name, path in files.items()}


@functools.cache
def versions() -> dict[str, str]:
    """Of the packages that pictures depend on; on the CPU their last bits depend on the number of threads, too."""
    threads = {} if torch.cuda.is_available() else {"threads": str(torch.get_num_threads())}
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, **threads}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a folder that is not installed
        return "unknown"


def identity(job: Job, sweep: Sweep) -> dict[str, Any]:
    """What a picture's record says of it before it is drawn: what must be equal for it to be the same picture."""
    drawing = sweep.drawing
    return {
        "kind": job.kind,
        "method": job.method,
        "config": _plain(job.config),
        "loras": list(job.ids),
        "triggers": {lora.id: list(lora.triggers) for lora in job.loras},
        "interval": job.interval,
        "seed": job.seed,
        "noise": job.noise,
        "prompt": job.prompt(sweep.style),
        "negative": sweep.style.negative,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "scale": drawing.scale,
        "size": [drawing.height, drawing.width],
        "scheduler": drawing.scheduler,
    }


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


class Studio:
    """The pipeline with all LoRAs of a sweep loaded."""

    def __init__(self, sweep: Sweep, ids: Sequence[str], device: str | None = None) -> None:
        """Load everything.

        Raises:
            CMLoRAError: names every LoRA that does not fit the model.
        """
        self.sweep = sweep
        files = lora_files(sweep, ids)
        self.pipe = load_pipeline(sweep.model, device)
        load_loras(self.pipe, files)
        self.pipe.set_progress_bar_config(disable=True)
        if sweep.drawing.scheduler == "dpmsolver++":
            from diffusers import DPMSolverMultistepScheduler

            config = dict(self.pipe.scheduler.config) | {"algorithm_type": "dpmsolver++"}
            self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)

    def draw(self, job: Job) -> tuple[bytes, dict[str, Any]]:
        """The picture as a PNG, and its record."""
        began = time.perf_counter()
        image, run = self._call(job)
        seconds = time.perf_counter() - began
        file = io.BytesIO()
        image.save(file, "PNG")
        told = {"seconds": round(seconds, 3), "summary": _short(run), "versions": versions(), "device": self._device()}
        return file.getvalue(), identity(job, self.sweep) | told

    def _call(self, job: Job) -> tuple[Image.Image, Summary]:
        drawing, style = self.sweep.drawing, self.sweep.style
        without = job.config.get("method") == FLOOR
        if without:
            self.pipe.disable_lora()  # of text encoders, too
        else:
            self.pipe.enable_lora()
            self.pipe.set_adapters(list(job.ids))
        with accelerated(self.pipe, **{"cache_interval": job.interval, **_roles(job), **job.config}):
            image = self.pipe(
                job.prompt(style),
                negative_prompt=style.negative or None,
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance,
                height=drawing.height,
                width=drawing.width,
                generator=torch.Generator().manual_seed(job.noise),
                **({} if without else {"cross_attention_kwargs": {"scale": drawing.scale}}),
            ).images[0]
            return image, summary(self.pipe)

    def _device(self) -> str:
        device = self.pipe.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        return f"{device.type}, {name}, {str(self.pipe.unet.dtype).removeprefix('torch.')}"


def _roles(job: Job) -> dict[str, tuple[str, ...]]:
    """Backgrounds are low, as CMLoRA has it; by the type of INFO.json and not by names."""
    if job.config.get("method", "cmlora") == FLOOR or "high" in job.config or "low" in job.config:
        return {}
    low = tuple(lora.id for lora in job.loras if lora.type == "background")
    return {"high": tuple(name for name in job.ids if name not in low), "low": low}


def _short(run: Summary) -> dict[str, Any]:
    """What a table may want to know of a run."""
    return {
        "steps": len(run.steps),
        "rows_full": sum(step.rows_full for step in run.steps),
        "rows_shallow": sum(step.rows_shallow for step in run.steps),
        "refreshes": run.refreshes,
        "dominant": [step.dominant[0] for step in run.steps if step.dominant],
        "acts_in": {name: round(float((mask > 0.5).float().mean()), 4) for name, mask in run.masks.items()},
    }
