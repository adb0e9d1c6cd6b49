"""Writers for the tests of the relay: journals of the dead as files, journals of the living by real processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t23_middleware.state import StateFolder, boot_id, network_namespace
from t23_middleware.transfer import FORMAT, JournalLine, Opening, Part, Play, Transfer, Writer, encode

MS = 1_000_000
BOOT = boot_id()

_WRITER = """
import sys
from pathlib import Path
from t23_middleware.journal import JournalWriter
from t23_middleware.state import StateFolder, boot_id
writer = JournalWriter(StateFolder(Path(sys.argv[1])), sys.argv[2], sys.argv[3])
print(writer.name, flush=True)
for line in sys.stdin:
    print(writer.write(bytes.fromhex(line)), flush=True)
"""
_HOLDER = """
import sys
from pathlib import Path
from t23_middleware.state import hold_lock
hold_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


class LivingWriter:
    """A process with a :class:`JournalWriter` that writes what it is told."""

    def __init__(self, folder: StateFolder, version: str = "0.1.0", digest: str = "digest") -> None:
        self._process = start(_WRITER, str(folder.path), version, digest)
        self.name = self._answer()

    def write(self, *lines: JournalLine | bytes) -> None:
        """Write each line, and come back when the journal has it."""
        for line in lines:
            data = line if isinstance(line, bytes) else encode(line)
            assert self._process.stdin is not None
            self._process.stdin.write(data.hex() + "\n")
            self._process.stdin.flush()
            assert self._answer() == "True"

    def kill(self) -> None:
        end(self._process)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return str(self._process.stdout.readline()).strip()


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@contextmanager
def living(folder: StateFolder, **options: str) -> Iterator[LivingWriter]:
    """A writer's process, killed at the end."""
    writer = LivingWriter(folder, **options)
    try:
        yield writer
    finally:
        writer.kill()


@contextmanager
def alive(folder: StateFolder, name: str) -> Iterator[None]:
    """The writer *name* lives meanwhile, whoever made its journals."""
    process = start(_HOLDER, str(folder.journals / f"{name}.lock"))
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield
    finally:
        end(process)


def header(name: str, *, boot: str = BOOT, format: int = FORMAT, digest: str = "digest") -> Writer:
    return Writer(name, format, "0.1.0", boot, 1_700_000_000_000, digest, network_namespace())


def opening(
    number: int, at_ns: int, session: str = "s", photo: str = "1", at_ms: int | None = None
) -> Opening:
    at_ms = time.time_ns() // MS if at_ms is None else at_ms
    return Opening(number, at_ns, at_ms, Play(session, photo), Part(0, 99_999, 100_000), 200, 100_000)


def transfer(number: int, at_ns: int, session: str = "s", sent: int = 100_000, **where: str) -> Transfer:
    """A response of 1 ms that ended at *at_ns*."""
    started = opening(number, at_ns - MS, session, **where)
    return Transfer(started, at_ns, started.started_ms + 1, sent)


def journal(
    folder: StateFolder, name: str, *lines: JournalLine | bytes, sequence: int = 0, boot: str = BOOT
) -> Path:
    """A journal with its header and these lines, of a writer that is dead unless :func:`alive`."""
    folder.create()
    path = folder.journals / f"{name}.{sequence:06d}.journal"
    told = (header(name, boot=boot), *lines)
    path.write_bytes(b"".join(line if isinstance(line, bytes) else encode(line) for line in told))
    return path
