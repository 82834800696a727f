"""Tables in documents are what the commands print from the committed records."""

import json
from pathlib import Path

from cmlora.lab import quality, report
from cmlora.sprites import measure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_quality_tables_are_those_of_the_records() -> None:
    pictures = quality.read(RESULTS / "methods" / "quality.jsonl")
    assert len(pictures) == 800
    text = (ROOT / "csrc_docs" / "quality.md").read_text()
    assert report.table(pictures) in text
    places = quality.read(RESULTS / "places" / "quality.jsonl")
    assert len(places) == 4 * 80 * 2
    assert report.table(places) in text
    assert report.table(places) in (ROOT / "README.md").read_text()
    assert report.cost_table(places, "merge") in text
    composites = [picture for picture in places if picture.setting.startswith("composite")]
    assert report.cost_table(composites, "composite, deviation") in text
    assert report.cost_table(quality.read(RESULTS / "masks" / "quality.jsonl"), "merge") in text
    for preset in ("search", "confirm", "frontier"):
        costs = report.cost_table(quality.read(RESULTS / preset / "quality.jsonl"))
        assert costs in (ROOT / "csrc_docs" / "quality.md").read_text()


def test_the_model_card_is_what_was_measured() -> None:
    measured = json.loads((RESULTS / "sprites.json").read_text())
    assert measure.markdown(measured) in (ROOT / "cmlora" / "sprites" / "README.md").read_text()
