"""A relay that hangs says where, and one that is asked says it too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import StateFolder, lock_is_held

from ..harness import PATIENCE, ROOT, until

#: A relay to which a second without a round is a minute.
SCRIPT = """
import sys
from t23_middleware.ops.cli import main
from t23_middleware.relay import watchdog
watchdog.HANGS_AFTER, watchdog.ENDS_AFTER = 1.0, float(sys.argv[1])
sys.exit(main(["relay"]))
"""


class Started:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture
def start(folder: StateFolder, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []
    with StandInServer() as api:

        def begin(ends_after: float = 600.0) -> Started:
            environ = {"T23_API_URL": api.url, "T23_STATE_DIR": str(folder.path), "T23_EXIT_SECONDS": "0.5"}
            with (tmp_path / "relay.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", SCRIPT, str(ends_after)],
                    env=os.environ | environ,
                    cwd=ROOT,
                    stdout=log,
                    stderr=log,
                )
            started.append(Started(process, tmp_path / "relay.log"))
            assert until(lambda: lock_is_held(folder.relay_lock)), started[0].log()
            return started[0]

        yield begin
        for each in started:
            each.process.kill()
            each.process.wait()


def test_a_relay_that_hangs_writes_where_and_goes_on_when_it_can(folder, start):
    pipe = folder.journals / "1-hangs.000000.journal"
    os.mkfifo(pipe)  # opening it blocks until somebody opens its other end
    relay = start()
    assert until(lambda: "Timeout (0:00:0" in relay.log()), relay.log()
    assert until(lambda: "journals.py" in relay.log())
    writer = os.open(pipe, os.O_WRONLY)
    pipe.unlink()
    os.close(writer)
    assert until(lambda: "the relay stood still for" in relay.log()), relay.log()
    relay.process.terminate()
    assert relay.process.wait(PATIENCE) == 0


def test_a_relay_that_is_asked_writes_where_it_is_and_works_on(folder, start):
    relay = start()
    assert until(lambda: folder.outbox.exists())
    relay.process.send_signal(signal.SIGUSR1)
    assert until(lambda: "process.py" in relay.log()), relay.log()
    relay.process.terminate()
    assert relay.process.wait(PATIENCE) == 0


def test_a_relay_that_never_comes_round_again_makes_room_for_another(folder, start):
    os.mkfifo(folder.journals / "1-hangs.000000.journal")
    relay = start(ends_after=3.0)
    assert relay.process.wait(PATIENCE) == -signal.SIGALRM, relay.log()
    assert "journals.py" in relay.log()
    assert not lock_is_held(folder.relay_lock)
