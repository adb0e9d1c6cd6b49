"""Real servers for the tests: started by their own command, ended by their pid, with all that they started."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from examples.flask_app import CLIP, VIDEO
from t23_middleware.state import StateFolder, lock_is_held

from .ports import free_port

ROOT = Path(__file__).parent.parent
MEDIA = "/{tree_id}/{photo}/{token}/{format}/{slug}-video.mp4".format(**VIDEO)
CLIP_BYTES = CLIP.stat().st_size

#: Folder for screenshots, where CI wants them. Taken out of the environment: servers would take it for a setting.
ARTEFACTS = os.environ.pop("T23_ARTEFACTS", "")

#: Seconds that anything may take on a busy machine before a test calls it hung.
PATIENCE = 30.0

#: Each server's own command for the example app; PORT stands for the port.
COMMANDS = {
    "gunicorn sync": "gunicorn -w 2 -b 127.0.0.1:PORT examples.flask_app:app",
    "gunicorn gthread": "gunicorn -w 2 -k gthread --threads 4 -b 127.0.0.1:PORT examples.flask_app:app",
    "gunicorn preload": "gunicorn --preload -w 2 -k gthread --threads 4 -b 127.0.0.1:PORT examples.flask_app:app",
    "gunicorn gevent": "gunicorn -w 2 -k gevent -b 127.0.0.1:PORT examples.flask_app:app",
    "waitress": "waitress-serve --listen=127.0.0.1:PORT examples.flask_app:app",
    "uwsgi": "uwsgi --http-socket 127.0.0.1:PORT --master --processes 4 --die-on-term --module examples.flask_app:app",
    "flask": "flask --app examples.flask_app:app run -p PORT",
}


def need(program: str) -> str:
    """The program's path; without it the test is skipped, or fails in CI, which installs it."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        lacking(f"{program} is not installed")
    return found


def lacking(reason: str) -> NoReturn:
    """Skip the test, or fail it in CI, where everything is installed."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need_root() -> None:
    """Skip a test that only root can run, or fail in CI, which is root."""
    if os.environ.get("CI"):
        pytest.fail("only root can run this")
    pytest.skip("only root can run this")


def let_others_in(folder: Path) -> None:
    """Let other users pass to *folder*: pytest closes its folders to them at each start."""
    for path in (folder, *folder.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)


def answers(port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def until(true: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Wait for something that another process does; whether it came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.02)
    return bool(true())


class Server:
    """A server's own command, in a process group of its own, started through ``t23-middleware run``."""

    def __init__(
        self,
        command: str,
        state: Path,
        api_url: str,
        cwd: Path = ROOT,
        before: tuple[str, ...] = (),
        **environ: str,
    ) -> None:
        self.port = free_port()
        self.state = StateFolder(state)
        words = command.replace("PORT", str(self.port)).split()
        need(words[0])
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environ = os.environ | {
            "PATH": path,
            "T23_API_URL": api_url,
            "T23_STATE_DIR": str(state),
            "T23_PHOTO_PATTERN": "twentythree",
            **environ,
        }
        self._log = state.with_suffix(".log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "t23_middleware", "run", *words],
                env=self.environ,
                cwd=cwd,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_ready(self) -> Server:
        assert until(self._answers), self.log()
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log()
        return answers(self.port)

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        """Status and body of a GET on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(
                "GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()}
            )
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def signal_group(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def stop(self) -> None:
        """End the server as an operator does, and wait until its relay has left too."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.signal_group(signal.SIGKILL)
                self.process.wait()
        self.signal_group(signal.SIGKILL)
        if not until(lambda: not lock_is_held(self.state.relay_lock), 10):
            end_relay(self.state)


def end_relay(state: StateFolder) -> None:
    """Tell the relay of *state* to end, and wait until it has."""
    import json

    if lock_is_held(state.relay_lock):
        os.kill(json.loads(state.relay_lock.read_text())["pid"], signal.SIGTERM)
        assert until(lambda: not lock_is_held(state.relay_lock))


@contextmanager
def running(
    command: str, state: Path, api_url: str, before: tuple[str, ...] = (), **environ: str
) -> Iterator[Server]:
    """The server, once it answers; ended with its relay."""
    server = Server(command, state, api_url, before=before, **environ)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()
