"""nginx's log is rotated again and again under load, and the relay that follows it is killed: each play once."""

from __future__ import annotations

import itertools
import random
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from t23_middleware.ops.standin import StandInServer

from ..harness import PATIENCE, until
from ..nginx.stage import TINY, TINY_BYTES, Stage, behind_nginx, target
from ..servers.client import Client
from .api import relay

pytestmark = pytest.mark.chaos

CLIENTS = 4
#: Half of the plays are sent by the app, half by nginx.
WAYS = ("file", "accel")
#: Rotations at least, and plays between two of them in the long version.
ROTATIONS, BETWEEN = 5, 3000
#: Seconds in which all that waits has to arrive.
ARRIVAL = 300.0


def test_rotations_with_relay_kills(plays: int, seed: int):
    """Rotations and kills of the relay lose and double nothing.

    The stand-in has the API's own cache here: it recognises what a killed relay sends again, not a second report.
    """
    rotations = max(ROTATIONS, plays // BETWEEN)
    with behind_nginx("gunicorn", api=StandInServer(), T23_RELAY="external") as stage:
        with relaying(stage):  # one that never read the log looks back two rotations only
            with Client(stage.nginx.ports["plain"]) as client:
                client.ask("GET", target(WAYS[0], session(plays), TINY))
            stage.api.wait_for(1)
        with load(stage, plays) as done, mortal_relay(stage, random.Random(seed)) as kills:
            for rotation in range(rotations):
                done.wait_for(plays * (rotation + 1) // (rotations + 1))
                stage.nginx.rotate()
            done.wait_for(plays)
            assert until(lambda: len(kills) >= rotations), stage.said()
        with relaying(stage):
            try:
                stage.api.wait_for(plays + 1, ARRIVAL)
            except TimeoutError as error:
                raise AssertionError(told(stage)) from error
            assert until(lambda: stage.status()["waiting"] == 0, ARRIVAL), told(stage)
        status, recorded = stage.status(), stage.api.recorded()
    print(f"--seed {seed}: {plays} plays, {rotations} rotations, {len(kills)} kills, {status['counters']}")
    assert (status["captured"], status["lost"], status["dead"]) == (plays + 1, 0, 0)
    assert Counter(report["session_id"] for report in recorded) == Counter(map(session, range(plays + 1)))
    assert {report["bytes_total"] for report in recorded} == {str(TINY_BYTES)}


def told(stage: Stage) -> str:
    """What is known of a stage where something is missing."""
    return f"{len(stage.api.recorded())} recorded, {stage.status()}\n{stage.said()}"


class Done:
    """How many plays are over."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.count = 0

    def add(self) -> None:
        self.count = next(self._numbers)

    def wait_for(self, count: int) -> None:
        """Gives up when nothing has come for as long as :data:`PATIENCE`."""
        while (before := self.count) < count:
            assert until(lambda before=before: self.count > before), "no client goes on"


def session(number: int) -> str:
    return f"r{number}"


@contextmanager
def load(stage: Stage, plays: int) -> Iterator[Done]:
    """So many plays, each of a session of its own, by a few clients that keep their connections."""
    numbers, done, over = iter(range(plays)), Done(), threading.Event()
    taking = threading.Lock()

    def go_on_playing() -> None:
        with Client(stage.nginx.ports["plain"]) as client:
            while not over.is_set():
                with taking:
                    number = next(numbers, None)
                if number is None:
                    return
                answer = client.ask("GET", target(WAYS[number % 2], session(number), TINY))
                assert len(answer.body) == TINY_BYTES
                done.add()

    threads = [threading.Thread(target=go_on_playing) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        over.set()
        for thread in threads:
            thread.join()


def relaying(stage: Stage) -> AbstractContextManager[subprocess.Popen[bytes]]:
    state = stage.apps["gunicorn"].state.path
    return relay(state, stage.api.url, T23_PROXY_LOG=str(stage.nginx.log))


@contextmanager
def mortal_relay(stage: Stage, chosen: random.Random) -> Iterator[list[int]]:
    """A relay that is killed by SIGKILL again and again, and for a while is not there; yields who was killed."""
    over = threading.Event()
    killed: list[int] = []

    def live_and_die() -> None:
        while not over.wait(chosen.uniform(0, 1)):
            with relaying(stage) as process:
                over.wait(chosen.uniform(0.3, 3))
                process.kill()
                process.wait(PATIENCE)
                killed.append(process.pid)

    thread = threading.Thread(target=live_and_die)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
