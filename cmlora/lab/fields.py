"""Every field of CMLoRAConfig with a picture of what it changes, drawn with the shipped model: a page of the site.

python -m cmlora.lab.fields csrc_docs            # writes fields.md and images/fields/*.png
python -m cmlora.lab.fields csrc_docs high low   # these two pictures alone, and fields.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cmlora.accelerate import accelerated
from cmlora.config import CMLoRAConfig
from cmlora.lab.demo import load_pipe, prompt_for
from cmlora.lab.pictures import labelled_grid
from cmlora.lab.quiet import leave_out_harmless_messages

Config = dict[str, Any]
ROLES, STEPS, SEED = ("character", "clothing", "background"), 20, 1

_LEFT = torch.cat([torch.ones(64, 32), torch.zeros(64, 32)], dim=1)
_ROUTED, _SWITCH, _LOCAL = {"method": "routed"}, {"method": "switch"}, {"method": "composite", "combine": "local"}
_QUADRATIC: Config = {"method": "merge", "cache_interval": "quadratic"}
_COMPOSITE: Config = {"method": "composite"}

CHANGES: dict[str, tuple[Config, Sequence[Any]]] = {
    "method": ({}, ("no_lora", "merge", "switch", "composite", "cmlora", "routed")),
    "partition": ({"async_switch": 1 / 4}, ("offline", "online", "async")),
    "adapters": (_ROUTED, (("character",), ("character", "clothing"), ROLES)),
    "high": ({}, ((), ("background",))),
    "low": ({}, ((), ("clothing",), ("character",))),
    "cache_interval": ({"method": "merge"}, (1, 2, 3, 5, "nonuniform", "quadratic")),
    "cache_branch": ({"method": "merge", "cache_interval": 3}, ((0, 0), (0, 1), (1, 0))),
    "max_cache_age": ({"cache_interval": 5}, (None, 4, 2)),
    "cache_follow": ({"combine": "deviation", "cache_interval": 5}, (True, False)),
    "switch_step": (_SWITCH, (1, 2, 5, 10)),
    "switch_stages": (_SWITCH, (False, True)),
    "combine": (_COMPOSITE, ("mean", "deviation", "local")),
    "mask_steps": (_ROUTED, (1, 2, 4, 8)),
    "mask_temperature": (_ROUTED, (0.1, 0.3, 0.6, 1.0, 3.0)),
    "mask_text": (_ROUTED, (0.0, 0.5, 1.0)),
    "mask_blur": (_LOCAL, (1, 3, 7)),
    "shared": (_COMPOSITE, ((), ("background",))),
    "regions": (_ROUTED, (None, {"background": _LEFT}, {"background": 1 - _LEFT})),
    "prompts": (_COMPOSITE, (None, {"character": "a zebrin creature"}, {"background": "checker background"})),
    "dominant_weight": ({}, (1.0, None, 6.0)),
    "dominant_decay": ({}, (0.0, 0.5, 0.9)),
    "dominant_floor": ({"dominant_weight": 3.0, "dominant_decay": 0.9}, (0.0, 1.0, 2.0)),
    "offline_boundary": ({"partition": "offline"}, (0.2, 120 / 220, 1.0)),
    "online_gate": ({}, (0.4, 0.65, 1.0)),
    "online_cutoff": ({"online_gate": 0.65}, (0.2, 0.5)),
    "async_switch": ({"partition": "async"}, (1 / 20, 1 / 11, 1 / 2)),
    "late_stage": ({"online_gate": 1.0}, ("shift", "low")),
    "quadratic_interval": (_QUADRATIC, (2, 3, 5)),
    "quadratic_center": (_QUADRATIC, (0.1, 0.3, 0.7)),
    "quadratic_power": (_QUADRATIC, (1.1, 1.4, 3.0)),
}
"""Field -> what else is set, and its values. Where nothing else is, the defaults are `cmlora`'s."""

SAME = ("max_rows", "memory_budget", "merge_weights", "winograd", "cuda_graphs", "backend")
"""Fields that change memory and time, and the picture in its last bits at most."""


def descriptions() -> dict[str, str]:
    """Of every field, from the docstring of CMLoRAConfig; fields that are explained together share a text."""
    text = (CMLoRAConfig.__doc__ or "").partition("Attributes:")[2].partition("Raises:")[0]
    names = "|".join(field.name for field in fields(CMLoRAConfig))
    begin = re.compile(rf"(?:^|(?<=[.;] ))((?:(?:{names})(?:, )?)+): ", re.MULTILINE)
    flat = "\n".join(line.strip() for line in text.splitlines())
    found: dict[str, str] = {}
    marks = [*begin.finditer(flat)]
    for mark, after in zip(marks, [*(one.start() for one in marks[1:]), len(flat)], strict=True):
        said = " ".join(flat[mark.end() : after].split())
        said = said[:1].upper() + said[1:]
        found |= dict.fromkeys(mark[1].split(", "), said)
    return found


def draw_field(pipe: Any, field: str) -> Image.Image:
    """A row of pictures from the same noise, a value of the field each."""
    base, values = CHANGES[field]
    images = []
    for value in values:
        pipe.set_adapters(list(ROLES))
        with accelerated(pipe, **{**base, field: value}):
            generator = torch.Generator().manual_seed(SEED)
            call = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "generator": generator}
            images.append(pipe(prompt_for(ROLES), **call).images[0])
    return labelled_grid([images], [label_of(value) for value in values])


def label_of(value: Any) -> str:
    """Short enough for a column."""
    if isinstance(value, Mapping):
        name, own = next(iter(value.items()))
        return f"{name}: {own!r}" if isinstance(own, str) else f"{name}: {'left' if own[0, 0] else 'right'}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value)


def page() -> str:
    """fields.md."""
    told, parts = descriptions(), ["# Every field, and what it changes", ""]
    parts += [
        "Fields of `CMLoRAConfig`, which `cmlora.accelerate` takes one by one, too. Pictures: the shipped model's, "
        f"of three LoRAs in {STEPS} steps, all of a row from the same noise (`python -m cmlora.lab.fields csrc_docs`).",
        "",
    ]
    for field in fields(CMLoRAConfig):
        parts += [f"## {field.name}", "", told[field.name], "", f"Default: `{field.default!r}`."]
        if field.name in CHANGES:
            base = ", ".join(f"{name}={value!r}" for name, value in CHANGES[field.name][0].items())
            parts += [f"Below with `{base}`."] if base else []
            parts += ["", f"![{field.name}](images/fields/{field.name}.png)", ""]
        else:
            parts += ["The picture stays the same, but for its last bits.", ""]
    return "\n".join(parts) + "\n"


def write_fields(out: Path, chosen: Sequence[str] = ()) -> Iterator[Path]:
    """Draw the fields chosen, or all of them; yields each file once written."""
    folder = out / "images" / "fields"
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipe(ROLES)
    pipe.set_progress_bar_config(disable=True)
    for field in chosen or CHANGES:
        draw_field(pipe, field).save(folder / f"{field}.png", optimize=True)
        yield folder / f"{field}.png"
    (out / "fields.md").write_text(page())
    yield out / "fields.md"


if __name__ == "__main__":
    leave_out_harmless_messages()
    for written in write_fields(Path(sys.argv[1]), sys.argv[2:]):
        sys.stdout.write(f"wrote {written}\n")
