"""The options of the long version; see this package's docstring."""

from __future__ import annotations

import random

import pytest

#: Kills of workers, relay and API in all.
KILLS = 30
#: Plays through nginx, over its log's rotations.
PLAYS = 6000
#: Seconds of kills beside lost answers.
KILL_SECONDS = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos")
    group.addoption(
        "--kills", type=int, default=KILLS, help="kills in tests/chaos; above 30, outages last longer too"
    )
    group.addoption(
        "--plays",
        type=int,
        default=PLAYS,
        help="plays through nginx in tests/chaos; its log is rotated each 3000",
    )
    group.addoption(
        "--kill-seconds", type=float, default=KILL_SECONDS, help="seconds of kills beside lost answers"
    )
    group.addoption("--seed", type=int, default=None, help="what tests/chaos draws its orders and places by")


# With a default of their own: run with all other tests, this file is read too late to add options.


@pytest.fixture(scope="session")
def kills(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--kills", KILLS))


@pytest.fixture(scope="session")
def plays(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--plays", PLAYS))


@pytest.fixture(scope="session")
def kill_seconds(pytestconfig: pytest.Config) -> float:
    return float(pytestconfig.getoption("--kill-seconds", KILL_SECONDS))


@pytest.fixture(scope="session")
def outage_seconds(kills: int) -> float:
    return 10.0 if kills <= KILLS else 20.0


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    given = pytestconfig.getoption("--seed", None)
    return random.randrange(1 << 32) if given is None else int(given)
