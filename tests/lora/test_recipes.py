"""A slot is a recipe: every row gives what PEFT's own layer gives with the recipe's adapters and weights."""

import pytest
import torch

from cmlora.batch.running import Running
from cmlora.lab.bench.tiny import ATTENTION, add_lora, relative
from cmlora.lora.bank import build_bank, fill_bank
from cmlora.lora.layers import install, uninstall
from cmlora.lora.stacked import fill_stacked, stack_projections
from tests.lora.rows import EXACT, image, in_force, layers_of, pefts, unet_with

RECIPES = (
    (("a", 0.7),),
    (),
    (("c", -0.4), ("a", 1.5)),
    (("b", 1.0),),
    (("a", 0.3), ("b", 0.6), ("c", 0.9)),
)


@pytest.fixture
def unet():
    """Two adapters on all layers, a third one on attention alone."""
    unet = unet_with("a", "b")
    add_lora(unet, "c", rank=7, pattern=ATTENTION, seed=9)
    return unet


def test_every_layer_with_every_recipe(unet):
    slots, seen = [0, 1, 2, 3, 4, -1], 0
    layers = layers_of(unet)
    xs = {name: image(layer, len(slots)) for name, layer in layers.items()}
    with in_force(unet, RECIPES, slots) as bank:
        got = {name: layer(xs[name]) for name, layer in layers.items()}
    assert bank.names == ("a", "c", "b")
    for row, slot in enumerate(slots):
        for name, layer in layers.items():
            want = pefts(unet, RECIPES[slot] if slot >= 0 else (), layer, xs[name][row : row + 1])
            assert relative(got[name][row : row + 1], want) < EXACT, (name, slot)
            seen += 1
    assert seen > 100


def test_the_scale_of_a_call_multiplies_all(unet):
    layer = next(iter(layers_of(unet).values()))
    x = image(layer, 2)
    with in_force(unet, RECIPES, [0, 4], scale=0.5):
        got = layer(x)
    for row, recipe in enumerate((RECIPES[0], RECIPES[4])):
        half = tuple((name, weight / 2) for name, weight in recipe)
        assert relative(got[row : row + 1], pefts(unet, half, layer, x[row : row + 1])) < EXACT


def test_a_column_says_whose_it_is(unet):
    """All columns of one adapter taken out of b: what PEFT gives without it."""
    recipe = RECIPES[4]
    layers = layers_of(unet)
    with in_force(unet, (recipe,), [0]) as bank:
        banks = dict(bank.layers)
        for layer in layers.values():
            groups = banks[layer].groups
            assert groups.dtype == torch.int32
            assert (groups >= 0).sum() == sum(layer.lora_A[n].weight.shape[0] for n, _ in recipe if n in layer.lora_A)
            banks[layer].b.mul_(groups != bank.names.index("b"))
        got = {name: layer(image(layer)) for name, layer in layers.items()}
    without = tuple(part for part in recipe if part[0] != "b")
    for name, layer in layers.items():
        assert relative(got[name], pefts(unet, without, layer, image(layer))) < EXACT


def test_stacked_projections_know_their_columns(unet):
    """q, k and v as one: each part's columns lie where the part's own layer has them."""
    bank, running = build_bank(unet, RECIPES, device=torch.device("cpu")), Running()
    fill_bank(bank, 1.0)
    install(bank, running, "auto")
    stacked = stack_projections(unet, running, "auto")
    fill_stacked(stacked.values())
    uninstall(unet)
    assert stacked
    for attention, projection in stacked.items():
        parts = [dict(bank.layers)[layer] for layer in (attention.to_q, attention.to_k, attention.to_v)]
        for part, groups in zip(parts, projection.bank.groups.chunk(3, 1), strict=True):
            assert torch.equal(groups[:, : part.groups.shape[1]], part.groups)
            assert (groups[:, part.groups.shape[1] :] == -1).all()


@pytest.mark.parametrize("loaded", [True, False])
def test_banks_made_in_inference_mode_serve_outside_of_it(loaded):
    with torch.inference_mode(loaded):
        unet = unet_with("a", "b")
    layer = next(iter(layers_of(unet).values()))
    with torch.inference_mode(not loaded):
        bank, running = build_bank(unet, RECIPES[3:4], device=torch.device("cpu")), Running()
    for mode in (True, False):
        with torch.inference_mode(mode):
            fill_bank(bank, 1.0)
    install(bank, running, "auto")
    uninstall(unet)
    assert torch.equal(dict(bank.layers)[layer].a[0], layer.lora_A["b"].weight)
