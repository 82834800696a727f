"""Every method on every transformer family computes what one plain PEFT call per prediction does (`peer.py`)."""

import pytest

import cmlora
from cmlora.lab.bench.tiny import relative
from cmlora.lab.bench.tiny_transformers import KINDS, NAMES, draw, pipeline, with_loras
from tests.dit.peer import Peer

EXACT = 1e-5
STAGE = {"partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0.0, "high": NAMES[:3]}
METHODS = {
    "mean": ({"method": "composite", "combine": "mean"}, {"rule": "mean"}),
    "deviation": ({"method": "composite", "combine": "deviation"}, {"rule": "deviation"}),
    "local": ({"method": "composite", "combine": "local"}, {"rule": "local"}),
    "cmlora": ({"method": "cmlora", "combine": "deviation", **STAGE}, {"rule": "deviation", "dominance": 2.5}),
    "routed": ({"method": "routed"}, {"rule": "routed"}),
    "switch": ({"method": "switch", "switch_step": 2}, {"rule": "switch"}),
}
TWICE = ("flux", "qwen")  # call their transformer once per guidance half


@pytest.fixture(scope="module", params=KINDS)
def drawn(request):
    kind = request.param
    return kind, with_loras(pipeline(kind), kind)


def weights_of(pipe, names=NAMES[:3], weights=(0.8, 1.2, 1.0)):
    pipe.transformer.set_adapters(list(names), list(weights[: len(names)]))
    return list(weights[: len(names)])


def compare(kind, pipe, config, how, *, guided=False, names=NAMES[:3], **call):
    weights = weights_of(pipe, names)
    if guided:
        how = how | ({"apart": 2} if kind in TWICE else {"halves": 2})
    with Peer(pipe, kind, names, weights=weights, **how):
        want = draw(pipe, kind, guided=guided, **call)
    assert relative(want, draw(pipe, kind, guided=guided, **call)) > 1e-3, "the definition equals a merge here"
    with cmlora.accelerated(pipe, **config):
        got = draw(pipe, kind, guided=guided, **call)
        assert len(cmlora.summary(pipe).steps) == call.get("steps", 4)
    assert relative(got, want) < EXACT


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_equals_a_loop_of_plain_calls(drawn, method, interval, guided):
    config, how = METHODS[method]
    settings = {"cache_interval": interval, "cache_branch": (1, 1)}
    compare(*drawn, config | settings, how | {"interval": interval, "cut": (1, 1)}, guided=guided, images=2)
