"""Tables in documents are what the commands print from the committed records."""

import json
import re
from pathlib import Path

from cmlora.lab import quality, report, settings
from cmlora.sprites import measure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_quality_tables_are_those_of_the_records() -> None:
    text = (ROOT / "csrc_docs" / "quality.md").read_text()
    for preset in ("search", "frontier"):
        pictures = quality.read(RESULTS / preset / "quality.jsonl")
        assert {p.setting for p in pictures} == set(settings.PRESETS[preset])
        assert report.cost_table(pictures) in text
    table = ""
    for preset in ("text", "masks", "partitions", "styles", "published", "trouble", "methods"):
        pictures = quality.read(RESULTS / preset / "quality.jsonl")
        assert {p.setting for p in pictures} == set(settings.PRESETS[preset])
        table = report.table(pictures)
        assert table in text
        for name in {"published": (settings.BEST,), "methods": settings.COMPARED}.get(preset, ()):
            assert report.gains_table(pictures, name) in text
    assert len(pictures) == len(settings.METHODS) * 80 * 2
    assert report.concepts_table(pictures) in text
    shown = [row for row in table.splitlines() if row in (ROOT / "README.md").read_text()]
    assert len(shown) == 8


def test_the_readme_begins_with_what_its_tables_and_the_package_say() -> None:
    text = (ROOT / "README.md").read_text()
    all_of_3 = {
        row.split("|")[1].strip(): row.split("|")[3].strip() for row in text.splitlines() if row.count("|") == 12
    }
    ours, merge = (float(all_of_3[name]) for name in ("routed, half text at 0.6", "merge"))
    assert f"in {ours:.0%}; with a plain merge, in {merge:.0%}".replace("%", " %") in text.replace(
        " of the pictures", ""
    )
    loop = re.search(r"sprites N=5: cmlora against the loop: .*, (\S+x) the time", text)
    peft = re.search(r"sprites N=5: merge against PEFT's: .*, (\S+x) the time", text)
    assert loop is not None
    assert peft is not None
    assert f"take {loop[1]} the time" in text
    assert f"takes {peft[1]} the time" in text
    project = (ROOT / "pyproject.toml").read_text()
    assert 'license = "MIT"' in project
    assert 'requires-python = ">=3.10"' in project
    assert "badge/licence-MIT-" in text
    assert "badge/Python-3.10+-" in text


def test_the_model_card_is_what_was_measured() -> None:
    measured = json.loads((RESULTS / "sprites.json").read_text())
    assert measure.markdown(measured) in (ROOT / "cmlora" / "sprites" / "README.md").read_text()
