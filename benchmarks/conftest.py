"""Options of the benchmarks."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reference", default=None, metavar="DIR", help="another implementation: DIR/reference.py")
