"""What pictures can be scored by. Each needs a model, some a package; what is missing is said in one line.

Every metric gives numbers by name for a picture, larger is better, and where it can, one per LoRA.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cmlora import sprites
from cmlora.errors import CMLoRAError
from cmlora.lab.score.pictures import Shot


@dataclass(frozen=True)
class Marks:
    """Of one picture. values: by name. loras: of the first of them, per LoRA, where the metric tells LoRAs apart."""

    values: dict[str, float]
    loras: dict[str, float] = field(default_factory=dict)


class Metric(Protocol):
    """A way to score. batch: how many pictures it takes at once."""

    batch: int

    def score(self, shots: Sequence[Shot]) -> list[Marks | None]:
        """One per picture; None: it has no score by this metric."""
        ...


class Detector:
    """The shipped model's own: is every LoRA's concept there? Mean probability, and whether all are above one half."""

    batch = 64

    def __init__(self, model: str, shots: Sequence[Shot]) -> None:
        from cmlora.sprites import detector

        other = sorted({name for shot in shots for name in shot.loras} - set(sprites.CONCEPTS))
        if other:
            raise CMLoRAError(f"metric detector knows the shipped LoRAs alone, got {', '.join(other)}")
        self.detector = detector.load_detector(model or None)
        self.probabilities = detector.probabilities

    def score(self, shots: Sequence[Shot]) -> list[Marks | None]:
        from cmlora.sprites.draw import LABELS

        sure = self.probabilities(self.detector, np.stack([np.asarray(shot.open()) for shot in shots]))
        found: list[Marks | None] = []
        for shot, row in zip(shots, sure, strict=True):
            loras = {name: round(float(row[LABELS.index(name)]), 6) for name in shot.loras}
            values = {"concept": float(np.mean(list(loras.values()))), "present": float(min(loras.values()) > 0.5)}
            found.append(Marks(values, loras))
        return found


class ClipScore:
    """100 x cosine of picture and text, not below 0 (arXiv 2104.08718): all triggers, the prompt, each LoRA's own.

    Texts are cut at the model's length, as torchmetrics does.
    """

    batch = 16

    def __init__(self, model: str, shots: Sequence[Shot]) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        model = model or "openai/clip-vit-base-patch16"
        self.model = _load("clip", model, CLIPModel.from_pretrained).eval()
        self.tokenizer = _load("clip", model, AutoTokenizer.from_pretrained)
        self.pixels = _load("clip", model, AutoImageProcessor.from_pretrained)

    @torch.no_grad()
    def score(self, shots: Sequence[Shot]) -> list[Marks | None]:
        texts: list[str] = []
        for shot in shots:
            own = [", ".join(words) for words in shot.triggers.values()]
            texts += [", ".join(own), shot.prompt, *own]
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        images = self.pixels(images=[shot.open() for shot in shots], return_tensors="pt")["pixel_values"]
        made = self.model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=images)
        image, text = _unit(made.image_embeds), _unit(made.text_embeds)
        found: list[Marks | None] = []
        first = 0
        for shot, own_image in zip(shots, image, strict=True):
            sure = (100 * (text[first : first + 2 + len(shot.triggers)] @ own_image)).clamp(min=0).tolist()
            first += 2 + len(shot.triggers)
            values = {"triggers": sure[0], "prompt": sure[1]}
            found.append(Marks(values, dict(zip(shot.triggers, sure[2:], strict=True))))
        return found


class Similarity:
    """Cosine of a picture's features and those of each LoRA's own solo pictures, mean over these and over the LoRAs.

    A solo picture is compared with the others of its LoRA, so that two seeds give a ceiling.
    """

    batch = 16

    def __init__(self, solo: Sequence[Shot], features: Callable[[Sequence[Shot]], Tensor]) -> None:
        self.features = features
        self.solo: dict[str, list[tuple[str, Tensor]]] = {}
        for shot, row in zip(solo, features(solo), strict=True):
            self.solo.setdefault(shot.loras[0], []).append((shot.file, row))

    def score(self, shots: Sequence[Shot]) -> list[Marks | None]:
        return [self._marks(shot, row) for shot, row in zip(shots, self.features(shots), strict=True)]

    def _marks(self, shot: Shot, row: Tensor) -> Marks | None:
        loras = {}
        for name in shot.loras:
            others = [float(one @ row) for file, one in self.solo.get(name, ()) if file != shot.file]
            if not others:
                return None
            loras[name] = float(np.mean(others))
        return Marks({"similarity": float(np.mean(list(loras.values())))}, loras)


def _solo(name: str, shots: Sequence[Shot]) -> list[Shot]:
    solo = [shot for shot in shots if shot.kind == "solo"]
    if not solo:
        raise CMLoRAError(f"metric {name} needs the LoRAs' solo pictures: `cmlora sweep` draws them")
    return solo


def _clip_image(model: str, shots: Sequence[Shot]) -> Metric:
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    solo = _solo("clip-image", shots)
    model = model or "openai/clip-vit-base-patch16"
    vision = _load("clip-image", model, CLIPVisionModelWithProjection.from_pretrained).eval()
    pixels = _load("clip-image", model, AutoImageProcessor.from_pretrained)
    return Similarity(solo, _features(pixels, lambda x: vision(pixel_values=x).image_embeds))


def _dino(model: str, shots: Sequence[Shot]) -> Metric:
    from transformers import AutoImageProcessor, AutoModel

    solo = _solo("dino", shots)
    model = model or "facebook/dinov2-base"
    vision = _load("dino", model, AutoModel.from_pretrained).eval()
    pixels = _load("dino", model, AutoImageProcessor.from_pretrained)
    return Similarity(solo, _features(pixels, lambda x: vision(pixel_values=x).last_hidden_state[:, 0]))


def _features(pixels: Any, embed: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Shot]], Tensor]:
    @torch.no_grad()
    def features(shots: Sequence[Shot]) -> Tensor:
        parts = [shots[i : i + 16] for i in range(0, len(shots), 16)]
        images = ([shot.open() for shot in part] for part in parts)
        return torch.cat([_unit(embed(pixels(images=part, return_tensors="pt")["pixel_values"])) for part in images])

    return features


class ImageReward:
    """A learned preference (arXiv 2304.05977) of the whole prompt, by the package image-reward."""

    batch = 1

    def __init__(self, model: str, shots: Sequence[Shot]) -> None:
        package = _package("imagereward", "ImageReward", "image-reward")
        self.model = _load("imagereward", model or "ImageReward-v1.0", package.load, CHECKPOINT)

    def score(self, shots: Sequence[Shot]) -> list[Marks | None]:
        with torch.no_grad():
            return [Marks({"reward": float(self.model.score(shot.prompt, str(shot.path)))}) for shot in shots]


class HpsV2:
    """A learned preference (arXiv 2306.09341) of the whole prompt, by the package hpsv2."""

    batch = 1

    def __init__(self, model: str, shots: Sequence[Shot]) -> None:
        self.package = _package("hpsv2", "hpsv2.img_score", "hpsv2")
        self.model = model or "v2.1"
        self.given = {"cp": self.model} if Path(self.model).is_file() else {"hps_version": self.model}

    def score(self, shots: Sequence[Shot]) -> list[Marks | None]:
        return [Marks({"preference": self._one(shot)}) for shot in shots]

    def _one(self, shot: Shot) -> float:
        def preference(_: str) -> float:  # the package reads its weights anew with every picture
            return float(self.package.score(str(shot.path), shot.prompt, **self.given)[0])

        return float(_load("hpsv2", self.model, preference, CHECKPOINT))


CHECKPOINT = "FILE, a checkpoint of its own, or the name of one while online"

METRICS: dict[str, Callable[[str, Sequence[Shot]], Metric]] = {
    "detector": Detector,
    "clip": ClipScore,
    "clip-image": _clip_image,
    "dino": _dino,
    "imagereward": ImageReward,
    "hpsv2": HpsV2,
}
"""Name -> made of a model (folder or hub id; "": the usual one) and all pictures."""


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)


def _package(metric: str, module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # packages of others raise anything where a version is not the one that they know
        absent = isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0])
        wrong = f"needs the package {package}: pip install {package}" if absent else f"cannot import its {package}"
        raise CMLoRAError(f"metric {metric} {wrong} ({_reason(error)})") from error


def _load(metric: str, model: str, load: Callable[[str], Any], place: str = "FOLDER, or a hub id while online") -> Any:
    try:
        return load(model)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CMLoRAError(
            f"metric {metric}: model {model!r} cannot be loaded; give --metric {metric}={place} ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
