from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from t23_middleware.ops.standin import StandIn, StandInServer

from .commands import Site


@pytest.fixture
def site(state: Path) -> Iterator[Site]:
    """A state folder that does not exist yet, and a stand-in that knows every video but 404."""
    with StandInServer(app=StandIn(unknown_photos={"404"})) as api:
        yield Site(state, api)
