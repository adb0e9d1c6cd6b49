"""A server of the matrix as a running process, and what its journals say."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t23_middleware.relay.drains import final_count
from t23_middleware.relay.sock_diag import Listener, dump
from t23_middleware.transfer import Counts, JournalLine, Opening, Transfer, decode

from ..ports import free_port
from .client import Answer, Client
from .setups import BIN, Setup, words

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that anything may take on a busy machine before it is called hung.
PATIENCE = 30.0

FILM_BYTES = 8 << 20
LONG_BYTES = 64 << 20
SHORT_BYTES = 2 << 20


def make_files(folder: Path) -> None:
    """``film.mp4``, in which each 8 bytes are unlike all others, ``long.mp4``, longer than all buffers, and ``short.mp4``,
    which the server's send buffer takes whole."""
    numbers = b"".join(number.to_bytes(8, "little") for number in range(FILM_BYTES // 8))
    (folder / "film.mp4").write_bytes(numbers)
    (folder / "short.mp4").write_bytes(numbers[:SHORT_BYTES])
    (folder / "long.mp4").touch()
    os.truncate(folder / "long.mp4", LONG_BYTES)


class Site:
    """A server that runs, its clients, and the journals that it writes."""

    def __init__(
        self, setup: Setup, process: subprocess.Popen[bytes], port: int, folder: Path, ends: dict[int, int]
    ) -> None:
        self.setup = setup
        self._ends = ends
        self.process = process
        self.port = port
        self.folder = folder
        self._numbers = iter(range(1, 1_000_000))

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def session(self) -> str:
        """A session that no request had yet."""
        return f"s{next(self._numbers)}"

    def client(self, **options: Any) -> Client:
        return Client(self.port, tls=self.setup.tls, **options)

    def bare(self, method: str, path: str, **headers: str) -> Answer:
        """The answer of the app without us, in the same process."""
        return self.ask(method, path, self.session(), X_Bare="1", **headers)

    def ask(self, method: str, path: str, session: str, **headers: str) -> Answer:
        with self.client() as client:
            return client.ask(method, play(path, session), headers)

    def sent(self, session: str) -> list[int]:
        """Bytes of each close line of *session*, once there is one."""
        deadline = time.monotonic() + PATIENCE
        while not (closed := self.closed(session)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return closed

    def closed(self, session: str) -> list[int]:
        """Bytes of each response of *session* that is over now, also for the client's kernel."""
        lines = (line for line in self._lines() if isinstance(line, Transfer) and of(line) == session)
        return [sent for line in lines if (sent := self._final(line)) is not None]

    def _final(self, line: Transfer) -> int | None:
        """The bytes that the relay would report; ``None`` while it would wait."""
        connection = line.opening.connection
        if connection is None or line.position is None:
            return line.sent
        row = dump([connection.port]).get(connection.cookie)
        if row is not None and row.info is not None and row.info.acked < line.position:
            return None
        acked = self._ends.get(connection.cookie) if row is None else line.position
        if acked is None:
            return None  # gone, and the listener's thread has not heard it yet
        return final_count(line.sent, connection.position, line.position, acked)

    def opened(self, session: str) -> bool:
        """Whether a response to *session* has been opened, now."""
        return any(of(line) == session for line in self._lines())

    def closes(self) -> list[str]:
        """The session of each close line."""
        return [of(line) for line in self._lines() if isinstance(line, Transfer)]

    def counted_aside(self) -> set[str]:
        """The names of what was counted and is no response."""
        return {name for line in self._decoded() if isinstance(line, Counts) for name in line.counts}

    def _lines(self) -> Iterator[Opening | Transfer]:
        return (line for line in self._decoded() if isinstance(line, Opening | Transfer))

    def _decoded(self) -> Iterator[JournalLine]:
        for journal in (self.folder / "state" / "journals").glob("*.journal"):
            text = journal.read_bytes()
            for line in text[: text.rfind(b"\n") + 1].splitlines():
                yield decode(line)


def play(path: str, session: str) -> str:
    return f"{path}?session_id={session}&photo_id=7"


def of(line: Opening | Transfer) -> str:
    opening = line.opening if isinstance(line, Transfer) else line
    return opening.play.session_id


@contextmanager
def running(setup: Setup, folder: Path, served: Path, *before: str, **environ: str) -> Iterator[Site]:
    """The server, once it answers; its command stands after the words *before*. *folder* is its own."""
    if setup.tls:
        _make_certificate(folder)
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*before, *words(setup, port, folder)],
            env=_environ(folder, served) | dict(setup.environ) | environ,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    ends: dict[int, int] = {}
    listener = Listener(
        lambda row: ends.update({row.cookie: row.info.acked if row.info else 0}), lambda: None
    )
    site = Site(setup, process, port, folder, ends)
    try:
        _wait_until_it_answers(site)
        yield site
    finally:
        listener.stop()
        _stop(process)


def _environ(folder: Path, served: Path) -> dict[str, str]:
    ours = {
        "PATH": os.pathsep.join((str(BIN), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")),
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C.UTF-8",
        "SERVED_FOLDER": str(served),
        "T23_API_URL": "http://127.0.0.1:9",
        "T23_RELAY": "off",
        "T23_STATE_DIR": str(folder / "state"),
    }
    return os.environ | ours


def _wait_until_it_answers(site: Site) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        if site.process.poll() is not None:
            raise RuntimeError(f"the server ended at its start:\n{site.log()}")
        if site.bare("GET", "/nothing").status == 404:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server does not answer:\n{site.log()}")
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server as its operator does, and whatever it leaves behind."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _make_certificate(folder: Path) -> None:
    command: Sequence[str] = (
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1",
        "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"),
    )  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
