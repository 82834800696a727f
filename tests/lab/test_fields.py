"""Every field of the config has a place on the site's page of fields."""

from dataclasses import fields
from pathlib import Path

from PIL import Image

from cmlora.config import CMLoRAConfig
from cmlora.lab.fields import CHANGES, SAME, descriptions, page
from cmlora.lab.pictures import GAP, SIDE


def test_every_field_is_on_the_page():
    names = {field.name for field in fields(CMLoRAConfig)}
    assert set(CHANGES) | set(SAME) == names
    assert not set(CHANGES) & set(SAME)
    told = descriptions()
    assert set(told) == names
    assert all(len(text) > 10 for text in told.values())
    for field, (base, values) in CHANGES.items():
        for value in values:
            CMLoRAConfig(**{**base, field: value})
    assert page().count("## ") == len(names)


def test_the_page_and_its_pictures_are_those_of_the_command():
    docs = Path(__file__).resolve().parents[2] / "csrc_docs"
    assert (docs / "fields.md").read_text() == page()
    pictures = {path.stem: Image.open(path) for path in (docs / "images" / "fields").glob("*.png")}
    assert set(pictures) == set(CHANGES)
    for field, picture in pictures.items():
        assert picture.width == len(CHANGES[field][1]) * (SIDE + GAP) - GAP, field
