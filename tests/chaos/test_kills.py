"""SIGKILL, everywhere and at the worst moments: nothing lost, and doubled at most what was in flight."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import lock_owner

from ..harness import PATIENCE, Server, running, until
from .api import plain_api, relay
from .load import IN_FLIGHT, Oracle, Verdict, all_arrived, load, workers_of

pytestmark = pytest.mark.chaos

GUNICORN = "gunicorn -w {} -k gthread --threads 4 -b 127.0.0.1:PORT tests.chaos.app:app"
#: Seconds in which all that waits has to arrive, on a busy machine, with the API's longest pause.
ARRIVAL = 120.0

#: Where the relay dies -> reports that may arrive twice then: none before the first was sent.
CRASH_POINTS = {
    "after_ingest_commit": 0,
    "after_unlink": IN_FLIGHT,
    "after_claim": 0,
    "after_send": IN_FLIGHT,
    "after_ack": IN_FLIGHT,
}


def test_thirty_kills_under_load_lose_nothing(kills: int, seed: int, tmp_path: Path) -> None:
    chosen, oracle = random.Random(seed), Oracle()
    victims = [("worker", "relay", "api")[number % 3] for number in range(kills)]
    chosen.shuffle(victims)
    print(f"--seed {seed}: {' '.join(victims)}")
    with plain_api() as api, running(GUNICORN.format(4), tmp_path / "state", api.url) as server:
        api.fault(
            "latency", seconds=0.03
        )  # so that each kill finds reports that are recorded and not answered
        with load(server.port, oracle, clients=6):
            for victim in victims:
                time.sleep(chosen.uniform(0.1, 0.7))
                KILL[victim](server, api, oracle, chosen)
            time.sleep(1)

        def has_all() -> bool:
            server.get("/")  # only a request starts the next relay, and the last one may have been killed
            return all_arrived(oracle.held(), api.recorded())

        assert until(has_all, ARRIVAL), told(server)
        server.stop()
        verdict = Verdict.of(oracle.held(), api.recorded())
    print(verdict)
    assert verdict.held > 10 * kills
    assert verdict.nothing_is_lost()
    assert verdict.doubled <= IN_FLIGHT * sum(victim != "worker" for victim in victims)


def test_kills_beside_lost_answers(kill_seconds: float, seed: int, tmp_path: Path) -> None:
    """Workers and relays die at random moments, and answers of the API are lost after it has recorded the report."""
    chosen, oracle, over = random.Random(seed), Oracle(), time.monotonic() + kill_seconds
    killed, cut = Counter[str](), 0
    print(f"--seed {seed}")
    with plain_api() as api, running(GUNICORN.format(4), tmp_path / "state", api.url) as server:
        with load(server.port, oracle, clients=6):
            while time.monotonic() < over:
                time.sleep(chosen.uniform(0.1, 1.5))
                victim = chosen.choice(["worker", "relay", "answers"])
                killed[victim] += 1
                if victim == "answers":
                    number = chosen.randint(1, 5)
                    cut += number
                    api.fault("cut", count=number)
                else:
                    KILL[victim](server, api, oracle, chosen)
        api.heal()

        def has_all() -> bool:
            server.get("/")
            return all_arrived(oracle.held(), api.recorded())

        assert until(has_all, ARRIVAL), told(server)
        server.stop()
        verdict = Verdict.of(oracle.held(), api.recorded())
    print(f"{dict(killed)}, {verdict}")
    assert verdict.held > 5 * kill_seconds
    assert verdict.nothing_is_lost()
    assert verdict.doubled <= cut + IN_FLIGHT * killed["relay"]


def kill_a_worker(server: Server, api: StandInServer, oracle: Oracle, chosen: random.Random) -> None:
    assert until(lambda: workers_of(server.process.pid))
    oracle.kill(chosen.choice(workers_of(server.process.pid)))


def kill_the_relay(server: Server, api: StandInServer, oracle: Oracle, chosen: random.Random) -> None:
    # Relays that end at their start are tried more and more seldom, up to a minute apart.
    assert until(lambda: lock_owner(server.state.relay_lock), ARRIVAL), told(server)
    os.kill(lock_owner(server.state.relay_lock) or 0, signal.SIGKILL)


def kill_the_api(server: Server, api: StandInServer, oracle: Oracle, chosen: random.Random) -> None:
    api.stop()
    time.sleep(chosen.uniform(0.0, 0.5))
    api.start()


KILL: dict[str, Callable[[Server, StandInServer, Oracle, random.Random], None]] = {
    "worker": kill_a_worker,
    "relay": kill_the_relay,
    "api": kill_the_api,
}


def told(server: Server) -> str:
    """What server and relay said, for a failing test."""
    return server.log() + server.state.relay_log.read_text(errors="replace")


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Verdict]]]:
    """All crashes side by side."""
    with ThreadPoolExecutor(len(CRASH_POINTS)) as pool:
        yield {
            point: pool.submit(crash, point, tmp_path_factory.mktemp(point) / "state")
            for point in CRASH_POINTS
        }


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_crash_between_relay_steps(point: str, crashes: dict[str, Future[Verdict]]) -> None:
    """A crash between two steps of the relay loses nothing, and doubles at most what was in flight."""
    verdict = crashes[point].result()
    assert verdict.held >= 100
    assert verdict.nothing_is_lost()
    assert verdict.doubled <= CRASH_POINTS[point]


def crash(point: str, state: Path) -> Verdict:
    """A relay that finds a backlog, with a dead worker's journal in it, dies there; another goes on."""
    oracle = Oracle()
    with plain_api() as api, running(GUNICORN.format(2), state, api.url, T23_RELAY="external") as server:
        with load(server.port, oracle, clients=2):
            assert until(lambda: len(oracle.held()) >= 50), server.log()
            oracle.kill(workers_of(server.process.pid)[0])
            with relay(state, api.url, _T23_CRASH_AT=point) as victim:
                assert victim.wait(PATIENCE) == -signal.SIGKILL
            already = len(oracle.held())
            with relay(state, api.url):
                assert until(lambda: len(oracle.held()) >= already + 50), server.log()
        with relay(state, api.url):
            assert until(lambda: all_arrived(oracle.held(), api.recorded()), ARRIVAL)
        return Verdict.of(oracle.held(), api.recorded())
