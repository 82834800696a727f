"""What a step of FLUX.1-dev launches, counted on `meta`, and how long it is predicted to take; nothing is timed.

python benchmarks/flux.py
"""

from __future__ import annotations

from cmlora.lab.bench.transformer_steps import INTERVAL, STEPS, MetaFlux
from cmlora.models.dit.step import cut_of

ADAPTERS = 3


def main() -> None:
    flux = MetaFlux(ADAPTERS)
    net = flux.pipe.transformer
    blocks = len(net.transformer_blocks) + len(net.single_transformer_blocks)
    cut = cut_of(blocks, None, cached=True)
    mean = {"method": "cmlora", "combine": "mean", "partition": "offline"}
    rows = {
        "loop of set_adapters, no cache": flux.count_loop(interval=1),
        "the same with our cache": flux.count_loop(cut=cut),
        "cmlora, mean": flux.count(**mean),
        "cmlora, local": flux.count(**(mean | {"combine": "local"})),
        "routed": flux.count(method="routed"),
        "merge": flux.count(method="merge"),
        "merge, no cache": flux.count(method="merge", cache_interval=1),
    }
    print(f"FLUX.1-dev, {flux.side} px, {ADAPTERS} LoRAs, {STEPS} steps, interval {INTERVAL}; a step, on sm_90")
    print(f"the first {cut[0]} and the last {cut[1]} of {blocks} blocks run in every step\n")
    print("| | kernels | TFLOP | GB | ms, predicted, H100 |\n|---|---|---|---|---|")
    for name, found in rows.items():
        print(f"| {name} | {found.ops:.0f} | {found.flops / 1e12:.1f} | {found.bytes / 1e9:.1f} | {found.ms:.0f} |")


if __name__ == "__main__":
    main()
