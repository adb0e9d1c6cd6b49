"""The journal: what a process writes, what survives its end, and what happens when the disk takes nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from t23_middleware.journal import JournalWriter
from t23_middleware.state import StateFolder, lock_is_held
from t23_middleware.transfer import FORMAT, Counts, Opening, TornLine, Transfer, Writer, decode
from t23_middleware.version import VERSION

from ..conftest import Journals
from .servers import ask, media, request

ROOT = Path(__file__).parents[2]
PLAYS = b"film"


class Clock:
    """Stands in for the ``time`` module; its monotonic clock goes on only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time_ns = staticmethod(time.time_ns)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("t23_middleware.journal.time", clock)
    return clock


class Disk:
    """Stands between the journal and ``os.write``: takes everything, nothing, or a part."""

    def __init__(self) -> None:
        self.takes: Any = len

    def write(self, descriptor: int, data: bytes) -> int:
        size = self.takes(data)
        if size == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data[:size])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    names = {name: getattr(os, name) for name in dir(os) if not name.startswith("__")}
    monkeypatch.setattr("t23_middleware.journal.os", SimpleNamespace(**{**names, "write": disk.write}))
    return disk


def run(script: str, state: Path, *, stdin: str = "") -> Any:
    """Run *script*, where ``play()`` is one counted response; what it printed, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + script, str(state)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PRELUDE = """
import json, os, resource, sys
from pathlib import Path
from t23_middleware import T23Middleware
from t23_middleware.journal import JournalWriter
from t23_middleware.state import StateFolder, lock_is_held
from tests.capture.servers import ask, media, request

state = Path(sys.argv[1])
site = T23Middleware(media(b"film"), api_url="http://127.0.0.1:9", state_dir=str(state), relay="off")

def play():
    answer = ask(site)
    assert answer.body == b"film" and answer.error is None, answer
"""


# What is written.


def test_journal_lines_per_response(wrap: Any, state: Path) -> None:
    """A journal begins with its writer, and has two lines per response."""
    app = wrap(media(PLAYS))
    ask(app)
    ask(app)
    journals = Journals(state)
    (file,) = journals.files()
    assert [type(line) for line in journals.lines()] == [Writer, Opening, Transfer, Opening, Transfer]
    writer = journals.writers()[0]
    assert file.name == f"{writer.name}.000000.journal"
    assert writer.name.startswith(f"{os.getpid()}-")
    assert (writer.format, writer.version) == (FORMAT, VERSION)
    assert len(writer.digest) == 8
    if sys.platform == "linux":
        assert writer.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_no_files_before_first_play(wrap: Any, state: Path) -> None:
    """No folder or file is created before the first counted response."""
    app = wrap(media(PLAYS))
    ask(app, request(query=""))
    assert not state.exists()
    ask(app)
    assert state.exists()


def test_journal_files_are_private(wrap: Any, state: Path) -> None:
    """All folders and files that are created are accessible to their user alone."""
    before = os.umask(0)
    try:
        ask(wrap(media(PLAYS)))
    finally:
        os.umask(before)
    assert state.stat().st_mode & 0o777 == 0o700
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in (state / "journals").iterdir()}
    assert modes == {".journal": 0o600, ".lock": 0o600}


def test_open_line_before_body(wrap: Any, journals: Any) -> None:
    """The open line is written before the body is sent."""
    body = wrap(media(PLAYS))(request(), lambda *head: None)
    assert len(journals.opened()) == 1
    assert journals.closed() == []
    body.close()
    assert len(journals.closed()) == 1


def test_journal_rotation_at_size(wrap: Any, journals: Any) -> None:
    """After one MiB, a journal is followed by the next one (rotation), and no play is lost."""
    app = wrap(media(PLAYS))
    session = "s" * 256
    plays = 1500
    for _ in range(plays):
        ask(app, request(query=f"session_id={session}&photo_id=7"))
    files = journals.files()
    name = journals.writers()[0].name
    assert [file.name for file in files] == [f"{name}.{number:06d}.journal" for number in range(len(files))]
    assert len(files) >= 2
    assert all((1 << 20) < file.stat().st_size < (1 << 20) + 2000 for file in files[:-1])
    assert all(isinstance(decode(file.read_bytes().splitlines()[0]), Writer) for file in files)
    assert sorted(transfer.opening.number for transfer in journals.closed()) == list(range(1, plays + 1))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_one_journal_is_open(wrap: Any, journals: Any) -> None:
    app = wrap(media(PLAYS))
    for _ in range(6000):
        ask(app, request(query=f"session_id={'s' * 256}&photo_id=7"))
    files = [str(file) for file in journals.files()]
    assert len(files) >= 4
    open_now = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    assert [file for file in files if file in open_now] == files[-1:]


def test_lines_of_many_threads(wrap: Any, journals: Any) -> None:
    """Lines that many threads write are whole, and their numbers are unique."""
    app = wrap(media(PLAYS))
    plays, workers = 1000, 8

    def work() -> None:
        for _ in range(plays):
            ask(app)
            ask(app, request(query="photo_id=7"))

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = list(range(1, plays * workers + 1))
    assert sorted(opening.number for opening in journals.opened()) == numbers
    assert sorted(transfer.opening.number for transfer in journals.closed()) == numbers
    assert len(journals.writers()) == len(journals.files()) >= 2
    ask(app)
    assert journals.counts() == {"no_session": plays * workers}


# Processes.


def test_fork_child_writes_own_files(state: Path) -> None:
    """A forked child writes its own files, and the lock of its parent survives."""
    told = run(
        """
play()
(parents,) = (state / "journals").glob("*.lock")
told = {}
child = os.fork()
if child == 0:
    play()
    held = lock_is_held(parents)
    os._exit(0 if held else 1)
told["child saw the parent's lock"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
play()
again = os.fork()
if again == 0:
    os._exit(0 if lock_is_held(parents) else 1)
told["and after the child's end"] = os.waitstatus_to_exitcode(os.waitpid(again, 0)[1]) == 0
told["parent"], told["child"] = os.getpid(), child
print(json.dumps(told))
""",
        state,
    )
    assert told["child saw the parent's lock"]
    assert told["and after the child's end"]
    journals = Journals(state)
    assert sorted(writer.name.partition("-")[0] for writer in journals.writers()) == sorted(
        [str(told["parent"]), str(told["child"])]
    )
    by_file = {
        file.name.partition("-")[0]: sum(
            isinstance(decode(line), Transfer) for line in file.read_bytes().splitlines()
        )
        for file in journals.files()
    }
    assert by_file == {str(told["parent"]): 2, str(told["child"]): 1}
    assert not any(lock_is_held(lock) for lock in (state / "journals").glob("*.lock"))


def test_fork_response_belongs_to_parent(state: Path) -> None:
    """A response that a forked child ends too is counted by its parent alone."""
    run(
        """
body = site(request(), lambda *head: None)
chunks = iter(body)
next(chunks)
child = os.fork()
if child == 0:
    body.close()
    os._exit(0)
os.waitpid(child, 0)
for chunk in chunks:
    pass
body.close()
print("null")
""",
        state,
    )
    assert Journals(state).sent() == [4]


def test_killed_process_leaves_journal(state: Path) -> None:
    """A killed process leaves the close lines of its ended responses, the open lines of the others, and no lock."""
    script = (
        PRELUDE
        + 'play()\nbody = site(request(), lambda *head: None)\nprint("open", flush=True)\nsys.stdin.read()\n'
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(state)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            (lock,) = (state / "journals").glob("*.lock")
            assert lock_is_held(lock)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not lock_is_held(lock)
    journals = Journals(state)
    assert [opening.number for opening in journals.opened()] == [1, 2]
    assert [transfer.opening.number for transfer in journals.closed()] == [1]


# A folder that somebody takes away.


def held_by_us(lock: Path) -> bool:
    """Whether this process holds it, as another one sees it; closing it here would drop it."""
    look = "import sys; from t23_middleware.state import lock_owner; from pathlib import Path; print(lock_owner(Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", look, str(lock)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout.strip() == str(os.getpid())


@pytest.mark.parametrize("how", ["removed", "moved", "journals removed", "journal replaced"])
def test_removed_journal_begins_again(
    how: str, wrap: Any, state: Path, journals: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """After the journal was removed, moved or replaced, a new one begins within a second."""
    app = wrap(media(PLAYS))
    ask(app)
    (first,) = journals.writers()
    if how == "removed":
        shutil.rmtree(state)
    elif how == "moved":
        state.rename(state.with_name("elsewhere"))
    elif how == "journals removed":
        shutil.rmtree(state / "journals")
    else:
        (file,) = journals.files()
        file.unlink()
        file.write_bytes(b"")
    clock.now += 1.0
    ask(app)
    ask(app)
    assert [transfer.opening.number for transfer in journals.closed()] == [2, 3]
    (second,) = journals.writers()
    assert second.name != first.name
    assert second.started_ms == first.started_ms
    assert held_by_us(state / "journals" / f"{second.name}.lock")
    assert len(errors(caplog)) == 1
    assert "was removed or moved while the app runs" in errors(caplog)[0]


def test_removed_folder_is_retried(
    wrap: Any, state: Path, journals: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """If a removed folder can't be created again, the writer tries again later and loses no play since then."""
    app = wrap(media(PLAYS))
    ask(app)
    shutil.rmtree(state)
    state.write_text("")
    clock.now += 1.0
    for _ in range(3):
        answer = ask(app)
        assert (answer.body, answer.error) == (PLAYS, None)
    state.unlink()
    clock.now += 1.1
    ask(app)
    assert [transfer.opening.number for transfer in journals.closed()] == [2, 3, 4, 5]
    assert len(errors(caplog)) == 2, "that it was removed, and that it can't be made"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_removed_folders_leave_no_descriptor(wrap: Any, state: Path, clock: Clock) -> None:
    app = wrap(media(PLAYS))
    for _ in range(5):
        ask(app)
        shutil.rmtree(state)
        clock.now += 1.0
    ask(app)
    opened = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [name for name in opened if str(state) in name and "(deleted)" in name] == []


# A descriptor that is the journal's for as long as anybody may write to it.


def write_while_asleep(writer: JournalWriter, line: bytes, meanwhile: Callable[[], None]) -> None:
    """Write *line* in a thread that sleeps, just before its ``write(2)``, until *meanwhile* is over."""
    asleep, wake = threading.Event(), threading.Event()
    really_write, sleeper = os.write, threading.Thread(target=lambda: writer.write(line))

    def write(descriptor: int, data: bytes) -> int:
        if threading.current_thread() is sleeper and not asleep.is_set():
            asleep.set()
            wake.wait(60)
        return really_write(descriptor, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        sleeper.start()
        assert asleep.wait(60)
        meanwhile()
        wake.set()
        sleeper.join(60)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Callable[[], bytes]]:
    """Once called, the app opens files under each number that is free; they are read at the second call."""
    opened: list[int] = []
    path = tmp_path / "the-apps-own"

    def look() -> bytes:
        if not opened:
            opened.extend(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for _ in range(20))
        return path.read_bytes()

    yield look
    for descriptor in opened:
        os.close(descriptor)


@pytest.mark.parametrize("rotations", [1, 2, 5])
def test_line_survives_rotations_of_others(
    folder: StateFolder, victim: Callable[[], bytes], rotations: int
) -> None:
    """A thread that sleeps before its write(2) never writes into the app's file, however often others rotate."""
    writer = JournalWriter(folder, "0.1.0", "digest")
    writer.write(b"first\n")

    def rotate() -> None:
        for _ in range(rotations):
            writer.write(b"x" * (1 << 20) + b"\n")
            writer.write(b"next\n")
        victim()

    write_while_asleep(writer, b"the secret session\n", rotate)
    assert victim() == b""
    assert any(b"the secret session" in file.read_bytes() for file in folder.journals.glob("*.journal"))
    writer.close()


def test_line_survives_abandoned_journals(
    folder: StateFolder, victim: Callable[[], bytes], clock: Clock
) -> None:
    """The same where the state folder is removed meanwhile, twice, and new journals begin."""
    writer = JournalWriter(folder, "0.1.0", "digest")
    writer.write(b"first\n")

    def lose_the_folder() -> None:
        for _ in range(2):
            shutil.rmtree(folder.path)
            clock.now += 1.1
            writer.write(b"next\n")
        victim()

    write_while_asleep(writer, b"the secret session\n", lose_the_folder)
    assert victim() == b""
    assert any(b"the secret session" in file.read_bytes() for file in folder.journals.glob("*.journal"))
    writer.close()


def test_closed_descriptors_are_the_apps(
    folder: StateFolder, victim: Callable[[], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """An app that becomes a daemon closes all descriptors, and ours among them; then their numbers are the app's."""
    before = {int(path.name) for path in Path("/dev/fd").iterdir()}
    writer = JournalWriter(folder, "0.1.0", "digest")
    writer.write(b"first\n")
    for number in {int(path.name) for path in Path("/dev/fd").iterdir()} - before:
        with contextlib.suppress(OSError):
            os.close(number)
    victim()
    assert writer.write(b"second\n")
    assert victim() == b""
    lines = [file.read_bytes().splitlines()[1:] for file in folder.journals.glob("*.journal")]
    assert sorted(lines) == [[b"first"], [b"second"]]
    assert errors(caplog) == []
    writer.close()
    assert victim() == b""


# A disk that takes nothing.


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("relay", ["off", "auto"])
def test_unusable_folder_logs_one_error(
    wrap: Any,
    state: Path,
    journals: Any,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    relay: str,
) -> None:
    """An unusable folder gives one error, and the plays are written after it is fixed."""
    monkeypatch.setattr("t23_middleware.capture.launch.start_relay", lambda settings, folder: None)
    state.write_text("a file in place of the folder")
    app = wrap(media(PLAYS), relay=relay)
    for _ in range(3):
        answer = ask(app)
        assert (answer.body, answer.error) == (PLAYS, None)
    (told,) = errors(caplog)
    assert "can't write plays to its journal" in told
    assert "set T23_STATE_DIR to a folder" in told
    state.unlink()
    ask(app)
    assert not state.exists(), "the next try is a second later"
    clock.now += 1.1
    ask(app)
    assert sorted(transfer.opening.number for transfer in journals.closed()) == [1, 2, 3, 4, 5]
    assert len(journals.opened()) == 5
    assert len(errors(caplog)) == 1
    assert "plays can be written to the journal again" in caplog.text


@pytest.fixture
def without_rights(tmp_path: Path) -> Iterator[None]:
    """The test's user may not write in its own folder."""
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        tmp_path.chmod(0o700)


@pytest.mark.usefixtures("without_rights")
def test_unwritable_folder_logs_one_error(wrap: Any, state: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder without write permission gives one error, and the app goes on."""
    app = wrap(media(PLAYS))
    for _ in range(3):
        answer = ask(app)
        assert (answer.body, answer.error) == (PLAYS, None)
    (told,) = errors(caplog)
    assert f"the state folder {state} can't be used (Permission denied)" in told


def test_threads_log_same_folder_error(
    wrap: Any, state: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Threads that find an unusable folder at the same time all log the same reason."""
    state.write_text("")
    app = wrap(media(PLAYS))
    threads = [threading.Thread(target=ask, args=(app,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors(caplog)
    assert all("set T23_STATE_DIR" in told for told in errors(caplog))


def test_line_buffer_is_bounded(wrap: Any, state: Path, journals: Any, clock: Clock) -> None:
    """The buffer keeps only the last 1000 lines, and the plays that are lost are counted."""
    state.write_text("")
    app = wrap(media(PLAYS))
    for _ in range(600):
        ask(app)
    state.unlink()
    clock.now += 1.1
    ask(app)
    kept = [transfer.opening.number for transfer in journals.closed()]
    lost = journals.counts()["capture_lost"]
    assert kept == list(range(lost + 1, 602)), "the oldest go, each is there once"
    assert lost == 100, "two lines a play, of which 1000 stayed"
    assert journals.counts() == {"capture_lost": lost, "capture_lost_bytes": lost * len(PLAYS)}


def test_full_disk_buffers_lines(
    wrap: Any, journals: Any, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """While the disk is full, lines and counters are buffered and written later."""
    app = wrap(media(PLAYS))
    ask(app)
    disk.takes = lambda data: 0
    for _ in range(700):
        answer = ask(app)
        assert (answer.body, answer.error) == (PLAYS, None)
        ask(app, request(query="photo_id=7"))
    assert len(errors(caplog)) == 1
    disk.takes = len
    ask(app)
    ask(app)
    lost = journals.counts()["capture_lost"]
    assert journals.counts()["no_session"] == 700
    assert len(journals.closed()) + lost == 703
    assert len({transfer.opening.number for transfer in journals.closed()}) == 703 - lost
    assert 0 < lost <= 201


def test_partly_written_line_repeated(wrap: Any, state: Path, disk: Disk) -> None:
    """A line that was written only in part is torn, and is written again as a whole."""
    app = wrap(media(PLAYS))
    ask(app)
    parts = iter([40])
    disk.takes = lambda data: next(parts, 0) or len(data)
    ask(app)
    ask(app)
    (file,) = Journals(state).files()
    torn, numbers = 0, []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            decoded = decode(line)
        except TornLine:
            torn += 1
            continue
        if isinstance(decoded, Transfer):
            numbers.append(decoded.opening.number)
    assert torn == 1
    assert numbers == [1, 2, 3]


def test_counters_written_once_a_second(wrap: Any, journals: Any, clock: Clock) -> None:
    """Counters are written once a second, even if no play follows."""
    app = wrap(media(PLAYS))
    ask(app, request(query="photo_id=7"))
    assert journals.files() == [], "before the first play there is no journal"
    ask(app)
    for expected in (1, 1, 1):
        ask(app, request(query="photo_id=7"))
        assert journals.counts() == {"no_session": expected}
    clock.now += 1.1
    ask(app, request(query="photo_id=7"))
    assert journals.counts() == {"no_session": 5}
    ask(app, request(query="photo_id=7"))
    ask(app)
    assert journals.counts() == {"no_session": 6}, "the last ones ride with the next play"


def test_refused_counters_line_is_retried(wrap: Any, journals: Any, disk: Disk) -> None:
    """A line of counters that the disk refuses is not lost."""
    app = wrap(media(PLAYS))
    ask(app, request(query="photo_id=7"))
    disk.takes = lambda data: 0 if b'"counts"' in data else len(data)
    ask(app)
    assert journals.counts() == {}
    disk.takes = len
    ask(app)
    assert journals.counts() == {"no_session": 1}
    assert journals.sent() == [4, 4]


def test_cut_first_line_restarts_journal(
    wrap: Any, state: Path, journals: Any, disk: Disk, clock: Clock
) -> None:
    """A journal whose first line was cut short is removed and begun again."""
    app = wrap(media(PLAYS))
    disk.takes = lambda data: 20
    ask(app)
    assert journals.files() == []
    disk.takes = len
    clock.now += 1.1
    ask(app)
    assert journals.sent() == [4, 4]


def test_failed_rotation_keeps_old_journal(
    wrap: Any, journals: Any, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a rotation fails, writing goes on in the old journal."""
    monkeypatch.setattr("t23_middleware.journal.ROTATE_AT", 2000)
    app = wrap(media(PLAYS))
    ask(app)
    disk.takes = lambda data: 0 if b'"writer"' in data else len(data)
    for _ in range(30):
        ask(app)
    assert len(journals.files()) == 1
    assert "can't be rotated and keeps growing" in caplog.text
    disk.takes = len
    for _ in range(30):
        ask(app)
    assert len(journals.files()) > 1
    assert sorted(transfer.opening.number for transfer in journals.closed()) == list(range(1, 62))


def _with_reserve(state: Path, monkeypatch: pytest.MonkeyPatch, free: int = 1 << 30) -> tuple[Path, Path]:
    """A relay's reserve and its mark in *state*, on a disk that says that *free* bytes are free."""
    monkeypatch.setattr("t23_middleware.journal.CHECK_ROOM_EVERY", 0.0)
    monkeypatch.setattr(
        "t23_middleware.journal.os.statvfs",
        lambda path: SimpleNamespace(f_bavail=free, f_frsize=1),
        raising=False,
    )
    state.mkdir(mode=0o700)
    reserve, mark = state / "reserve", state / "reserved"
    reserve.write_bytes(bytes(1000))
    mark.touch()
    return reserve, mark


@pytest.mark.parametrize("takes", [0, 20], ids=["nothing", "a part of the line"])
def test_quota_met_by_a_worker(
    wrap: Any, state: Path, journals: Any, disk: Disk, monkeypatch: pytest.MonkeyPatch, takes: int
) -> None:
    """It removes the reserve for the relay, and writes no more until that is back."""
    reserve, _ = _with_reserve(state, monkeypatch)
    app = wrap(media(PLAYS))
    ask(app)
    disk.takes = lambda data: takes
    ask(app)
    assert not reserve.exists()
    disk.takes = len
    for _ in range(10):
        ask(app)
    (journal,) = journals.files()
    assert journal.read_bytes().count(b"close") == 1
    reserve.write_bytes(bytes(1000))
    ask(app)
    assert journal.read_bytes().count(b"close") == 13


def test_quota_met_by_another_process(
    wrap: Any, state: Path, journals: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker whose writes never failed stops at the next look, and so does one that only starts."""
    reserve, _ = _with_reserve(state, monkeypatch)
    app = wrap(media(PLAYS))
    ask(app)
    reserve.unlink()
    ask(app)
    late = wrap(media(PLAYS))
    ask(late)
    assert len(journals.closed()) == 1
    assert len(journals.files()) == 1
    assert caplog.text.count("its last space is reserved for the relay") == 2
    reserve.write_bytes(bytes(1000))
    ask(app), ask(late)
    assert len(journals.closed()) == 5


def test_reserve_missing_for_other_reasons(wrap: Any, state: Path, journals: Any, monkeypatch: Any) -> None:
    """No relay ever made one, or the disk itself has little room: a worker writes on."""
    reserve, mark = _with_reserve(state, monkeypatch, free=64 << 20)
    app = wrap(media(PLAYS))
    reserve.unlink()
    ask(app)
    assert len(journals.closed()) == 1
    monkeypatch.setattr(
        "t23_middleware.journal.os.statvfs",
        lambda path: SimpleNamespace(f_bavail=1 << 30, f_frsize=1),
        raising=False,
    )
    mark.unlink()
    ask(app)
    assert len(journals.closed()) == 2


def test_flaky_disk_with_many_threads(wrap: Any, journals: Any, disk: Disk) -> None:
    """A disk that fails now and then under many threads loses no play and writes none twice."""
    app = wrap(media(PLAYS))
    dice = random.Random(23)
    disk.takes = lambda data: 0 if dice.random() < 0.3 else len(data)
    plays, workers = 200, 6

    def work() -> None:
        for _ in range(plays):
            ask(app)

    ask(app)
    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disk.takes = len
    ask(app)
    written = Counter(transfer.opening.number for transfer in journals.closed())
    assert journals.counts() == {}
    assert written == Counter(range(1, plays * workers + 3))


def test_file_size_limit_tears_line(state: Path) -> None:
    """A real limit on the file size (RLIMIT_FSIZE) tears one line and loses no play."""
    told = run(
        """
import signal
play()
(journal,) = (state / "journals").glob("*.journal")
resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 150, resource.RLIM_INFINITY))
for _ in range(5):
    play()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
play()
print(json.dumps(str(journal)))
""",
        state,
    )
    torn, numbers = 0, []
    for line in Path(told).read_bytes().split(b"\n")[:-1]:
        try:
            decoded = decode(line)
        except TornLine:
            torn += 1
            continue
        assert not isinstance(decoded, Counts)
        if isinstance(decoded, Transfer):
            numbers.append(decoded.opening.number)
    assert torn == 1
    assert numbers == [1, 2, 3, 4, 5, 6, 7]


def test_file_size_limit_begins_journal(state: Path) -> None:
    """A process that may write no large file (RLIMIT_FSIZE) begins another journal and loses no play."""
    told = run(
        """
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for _ in range(800):
    play()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
play()
print(json.dumps(sorted(map(str, (state / "journals").glob("*.journal")))))
""",
        state,
    )
    numbers = []
    for journal in map(Path, told):
        assert journal.stat().st_size <= 101_000
        for line in journal.read_bytes().split(b"\n"):
            with suppress(TornLine):
                decoded = decode(line)
                if isinstance(decoded, Transfer):
                    numbers.append(decoded.opening.number)
    assert len(told) > 2
    assert sorted(numbers) == list(range(1, 802))


def test_journals_that_no_relay_reads_are_bounded(state: Path) -> None:
    """The writer itself stops, counts what it can't keep, and goes on once there is room."""
    sizes, counted = run(
        """
from t23_middleware import journal as module
from t23_middleware.transfer import Counts, decode
module.ROTATE_AT, module.RETRY_FULL, module.MAX_BUFFERED = 20_000, 0.0, 100
site = T23Middleware(media(b"film"), api_url="http://127.0.0.1:9", state_dir=str(state), relay="off", max_bytes="65536")
folder = state / "journals"

def size():
    return sum(path.stat().st_size for path in folder.glob("*.journal"))

for _ in range(2000):
    play()
sizes = [size()]
for _ in range(100):
    play()
sizes.append(size())
for path in sorted(folder.glob("*.journal"))[:-1]:
    path.unlink()
play()
play()
sizes.append(size())
found = [decode(line) for path in folder.glob("*.journal") for line in path.read_bytes().splitlines()]
print(json.dumps([sizes, sum(each.counts.get("capture_lost", 0) for each in found if isinstance(each, Counts))]))
""",
        state,
    )
    assert sizes[0] == sizes[1] <= 65536 + 2 * 20_000
    assert 0 < sizes[2] < sizes[0]
    assert counted > 1000
