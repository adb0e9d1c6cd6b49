"""A relay that hangs says where, and one that is asked says it too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import StateFolder, lock_is_held

from ..harness import PATIENCE, ROOT, until

#: A relay to which a second without a round is a minute.
SCRIPT = """
import os, sys
from t23_middleware.ops.cli import main
from t23_middleware.relay import watchdog
from t23_middleware.relay.journals import Journals
watchdog.HANGS_AFTER, watchdog.ENDS_AFTER = 1.0, float(sys.argv[1])
read = Journals.read
def hang(*arguments):
    pipe = os.environ["T23_STATE_DIR"] + "/hangs"
    if os.path.exists(pipe):
        open(pipe).close()
    return read(*arguments)
Journals.read = hang
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


def test_hanging_relay_logs_stack(folder, start):
    """A relay that hangs logs where, and goes on when it can."""
    pipe = folder.path / "hangs"
    os.mkfifo(pipe)  # opening it blocks until somebody opens its other end
    relay = start()
    assert until(lambda: "The relay stands still for" in relay.log()), relay.log()
    assert until(lambda: "in hang" in relay.log())
    writer = os.open(pipe, os.O_WRONLY)
    pipe.unlink()
    os.close(writer)
    assert until(lambda: "the relay stood still for" in relay.log()), relay.log()
    relay.process.terminate()
    assert relay.process.wait(PATIENCE) == 0


def test_sigusr1_logs_stack(folder, start):
    """A relay that gets SIGUSR1 logs where it is and goes on."""
    relay = start()
    assert until(lambda: folder.outbox.exists())
    relay.process.send_signal(signal.SIGUSR1)
    assert until(lambda: "process.py" in relay.log()), relay.log()
    relay.process.terminate()
    assert relay.process.wait(PATIENCE) == 0


def test_permanently_hanging_relay_is_killed(folder, start):
    """A relay that hangs for too long is ended, so that another one can take its place."""
    os.mkfifo(folder.path / "hangs")
    relay = start(ends_after=3.0)
    assert relay.process.wait(PATIENCE) == -signal.SIGKILL, relay.log()
    assert "in hang" in relay.log()
    assert not lock_is_held(folder.relay_lock)


@pytest.mark.parametrize("ends_after", [1.0, 600.0])
def test_frozen_relay_goes_on(folder: StateFolder, start: Callable[..., Started], ends_after: float) -> None:
    """A relay that was frozen for longer than a loop may hang is neither told nor ended, and works on."""
    relay = start(ends_after)
    assert until(lambda: folder.outbox.exists())
    for _ in range(2):
        relay.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, relay.process.pid, os.WSTOPPED)
        time.sleep(2.5)
        relay.process.send_signal(signal.SIGCONT)
    assert until(lambda: not folder.relay_start.exists())
    time.sleep(0.3)
    assert relay.process.poll() is None
    assert "still" not in relay.log()
    relay.process.terminate()
    assert relay.process.wait(PATIENCE) == 0


def test_frozen_time_is_not_counted() -> None:
    """A loop that hangs is told by the time that the process ran, whatever was frozen in between."""
    script = """
import signal, sys, time
from t23_middleware.relay import watchdog
watchdog.HANGS_AFTER, watchdog.ENDS_AFTER = 1.5, 600.0
dog = watchdog.Watchdog(0.0)
with dog.watching():
    print("hangs", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        began = time.monotonic()
        process.send_signal(signal.SIGCONT)
        assert process.stderr.readline().startswith("The relay stands still for")
        assert time.monotonic() - began > 0.5
    finally:
        process.kill()
        process.communicate()
