"""Some hundred random apps; ``python -m tests.random_apps.compare`` tries ten thousand."""

from __future__ import annotations

import pytest

from ..harness import lacking
from ..servers.setups import missing
from .compare import SETUPS, USUAL, compare

FIRST = 1
APPS = 150


@pytest.mark.parametrize("server", USUAL)
def test_random_apps_stay_the_same(server: str) -> None:
    """Client, app and log see the same with us, and the journal has each complete media answer's bytes."""
    reason = missing(SETUPS[server])
    if reason is not None:
        lacking(reason)
    faults = compare(server, list(range(FIRST, FIRST + APPS))).faults
    assert not faults, "\n".join(map(str, faults))
