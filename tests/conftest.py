"""Where the tests run: two threads, no downloads, the interpreter without a GPU, and data beside the project."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # triton reads the switch when a kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    """A folder of reference data beside the project; the test is skipped, saying so, where it is absent."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"reference data absent: {folder}")
    return folder


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
