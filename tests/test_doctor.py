"""The doctor names what is wrong: a kernel, a kernel that kills its process, a card's file that cannot be right."""

import dataclasses
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from cmlora import cli
from cmlora.lab.bench.tiny import DEVICE
from cmlora.lab.doctor import examination, kernels, report
from cmlora.lab.doctor.cases import small_layers, variants_of
from cmlora.lab.doctor.examination import Examination, check_kernels, disagreement, examine
from cmlora.lab.doctor.findings import Finding
from cmlora.lab.doctor.machine import examine_machine
from cmlora.lab.doctor.speed import Timed
from cmlora_kernels import cards
from cmlora_kernels.cards import Measured
from cmlora_kernels.launch import Launch
from cmlora_kernels.variants import variants

MEASURED = Measured("CPU", cards.triton_version(), 4e10, 1e11, 1e11, 0.8, 2e-5)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def found_on(machine, **fields):
    shape = Timed("2x8x64->64", 1e-5, 2e-5, 3e-5, 2e-5, "fused", 1.25)
    return Examination(machine, [Finding("add", "right", error=0.0, allowed=1.0)], [shape], MEASURED, **fields)


def test_a_planted_wrong_kernel_is_named_and_no_other(monkeypatch):
    """One number of what a kernel wrote is off by as much as a lost rounding would not explain."""
    call = Launch.__call__

    def planted(self, *tensors):
        call(self, *tensors)
        if self.kernel.__name__ == "add_kernel":
            tensors[0].view(-1)[3] += 0.05

    monkeypatch.setattr(Launch, "__call__", planted)
    cases = list(small_layers((torch.float16,), (8,)))
    found = list(kernels.check_all(cases, torch.device(DEVICE), 60))
    assert len(found) == len(cases) > 8
    wrong = {finding.name for finding in found if finding.bad}
    assert wrong == {finding.name for finding in found if finding.name.startswith("add ")}
    assert all("off by" in finding.detail for finding in found if finding.bad)
    assert "WRONG: add aligned r8 float16: off by" in "\n".join(
        report.summary_lines(Examination(examine_machine(), found))
    )


def test_a_kernel_that_kills_its_process_is_named_and_the_next_ones_go_on(monkeypatch):
    """The process of the kernels is replaced with one that dies in the second of three."""
    program = (
        "import sys, os, json\n"
        "for i, name in list(enumerate(['one', 'two', 'three']))[int(sys.argv[3]):]:\n"
        "    print(json.dumps({'begins': name}), flush=True)\n"
        "    if name == 'two': os.abort()\n"
        "    print(json.dumps({'name': name, 'state': 'right'}), flush=True)\n"
    )
    monkeypatch.setattr(examination, "command", lambda module, *rest: [sys.executable, "-c", program, *rest])
    found = check_kernels(examine_machine(), 20, lambda what: None)
    assert [(finding.name, finding.state) for finding in found] == [
        ("one", "right"),
        ("two", "failed"),
        ("three", "right"),
    ]
    assert "its process died" in found[1].detail


def test_what_is_checked_on_a_gpu_are_the_codes_of_all_layers():
    """One case per compiled code of the layers; the inspection, which counts more adapters, knows no others."""
    for target in ("sm_86/28/NVIDIA GeForce RTX 3060", "sm_90"):
        cases = variants_of(target, torch.float16, (16,))
        names = {kind for case in cases for kind in [case.name.split()[0]]}
        assert names >= {"fused", "add", "merged", "conv3x3", "conv1x1"}
        inspected = [v for v in variants(target, dtypes=[torch.float16], ranks=(16,)) if "multi_lora" in str(v.launch)]
        assert len(cases) > 0.9 * len(inspected)


@pytest.mark.usefixtures("own_cache")
def test_a_planted_slow_file_and_a_broken_one_are_named_and_written_anew():
    machine = examine_machine()
    slow = dataclasses.replace(MEASURED, bandwidth=4e8)
    path = cards.write(slow)
    found = found_on(machine)
    examination._card_file(found, keep=True)
    assert "bandwidth 4e+08, measured now 4e+10" in found.file_said
    assert found.file_said in "\n".join(report.summary_lines(found))
    assert cards.read("CPU") == MEASURED
    path.write_text("{")
    examination._card_file(found, keep=True)
    assert "is broken" in found.file_said
    assert cards.read("CPU") == MEASURED
    assert disagreement(MEASURED, dataclasses.replace(MEASURED, half_flops=1.2e11)) == ""


@pytest.mark.usefixtures("own_cache")
def test_nothing_is_written_from_a_machine_that_computes_wrong():
    found = found_on(examine_machine())
    found.findings.append(Finding("add", "wrong", "off by 1"))
    examination._card_file(found, keep=True)
    assert found.file is None
    assert cards.read("CPU") is None
    assert not found.healthy


def test_the_command_exits_with_an_error_and_writes_json(monkeypatch, tmp_path):
    machine = examine_machine()
    for bad, code in ((False, 0), (True, 1)):
        found = found_on(machine, seconds=1.0)
        if bad:
            found.findings.append(Finding("fused 2x8", "wrong", "off by 1, allowed 0"))
        monkeypatch.setattr(examination, "examine", lambda *_, found=found, **__: found)
        done = CliRunner().invoke(cli.app, ["doctor", "--json", str(tmp_path / "out.json")])
        assert done.exit_code == code, done.output
        assert json.loads((tmp_path / "out.json").read_text())["healthy"] is not bad
        assert ("WRONG: fused 2x8: off by 1, allowed 0" in done.output) is bad
        assert len(report.summary_lines(found)) <= 10


@pytest.mark.usefixtures("own_cache")
def test_all_parts_run_in_their_processes_and_say_what_there_was_no_time_for():
    found = examine(examine_machine(), 4, lambda what: None)
    states = {finding.state for finding in found.findings}
    assert "right" in states
    assert not [finding for finding in found.findings if finding.bad]
    assert any(finding.detail == "no time left" for finding in found.findings)
    assert found.healthy
    assert found.file is not None
    json.dumps(report.as_dict(found))
