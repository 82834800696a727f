"""Every field of the config has a place on the site's page of fields."""

from dataclasses import fields

from cmlora.config import CMLoRAConfig
from cmlora.lab.fields import CHANGES, SAME, descriptions, page


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
