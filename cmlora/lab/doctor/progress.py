"""A bar of the time that the doctor was given, and what it is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(seconds: float) -> Iterator[Callable[[str], None]]:
    """A function that is told what is being done; the bar is gone when all is done."""
    start = time.monotonic()
    shape = "{l_bar}{bar}| {elapsed}{postfix}"
    with tqdm(total=seconds, leave=False, mininterval=0.3, bar_format=shape) as bar:

        def say(what: str) -> None:
            bar.n = min(seconds, time.monotonic() - start)
            bar.set_postfix_str(what[:60])

        yield say
