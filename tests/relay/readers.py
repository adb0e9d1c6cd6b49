"""What is in the outbox, for tests of a relay that may be working on it, or only be making it: then there is nothing."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from t23_middleware.relay.outbox import NoOutbox, OutboxView, Snapshot, Stats
from t23_middleware.relay.outbox.connection import open_beside
from t23_middleware.state import StateFolder

_NOTHING = Snapshot(Stats(0, 0, 0, 0, 0), [], None, {}, [], {}, {})


def seen(folder: StateFolder) -> Snapshot:
    """All that a look tells."""
    try:
        with OutboxView(folder.outbox) as view:
            return view.snapshot()
    except NoOutbox:
        return _NOTHING


def stats(folder: StateFolder) -> Stats:
    """The figures, which add up at every moment."""
    found = seen(folder).stats
    assert found.captured == found.waiting + found.sent + found.dead + found.lost
    return found


def rows(folder: StateFolder, query: str) -> list[Any]:
    """What no look tells."""
    try:
        with closing(open_beside(folder.outbox, "ro")) as db:
            return db.execute(query).fetchall()
    except NoOutbox:
        return []
