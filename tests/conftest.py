"""What the tests share: an environment without our variables, a state folder, and a look into its journals."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from t23_middleware import T23Middleware
from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import StateFolder
from t23_middleware.transfer import Counts, JournalLine, Opening, Transfer, Writer, decode

# A shell without job control starts what runs in the background deaf to Ctrl-C, and so would be all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Journals:
    """The journals in a state folder, decoded; a line that is torn raises."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def files(self) -> list[Path]:
        return sorted((self.state / "journals").glob("*.journal"))

    def lines(self) -> list[JournalLine]:
        return [decode(line) for file in self.files() for line in file.read_bytes().splitlines()]

    def writers(self) -> list[Writer]:
        return [line for line in self.lines() if isinstance(line, Writer)]

    def opened(self) -> list[Opening]:
        return [line for line in self.lines() if isinstance(line, Opening)]

    def closed(self) -> list[Transfer]:
        closed = [line for line in self.lines() if isinstance(line, Transfer)]
        return sorted(closed, key=lambda transfer: transfer.ended_ns)

    def sent(self) -> list[int]:
        """Bytes of each close line, in the order of the closes."""
        return [transfer.sent for transfer in self.closed()]

    def counts(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for line in self.lines():
            if isinstance(line, Counts):
                total.update(line.counts)
        return total


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("T23_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder that does not exist yet."""
    return tmp_path / "state"


@pytest.fixture
def folder(state: Path) -> StateFolder:
    """One that does."""
    folder = StateFolder(state)
    folder.create()
    return folder


@pytest.fixture
def api() -> Iterator[StandInServer]:
    """The API, as its documentation says."""
    with StandInServer() as server:
        yield server


@pytest.fixture
def journals(state: Path) -> Journals:
    return Journals(state)


@pytest.fixture
def wrap(state: Path) -> Callable[..., T23Middleware]:
    """Wraps an app so that it is captured into the state folder, and no relay is started."""

    def wrapped(app: Any, **arguments: Any) -> T23Middleware:
        given = {"api_url": "http://127.0.0.1:9", "state_dir": str(state), "relay": "off", **arguments}
        return T23Middleware(app, **given)

    return wrapped
