"""Every method on every transformer family computes what one plain PEFT call per prediction does (`peer.py`)."""

import pytest
import torch

import cmlora
from cmlora.lab.bench.tiny import add_lora, relative
from cmlora.lab.bench.tiny_transformers import KINDS, NAMES, draw, pipeline, with_loras
from cmlora.models.dit.step import TransformerPart
from tests.dit.peer import Peer

EXACT = 1e-5
STAGE = {"partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0.0, "high": NAMES[:3]}
METHODS = {
    "mean": ({"method": "composite", "combine": "mean"}, {"rule": "mean"}),
    "deviation": ({"method": "composite", "combine": "deviation"}, {"rule": "deviation"}),
    "local": ({"method": "composite", "combine": "local"}, {"rule": "local"}),
    "cmlora": ({"method": "cmlora", "combine": "deviation", **STAGE}, {"rule": "deviation", "dominance": 2.5}),
    "routed": ({"method": "routed"}, {"rule": "routed"}),
    "routed, less text": ({"method": "routed", "mask_text": 0.4}, {"rule": "routed", "mask_text": 0.4}),
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


@pytest.mark.parametrize(
    ("kind", "method"),
    # the peer cannot mask layers of Z-Image that diffusers runs on all rows' tokens as one
    [(k, m) for k in KINDS for m in ("deviation", "routed") if (k, m) != ("z_image", "routed")],
)
def test_loras_around_the_blocks_act_too(kind, method):
    """Embedders, modulation and norms' projections, of text, image and time."""
    config, how = METHODS[method]
    pipe = with_loras(pipeline(kind), kind, edges=True)
    settings = {"cache_interval": 2, "cache_branch": (1, 1)}
    compare(kind, pipe, config | settings, how | {"interval": 2, "cut": (1, 1)}, images=2, guided=kind != "flux")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "cut"), [(2, (1, 0)), (4, (2, 1))])
def test_any_number_of_adapters_and_any_cut(kind, count, cut):
    pipe = with_loras(pipeline(kind), kind, count=count)
    config, how = METHODS["cmlora"]
    config = config | {"high": NAMES[:count], "dominant_weight": 2.5, "cache_interval": 2, "cache_branch": cut}
    weights = (0.8, 1.2, 1.0, 0.9)
    pipe.transformer.set_adapters(list(NAMES[:count]), list(weights[:count]))
    with Peer(pipe, kind, NAMES[:count], weights=weights[:count], **how, interval=2, cut=cut):
        want = draw(pipe, kind, steps=6)
    with cmlora.accelerated(pipe, **config):
        assert relative(draw(pipe, kind, steps=6), want) < EXACT


@pytest.mark.parametrize("kind", ["sd3", "qwen", "z_image"])
def test_blocks_before_the_first_adapter_run_once_for_all_predictions(kind, monkeypatch):
    pipe, name = pipeline(kind), KINDS[kind].blocks[-1]
    first, *_, last = getattr(pipe.transformer, name)
    for seed, adapter in enumerate(NAMES[:2]):
        pattern = rf"^{name}\.3\..*(to_q|net\.2|w2)$"
        add_lora(pipe.transformer, adapter, rank=3, pattern=pattern, seed=seed)
    config, how = METHODS["mean"]
    compare(kind, pipe, config | {"cache_interval": 1}, how, names=NAMES[:2])
    rows, rows_for = {}, TransformerPart.rows_for

    def counted(part, module, *xs):
        given = rows_for(part, module, *xs)
        rows[module] = len(given[0].value)
        return given

    monkeypatch.setattr(TransformerPart, "rows_for", counted)
    with cmlora.accelerated(pipe, **config, cache_interval=1):
        draw(pipe, kind)
    assert (rows[first], rows[last]) == (1, 2)


@pytest.mark.parametrize("method", ["mean", "routed"])
def test_shared_adapters_and_regions(drawn, method):
    kind, pipe = drawn
    region = torch.rand(16, 16, generator=torch.Generator().manual_seed(5))
    config, how = METHODS[method]
    config = config | {"regions": {"style": region.numpy()}, "shared": ("background",), "cache_interval": 1}
    how = how | {"regions": {"style": region}, "shared": ("background",)}
    names = ("character", "style")
    pipe.transformer.set_adapters([*names, "background"])
    with Peer(pipe, kind, names, **how):
        want = draw(pipe, kind, images=2)
    pipe.transformer.set_adapters([*names, "background"])
    with cmlora.accelerated(pipe, adapters=names, **config):
        assert relative(draw(pipe, kind, images=2), want) < EXACT


@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen"])
def test_an_adapter_s_own_prompt_is_in_the_conditional_half_alone(kind):
    pipe, generator = with_loras(pipeline(kind), kind, edges=True), torch.Generator().manual_seed(8)
    text = torch.randn(1, 7, 24, generator=generator)
    beside = torch.ones(1, 7, dtype=torch.int64) if kind == "qwen" else torch.randn(1, 20, generator=generator)
    name = "encoder_hidden_states_mask" if kind == "qwen" else "pooled_projections"
    config = METHODS["deviation"][0] | {"prompts": {"style": (text, beside)}, "cache_interval": 2}
    own = {"encoder_hidden_states": text, name: beside}
    guided = kind in TWICE
    for half in (False, True) if guided else (False,):
        apart = {"apart": 2} if half else {}
        how = {"rule": "deviation", "interval": 2, "prompts": {"style": own}, **apart}
        compare(kind, pipe, config | {"cache_branch": (1, 1)}, how, guided=half)
