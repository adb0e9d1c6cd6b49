"""The commands as an operator runs them: processes of their own, on a state folder and a stand-in."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t23_middleware.ops.standin import StandInServer
from t23_middleware.relay.delivery import ACCEPTED
from t23_middleware.relay.outbox import SQLiteOutbox
from t23_middleware.settings import Settings
from t23_middleware.state import StateFolder, lock_is_held

from ..harness import PATIENCE, ROOT, until
from ..relay.writers import journal, transfer

#: What keeps a command's figures readable by tests: 80 columns, no settings but these.
_COLUMNS = {"COLUMNS": "80", "PYTHONUNBUFFERED": "1"}


class Site:
    """A state folder, the API that it reports to, and the commands run with both."""

    def __init__(self, state: Path, api: StandInServer) -> None:
        self.folder = StateFolder(state)
        self.api = api
        self.environ = {"T23_API_URL": api.url, "T23_STATE_DIR": str(state), "T23_TIMEOUT": "5"}
        self._plays = 0

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """``t23-middleware *words``, to its end."""
        command = [sys.executable, "-m", "t23_middleware", *words]
        return self.start_process(command, environ, subprocess.run, timeout=4 * PATIENCE)

    def start(self, *words: str, **environ: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "t23_middleware", *words]
        return self.start_process(command, environ, subprocess.Popen)

    def python(self, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """A script of ours, to its end."""
        return self.start_process(
            [sys.executable, "-c", script], environ, subprocess.run, timeout=4 * PATIENCE
        )

    def start_process(
        self, command: list[str], environ: dict[str, str], how: Callable[..., Any], **more: Any
    ) -> Any:
        return how(
            command,
            env=os.environ | _COLUMNS | self.environ | environ,
            cwd=ROOT,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **more,
        )

    @contextmanager
    def on_terminal(self, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        """The command on a terminal of 80 columns; the process, and the descriptor that its screen is read from."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-m", "t23_middleware", *words],
            env=os.environ | self.environ,
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        try:
            yield process, master
        finally:
            process.kill()
            process.wait()
            os.close(master)

    def status(self) -> dict[str, Any]:
        """What ``status --json`` says; its figures add up."""
        done = self.run("status", "--json")
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        assert status["captured"] == sum(status[name] for name in ("waiting", "sent", "dead", "lost"))
        return status

    def play(self, count: int = 1, photo: str = "1", session: str = "session") -> None:
        """Plays of as many sessions, in the journal of a worker that has ended."""
        first, self._plays = self._plays, self._plays + count
        now_ns = time.monotonic_ns()
        plays = [transfer(n, now_ns, f"{session}-{n}", photo=photo) for n in range(first, self._plays)]
        journal(self.folder, f"worker{first}", *plays)

    def prove(self) -> None:
        """As if the API had taken a report from this folder once: what it refuses is dead from then on."""
        self.folder.create()
        outbox = SQLiteOutbox(self.folder.outbox)
        outbox.note({ACCEPTED: "1"})
        outbox.close()

    def deliver(self) -> subprocess.CompletedProcess[str]:
        return self.run("relay", "--once")

    @contextmanager
    def relay(self, automatic: bool = False, **environ: str) -> Iterator[subprocess.Popen[str]]:
        """A relay at work: as a service, or as a worker starts it."""
        mark = {"_T23_STARTED_BY_WORKER": "1"} if automatic else {}
        process = self.start("relay", **mark, **environ)
        try:
            assert until(lambda: lock_is_held(self.folder.relay_lock) or process.poll() is not None)
            assert until(lambda: self.holder_pid() == process.pid or process.poll() is not None)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()

    def holder_pid(self) -> int | None:
        holder = self.folder.relay_holder()
        return holder.pid if holder else None

    def digest(self) -> str:
        """What a worker with these settings writes into its journal."""
        return Settings(environ=self.environ).relay_digest()


#: Columns before the words of an item of ``status``, at most those of any command's.
HANGING = 18


def fits(output: str) -> bool:
    """Whether no line is wider than 80 columns, but for one word that fits on none."""
    return all(
        len(line) <= 80 or len(line) - len(line.split()[-1]) <= HANGING for line in output.splitlines()
    )
