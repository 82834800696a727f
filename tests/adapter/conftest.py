"""What several files of tests begin with."""

import pytest

from cmlora.lab.bench.tiny import sd_pipe
from tests.adapter.loop import small_unet, with_loras


@pytest.fixture
def sd():
    """A small pipeline with two adapters."""
    return with_loras(sd_pipe(small_unet()))
