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
from cmlora_kernels.machine_code import read_amdgcn, read_sass
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
        out, error = process.communicate(timeout=900)
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
        if name.startswith("sm_") and any(part in name for part in ("multi_lora", "merged")):
            contiguous = "conv" in name and "channels_last" not in name  # a tap shifts the row by one pixel: 2 bytes
            assert bool(row["async_copy"]) == (not contiguous), name
            assert row["narrow_access_bytes"] == (2 if contiguous else 16), name


def test_the_pipeline_of_small_cards_holds_two_tiles(inspected: dict[str, dict]) -> None:
    for target in ("sm_80", "sm_86", "sm_89", "sm_120"):
        row = inspected[f"{target} multi_lora_linear float16: linear 10x1024x640->640 r64 float16"]
        assert row["shared_bytes"] == 2 * (128 + 128 + 64) * 64 * 2
        stages = 3 if target == "sm_80" else 2  # of the expand: tiles of B, the one that is laid anew, a tile of y
        row = inspected[f"{target} multi_lora_add float32: add 10x1024x640->640 r128 float32"]
        assert row["shared_bytes"] == 4 * (stages * 64 * 128 + 32 * 64)


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
    assert {"linear_kernel", "conv_add_kernel", "spectrum_kernel", "concat_channels_kernel", "combine_kernel"} <= names


def test_occupancy_is_bound_by_registers_shared_memory_and_slots() -> None:
    assert occupancy(32, 0, 4, "sm_90") == 1.0
    assert occupancy(168, 0, 4, "sm_90") == 0.188  # 3 warps of 168 registers on each of 4 schedulers
    assert occupancy(32, 100_000, 4, "sm_90") == 0.125  # 2 blocks of 100 KB
    assert occupancy(256, 0, 1, "gfx942") == 0.25


AMDGCN = """
    global_load_dword v9, v8, s[0:1]
.LBB0_1:
    global_load_ushort v0, v4, s[0:1]
    global_load_dwordx4 v[4:7], v4, s[0:1]
    v_add_u32 v4, v4, v8
    v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
    s_cbranch_scc1 .LBB0_1
.LBB0_2:
    global_load_dwordx2 v[0:1], v4, s[0:1]
    v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
    global_store_dwordx2 v4, v[0:1], s[0:1]
    s_cbranch_scc1 .LBB0_2
    .private_segment_fixed_size: 8
    .vgpr_count:     40
    .vgpr_spill_count: 2
"""

SASS = """
        /*0000*/                   LDG.E R9, [R8.64] ;
.L_x_1:
        /*0010*/                   LDG.E.U16 R0, [R4.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], [R6.64], P0 ;
        /*0030*/                   IADD3 R4, R4, R8, RZ ;
        /*0040*/                   HMMA.16816.F32 R12, R4, R10, R12 ;
        /*0050*/                   BRA.U !UP0, `(.L_x_1) ;
.L_x_2:
        /*0060*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], [R6.64], P0 ;
        /*0070*/                   HMMA.16816.F32 R12, R4, R10, R12 ;
        /*0080*/                   STG.E.128 [R4.64], R12 ;
        /*0090*/              @P0  BRA `(.L_x_2) ;
"""


def test_the_main_loop_is_the_one_that_reduces() -> None:
    """An update in place has a second loop, shorter, that stores what the first one has summed."""
    code = read_amdgcn(AMDGCN)
    assert (code.registers, code.spill_bytes, code.local_bytes, code.tensor_core) == (40, 8, 8, "mfma")
    assert (code.access_bytes, code.narrow_access_bytes) == (16, 2)
    code = read_sass(SASS, "REG:40 STACK:0 SHARED:0 LOCAL:0")
    assert (code.tensor_core, code.access_bytes, code.narrow_access_bytes) == ("mma.sync", 16, 2)
    assert not code.async_copy  # one of its loads passes through a register
    assert read_sass(SASS.replace("LDG.E.U16", "LDGSTS.E.64"), "REG:1 STACK:0 LOCAL:0").async_copy == "cp.async"


def test_a_kernel_without_a_loop_is_read_as_a_whole() -> None:
    code = read_sass(SASS.replace("BRA", "NOP"), "REG:40 STACK:0 SHARED:0 LOCAL:0")
    assert (code.access_bytes, code.narrow_access_bytes) == (16, 2)


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
