"""The report of `cmlora quality`: tables with bootstrap intervals, and a sheet of pictures to check by eye."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cmlora.lab.markdown import header, row
from cmlora.lab.pictures import labelled_grid
from cmlora.lab.quality import Picture, picture_name
from cmlora.sprites import draw, role_of
from cmlora.sprites.measure import sheet

RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """How one setting did with one number of LoRAs, or with all numbers together (size 0).

    Attributes:
        present: share of pictures with all concepts: mean and 95 % bootstrap interval.
        concept: probability of a concept, mean over a picture's: the same.
        named: share of the prompt's other words that were found: the same.
        distance: from what can be drawn at all, mean; about 1 is good (`cmlora.lab.realism`).
        seconds: median per picture. gflop: mean per picture.
    """

    setting: str
    size: int
    present: tuple[float, float, float]
    concept: tuple[float, float, float]
    named: tuple[float, float, float]
    distance: float
    seconds: float
    gflop: float

    @classmethod
    def of(cls, setting: str, size: int, pictures: Sequence[Picture]) -> Score:
        return cls(
            setting=setting,
            size=size,
            present=mean_with_interval([p.present for p in pictures]),
            concept=mean_with_interval([score_of(p) for p in pictures]),
            named=mean_with_interval([p.named for p in pictures]),
            distance=float(np.mean([p.distance for p in pictures])),
            seconds=float(np.median([p.seconds for p in pictures])),
            gflop=float(np.mean([p.gflop for p in pictures])),
        )


def score_of(picture: Picture) -> float:
    """Probability of a concept, mean over those of the picture."""
    return float(np.mean(list(picture.concepts.values())))


def mean_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % percentile bootstrap interval (2000 resamples, seed 0)."""
    x = np.sort(np.asarray(values, dtype=np.float64))  # whatever the order of the records
    means = x[np.random.default_rng(0).integers(0, len(x), (RESAMPLES, len(x)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(x.mean()), float(low), float(high)


def settings_of(pictures: Sequence[Picture]) -> list[str]:
    """In the order of their first picture."""
    return list(dict.fromkeys(p.setting for p in pictures))


def scores_by_size(pictures: Sequence[Picture]) -> list[Score]:
    """One per setting and number of LoRAs."""
    found = []
    for setting in settings_of(pictures):
        for size in sorted({len(p.loras) for p in pictures}):
            chosen = [p for p in pictures if len(p.loras) == size and p.setting == setting]
            found += [Score.of(setting, size, chosen)] if chosen else []
    return found


def scores_over_sizes(pictures: Sequence[Picture]) -> list[Score]:
    """One per setting, over all numbers of LoRAs, cheapest first."""
    found = [Score.of(name, 0, [p for p in pictures if p.setting == name]) for name in settings_of(pictures)]
    return sorted(found, key=lambda score: score.gflop)


def frontier(points: Sequence[Score]) -> list[Score]:
    """Of points in order of cost: those that score higher than every cheaper one."""
    found: list[Score] = []
    for point in points:
        if not found or point.concept[0] > found[-1].concept[0]:
            found.append(point)
    return found


def named_of(picture: Picture) -> float:
    """Share of the prompt's other words that the detector found."""
    return picture.named


def gain(
    pictures: Sequence[Picture], setting: str, reference: str, value: Callable[[Picture], float] = score_of
) -> tuple[float, float, float] | None:
    """How much higher a setting's concept score, or another value, is than the reference's: mean and interval.

    Compared are pictures of the same combination and noise, so that the spread between combinations falls out. None
    where the two share no picture.
    """
    scores = {(p.setting, p.loras, p.seed): value(p) for p in pictures}
    pairs = [
        (score, scores[reference, loras, seed])
        for (name, loras, seed), score in scores.items()
        if name == setting and (reference, loras, seed) in scores
    ]
    return mean_with_interval([a - b for a, b in pairs]) if pairs else None


def concepts_table(pictures: Sequence[Picture]) -> str:
    """Markdown: per setting the share of pictures in which each LoRA's concept is found; backgrounds by their company.

    A style wants the places of a background, so that one stands for how two LoRAs share a place.
    """
    names = [name for name in draw.CONCEPTS if any(name in p.loras for p in pictures)]
    styled = {"backgrounds without a style": False, "backgrounds with one": True}
    lines = list(header("setting", *names, *styled))
    for setting in settings_of(pictures):
        chosen = [p for p in pictures if p.setting == setting]
        found = {name: [p.concepts[name] > 0.5 for p in chosen if name in p.loras] for name in names}
        for column, wanted in styled.items():
            of = [p for p in chosen if wanted == any(role_of(name) == "style" for name in p.loras)]
            found[column] = [p.concepts[n] > 0.5 for p in of for n in p.loras if role_of(n) == "background"]
        lines.append(row(setting, *(f"{np.mean(values):.2f}" if values else "" for values in found.values())))
    return "\n".join(lines)


def table(pictures: Sequence[Picture], ceiling: str = "each alone") -> str:
    """Markdown: a row per setting; all-present rate per number of LoRAs, then scores and cost over all of them.

    With the setting `ceiling` among them, the share of its concept score that the others reach stands beside theirs.
    """
    sizes = sorted({len(p.loras) for p in pictures})
    head = ["setting", *(f"all of {size}" for size in sizes), "concept score", "of the ceiling", "rest kept"]
    together = {score.setting: score for score in scores_over_sizes(pictures)}
    by_size = {(score.setting, score.size): f"{score.present[0]:.2f}" for score in scores_by_size(pictures)}
    best = together.get(ceiling)
    lines = list(header(*head, "distance", "GFLOP per image", "seconds"))
    for name in settings_of(pictures):
        score = together[name]
        cells = [by_size.get((name, size), "") for size in sizes]
        share = "" if best is None else f"{score.concept[0] / best.concept[0]:.2f}"
        cells += [_interval(score.concept), share, _interval(score.named), f"{score.distance:.2f}"]
        lines.append(row(name, *cells, f"{score.gflop:.1f}", f"{score.seconds:.2f}"))
    return "\n".join(lines)


def gains_table(pictures: Sequence[Picture], setting: str) -> str:
    """Markdown: how much higher `setting` is than each other setting, in all pictures and per number of LoRAs.

    Compared are concept score and rest kept.
    """
    sizes = sorted({len(p.loras) for p in pictures})
    values = (("concept", score_of), ("rest", named_of))
    groups = [("all", pictures), *((f"{size} LoRAs", [p for p in pictures if len(p.loras) == size]) for size in sizes)]
    lines = list(header(f"{setting} against", *(f"{what}, {name}" for what, _ in values for name, _ in groups)))
    for other in settings_of(pictures):
        if other == setting:
            continue
        cells = []
        for _, value in values:
            for _, chosen in groups:
                more = gain(chosen, setting, other, value)
                cells.append("" if more is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*more))
        lines.append(row(other, *cells))
    return "\n".join(lines)


def cost_table(pictures: Sequence[Picture], reference: str = "") -> str:
    """Markdown: a row per setting, cheapest first, with its gain over the reference.

    Without a name the reference is the setting called defaults, or else merge, or else the first one.
    On the frontier are settings that score higher than every cheaper one.
    """
    points = scores_over_sizes(pictures)
    ahead = {score.setting for score in frontier(points)}
    settings = settings_of(pictures)
    reference = reference or next((name for name in ("defaults", "merge") if name in settings), settings[0])
    head = ["setting", "GFLOP per image", "seconds per image", "concept score", f"gain over {reference}"]
    lines = list(header(*head, "all present", "on the frontier"))
    for point in points:
        more = None if point.setting == reference else gain(pictures, point.setting, reference)
        gained = "" if more is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*more)
        concept, present, on = (
            _interval(point.concept),
            _interval(point.present),
            "yes" if point.setting in ahead else "",
        )
        lines.append(row(point.setting, f"{point.gflop:.1f}", f"{point.seconds:.2f}", concept, gained, present, on))
    return "\n".join(lines)


def _interval(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.2f} ({low:.2f}-{high:.2f})"


def settings_sheet(pictures: Sequence[Picture], out: Path, columns: int = 6) -> Path | None:
    """Every setting with the largest number of LoRAs, a column per combination, at the first seed: out/settings.png.

    Returns its path; None where no combination has all its pictures still in `out`.
    """
    pictures = _together(pictures)
    size, seed = max(len(p.loras) for p in pictures), min(p.seed for p in pictures)
    chosen = {(p.setting, p.loras): p for p in pictures if len(p.loras) == size and p.seed == seed}
    files = {key: out / "pictures" / picture_name(picture) for key, picture in chosen.items()}
    gone = {loras for (_, loras), file in files.items() if not file.exists()}
    combinations = [loras for loras in dict.fromkeys(loras for _, loras in chosen) if loras not in gone][:columns]
    if not combinations:
        return None
    rows = [[Image.open(files[name, loras]) for loras in combinations] for name in settings_of(pictures)]
    heads = ["-".join(name[:3] for name in loras) for loras in combinations]
    sheet = labelled_grid(rows, heads, settings_of(pictures))
    sheet.reduce(2).quantize(128).save(out / "settings.png", optimize=True)
    return out / "settings.png"


def _together(pictures: Sequence[Picture]) -> list[Picture]:
    """Those of all LoRAs in one picture; of each alone there are several side by side."""
    return [p for p in pictures if not p.config.get("alone")]


def contact_sheet(pictures: Sequence[Picture], out: Path, count: int = 32) -> Path | None:
    """A sheet of random pictures, each with its prompt and the concepts that the detector found, to check.

    Returns the sheet's path; None where the pictures themselves are no longer in `out`.
    """
    together = _together(pictures)
    order = np.random.default_rng(0).permutation(len(together))[:count]
    chosen = [together[i] for i in order]
    files = [out / "pictures" / picture_name(p) for p in chosen]
    if not all(file.exists() for file in files):
        return None
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    captions = [f"{p.setting}, {p.prompt}" for p in chosen]
    found = [{name for name, sure in p.concepts.items() if sure > 0.5} for p in chosen]
    sheet(pixels, captions, found, out / "look.png")
    return out / "look.png"
