"""What tests of people's own doings compare: the plain picture, that of a loop of plain calls, or an error of ours."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

import cmlora
from cmlora.lab.bench.tiny import call, relative
from tests.adapter.loop import NAMES, WEIGHTS, peer

NEAR = 1e-4  # rounding of a run of some steps, ours and theirs being summed in another order
MERGE = {"method": "merge", "cache_interval": 1}
MEAN = {"method": "composite", "combine": "mean", "cache_interval": 1}
DEVIATION = {"method": "composite", "combine": "deviation", "cache_interval": 1}
KINDS = pytest.mark.parametrize("kind", [MERGE, MEAN], ids=["merge", "mean"])


def three_steps(pipe):
    return call(pipe, 3)


def refused(error, *parts):
    """One of ours, that says what it is about."""
    return len(str(error.value)) > 30 and any(part in str(error.value) for part in parts)


@contextmanager
def or_refused(*parts):
    """What runs inside may end in an error of ours that names one of the parts."""
    with pytest.raises((cmlora.CMLoRAError, DoneError)) as error:
        yield
        raise DoneError
    assert error.type is DoneError or refused(error, *parts), str(error.value)


class DoneError(Exception):
    """Nothing was refused."""


def right(pipe, kind, run=three_steps):
    """`run` on the plain pipeline, or with a loop in the place of its UNet's forward."""
    pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))
    if kind is MERGE:
        return run(pipe)
    with peer(pipe, 1, deviation=kind is DEVIATION):
        return run(pipe)


def ours(pipe, kind, run=three_steps):
    pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))
    with cmlora.accelerated(pipe, **kind):
        return run(pipe)


def right_or_refused(pipe, kind, run=three_steps, match=""):
    """Ours is right, or an error that names `match`."""
    want = right(pipe, kind, run)
    with or_refused(match):
        assert relative(ours(pipe, kind, run), want) < NEAR
