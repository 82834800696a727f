"""Pipelines from folders or hub ids, with LoRAs from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmlora.errors import CMLoRAError


def load_pipeline(model: str | Path, device: str | None = None) -> Any:
    """A diffusers pipeline, on the GPU in float16 where there is one, on the CPU in float32 elsewhere.

    Args:
        model: folder or hub id. device: as torch names it; None: the GPU where there is one.
    """
    import torch
    from diffusers import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.float16
    return DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)


def load_loras(pipe: Any, files: Mapping[str, Path]) -> None:
    """Load LoRAs under their names.

    Raises:
        CMLoRAError: names every file that is not there, cannot be read, or changed no layer of the model.
    """
    wrong = {}
    for name, path in files.items():
        if not path.is_file():
            wrong[path] = "no such file"
            continue
        try:
            pipe.load_lora_weights(str(path), adapter_name=name)
        except Exception as error:  # whatever diffusers, PEFT or safetensors raise for a file that does not fit
            lines = str(error).strip().splitlines() or [type(error).__name__]
            wrong[path] = f"does not fit this model: {lines[1].strip() if len(lines) > 1 else lines[0]}"
            continue
        if name not in {adapter for part in pipe.get_list_adapters().values() for adapter in part}:
            wrong[path] = "changed no layer of this model: its keys fit another model or lack a prefix"
    if wrong:
        raise CMLoRAError("; ".join(f"{path} {problem}" for path, problem in wrong.items()))
