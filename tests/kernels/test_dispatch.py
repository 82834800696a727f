"""Installs that may be: no triton, no C compiler, an old GPU; the definitions run, and one warning says why."""

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cmlora_kernels import combine_noise, dispatch
from cmlora_kernels.chips import has_kernels
from cmlora_kernels.costs import choose
from cmlora_kernels.tiles import Problem

ROOT = Path(__file__).resolve().parents[2]
ON_THE_GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
"""All of a tensor that the choice looks at."""


@pytest.fixture
def install(monkeypatch):
    """A machine with a GPU, as it is described; what this process found out about its own is set aside."""

    def describe(arch="sm_90", triton_there=True, driver=lambda: "target"):
        active = SimpleNamespace(get_current_target=driver)
        fake = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
        monkeypatch.setattr(dispatch, "arch_of", lambda device: arch)
        monkeypatch.setattr(dispatch, "HAS_TRITON", triton_there)
        monkeypatch.setattr(dispatch, "triton", fake)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    dispatch.why_not.cache_clear()
    dispatch._usable.cache_clear()
    yield describe
    dispatch.why_not.cache_clear()
    dispatch._usable.cache_clear()


def no_compiler():
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


def test_a_gpu_with_triton_runs_the_kernels_and_asks_once(install):
    asked = []
    install(driver=lambda: asked.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(dispatch.use_triton(ON_THE_GPU, backend) for backend in ("auto", "triton", "auto"))
    assert asked == [1]
    assert not dispatch.use_triton(ON_THE_GPU, "torch")


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"triton_there": False}, "triton is not installed"),
        ({"driver": no_compiler}, "Failed to find C compiler"),
        ({"arch": "sm_75"}, "compute capability 8.0 or newer, got sm_75"),
    ],
    ids=["windows", "no compiler", "sm_75"],
)
def test_a_gpu_that_cannot_run_triton_runs_the_definitions_with_one_warning(install, machine, reason):
    install(**machine)
    with pytest.warns(RuntimeWarning, match=reason) as seen:
        assert not any(dispatch.use_triton(ON_THE_GPU, "auto") for _ in range(3))
    assert len(seen) == 1
    with pytest.raises(ValueError, match=f"backend='triton' cannot run on cuda:0: .*{reason}"):
        dispatch.use_triton(ON_THE_GPU, "triton")


def test_without_triton_all_ops_run_and_the_forced_kernel_names_what_is_missing():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, cmlora_kernels as ck\n"
        "noise, weights = torch.randn(4, 4, 8, 8), torch.rand(2, 2)\n"
        "ck.combine_noise(noise, weights)\n"
        "try: ck.combine_noise(noise, weights, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "backend='triton' cannot run on cpu: triton is not installed" in done.stdout


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"cannot run on cpu: kernels need a CUDA or ROCm tensor.*TRITON_INTERPRET=1"):
        combine_noise(torch.randn(2, 4, 8, 8), torch.rand(1, 2), backend="triton")


def test_old_gpus_have_no_kernels_and_the_cost_model_plans_with_none():
    assert not any(map(has_kernels, ("sm_70", "sm_75")))
    assert all(map(has_kernels, ("sm_80", "sm_89", "sm_120", "gfx942")))
    assert not has_kernels("sm_75")
    problem = Problem(2, 64, 320, 320, 16, 1, 2, torch.float16, True)
    assert choose(problem, "sm_75").strategy == "definition"
