"""CI fails on a skip that is not on the list."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

def test_listed():
    pytest.skip("reference data absent: /nowhere")

@pytest.mark.skipif(True, reason="flaky")
def test_unlisted():
    pass

@pytest.mark.xfail(reason="broken")
def test_known_to_fail():
    assert False

def test_passes():
    pass
"""


@pytest.mark.parametrize(
    ("ci", "told"), [("true", "1 failed, 1 passed, 1 skipped, 1 error"), ("", "1 passed, 2 skipped")]
)
def test_an_unlisted_skip_fails_in_ci_alone(ci, told, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_whole_file.py").write_text('import pytest; pytest.skip("slow", allow_module_level=True)\n')
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def run(file):
        command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "no:cacheprovider", str(tmp_path / file)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run("test_some.py")
    assert told in done.stdout, done.stdout
    assert done.returncode == bool(ci)
    assert ("does not list: Skipped: flaky" in done.stdout) == bool(ci)
    assert (run("test_whole_file.py").returncode == 2) == bool(ci)
