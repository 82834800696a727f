"""Labelled images and the picture of a run, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cmlora.summary import Summary

BAND, GAP, SIDE = 28, 8, 192
COLOURS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6", "#dd4477", "#66aa00")


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], labels: Sequence[str] = ()
) -> Image.Image:
    """Rows of images of one size under their column's label; small ones are enlarged to be seen."""
    first = rows[0][0]
    factor = max(1, SIDE // first.width)
    wide, tall = first.width * factor, first.height * factor
    font = ImageFont.load_default(16)
    head = _largest_font(columns, wide)
    margin = max([90, *(int(font.getlength(label)) + 2 * GAP for label in labels)]) if labels else 0
    size = (margin + len(columns) * (wide + GAP) - GAP, BAND + len(rows) * (tall + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        pen.text((margin + c * (wide + GAP) + wide / 2, BAND / 2), label, fill="black", font=head, anchor="mm")
    for r, images in enumerate(rows):
        top = BAND + r * (tall + GAP)
        if labels:
            pen.text((margin / 2, top + tall / 2), labels[r], fill="black", font=font, anchor="mm")
        for c, image in enumerate(images):
            sheet.paste(image.resize((wide, tall), Image.Resampling.NEAREST), (margin + c * (wide + GAP), top))
    return sheet


def _largest_font(labels: Sequence[str], wide: int) -> Any:
    """From 16 down to 9: in which every label fits its column."""
    fonts = map(ImageFont.load_default, range(16, 9, -1))
    fitting = (font for font in fonts if all(font.getlength(label) <= wide for label in labels))
    return next(fitting, ImageFont.load_default(9))


def masks_over(image: Image.Image, masks: Mapping[str, Tensor]) -> Image.Image:
    """A picture, and beside it a panel per adapter: in colour where the adapter acts, pale grey where it does not.

    Args:
        image: the first of the batch.
        masks: of `Summary.masks`; the share of the image with a mask above 0.5 stands behind the name.
    """
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.7)
    panels, labels = [image.convert("RGB")], ["picture"]
    for name, mask in masks.items():
        level = Image.fromarray((mask[0] * 255).round().byte().numpy()).resize(image.size, Image.Resampling.BILINEAR)
        panels.append(Image.composite(panels[0], pale, level))
        labels.append(f"{name}, {float((mask[0] > 0.5).float().mean()):.0%}")
    return labelled_grid([panels], labels)


def timeline(run: Summary, image: Image.Image) -> Image.Image:
    """One run, step by step: who dominates with which weight, m of the gate, rows that ran the whole UNet.

    The first image of the batch is shown; its own picture stands on the left.
    """
    steps, wide, tall = run.steps, 26, 110
    left, top = 300, 40
    sheet = Image.new("RGB", (left + len(steps) * wide + 150, top + 3 * (tall + 44)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    sheet.paste(image.resize((256, 256), Image.Resampling.NEAREST), (16, top))
    pen.text((16, top + 268), f"{run.method}: {len(run.adapters)} LoRAs, {len(steps)} steps", fill="black", font=font)
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(run.adapters)}
    most = max((step.weight for step in steps), default=1.0)
    rows = max(step.rows_full + step.rows_shallow for step in steps)
    panels = ("weight of the dominant LoRA", "m: share of high frequencies", "rows: whole UNet (dark), shallow (light)")
    for p, title in enumerate(panels):
        bottom = top + p * (tall + 44) + tall
        pen.text((left, bottom - tall - 18), title, fill="black", font=font)
        pen.line((left, bottom, left + len(steps) * wide, bottom), fill="black")
        for i, step in enumerate(steps):
            x = left + i * wide
            if p == 0 and step.dominant:
                bar = (x + 3, bottom - tall * step.weight / most, x + wide - 3, bottom)
                pen.rectangle(bar, fill=colour[step.dominant[0]])
            elif p == 1 and step.gate:
                y = bottom - tall * step.gate[0]
                pen.ellipse((x + 9, y - 4, x + 17, y + 4), fill="#444444")
            elif p == 2:
                full, all_rows = step.rows_full, step.rows_full + step.rows_shallow
                pen.rectangle((x + 3, bottom - tall * all_rows / rows, x + wide - 3, bottom), fill="#c9d4e8")
                if full:
                    pen.rectangle((x + 3, bottom - tall * full / rows, x + wide - 3, bottom), fill="#24406e")
            if i % 5 == 0:
                pen.text((x + wide / 2, bottom + 9), str(i), fill="black", font=font, anchor="mm")
    for i, name in enumerate(run.adapters):
        y = top + 10 + i * 20
        pen.rectangle((sheet.width - 130, y, sheet.width - 116, y + 14), fill=colour[name])
        pen.text((sheet.width - 110, y + 7), name, fill="black", font=font, anchor="lm")
    return sheet
