"""Counted at Flux's real size on `meta`: what a step launches and computes against a loop of set_adapters.

`meta` tensors have no values: that a pipeline's call runs on them says that nothing is read back.
"""

import runpy
from pathlib import Path

import pytest

from cmlora.lab.bench.transformer_steps import FEW, Blocks, Flux, MetaFlux, counts_table, times_table

ROOT = Path(__file__).resolve().parents[2]
MEAN = {"method": "cmlora", "combine": "mean", "partition": "offline"}


@pytest.fixture(scope="module")
def flux():
    return Flux(3)


def test_a_step_launches_and_computes_less_than_a_loop_of_set_adapters(flux):
    loop, ours = flux.count_loop(), flux.count(**MEAN)
    assert ours.ops <= 0.3 * loop.ops, "the loop has the same cache"
    assert ours.flops <= loop.flops
    rows = {"the same with our cache": loop, "cmlora, mean": ours}
    for name, table in (("csrc_docs/transformers.md", counts_table), ("csrc_docs/roofline.md", times_table)):
        assert "\n".join(table(rows)[2:]) in (ROOT / name).read_text()
    assert "\n".join(times_table(rows)[2:]) in (ROOT / "README.md").read_text()


def test_a_routed_image_costs_little_more_than_a_merged_one(flux):
    merged = flux.count(method="merge")
    routed = flux.count(method="routed")
    assert routed.flops <= 1.3 * merged.flops
    assert all(r <= 1.3 * m for r, m in zip(routed.ms, merged.ms, strict=True))


def test_every_further_block_of_a_kind_adds_the_same(flux):
    blocks = Blocks(3, 2, 3, 2)
    model = MetaFlux(3, num_layers=5, num_single_layers=5)
    for traced, followed in (
        (model.count(cache_branch=(3, 2), **MEAN), flux.count(blocks, **MEAN)),
        (model.count_loop(cut=(3, 2)), flux.count_loop(blocks)),
    ):
        for name in ("ops", "flops", "bytes"):
            assert getattr(traced, name) == pytest.approx(getattr(followed, name), rel=1e-9), name
        assert traced.ms == pytest.approx(followed.ms, rel=1e-6)


def test_the_benchmark_prints_a_row_of_every_way_in_both_tables(capsys):
    main = runpy.run_path(str(ROOT / "benchmarks" / "flux.py"))["main"]
    main(["--adapters", "2", "--blocks", *map(str, FEW)])
    lines = capsys.readouterr().out.splitlines()
    assert f"the first 2 and the last 1 of {sum(FEW)} blocks run in every step" in lines
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    ways = [name for name in names if name and not name.startswith("ms of a step")]
    assert ways[: len(ways) // 2] == ways[len(ways) // 2 :]
    assert len(set(ways)) == 7
