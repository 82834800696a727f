"""restore: the pipeline is what it was, whatever happened in between."""

import pytest
import torch

import cmlora
from cmlora.lab.bench.tiny import EVERYTHING, add_lora, call, embeddings, sd_pipe


@pytest.fixture
def pipe():
    pipe = sd_pipe()
    for i, name in enumerate(("character", "background")):
        add_lora(pipe.unet, name, rank=2 + i, pattern=EVERYTHING, seed=i + 1)
    pipe.set_adapters(["character", "background"], [0.8, 0.6])
    return pipe


def snapshot(pipe):
    unet, image = pipe.unet, call(pipe)  # first: the call itself leaves attributes on the pipe
    return {
        "state": {k: v.clone() for k, v in unet.state_dict().items()},
        "modules": [(name, type(module)) for name, module in unet.named_modules()],
        "dicts": [(name, sorted(module.__dict__)) for name, module in unet.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in unet.modules()],
        "pipe": sorted(pipe.__dict__),
        "active": pipe.get_active_adapters(),
        "image": image,
    }


def assert_same(before, after):
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
    for part in ("modules", "dicts", "hooks", "pipe", "active"):
        assert after[part] == before[part], part
    assert torch.equal(after["image"], before["image"])


@pytest.mark.parametrize("method", ["no_lora", "merge", "switch", "composite", "cmlora"])
def test_restore_leaves_nothing_behind(pipe, method):
    before = snapshot(pipe)
    cmlora.accelerate(pipe, method=method)
    assert not torch.equal(call(pipe), before["image"])
    cmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_twice_enabled_is_once_enabled_and_restore_is_never_an_error(pipe):
    before = snapshot(pipe)
    cmlora.restore(pipe)
    cmlora.accelerate(pipe, method="composite", combine="mean")
    once = call(pipe)
    cmlora.accelerate(pipe, method="composite", combine="mean")
    assert torch.equal(call(pipe), once)
    cmlora.restore(pipe)
    cmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_a_second_accelerate_replaces_the_first_and_a_failing_one_changes_nothing(pipe):
    cmlora.accelerate(pipe, method="composite", combine="mean", cache_interval=1)
    composite = call(pipe)
    with pytest.raises(cmlora.AdapterError):
        cmlora.accelerate(pipe, adapters=["character", "nobody"])
    assert torch.equal(call(pipe), composite)
    cmlora.accelerate(pipe, method="cmlora", cache_interval=1)
    assert not torch.equal(call(pipe), composite)


def test_accelerated_ends_with_its_block_even_by_an_error_and_nests(pipe):
    before = snapshot(pipe)
    with pytest.raises(KeyError), cmlora.accelerated(pipe, method="composite", combine="mean"):
        outer = call(pipe)
        with cmlora.accelerated(pipe, method="switch"):
            assert not torch.equal(call(pipe), outer)
        assert torch.equal(call(pipe), outer)
        raise KeyError
    assert_same(before, snapshot(pipe))


def test_an_error_in_the_middle_of_a_call_leaves_no_state(pipe):
    cmlora.accelerate(pipe, cache_interval=2)
    want = call(pipe, 5)

    def fail(pipe, step, timestep, kwargs):
        if step == 2:
            raise KeyError
        return {}

    with pytest.raises(KeyError):
        call(pipe, 5, callback_on_step_end=fail)
    assert torch.equal(call(pipe, 5), want)

    resnet = pipe.unet.mid_block.resnets[0]
    resnet.forward, inside = None, resnet.forward
    with pytest.raises(TypeError):
        call(pipe, 5)
    del resnet.forward
    assert resnet.forward == inside
    assert torch.equal(call(pipe, 5), want)


def test_runs_of_other_sizes_steps_and_batches_do_not_meet(pipe):
    config = {"method": "cmlora", "partition": "online", "cache_interval": 2}
    runs = [
        {"steps": 4},
        {"steps": 7, "given": embeddings(pipe, 3, seed=5)},
        {"steps": 3, "given": embeddings(pipe, 1, seed=6, size=(8, 24))},
        {"steps": 4, "guidance": 1.0},
        {"steps": 4},
    ]
    fresh = []
    for run in runs:
        cmlora.accelerate(pipe, **config)
        fresh.append(call(pipe, **run))
    cmlora.accelerate(pipe, **config)
    for run, want in zip(runs, fresh, strict=True):
        assert torch.equal(call(pipe, **run), want)


def test_two_pipelines_do_not_meet(pipe):
    other = sd_pipe()
    add_lora(other.unet, "a", seed=7)
    add_lora(other.unet, "b", seed=8)
    cmlora.accelerate(pipe, method="cmlora")
    want = call(pipe)
    cmlora.accelerate(other, method="switch", switch_step=1)
    call(other)
    assert torch.equal(call(pipe), want)
    cmlora.restore(other)
    assert torch.equal(call(pipe), want)


def test_summary_counts_what_ran(pipe):
    with pytest.raises(cmlora.CMLoRAError, match="not accelerated"):
        cmlora.summary(pipe)
    cmlora.accelerate(pipe, combine="mean", partition="offline", cache_interval=2)
    deep, shallow = [], []
    counters = [
        pipe.unet.mid_block.register_forward_hook(lambda m, i, o: deep.append(len(o))),
        pipe.unet.conv_out.register_forward_hook(lambda m, i, o: shallow.append(len(o))),
    ]
    call(pipe, 5)
    for counter in counters:
        counter.remove()
    steps = cmlora.summary(pipe).steps
    assert [s.rows_full for s in steps if s.rows_full] == [4, 2, 2]
    assert [s.rows_full + s.rows_shallow for s in steps] == [4] * 5
    assert (deep, shallow) == ([2] * 4, [2] * 10), "a hook of the user's sees one prediction at a time"
    assert "dominant" in str(cmlora.summary(pipe))
