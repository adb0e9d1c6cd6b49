"""A state folder that another local user made first, or in which something else lies in the place of our files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t23_middleware import owned
from t23_middleware.errors import StateError
from t23_middleware.relay.outbox import OutboxError, OutboxView, SQLiteOutbox
from t23_middleware.state import StateFolder, hold_lock, lock_owner

from .harness import PATIENCE, ROOT

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

#: Every file that anything of ours opens in a state folder.
NAMES = (
    "relay.lock",
    "relay.start",
    "relay.log",
    "delivered",
    "leaving",
    "unfinished",
    "foreign",
    "reserve",
    "outbox.db",
    "outbox.db-wal",
    "outbox.db-shm",
    "journals/1-a.000000.journal",
    "journals/1-a.lock",
)
NOBODY = 65534

#: Requests without a play and with one, the operator's page, and how long the slowest of them took.
SCRIPT = """
import json, sys, time
from t23_middleware import T23Middleware

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "video/mp4"), ("Content-Length", "5")])
    return [b"12345"]

wrapped = T23Middleware(app, status_token="0123456789abcdef0123456789abcdef")
took = []
def ask(path, query="", **more):
    began = time.perf_counter()
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": query, "SCRIPT_NAME": "", **more}
    body = wrapped(environ, lambda *answer: None)
    data = b"".join(body)
    getattr(body, "close", lambda: None)()
    took.append(time.perf_counter() - began)
    return data

assert ask("/") == b"12345"
assert ask("/film.mp4", "session_id=s1&photo_id=7") == b"12345"
time.sleep(1.1)  # the launcher looks once a second
assert ask("/film.mp4", "session_id=s2&photo_id=7") == b"12345"
ask("/_t23/status.json", HTTP_AUTHORIZATION="Bearer 0123456789abcdef0123456789abcdef")
ask("/_t23.json", HTTP_AUTHORIZATION="Bearer 0123456789abcdef0123456789abcdef")
print(json.dumps(took))
"""


def run(state: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environ = {"T23_API_URL": "http://127.0.0.1:9", "T23_STATE_DIR": str(state), "T23_TIMEOUT": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def put(path: Path, kind: str, target: Path) -> None:
    """Something of *kind* in the place of the file *path*."""
    match kind:
        case "fifo":
            os.mkfifo(path, 0o666)
        case "link":
            path.symlink_to(target)
        case "folder":
            path.mkdir()


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of this user's own that no other may write."""
    path = tmp_path / "settings.py"
    path.write_text("DEBUG = False\n")
    return path


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A state folder in a folder for everybody, that another user made."""
    everybodys = tmp_path / "tmp"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    state = everybodys / "t23-0" / "t23-middleware" / "video.example.com"
    (state / "journals").mkdir(parents=True)
    (state / "journals" / "2-b.000000.journal").touch()
    return state


def give_away(state: Path) -> None:
    for path in (state.parents[1], *state.parents[1].rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(0o777)


@as_root
@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_anothers_folder_is_left_alone(theirs: Path, victim: Path, kind: str) -> None:
    """Requests are answered at once, nothing is written there or through a link, and one ERROR names the remedy."""
    for name in NAMES:
        put(theirs / name, kind, victim)
    give_away(theirs)
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in theirs.rglob("*"))
    done = run(theirs, "-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)[:-2]) < 1.0
    errors = [line for line in done.stderr.splitlines() if "T23_STATE_DIR" in line]
    assert len(errors) == 1, done.stderr
    assert "another user's" in errors[0]
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in theirs.rglob("*")) == before
    assert victim.read_text() == "DEBUG = False\n"


@as_root
@pytest.mark.parametrize("where", ["t23-0", "t23-0/t23-middleware"])
def test_nothing_made_in_anothers_folder(tmp_path: Path, where: str) -> None:
    """Parents are checked before each folder is made."""
    everybodys = tmp_path / "tmp"
    (everybodys / where).mkdir(parents=True)
    everybodys.chmod(0o1777)
    for path in (everybodys / "t23-0").parent.rglob("*"):
        os.chown(path, NOBODY, NOBODY)
    with pytest.raises(StateError, match="another user's"):
        StateFolder(everybodys / "t23-0" / "t23-middleware" / "site").create()
    assert sorted(str(path.relative_to(everybodys)) for path in everybodys.rglob("*")) == sorted(
        {"t23-0", where}
    )


def test_nothing_made_behind_a_link(tmp_path: Path) -> None:
    """A link to a folder of the app's own user is no way into it."""
    everybodys, home = tmp_path / "tmp", tmp_path / "home"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    home.mkdir()
    (everybodys / "t23-0").symlink_to(home)
    with pytest.raises(StateError, match="another user's"):
        StateFolder(everybodys / "t23-0" / "t23-middleware" / "site").create()
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_ours_is_opened(folder: StateFolder, victim: Path, name: str, kind: str) -> None:
    """In a folder of ours, what is no regular file is neither followed nor waited for, and nothing hangs."""
    put(folder.path / name, kind, victim)
    with pytest.raises(OSError):
        owned.open_file(folder.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with pytest.raises(OSError):
        owned.read(folder.path / name)
    with pytest.raises(owned.NotOwned):
        owned.check_file(folder.path / name)
    assert victim.read_text() == "DEBUG = False\n"


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_locks_and_marks_never_hang(folder: StateFolder, victim: Path, kind: str) -> None:
    """What asks for locks and marks answers as if they were missing."""
    for name in NAMES:
        put(folder.path / name, kind, victim)
    assert lock_owner(folder.relay_lock) is None
    with pytest.raises(OSError):
        hold_lock(folder.relay_lock)
    assert folder.relay_holder() is None
    assert folder.leaving_workers() == {}
    assert folder.foreign_journals() == {}
    assert not folder.has_work()
    assert victim.read_text() == "DEBUG = False\n"


@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_database_files_are_checked(folder: StateFolder, victim: Path, kind: str, end: str) -> None:
    """SQLite opens its files by their paths, and would follow a link."""
    put(folder.outbox.with_name(f"outbox.db{end}"), kind, victim)
    with pytest.raises(OutboxError, match="not a regular file"):
        SQLiteOutbox(folder.outbox)
    with pytest.raises(OutboxError, match="not a regular file"):
        OutboxView(folder.outbox)
    assert victim.read_text() == "DEBUG = False\n"


@as_root
def test_anothers_file_in_our_folder(folder: StateFolder) -> None:
    """A file that another user left, while the folder was open to all, is not written to."""
    folder.relay_log.touch(0o666)
    os.chown(folder.relay_log, NOBODY, NOBODY)
    with pytest.raises(owned.NotOwned):
        owned.open_file(folder.relay_log, os.O_WRONLY | os.O_APPEND)


def test_journals_that_are_a_link(folder: StateFolder, tmp_path: Path) -> None:
    """A link in the place of the folder of journals leads nowhere."""
    folder.journals.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.journals.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="link or another user's"):
        folder.create()
    with pytest.raises(owned.NotOwned):
        owned.names(folder.journals, "")


@pytest.mark.parametrize("command", ["status", "check", "dead list", "relay --once"])
@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_commands_end_without_traceback(folder: StateFolder, victim: Path, command: str, kind: str) -> None:
    """Each command ends by itself on such a folder, in words."""
    for name in NAMES:
        put(folder.path / name, kind, victim)
    done = run(folder.path, "-m", "t23_middleware", *command.split())
    assert "Traceback" not in done.stderr
    assert victim.read_text() == "DEBUG = False\n"
