"""What `cmlora quality` measures: which way of composing shows all its LoRAs, on the shipped model, by its detector.

One record per picture goes to a JSONL file; a run that was interrupted goes on from there. Half of the combinations
serve to choose settings, the other half to report them.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cmlora.accelerate import accelerate, restore
from cmlora.config import CMLoRAConfig
from cmlora.sprites import ROLES, draw, lora_path, model_path, role_of
from cmlora.sprites.detector import Detector, load_detector, probabilities
from cmlora_kernels.flops import FLOPS

Half = Literal["choose", "report", "all"]
Config = dict[str, Any]

GUIDANCE = 4.0

COMPOSED: dict[str, Config] = {
    f"{name}, {combine}": {**config, "combine": combine}
    for name, config in {
        "composite": {"method": "composite"},
        **{f"cmlora {part}": {"method": "cmlora", "partition": part} for part in ("offline", "online", "async")},
    }.items()
    for combine in ("mean", "deviation")
}
SETTINGS: dict[str, Config] = {"merge": {"method": "merge"}, "switch": {"method": "switch"}, **COMPOSED}
"""What is compared: name -> fields of CMLoRAConfig; a field that is not named has its default."""

FRONTIER: dict[str, Config] = {
    **{f"merge, interval {k}": {"method": "merge", "cache_interval": k} for k in (1, 2, 3, 5)},
    **{f"mean, interval {k}": {"combine": "mean", "cache_interval": k} for k in (1, 2)},
    "composite deviation, interval 2": {"method": "composite", "combine": "deviation", "cache_interval": 2},
    **{
        f"deviation, interval {k}, branch {branch[0]}.{branch[1]}": {
            "combine": "deviation",
            "cache_interval": k,
            "cache_branch": branch,
        }
        for k in (1, 2, 3, 5, "nonuniform")
        for branch in ((0, 0), (0, 1), (1, 0))
        if k != 1 or branch == (0, 1)
    },
}
"""Quality against cost. "mean, interval 2" is the published code's default; without a cache there is no branch."""

SEARCH: dict[str, Config] = {
    "defaults": {"combine": "deviation"},
    "features stay": {"combine": "deviation", "cache_follow": False},
    "max_cache_age 4": {"combine": "deviation", "max_cache_age": 4},
    "dominant_weight 1": {"combine": "deviation", "dominant_weight": 1.0},
    "dominant_decay 0": {"combine": "deviation", "dominant_decay": 0.0},
    "late_stage low": {"combine": "deviation", "late_stage": "low"},
    "online_gate 0": {"combine": "deviation", "online_gate": 0.0},
    "online_gate 0.6": {"combine": "deviation", "online_gate": 0.6},
    "offline": {"combine": "deviation", "partition": "offline"},
    "async": {"combine": "deviation", "partition": "async"},
}
"""One field at a time away from the defaults."""

PLACES: dict[str, Config] = {
    "merge": {"method": "merge"},
    "routed": {"method": "routed"},
    "composite, deviation": {"method": "composite", "combine": "deviation"},
    "composite, local": {"method": "composite", "combine": "local"},
}
"""Each LoRA where it belongs, against the same without places."""

MASKS: dict[str, Config] = {
    "merge": {"method": "merge"},
    **{f"routed, temperature {tau}": {"method": "routed", "mask_temperature": tau} for tau in (0.3, 0.6, 1.0)},
    "routed, 1 mask step": {"method": "routed", "mask_steps": 1},
    "routed, 3 mask steps": {"method": "routed", "mask_steps": 3},
    **{
        f"local, temperature {tau}": {"method": "composite", "combine": "local", "mask_temperature": tau}
        for tau in (0.25, 0.5, 1.0)
    },
}
"""What the masks' defaults were chosen from."""

PRESETS = {"methods": SETTINGS, "frontier": FRONTIER, "search": SEARCH, "places": PLACES, "masks": MASKS}
DEFAULTS = ("cmlora online, deviation", "deviation, interval 2, branch 0.1", "defaults")
"""What gains are measured against in the presets: cmlora with deviations, the default before there were masks."""


@dataclass(frozen=True)
class Picture:
    """One picture and what the detector found.

    Attributes:
        loras: the combination, in the order of ROLES.
        setting: a name of the settings compared; config: its fields.
        seed: number of the picture of this combination and setting (`seed_of`). steps: denoising steps.
        prompt: the trigger words and words that the base model knows.
        concepts: probability of each of the LoRAs' concepts.
        present: whether all of them are above one half.
        named: share of the prompt's other words that the detector found.
        seconds: wall time of the pipeline's call, over its pictures; the first call of a setting and size is counted,
            too, and takes longer. gflop: of the UNet, per picture.
    """

    loras: tuple[str, ...]
    setting: str
    config: Config
    seed: int
    steps: int
    prompt: str
    concepts: dict[str, float]
    present: bool
    named: float
    seconds: float
    gflop: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a picture the same picture."""
        return self.loras, self.setting, json.dumps(self.config, sort_keys=True), self.seed, self.steps


def parse_setting(text: str) -> tuple[str, Config]:
    """NAME:field=value,... as a name and fields of CMLoRAConfig; a value is a Python literal, else a string.

    Raises:
        ValueError: names the text.
        ConfigError: a field or value that CMLoRAConfig refuses.
    """
    name, _, fields = text.partition(":")
    pairs = [pair.partition("=") for pair in re.split(r",(?![^(]*\))", fields) if pair]
    if not name or not all(equals for _, equals, _ in pairs):
        raise ValueError(f"a setting must read NAME:field=value,..., got {text!r}")
    config = {key: _literal(value) for key, _, value in pairs}
    CMLoRAConfig.build(None, config)
    return name, config


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def combinations(size: int) -> list[tuple[str, ...]]:
    """All sets of `size` LoRAs with one character and distinct roles, in the order of ROLES."""
    others = [role for role in ROLES if role != "character"]
    found = []
    for roles in itertools.combinations(others, size - 1):
        found += list(itertools.product(ROLES["character"], *(ROLES[role] for role in roles)))
    return found


def choose_combinations(size: int, half: Half, limit: int | None = None) -> list[tuple[str, ...]]:
    """Every other combination of a fixed shuffle: "choose" the even ones, "report" the odd ones; at most `limit`."""
    everything = combinations(size)
    shuffled = [everything[i] for i in np.random.default_rng(size).permutation(len(everything))]
    start = {"choose": slice(0, None, 2), "report": slice(1, None, 2), "all": slice(None)}[half]
    return shuffled[start][:limit]


def seed_of(loras: Sequence[str], seed: int) -> int:
    """Of scene and latents: another one for every combination, the same for all settings."""
    return zlib.crc32(f"{' '.join(loras)} {seed}".encode())


def scene_of(loras: Sequence[str], seed: int) -> draw.Scenes:
    """A scene [1] with the LoRAs' concepts; what they leave open is drawn at random."""
    scene = draw.sample(1, seed=seed)
    for name in loras:
        scene = scene.with_concept(name)
    return scene


@dataclass
class Evaluator:
    """Draws and scores: the pipeline with all ten LoRAs, the detector, and the FLOPs that were counted already."""

    pipe: Any
    detector: Detector
    flops: dict[tuple[object, ...], float] = field(default_factory=dict)

    @classmethod
    def load(cls) -> Evaluator:
        """The shipped model, in float32 on the CPU or the GPU."""
        from diffusers import StableDiffusionPipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipe = StableDiffusionPipeline.from_pretrained(model_path(), torch_dtype=torch.float32).to(device)
        pipe.set_progress_bar_config(disable=True)
        for name in draw.CONCEPTS:
            pipe.load_lora_weights(lora_path(name), adapter_name=adapter_name(name))
        return cls(pipe, load_detector())

    def draw(
        self, loras: tuple[str, ...], setting: str, config: Config, seeds: Sequence[int], steps: int
    ) -> tuple[list[Picture], npt.NDArray[np.uint8]]:
        """Pictures of one combination with one setting, one per seed, and their records."""
        own_seeds = [seed_of(loras, seed) for seed in seeds]
        scenes = [scene_of(loras, seed) for seed in own_seeds]
        prompts = [draw.captions(scene)[0] for scene in scenes]
        self.pipe.set_adapters([adapter_name(name) for name in loras])
        accelerate(self.pipe, **config)
        cost = (len(loras), setting, json.dumps(config, sort_keys=True), len(seeds), steps)
        began = time.perf_counter()
        if cost in self.flops:
            made = self._call(prompts, steps, own_seeds)
        else:  # adapters weigh so little that one combination of a size stands for all
            made, self.flops[cost] = self._counted(prompts, steps, own_seeds)
        seconds = (time.perf_counter() - began) / len(seeds)
        restore(self.pipe)
        pixels = (made * 255 + 0.5).astype(np.uint8)
        sure = probabilities(self.detector, pixels)
        truth = np.concatenate([draw.labels(scene) for scene in scenes]) > 0.5
        own = np.isin(draw.LABELS, loras)
        pictures = [
            Picture(
                loras=loras,
                setting=setting,
                config=config,
                seed=seed,
                steps=steps,
                prompt=prompt,
                concepts={name: round(float(row[draw.LABELS.index(name)]), 4) for name in loras},
                present=bool((row[own] > 0.5).all()),
                named=round(float((row[true & ~own] > 0.5).mean()), 4) if (true & ~own).any() else 1.0,
                seconds=round(seconds, 3),
                gflop=round(self.flops[cost] / len(seeds), 3),
            )
            for seed, prompt, row, true in zip(seeds, prompts, sure, truth, strict=True)
        ]
        return pictures, pixels

    def _call(self, prompts: list[str], steps: int, seeds: Sequence[int]) -> npt.NDArray[np.float32]:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        images: npt.NDArray[np.float32] = self.pipe(
            prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=noise, output_type="np"
        ).images
        return images

    def _counted(self, prompts: list[str], steps: int, seeds: Sequence[int]) -> tuple[npt.NDArray[np.float32], float]:
        """The pictures, and the GFLOP of the UNet."""
        original, total = self.pipe.unet.forward, 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
                made = original(*args, **kwargs)
            total += counter.get_total_flops()
            return made

        self.pipe.unet.forward = counted
        try:
            made = self._call(prompts, steps, seeds)
        finally:
            self.pipe.unet.forward = original
        return made, total / 1e9


def adapter_name(concept: str) -> str:
    """As people name theirs: by role, so that the split into high and low follows it."""
    return f"{role_of(concept)}_{concept}"


def read(path: Path) -> list[Picture]:
    """The records of a JSONL file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append(Picture(**{**values, "loras": tuple(values["loras"])}))
    return found


def run(
    out: Path,
    settings: Mapping[str, Config],
    sizes: Sequence[int] = (2, 3, 4, 5),
    half: Half = "report",
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    limit: int | None = None,
) -> list[Picture]:
    """Draw and score what is not yet in out/quality.jsonl; pictures go to out/pictures.

    Args:
        out: folder of the results; made if absent.
        settings: name -> fields of CMLoRAConfig.
        sizes: numbers of LoRAs. half: of the combinations. seeds: pictures per combination and setting.
        steps: denoising steps. limit: at most so many combinations of a size.

    Returns:
        The records of all pictures asked for, those drawn earlier included.
    """
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    known = {picture.key: picture for picture in read(out / "quality.jsonl")}
    asked = list(_jobs(settings, sizes, half, limit))
    found: list[Picture] = []
    evaluator = None
    with (out / "quality.jsonl").open("a") as log:
        for loras, setting, config in tqdm(asked, desc="quality", mininterval=5.0):
            text = json.dumps(config, sort_keys=True)
            keys = [(loras, setting, text, seed, steps) for seed in seeds]
            if all(key in known for key in keys):
                found += [known[key] for key in keys]
                continue
            evaluator = evaluator or Evaluator.load()
            pictures, pixels = evaluator.draw(loras, setting, config, seeds, steps)
            found += pictures
            for picture, image in zip(pictures, pixels, strict=True):
                log.write(json.dumps(asdict(picture)) + "\n")
                _save(image, out / "pictures" / picture_name(picture))
            log.flush()
    return found


def _jobs(
    settings: Mapping[str, Config], sizes: Sequence[int], half: Half, limit: int | None
) -> Iterator[tuple[tuple[str, ...], str, Config]]:
    """Combination after combination, so that an interrupted run has all settings of those that it got to."""
    rows = [choose_combinations(size, half, limit) for size in sizes]
    for step in itertools.zip_longest(*rows):
        for loras in step:
            if loras is not None:
                # JSON has no tuples, and a resumed run must find its own records
                yield from ((loras, name, json.loads(json.dumps(config))) for name, config in settings.items())


def picture_name(picture: Picture) -> str:
    """The file of a picture."""
    setting = "".join(c if c.isalnum() or c == "." else "-" for c in picture.setting)
    return f"{'-'.join(picture.loras)}_{setting}_{picture.seed}_{picture.steps}.png"


def _save(image: npt.NDArray[np.uint8], path: Path) -> None:
    from PIL import Image

    Image.fromarray(image).save(path)


def detector_report(count: int = 400, captions: int = 64) -> str:
    """Markdown: how often the detector itself is right, on renders, through the VAE, on blends and on base pictures."""
    from cmlora.sprites import measure

    evaluator = Evaluator.load()
    evaluator.pipe.unload_lora_weights()
    rows = measure.detector_accuracy(evaluator.pipe, evaluator.detector, count)
    scenes = measure.unseen(captions)
    pictures = measure.generate(evaluator.pipe, draw.captions(scenes), seed=1000)
    rows["base model, against its captions"] = measure.accuracy(evaluator.detector, pictures, draw.labels(scenes))
    names = ("labels", "true_found", "false_refused")
    text = ["| pictures | labels right | true labels found | false labels refused |", "|---|---|---|---|"]
    text += [f"| {kind} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |" for kind, row in rows.items()]
    return "\n".join(text)
