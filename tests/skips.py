"""In CI a test may be skipped for the reasons below and for no other: any other skip is a failure there."""

import os
import re
from typing import Any

import pytest

ALLOWED = (
    "reference data absent: ",  # it lies beside the checkout of those who have it
    "needs a GPU",
    "needs a machine without a GPU: ",
    "needs a package that this library does not: ",  # of quantised weights, whose layers a stand-in shows everywhere
)


def is_allowed(reason: str) -> bool:
    """Whether a skip with this reason, as pytest reports it, is on the list."""
    return re.match("|".join(map(re.escape, ALLOWED)), reason.removeprefix("Skipped: ")) is not None


def fail_unless_allowed(report: Any) -> Any:
    """The report, in CI as a failure if it is a skip (of a test, of a whole file, or xfail) that is not on the list."""
    if os.environ.get("CI") == "true" and report.skipped:
        longrepr = getattr(report, "longrepr", None)
        reason = longrepr[2] if isinstance(longrepr, tuple) else getattr(report, "wasxfail", str(longrepr))
        if not is_allowed(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped in CI for a reason that tests/skips.py does not list: {reason}"
            report.__dict__.pop("wasxfail", None)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    return fail_unless_allowed((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    return fail_unless_allowed((yield))
