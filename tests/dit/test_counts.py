"""Counted at Flux's real width on `meta`: what a step launches and computes against a loop of set_adapters.

`meta` tensors have no values: that a pipeline's call runs on them says that nothing is read back.
"""

import pytest

from cmlora.lab.bench.transformer_steps import MetaFlux
from cmlora.models.dit.step import cut_of


@pytest.fixture(scope="module")
def flux():
    return MetaFlux(3, num_layers=5, num_single_layers=10)  # a quarter of its blocks, all else as published


def test_a_step_launches_and_computes_less_than_a_loop_of_set_adapters(flux):
    cut = cut_of(15, None, cached=True)
    loop, cached = flux.count_loop(interval=1), flux.count_loop(cut=cut)
    ours = flux.count(method="cmlora", combine="mean", partition="offline")
    assert ours.ops <= 0.3 * loop.ops
    assert ours.flops <= cached.flops < loop.flops


def test_a_routed_image_costs_little_more_than_a_merged_one(flux):
    merged = flux.count(method="merge")
    routed = flux.count(method="routed")
    assert routed.flops <= 1.3 * merged.flops
