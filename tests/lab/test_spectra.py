"""Spectra of pictures are NumPy's, and more of what is fine ranks higher."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cmlora import CMLoRAError
from cmlora.cli import app
from cmlora.lab.spectra import by_group, find_pictures, measure, spectrum_of, table


def picture(period: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    """Stripes of a period in pixels, brightness and colours at odds with each other."""
    x = np.arange(size[1])
    stripes = (127 + 100 * np.sin(2 * np.pi * x / period)).astype(np.uint8)
    return Image.fromarray(np.stack([np.broadcast_to(stripes, size)] * 2 + [np.full(size, 90, np.uint8)], axis=2))


def test_a_spectrum_is_numpys():
    image = picture(8)
    grey = (np.asarray(image, dtype=np.float64) / 255).mean(2)
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(grey)))
    y, x = np.indices(grey.shape)
    radius = np.hypot(y - 24, x - 32).astype(int)
    want = np.bincount(radius.ravel(), amplitude.ravel()) / np.bincount(radius.ravel())
    want /= want.max()
    profile, intensity = spectrum_of(image, 0.2)
    assert np.abs(profile.numpy() - want).max() < 1e-6
    beyond = np.arange(len(want)) > 0.2 * (len(want) - 1)
    assert intensity == pytest.approx(want[beyond].mean(), rel=1e-5)


def test_finer_pictures_rank_higher_and_groups_are_a_sweeps(tmp_path):
    for period in (32, 4, 16):
        picture(period).save(tmp_path / f"period{period}.png")
    groups = by_group(measure([tmp_path]))
    assert next(iter(groups)) == "period4"
    assert table(groups).count("\n") == 4
    records = [
        {"file": "a.png", "kind": "solo", "method": "solo", "loras": ["zebrin"]},
        {"file": "b.png", "kind": "composed", "method": "merge", "loras": ["zebrin", "hat"]},
    ]
    for record in records:
        picture(8).save(tmp_path / record["file"])
        from cmlora.lab.sweep.folder import digest

        record |= {"sha256": digest((tmp_path / record["file"]).read_bytes()), "interval": 1, "seed": 0}
        record |= {"triggers": {}, "prompt": ""}
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [group for _, group, _ in find_pictures([tmp_path])] == ["zebrin alone", "merge"]


def test_the_command_writes_plots_and_says_what_is_wrong(tmp_path):
    files = []
    for period in (4, 16):
        files.append(tmp_path / f"p{period}.png")
        picture(period).save(files[-1])
    arguments = ["spectra", *map(str, files), "--compare", *map(str, files), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"spectra.png", "spectra.json", "spectra.md", "difference.png"}
    numbers = json.loads((tmp_path / "out" / "spectra.json").read_text())
    assert list(numbers["groups"]) == ["p4", "p16"]
    picture(4, (48, 48)).save(tmp_path / "other.png")
    with pytest.raises(CMLoRAError, match="one size, got 64 x 48 and 48 x 48"):
        CliRunner().invoke(app, [*arguments[:5], str(tmp_path / "other.png")], catch_exceptions=False)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(CMLoRAError, match=r"no.png is no picture"):
        measure([tmp_path / "no.png"])
    with pytest.raises(CMLoRAError, match=r"cutoff must be in \[0, 1\)"):
        measure(files, 1.0)
