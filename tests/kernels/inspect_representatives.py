"""Compile a few variants of every kernel ahead of time; prints JSON. Not under TRITON_INTERPRET; arguments are targets.

python tests/kernels/inspect_representatives.py sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx90a gfx942 gfx1100 gfx1201 \
    > tests/kernels/inspected.json
"""

import json
import sys

import torch
import triton

from cmlora_kernels.inspect import inspect_launch
from cmlora_kernels.multi_lora_add import add_launches
from cmlora_kernels.multi_lora_gate import gated_launches
from cmlora_kernels.multi_lora_linear import linear_launch
from cmlora_kernels.tiles import Problem
from cmlora_kernels.variants import TRANSFORMERS, Variant, variants

EVERYWHERE = {  # the kernels with matrix products and those that fill the registers, on every target: (kernel, dtype)
    ("linear_kernel", "float16"),
    ("linear_kernel", "float32"),
    ("add_kernel", "bfloat16"),
    ("gate_kernel", "float16"),
    ("conv_add_kernel", "float16"),
    ("spectrum_kernel", "float16"),
    ("modulated_norm_kernel", "float16"),
    ("group_norm_silu_kernel", "float16"),
    ("rotary_norm_kernel", "float16"),
}
SHOWN = (
    "registers",
    "spill_bytes",
    "local_bytes",
    "shared_bytes",
    "shared_limit",
    "tensor_core",
    "async_copy",
    "access_bytes",
    "narrow_access_bytes",
    "bytes",
    "flops",
)


def representatives(target: str) -> list[Variant]:
    """Of each kernel and dtype the variant that moves most, with token weights or a gate and without, convolutions and
    group norms in either layout; the copying kernels in fp16 on one target per vendor; of transformers what they alone
    have.

    What once spilled: the smallest linear layer in float32 (16 tokens a tile), the update with a gate in float32 at the
    widest rank, the local combination of channels_last noise, the group norm in float32. And the linear layer and the
    update in place whose pipelines take most shared memory.
    """
    most: dict[tuple[str, str, bool, bool, bool], Variant] = {}
    known = variants(target, ranks=(16,))
    names = {v.launch.kernel.__name__ for v in known}
    others = [v for v in variants(target, TRANSFORMERS, ranks=()) if v.launch.kernel.__name__ not in names]
    for variant in (*known, *others):
        key = (variant.launch.kernel.__name__, str(variant.dtype).removeprefix("torch."))
        launch = variant.launch
        last = launch.scalars.get("x_channel") == 1 or launch.constexprs.get("LAST", False)
        form = (*key, is_weighted(variant), last, launch.constexprs.get("GATED", False))
        wanted = key in EVERYWHERE or (target in ("sm_90", "gfx942") and key[1] == "float16")
        if wanted and (form not in most or variant.launch.bytes > most[form].launch.bytes):
            most[form] = variant
    linear = [v for v in known if v.launch.kernel.__name__ == "linear_kernel" and v.dtype == torch.float32]
    small = [v for v in linear if not is_weighted(v)]
    smallest = sorted(small, key=lambda v: (v.launch.constexprs["BLOCK_M"], v.launch.bytes))[:1]
    local = [v for v in known if v.launch.kernel.__name__ == "local_kernel" and v.launch.scalars["channel_stride"] == 1]
    local = [v for v in local if v.launch.tensors["base_ptr"] and v.dtype == torch.float16][:1]
    norms = [v for v in known if v.launch.kernel.__name__ == "group_norm_silu_kernel" and v.launch.constexprs["LAST"]]
    norms = sorted((v for v in norms if v.dtype == torch.float32), key=lambda v: -v.launch.bytes)[:1]
    half = Problem(10, 1024, 640, 640, 64, 1, 5, torch.float16, True)
    single = half._replace(rank=128, dtype=torch.float32)
    gated = single._replace(outer=1280, weights=2, gated=True)
    widest = (
        (linear_launch(half, target), half),
        (add_launches(single, target)[0][1], single),
        (gated_launches(gated, target, fused=False)[-1][1], gated),
    )
    return [*most.values(), *smallest, *local, *norms, *(Variant(launch, "", p.dtype, 0) for launch, p in widest)]


def is_weighted(variant: Variant) -> bool:
    """Whether a multi-LoRA launch has token weights."""
    return variant.launch.tensors.get("groups_ptr") is not None


def main(targets: list[str]) -> None:
    rows = {}
    for target in targets:
        for variant in representatives(target):
            dtype = str(variant.dtype).removeprefix("torch.")
            report = inspect_launch(variant.launch, target, variant.model, dtype).as_dict()
            rows[f"{target} {report['kernel']} {dtype}: {report['variant']}"] = {name: report[name] for name in SHOWN}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
    sys.stdout.write(f'{{\n  "triton": "{triton.__version__}",\n{lines}\n}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
