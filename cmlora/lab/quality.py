"""What `cmlora quality` measures: which way of composing shows all its LoRAs, on the shipped model, by its detector.

One record per picture goes to a JSONL file; a run that was interrupted goes on from there. Half of the combinations
serve to choose settings, the other half to report them.
"""

from __future__ import annotations

import itertools
import json
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

from cmlora.accelerate import accelerated
from cmlora.lab.realism import Realism
from cmlora.lab.rivals import merged_by_peft
from cmlora.lab.settings import Config, own_fields
from cmlora.sprites import ROLES, TROUBLE, draw, lora_path, model_path, role_of
from cmlora.sprites.detector import Detector, load_detector, probabilities
from cmlora_kernels.flops import FLOPS

Half = Literal["choose", "report", "all"]
Pixels = npt.NDArray[np.uint8]
GUIDANCE = 4.0


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
        distance: from what can be drawn at all (`cmlora.lab.realism`); about 1 for a good picture.
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
    distance: float
    seconds: float
    gflop: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a picture the same picture."""
        return self.loras, self.setting, json.dumps(self.config, sort_keys=True), self.seed, self.steps


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
    """Draws and scores: the pipeline with all its LoRAs, the detector, renders, and FLOPs that were counted already."""

    pipe: Any
    detector: Detector
    realism: Realism
    flops: dict[tuple[object, ...], float] = field(default_factory=dict)

    @classmethod
    def load(cls) -> Evaluator:
        """The shipped model, in float32 on the CPU or the GPU."""
        from diffusers import StableDiffusionPipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipe = StableDiffusionPipeline.from_pretrained(model_path(), torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        for name in (*draw.CONCEPTS, *TROUBLE):
            pipe.load_lora_weights(lora_path(name), adapter_name=adapter_name(name))
        detector = load_detector()
        realism = Realism(pipe.vae, detector)
        return cls(pipe.to(device), detector, realism)

    def draw(
        self, loras: tuple[str, ...], setting: str, config: Config, seeds: Sequence[int], steps: int
    ) -> tuple[list[Picture], list[Pixels]]:
        """Pictures of one combination with one setting, one per seed, and their records.

        Where every LoRA is drawn alone, a picture has them side by side, and what a record says is of its own LoRA for
        a concept, and the mean for the rest.
        """
        own_seeds = [seed_of(loras, seed) for seed in seeds]
        scenes = [scene_of(loras, seed) for seed in own_seeds]
        prompts = [draw.captions(scene)[0] for scene in scenes]
        groups = [(name,) for name in loras] if config.get("alone") else [loras]
        began = time.perf_counter()
        drawn = [self._draw(group, setting, config, prompts, steps, own_seeds) for group in groups]
        seconds = (time.perf_counter() - began) / len(seeds)
        sure = np.stack([probabilities(self.detector, pixels) for pixels, _ in drawn])  # [groups, seeds, labels]
        odd = np.mean([self.realism.distance(pixels) for pixels, _ in drawn], axis=0)
        truth = np.concatenate([draw.labels(scene) for scene in scenes]) > 0.5
        rest = truth & ~np.isin(draw.LABELS, loras)
        pictures = []
        for i, (seed, prompt) in enumerate(zip(seeds, prompts, strict=True)):
            of = {name: sure[min(k, len(groups) - 1), i, draw.LABELS.index(name)] for k, name in enumerate(loras)}
            pictures.append(
                Picture(
                    loras=loras,
                    setting=setting,
                    config=config,
                    seed=seed,
                    steps=steps,
                    prompt=prompt,
                    concepts={name: round(float(p), 4) for name, p in of.items()},
                    present=all(p > 0.5 for p in of.values()),
                    named=round(float((sure[:, i, rest[i]] > 0.5).mean()), 4) if rest[i].any() else 1.0,
                    distance=round(float(odd[i]), 3),
                    seconds=round(seconds, 3),
                    gflop=round(sum(flop for _, flop in drawn) / len(seeds), 3),
                )
            )
        return pictures, [np.concatenate([pixels[i] for pixels, _ in drawn], 1) for i in range(len(seeds))]

    def _draw(
        self,
        loras: tuple[str, ...],
        setting: str,
        config: Config,
        prompts: list[str],
        steps: int,
        seeds: Sequence[int],
    ) -> tuple[Pixels, float]:
        """Pictures uint8 [n, 64, 64, 3] with these LoRAs together, and the GFLOP of the UNet for all of them."""
        swap = config.get("swap", "")
        names = [adapter_name(swap if TROUBLE.get(swap) == name else name) for name in loras]
        self.pipe.set_adapters(names, [weight_of(name, config) for name in loras])
        kind = config.get("peft")
        cost = (len(loras), setting, json.dumps(config, sort_keys=True), len(seeds), steps)
        fields = own_fields(config)
        if "shared" in fields:
            fields["shared"] = [
                adapter for adapter, name in zip(names, loras, strict=True) if role_of(name) in fields["shared"]
            ]
        with merged_by_peft(self.pipe, names, kind) if kind else accelerated(self.pipe, **fields):
            if cost in self.flops:
                made = self._call(prompts, steps, seeds)
            else:  # adapters weigh so little that one combination of a size stands for all
                made, self.flops[cost] = self._counted(prompts, steps, seeds)
        return (made * 255 + 0.5).astype(np.uint8), self.flops[cost]

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


def weight_of(lora: str, config: Config) -> float:
    """A setting's factor on a LoRA: one for all, or by role, where roles that are not named have 1."""
    weights = config.get("weights", 1.0)
    return float(weights.get(role_of(lora), 1.0) if isinstance(weights, dict) else weights)


def adapter_name(lora: str) -> str:
    """As people name theirs: by role, so that the split into high and low follows it."""
    return f"{role_of(TROUBLE.get(lora, lora))}_{lora}"


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
    swapped = {TROUBLE[config["swap"]] for config in settings.values() if "swap" in config}
    rows = [[loras for loras in choose_combinations(size, half) if swapped <= set(loras)][:limit] for size in sizes]
    for step in itertools.zip_longest(*rows):
        for loras in step:
            if loras is not None:
                # JSON has no tuples, and a resumed run must find its own records
                yield from ((loras, name, json.loads(json.dumps(config))) for name, config in settings.items())


def picture_name(picture: Picture) -> str:
    """The file of a picture."""
    setting = "".join(c if c.isalnum() or c == "." else "-" for c in picture.setting)
    return f"{'-'.join(picture.loras)}_{setting}_{picture.seed}_{picture.steps}.png"


def _save(image: Pixels, path: Path) -> None:
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
