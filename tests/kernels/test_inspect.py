"""The compiled code of representative variants, against the committed table: a regression shows as a diff."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cmlora_kernels.chips import TARGETS
from cmlora_kernels.inspect import KernelReport, compile_launch, inspect_kernels, occupancy, write_table
from cmlora_kernels.machine_code import read_amdgcn
from cmlora_kernels.variants import code_key, variants

HERE = Path(__file__).parent
TABLE = HERE / "inspected.json"


@pytest.fixture(scope="module")
def inspected() -> dict[str, dict]:
    """Two compilers at once, outside this process, which may have chosen the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    program = [sys.executable, "-W", "ignore", str(HERE / "inspect_representatives.py")]
    running = [
        subprocess.Popen(
            [*program, *targets], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for targets in (TARGETS[::2], TARGETS[1::2])
    ]
    rows: dict[str, dict] = {}
    for process in running:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        rows |= json.loads(out)
    return rows


def test_no_variant_spills_or_exceeds_its_chip(inspected: dict[str, dict]) -> None:
    rows = {name: row for name, row in inspected.items() if name != "triton"}
    assert {name.split()[0] for name in rows} == set(TARGETS)
    for name, row in rows.items():
        assert row["spill_bytes"] == row["local_bytes"] == 0, name
        assert row["shared_bytes"] <= row["shared_limit"], name
        products = ("multi_lora", "merged") if name.startswith("gfx1") else ("multi_lora", "merged", "spectrum float")
        if any(part in name for part in products):  # RDNA has no matrix unit for fp32: its spectrum is plain FMAs
            assert row["tensor_core"], name
            assert row["async_copy"] or not name.startswith("sm_") or "spectrum" in name, name


def test_compiled_code_is_the_committed_one(inspected: dict[str, dict]) -> None:
    want = json.loads(TABLE.read_text())
    if want["triton"] != inspected["triton"]:
        pytest.skip(f"{TABLE.name} is of triton {want['triton']}, this is {inspected['triton']}")
    assert inspected == want


def test_variants_compile_once_and_are_the_largest_of_their_code() -> None:
    found = variants("sm_90", models=["sd15"], ranks=(16,))
    assert len({code_key(v.launch) for v in found}) == len(found)
    assert sum(v.others for v in found) > len(found)  # most launches share their code
    names = {v.launch.kernel.__name__ for v in found}
    assert {"linear_kernel", "conv_add_kernel", "spectrum_kernel", "gather_concat_kernel", "combine_kernel"} <= names


def test_occupancy_is_bound_by_registers_shared_memory_and_slots() -> None:
    assert occupancy(32, 0, 4, "sm_90") == 1.0
    assert occupancy(168, 0, 4, "sm_90") == 0.188  # 3 warps of 168 registers on each of 4 schedulers
    assert occupancy(32, 100_000, 4, "sm_90") == 0.125  # 2 blocks of 100 KB
    assert occupancy(256, 0, 1, "gfx942") == 0.25


def test_assembly_is_read_by_its_main_loop() -> None:
    assembly = """
.LBB0_1:
    global_load_dwordx4 v[0:3], v4, s[0:1]
    v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
    s_cbranch_scc1 .LBB0_1
    global_load_ushort v5, v6, s[2:3]
    .private_segment_fixed_size: 8
    .vgpr_count:     40
    .vgpr_spill_count: 2
"""
    code = read_amdgcn(assembly)
    assert (code.registers, code.spill_bytes, code.local_bytes, code.tensor_core) == (40, 8, 8, "mfma")
    assert (code.access_bytes, code.narrow_access_bytes) == (16, 16)


def test_table_prints_every_row() -> None:
    row = KernelReport(
        "spectrum",
        "one",
        "sd15",
        "sm_90",
        "float16",
        0,
        10,
        0,
        0,
        0,
        1,
        0.5,
        "",
        "",
        16,
        16,
        2_000_000,
        1,
        1,
        1.0,
        "memory",
    )
    file = io.StringIO()
    write_table([row, row], file)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:4] == ["spectrum", "sm_90", "float16", "one"]


def test_errors_name_what_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"targets must be of .* got \['sm_12'\]"):
        list(inspect_kernels(targets=["sm_12"]))
    with pytest.raises(ValueError, match="models must be of"):
        list(inspect_kernels(models=["sd3"]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreter"):
        compile_launch(variants("sm_90", ranks=(16,))[0].launch, "sm_90")
