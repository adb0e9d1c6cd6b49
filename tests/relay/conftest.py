"""The option of the long version of ``test_disk_full.py``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("chaos").addoption(
        "--disk-full",
        type=float,
        default=0.0,
        help="seconds for which tests/relay/test_disk_full.py keeps a disk full",
    )


@pytest.fixture
def full_seconds(pytestconfig: pytest.Config) -> float:
    # With a default of its own: run with all other tests, this file is read too late to add an option.
    return float(pytestconfig.getoption("--disk-full", 0.0))
