"""The documentation's site, without the packages that build it: pages that exist, and all of them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "csrc_docs"
GENERATED = {"sprites.md"}
"""By csrc_docs/hooks.py."""


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    listed = set(re.findall(r": (\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    there = {str(path.relative_to(DOCS)) for kind in ("md", "ipynb") for path in DOCS.rglob(f"*.{kind}")}
    assert listed == there | GENERATED


def test_every_link_within_the_documents_leads_to_a_file() -> None:
    documents = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.joinpath("cmlora").rglob("README.md")]
    lost = [
        f"{document.relative_to(ROOT)}: {link}"
        for document in documents
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
        if re.search(r"[./]", link) and "://" not in link and not (document.parent / link).exists()
    ]
    assert not lost
