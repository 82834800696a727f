"""The shipped model's card is a page of the site, too: it lies beside the model."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

CARD = "cmlora/sprites/README.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the card as sprites.md."""
    text = (Path(config.config_file_path).parent / CARD).read_text().replace("../../csrc_docs/", "")
    files.append(File.generated(config, "sprites.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the card within the repository lead to its page."""
    return markdown.replace(f"../{CARD}", "sprites.md")
