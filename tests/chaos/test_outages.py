"""An API that fails in every way, then is well again: all arrives, and no worker waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import lock_is_held, lock_owner

from ..harness import PATIENCE, ROOT, Server, running, until
from .api import PlainAPI, plain_api, relay
from .load import Oracle, Verdict, all_arrived, play, workers_of

pytestmark = pytest.mark.chaos

GUNICORN = "gunicorn -w 2 -k gthread --threads 4 -b 127.0.0.1:PORT tests.chaos.app:app"
#: Seconds in which all that waits has to arrive once the API is well, its longest pause included.
ARRIVAL = 150.0
PLAYS = 200

OUTAGES: dict[str, dict[str, object]] = {
    "down": {},
    "refuse": {},
    "status": {"status": 503},
    "hang": {},
    "cut": {},
    "deny": {},
}


class Outage(NamedTuple):
    """How an outage went."""

    #: Reports that were recorded though it lasted.
    recorded: int
    verdict: Verdict


@pytest.fixture(scope="module")
def outages(
    tmp_path_factory: pytest.TempPathFactory, outage_seconds: float
) -> Iterator[dict[str, Future[Outage]]]:
    """All outages side by side."""
    with ThreadPoolExecutor(len(OUTAGES)) as pool:
        yield {
            kind: pool.submit(suffer, kind, outage_seconds, tmp_path_factory.mktemp(kind) / "state")
            for kind in OUTAGES
        }


@pytest.mark.parametrize("kind", OUTAGES)
def test_outage_loses_nothing(kind: str, outages: dict[str, Future[Outage]]) -> None:
    """An outage loses nothing, and doubles only what was recorded without an answer."""
    outage = outages[kind].result()
    assert outage.verdict.held == PLAYS
    assert outage.verdict.nothing_is_lost()
    assert (outage.recorded > 0) == (kind == "cut")
    assert outage.verdict.doubled <= outage.recorded


def suffer(kind: str, seconds: float, state: Path) -> Outage:
    oracle = Oracle()
    with plain_api() as api, running(GUNICORN, state, api.url, T23_TIMEOUT="2") as server:
        begin(kind, api)
        play_for(seconds, server, oracle)
        recorded = len(api.recorded())
        end_outage(kind, api, server)
        assert until(lambda: all_arrived(oracle.held(), api.recorded()), ARRIVAL), server.log()
        server.stop()
        return Outage(recorded, Verdict.of(oracle.held(), api.recorded()))


def begin(kind: str, api: StandInServer) -> None:
    if kind == "down":
        api.stop()
    else:
        api.fault(kind, **OUTAGES[kind])


def play_for(seconds: float, server: Server, oracle: Oracle) -> None:
    """All plays, spread over the outage."""
    ends = time.monotonic() + seconds
    for number in range(PLAYS):
        session = f"o{number}"
        response = play(server.port, session)
        assert response is not None, server.log()
        oracle.completed(session, response)
        time.sleep(max(ends - time.monotonic(), 0) / (PLAYS - number))


def end_outage(kind: str, api: StandInServer, server: Server) -> None:
    if kind == "down":
        api.start()
        return
    api.heal()
    if kind == "deny":
        # The relay tries one report each 5 minutes now; an operator who has mended it does not wait for that.
        command = [sys.executable, "-m", "t23_middleware", "relay", "--once"]
        settings = {"T23_API_URL": api.url, "T23_STATE_DIR": str(server.state.path)}
        once = subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, timeout=60)
        assert once.returncode == 0, once.stderr


@pytest.mark.parametrize("told", ["worker", "master"])
def test_shutdown_with_hanging_api(told: str, tmp_path: Path) -> None:
    """Neither worker nor relay waits at its end for an API that hangs.

    No time is measured, because a busy machine would change it: the API answers after both have ended.
    """
    state = tmp_path / "state"
    with plain_api() as api:
        api.fault("hang")
        with running(GUNICORN, state, api.url, T23_TIMEOUT="300") as server:
            assert play(server.port, "hung") is not None
            assert isinstance(api.app, PlainAPI)
            assert until(lambda: api.app.asked), server.log()
            end_by_sigterm(server, told)
            holder = lock_owner(server.state.relay_lock)
            assert holder, "the relay waits for the API"
            os.kill(holder, signal.SIGTERM)
            assert until(lambda: not lock_is_held(server.state.relay_lock))
        api.heal()
        with relay(state, api.url):
            api.wait_for(1, PATIENCE)
        assert [report["session_id"] for report in api.recorded()] == ["hung"]


def end_by_sigterm(server: Server, told: str) -> None:
    workers = workers_of(server.process.pid)
    if told == "master":
        server.process.terminate()
        server.process.wait(PATIENCE)
        return
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    assert until(lambda: not set(workers) & set(workers_of(server.process.pid))), server.log()
