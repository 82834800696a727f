"""Where the tests run: on the GPU where there is one, else in the interpreter; on two threads, no downloads."""

import os
from pathlib import Path

# a worker of `pytest -n 2` has one core, and has inherited what its parent set
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # triton reads the switch when a kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from tests.skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401

diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    """A file or folder of reference data beside the project; the test is skipped, saying so, where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference data absent: {path}")
    return path


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, scope="session")
def _exact_libraries():
    """On a GPU float32 is float32, and the same call gives the same bits: tests compare both ways."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
