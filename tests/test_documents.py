"""Tables in documents are what the commands print from the committed records."""

import json
from pathlib import Path

from cmlora.lab import quality, report, settings
from cmlora.sprites import measure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_quality_tables_are_those_of_the_records() -> None:
    text = (ROOT / "csrc_docs" / "quality.md").read_text()
    table = ""
    for preset in ("text", "masks", "published", "trouble", "methods"):
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


def test_the_model_card_is_what_was_measured() -> None:
    measured = json.loads((RESULTS / "sprites.json").read_text())
    assert measure.markdown(measured) in (ROOT / "cmlora" / "sprites" / "README.md").read_text()
