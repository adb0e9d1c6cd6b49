"""What stops every greenlet of a worker is a lock that the worker waits for: ours waits for none."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from ..harness import need, running, until
from .api import plain_api
from .load import Oracle, Verdict, all_arrived, load, workers_of

pytestmark = pytest.mark.chaos

GUNICORN = "gunicorn -w 2 -k gevent -b 127.0.0.1:PORT tests.chaos.app:app"
#: Seconds for which another process has the outbox's lock, each time.
HELD = 0.3


def test_gevent_worker_never_opens_outbox(tmp_path: Path) -> None:
    """A gevent worker does not use the outbox: it has neither the file open nor SQLite loaded.

    The hub's pauses are not measured, because a busy machine would change them.
    """
    need("gunicorn")
    oracle = Oracle()
    with plain_api() as api, running(GUNICORN, tmp_path / "state", api.url) as server:
        with load(server.port, oracle, clients=4):
            api.wait_for(1, 60)
            for _ in range(5):
                with outbox_locked(server.state.outbox):
                    already = len(oracle.held())
                    assert until(lambda already=already: len(oracle.held()) > already), server.log()
                    for worker in workers_of(server.process.pid):
                        assert_without_sqlite(worker)
        assert until(lambda: all_arrived(oracle.held(), api.recorded()), 60), server.log()
        server.stop()
        verdict = Verdict.of(oracle.held(), api.recorded())
    assert verdict.nothing_is_lost()
    assert verdict.doubled == 0


@contextmanager
def outbox_locked(path: Path) -> Iterator[None]:
    """Nobody else can write it meanwhile, nor for :data:`HELD` seconds at least."""
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        time.sleep(HELD)
        yield
        db.execute("ROLLBACK")


def opened_by(worker: int) -> list[str]:
    return [str(descriptor.resolve()) for descriptor in Path(f"/proc/{worker}/fd").iterdir()]


def assert_without_sqlite(worker: int) -> None:
    assert until(lambda: any(name.endswith(".journal") for name in opened_by(worker)))
    assert not [name for name in opened_by(worker) if "outbox" in name]
    assert "_sqlite3" not in Path(f"/proc/{worker}/maps").read_text()
