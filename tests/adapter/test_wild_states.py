"""Copies and states of adapters, as people had them in public bug reports, through the public API: the plain
pipeline's picture, that of a loop of plain calls, or an error that says what to do. Never silently another picture."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import cmlora
from cmlora.lab.bench.tiny import call, relative, sd_pipe
from tests.adapter.loop import NAMES, WEIGHTS
from tests.adapter.wild import MERGE, NEAR


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_the_unet_is_a_plain_one(duplicate, sd):
    cmlora.accelerate(sd, **MERGE)
    want = call(sd, 2)
    other = sd_pipe(duplicate(sd.unet))
    assert relative(call(other, 2), want) < NEAR
    other.unet.set_adapters(list(NAMES), [0.0, 0.0])
    assert relative(call(other, 2), want) > NEAR
    assert relative(call(sd, 2), want) < NEAR
    cmlora.restore(other)
    assert len(cmlora.summary(sd).steps) == 2
    other.unet.set_adapters(list(NAMES), list(WEIGHTS))
    with cmlora.accelerated(other, **MERGE):
        assert relative(call(other, 2), want) < NEAR
        assert len(cmlora.summary(other).steps) == 2


def test_a_copy_of_the_pipeline_is_a_plain_one(sd):
    cmlora.accelerate(sd, **MERGE)
    want = call(sd, 2)
    other = copy.deepcopy(sd)
    other.unet.set_adapters(list(NAMES), [0.0, 0.0])
    assert relative(call(other, 2), want) > NEAR
    cmlora.restore(other)
    assert len(cmlora.summary(sd).steps) == 2
    assert relative(call(sd, 2), want) < NEAR


# --- a merge of whatever is there


def disabled(pipe):
    pipe.disable_lora()


def deleted(pipe):
    pipe.delete_adapters(list(NAMES))


def fused(pipe):
    pipe.fuse_lora()


def unfused(pipe):
    pipe.fuse_lora()
    pipe.unfuse_lora()


def unloaded(pipe):
    pipe.unload_lora_weights()


@pytest.mark.parametrize("behind", [False, True], ids=["before accelerate", "behind accelerate"])
@pytest.mark.parametrize("change", [disabled, deleted, fused, unfused, unloaded], ids=lambda change: change.__name__)
def test_a_merge_draws_what_the_plain_pipeline_draws(change, behind, sd):
    if behind:
        cmlora.accelerate(sd, **MERGE)
        call(sd, 1)
    change(sd)
    if not behind and change in (deleted, unloaded):  # nothing to compose: more likely a file that did not fit
        with pytest.raises(cmlora.AdapterError, match="carries no LoRA layer"):
            cmlora.accelerate(sd, **MERGE)
        return
    if not behind:
        cmlora.accelerate(sd, **MERGE)
    got = call(sd, 2)
    assert relative(got, call(cmlora.restore(sd), 2)) < NEAR
