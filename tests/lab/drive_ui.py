"""The page, served by the command and driven in a browser as a person would. To be run by name: it needs a browser.

pip install playwright && playwright install chromium     # or CHROMIUM=path of one that is there
python -m pytest tests/lab/drive_ui.py
SCREENSHOT=csrc_docs/images/ui.png python -m pytest tests/lab/drive_ui.py
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from cmlora import sprites

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOT = os.environ.get("SCREENSHOT")
PATIENCE = 600.0
"""Seconds for anything at all: a busy machine is no failure."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "cmlora.cli", "ui", "--port", str(port)], cwd=ROOT)
    address, until = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE
    while not answers(address):
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < until
        time.sleep(0.5)
    yield address
    server.terminate()
    server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(1000 * PATIENCE)
        expect.set_options(timeout=1000 * PATIENCE)
        page.goto(url)
        yield page
        browser.close()


def test_a_person_in_a_browser_picks_paints_and_draws(page):
    page.get_by_label("Prompt", exact=True).fill("a zebrin creature, wearing a tophat, checker background")
    for name in sprites.CONCEPTS:
        page.get_by_role("checkbox", name=name, exact=True).set_checked(name in ("zebrin", "tophat", "checker"))
    page.get_by_role("button", name="Weights").click()
    page.get_by_label("number input for tophat").fill("0.9")
    page.get_by_label("number input for Steps").fill("20" if SCREENSHOT else "2")
    page.get_by_label("Seed").fill("1")
    paint(page, "checker")
    page.get_by_role("button", name="Draw", exact=True).click()
    ran = page.get_by_label("What ran")
    expect(ran).to_have_value(re.compile(r"^[\d.]+ s\n"))
    said = ran.input_value()
    assert "checker acts in" in said
    for label in ("Picture", "Where each LoRA acts", "Who dominated, step by step"):
        image = page.locator(".block", has_text=label).locator("img").last
        expect(image).to_be_visible()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") >= 64
    if SCREENSHOT:
        page.screenshot(path=SCREENSHOT, full_page=True)


def paint(page: Page, name: str) -> None:
    """The upper half of the canvas, which is a square in the middle of its frame, as the region of this LoRA."""
    page.get_by_role("button", name="Draw where a LoRA acts").click()
    page.get_by_label("Whose region").click()
    page.get_by_role("option", name=name, exact=True).click()
    page.get_by_label("Brush").click()
    canvas = page.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    middle, side = box["x"] + box["width"] / 2, 0.8 * box["height"]
    for share in (0.15, 0.35):
        page.mouse.move(middle - side / 2, box["y"] + share * box["height"])
        page.mouse.down()
        page.mouse.move(middle + side / 2, box["y"] + share * box["height"], steps=4)
        page.mouse.up()
    page.get_by_role("button", name="Use as its region").click()
    expect(page.get_by_text(re.compile(rf"{name} in \d+% of the picture"))).to_be_visible()
