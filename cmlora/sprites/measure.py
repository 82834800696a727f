"""What the model card states: the VAE's fidelity, the detector's accuracy, base prompts and every LoRA alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from tqdm import tqdm

from cmlora.accelerate import accelerated
from cmlora.sprites import TROUBLE, draw
from cmlora.sprites.detector import (
    Detector,
    blend_targets,
    detect,
    load_detector,
    partner,
    probabilities,
)

Pixels = npt.NDArray[np.uint8]

STEPS, GUIDANCE = 25, 4.0

LORA_WEIGHTS = (0.5, 0.7, 1.0, 1.3)
BOUNDS = (
    ("concept", "0.5", 0.5),
    ("concept", "0.7", 0.85),
    ("concept", "1.0", 0.95),
    ("concept", "1.3", 0.9),
    ("rest", "1.0", 0.9),
    ("rest", "1.3", 0.8),
)
"""What a LoRA that behaves keeps: at least so much at a weight; and at most `MOST_WITHOUT` without its word."""
MOST_WITHOUT = 0.3


def generate(pipe: StableDiffusionPipeline, captions: list[str], seed: int, batch: int = 20) -> Pixels:
    """One picture per caption, uint8 [n, 64, 64, 3]; picture i has the noise of seed + i whatever the batch."""
    pictures = []
    for i in tqdm(range(0, len(captions), batch), desc="generate", leave=False):
        part = captions[i : i + batch]
        noise = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
        made = pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise, output_type="np")
        pictures.append((made.images * 255 + 0.5).astype(np.uint8))
    return np.concatenate(pictures)


@torch.no_grad()
def through_vae(
    vae: Any,
    first: Pixels,
    second: Pixels | None = None,
    share: Any = None,
    between: Callable[[torch.Tensor], torch.Tensor] = lambda z: z,
) -> Pixels:
    """Pictures encoded and decoded; given a second batch, latents blended in between, share [n] of the first.

    between: what else happens to latents [n, 4, 16, 16].
    """
    made = []
    for i in range(0, len(first), 64):
        z = vae.encode(_input(first[i : i + 64])).latent_dist.mean
        if second is not None:
            s = share[i : i + 64, None, None, None]
            z = s * z + (1 - s) * vae.encode(_input(second[i : i + 64])).latent_dist.mean
        made.append(((vae.decode(between(z)).sample.clamp(-1, 1) + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(made)


def _input(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal to noise ratio in dB over the whole batch."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)))


def accuracy(detector: Detector, pictures: Pixels, truth: Any, counts: Any = None) -> dict[str, float]:
    """Share of labels answered rightly, of true ones found, of false ones refused, of pictures without an error."""
    found = probabilities(detector, pictures) > 0.5
    truth = np.asarray(truth) > 0.5
    asked = np.ones_like(truth) if counts is None else np.asarray(counts) > 0.5
    right = (found == truth) | ~asked
    return {
        "labels": _share(right[asked]),
        "true_found": _share(right[asked & truth]),
        "false_refused": _share(right[asked & ~truth]),
        "pictures": _share(right.all(1)),
    }


def _share(values: Any) -> float:
    return round(float(np.mean(values)), 4)


def unseen(count: int) -> draw.Scenes:
    """Scenes of `count` different captions from the combinations that training never used (there are about 200)."""
    pool = draw.sample(4000, seed=101, held_back=True)
    _, first = np.unique(draw.captions(pool), return_index=True)
    return pool[np.random.default_rng(0).permutation(first)[:count]]


def detector_accuracy(pipe: StableDiffusionPipeline, detector: Detector, count: int = 1000) -> dict[str, Any]:
    """On fresh renders, renders through the VAE, and blends of two pictures and of two latents."""
    scenes = draw.sample(count, seed=102, concepts=0.35)
    others = partner(scenes, seed=103, concepts=0.35)
    first, second = draw.render(scenes), draw.render(others)
    share = torch.from_numpy(np.random.default_rng(104).uniform(0.15, 0.85, count)).float()
    truth = torch.from_numpy(draw.labels(scenes))
    target, counts = blend_targets(truth, torch.from_numpy(draw.labels(others)), share)
    s = share.numpy()[:, None, None, None]
    blended = (s * first + (1 - s) * second + 0.5).astype(np.uint8)
    return {
        "renders": accuracy(detector, first, truth),
        "decoded renders": accuracy(detector, through_vae(pipe.vae, first), truth),
        "blends": accuracy(detector, blended, target, counts),
        "decoded blends": accuracy(detector, through_vae(pipe.vae, first, second, share), target, counts),
    }


def base_prompts(pipe: StableDiffusionPipeline, detector: Detector, work: Path, count: int = 200) -> dict[str, Any]:
    """Pictures of unseen captions. One is right if the detector finds all that its caption names and nothing else."""
    scenes = unseen(count)
    captions = draw.captions(scenes)
    pictures = generate(pipe, captions, seed=1000)
    sheet(pictures[:32], captions[:32], detect(detector, pictures[:32]), work / "base.png")
    return {"captions": len(captions), **accuracy(detector, pictures, draw.labels(scenes))}


def lora_alone(pipe: Any, detector: Detector, name: str, path: Path, work: Path, count: int = 100) -> dict[str, Any]:
    """How a LoRA behaves on unseen captions: at several weights, and without its word at weight 1.

    Returns:
        concept and rest by weight: how often the concept is found, and the share found of all else that the captions
        name; "decoded": of that rest, what is found in renders of the captions that the VAE has decoded, the most that
        a LoRA can keep; "without its word": how often the concept is found then. `misses`: which of `BOUNDS` it does
        not keep.
    """
    concept = TROUBLE.get(name, name)
    scenes = unseen(count).with_concept(concept)
    truth, own = draw.labels(scenes) > 0.5, draw.LABELS.index(concept)
    rest = truth.copy()
    rest[:, own] = False
    pipe.load_lora_weights(path, adapter_name=name)
    result: dict[str, Any] = {"concept": {}, "rest": {}}
    result["decoded"] = rest_of_renders(pipe, detector, name, count)
    for weight in LORA_WEIGHTS:
        captions = draw.captions(scenes)
        pictures, found = _with_lora(pipe, detector, name, weight, captions)
        result["concept"][str(weight)] = _share(found[:, own])
        result["rest"][str(weight)] = _share(found[rest])
        if weight == 1.0:
            sheet(pictures[:16], captions[:16], detect(detector, pictures[:16]), work / f"lora_{path.stem}.png")
    silent = draw.captions(scenes, without=draw.role_of(concept))
    result["without its word"] = _share(_with_lora(pipe, detector, name, 1.0, silent)[1][:, own])
    pipe.unload_lora_weights()
    result["misses"] = [f"{what} at {weight}" for what, weight, least in BOUNDS if result[what][weight] < least]
    result["misses"] += ["without its word"] if result["without its word"] > MOST_WITHOUT else []
    return result


def rest_of_renders(pipe: Any, detector: Detector, name: str, count: int) -> float:
    """Share found of all that captions name beside a LoRA's concept, in their renders through the VAE."""
    concept = TROUBLE.get(name, name)
    scenes = unseen(count).with_concept(concept)
    rest = draw.labels(scenes) > 0.5
    rest[:, draw.LABELS.index(concept)] = False
    decoded = through_vae(pipe.vae, draw.render(scenes))
    return _share((probabilities(detector, decoded) > 0.5)[rest])


def _with_lora(pipe: Any, detector: Detector, name: str, weight: float, captions: list[str]) -> tuple[Pixels, Any]:
    """Pictures with a LoRA at a weight, and which labels are found in them, bool [n, labels]."""
    pipe.set_adapters([name], [weight])
    with accelerated(pipe, method="merge", cache_interval=1):  # the plain pipeline's pictures, in half of the time
        pictures = generate(pipe, captions, seed=2000)
    return pictures, probabilities(detector, pictures) > 0.5


def everything(out: Path, work: Path, captions: int = 100) -> dict[str, Any]:
    """All figures, also in work/measured.json; sheets of pictures with the detector's verdicts go to work.

    captions: that every LoRA is measured on.
    """
    pipe = StableDiffusionPipeline.from_pretrained(out / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    detector = load_detector(out / "detector.safetensors")
    renders = draw.render(draw.sample(1000, seed=105, concepts=0.3))
    result: dict[str, Any] = {
        "megabytes": round(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6, 2),
        "vae_psnr_db": round(psnr(renders, through_vae(pipe.vae, renders)), 2),
        "detector": detector_accuracy(pipe, detector),
        "base": base_prompts(pipe, detector, work),
        "captions": captions,
        "lora": {},
    }
    for name in (*draw.CONCEPTS, *TROUBLE):
        path = out / "lora" / f"{name}.safetensors"
        if path.exists():
            result["lora"][name] = lora_alone(pipe, detector, name, path, work, captions)
    (work / "measured.json").write_text(json.dumps(result, indent=1) + "\n")
    curves(result, work / "loras.png")
    return result


def curves(result: dict[str, Any], path: Path) -> None:
    """Plot every LoRA's concept and the rest of the caption against its weight, and the least that is asked for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, (name, row) in zip(
        figure.subplots(2, 6, sharex=True, sharey=True).flat, result["lora"].items(), strict=False
    ):
        for what, colour in (("concept", "tab:blue"), ("rest", "tab:orange")):
            axes.plot(LORA_WEIGHTS, list(row[what].values()), "o-", color=colour, label=what)
            asked = [(float(weight), least) for of, weight, least in BOUNDS if of == what]
            axes.plot(*zip(*asked, strict=True), "_", color=colour, markersize=14)
        axes.plot([1.0], [row["without its word"]], "x", color="tab:red", label="without its word")
        axes.set_title(name, fontsize=9)
        axes.set_ylim(-0.03, 1.03)
    figure.supxlabel("weight of the LoRA")
    figure.axes[0].legend(fontsize=7, loc="center left")
    figure.savefig(path, dpi=110)


def markdown(result: dict[str, Any]) -> str:
    """The figures of `everything` as the model card shows them."""
    columns = {
        "labels": "labels right",
        "true_found": "true labels found",
        "false_refused": "false labels refused",
        "pictures": "pictures without any error",
    }
    base = {f"base model, against its {result['base']['captions']} captions": result["base"]}
    lines = [
        f"{result['megabytes']} MB; VAE: {result['vae_psnr_db']} dB PSNR on 1000 renders, concepts included.",
        "",
        f"| pictures | {' | '.join(columns.values())} |",
        "|---|" + "---|" * len(columns),
        *(
            f"| {kind} | " + " | ".join(f"{row[name]:.4f}" for name in columns) + " |"
            for kind, row in (result["detector"] | base).items()
        ),
        "",
        f"| LoRA alone, {result['captions']} captions | {' | '.join(f'concept at {w}' for w in LORA_WEIGHTS)} "
        "| rest at 1.0 | rest at 1.3 | rest, decoded renders | without its word | bounds missed |",
        "|---|" + "---|" * (len(LORA_WEIGHTS) + 5),
        *(_lora_row(name, row) for name, row in result["lora"].items()),
    ]
    return "\n".join(lines)


def _lora_row(name: str, row: dict[str, Any]) -> str:
    concept = " | ".join(f"{row['concept'][str(weight)]:.2f}" for weight in LORA_WEIGHTS)
    rest = f"{row['rest']['1.0']:.2f} | {row['rest']['1.3']:.2f} | {row['decoded']:.2f}"
    label = f"{name} ({TROUBLE[name]}; makes trouble on purpose)" if name in TROUBLE else name
    return f"| {label} | {concept} | {rest} | {row['without its word']:.2f} | {', '.join(row['misses'])} |"


def sheet(pictures: Pixels, captions: list[str], found: list[set[str]], path: Path, columns: int = 4) -> None:
    """Pictures, each with its caption and what the detector found, for people to check."""
    wide, high = 330, 140
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * wide, rows * high), "white")
    pen = ImageDraw.Draw(page)
    for i, picture in enumerate(pictures):
        left, top = i % columns * wide, i // columns * high
        page.paste(Image.fromarray(picture).resize((128, 128), Image.Resampling.NEAREST), (left, top))
        lines = [*captions[i].split(", "), "", *(label for label in draw.LABELS if label in found[i])]
        pen.multiline_text((left + 134, top), "\n".join(lines), fill="black", spacing=0, font_size=10)
    page.save(path)
