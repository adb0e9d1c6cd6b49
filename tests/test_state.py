"""The state folder: who may use it, and the locks that say who is alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t23_middleware import StateError
from t23_middleware.state import StateFolder, hold_lock, lock_is_held
from t23_middleware.transfer import FORMAT

ROOT = Path(__file__).parent.parent
HOLD = """
import sys
from pathlib import Path
from t23_middleware.state import hold_lock
print(hold_lock(Path(sys.argv[1])) is not None, flush=True)
sys.stdin.read()
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock on ``tmp_path/lock``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "True\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_new_folder_is_private(tmp_path: Path) -> None:
    """A new folder, and every folder that is created on the way to it, is accessible to its user alone."""
    before = os.umask(0)  # as servers that became daemons leave it
    try:
        StateFolder(tmp_path / "a" / "b").create()
    finally:
        os.umask(before)
    for made in ("a", "a/b", "a/b/journals"):
        assert (tmp_path / made).stat().st_mode & 0o777 == 0o700


def test_readable_folder_becomes_private(tmp_path: Path) -> None:
    """A folder that others may read is closed to them."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    StateFolder(folder).create()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_file_in_place_of_folder(tmp_path: Path) -> None:
    """A file in place of the folder is reported with its remedy."""
    (tmp_path / "state").write_text("")
    with pytest.raises(StateError, match=r"state can't be used \(.+\); set T23_STATE_DIR to a folder"):
        StateFolder(tmp_path / "state").create()


def test_link_in_place_of_folder(tmp_path: Path) -> None:
    """A link in place of the folder is refused."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="link or another user's"):
        StateFolder(tmp_path / "state").create()


@as_root
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", 65534, 65534)
    with pytest.raises(StateError, match="link or another user's"):
        StateFolder(tmp_path / "state").create()


@as_root
def test_folder_under_anothers_folder_refused(
    tmp_path: Path,
) -> None:
    """A folder is refused if its parent belongs to another user and is in a folder that everybody may write to."""
    everybodys = tmp_path / "tmp"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    (everybodys / "t23-0").mkdir()
    os.chown(everybodys / "t23-0", 65534, 65534)
    with pytest.raises(StateError, match="link or another user's"):
        StateFolder(everybodys / "t23-0" / "t23-middleware" / "video.example.com").create()


def test_folder_behind_unsafe_link_refused(tmp_path: Path) -> None:
    """A folder behind a link that anybody may have created is refused."""
    everybodys = tmp_path / "tmp"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    (tmp_path / "target").mkdir()
    (everybodys / "t23-0").symlink_to(tmp_path / "target")
    with pytest.raises(StateError, match="link or another user's"):
        StateFolder(everybodys / "t23-0" / "t23-middleware").create()


def test_what_counts_as_work(tmp_path: Path) -> None:
    """Only a journal or unfinished deliveries count as work."""
    folder = StateFolder(tmp_path / "state")
    assert not folder.has_work()
    folder.create()
    (folder.journals / "1-a.lock").touch()
    assert not folder.has_work()
    folder.unfinished.touch()
    assert folder.has_work()
    folder.unfinished.unlink()
    (folder.journals / "1-a.000000.journal").touch()
    assert folder.has_work()


def test_foreign_journal_is_not_work(tmp_path: Path) -> None:
    """A journal that only another version can read does not count as work of this version."""
    folder = StateFolder(tmp_path / "state")
    folder.create()
    (folder.journals / "1-a.000000.journal").touch()
    folder.write_foreign_journals({"1-a.000000.journal": str(FORMAT + 1)})
    assert not folder.has_work()
    (folder.journals / "2-b.000000.journal").touch()
    assert folder.has_work()
    # As the other version sees it, which a relay of this one has told so.
    folder.write_foreign_journals({"1-a.000000.journal": str(FORMAT), "2-b.000000.journal": str(FORMAT + 1)})
    assert [path.name for path in folder.readable_journals()] == ["1-a.000000.journal"]


@pytest.mark.parametrize("content", [b"", b"\xff\n\n", b"9" * 5000 + b" x\n1"])
def test_a_damaged_list_of_those_hides_nothing(content: bytes, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    folder.create()
    (folder.journals / "1-a.000000.journal").touch()
    folder.foreign.write_bytes(content)
    assert folder.has_work()


def test_lock_ends_with_killed_holder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """Other processes see a lock, and it ends when its holder is killed."""
    lock = tmp_path / "lock"
    assert lock_is_held(lock)
    assert lock_is_held(lock), "the look itself must not take the lock away"
    assert hold_lock(lock) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not lock_is_held(lock)
    descriptor = hold_lock(lock)
    assert descriptor is not None
    os.close(descriptor)


def test_untaken_lock_is_free(tmp_path: Path) -> None:
    """A lock that was never taken is free, whether its file exists or not."""
    assert not lock_is_held(tmp_path / "nothing")
    (tmp_path / "lock").touch()
    assert not lock_is_held(tmp_path / "lock")


def test_lock_file_removed_before_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock whose file was removed between open and lock is taken again, on a new file."""
    lock = tmp_path / "lock"
    opened: list[int] = []
    really_open = os.open

    def open_and_lose_the_first(path: str, *rest: int, **options: int) -> int:
        descriptor = really_open(path, *rest, **options)
        if path == lock.name:
            if not opened:
                lock.unlink()
            opened.append(descriptor)
        return descriptor

    monkeypatch.setattr("t23_middleware.state.os.open", open_and_lose_the_first)
    held = hold_lock(lock)
    assert held is not None
    assert len(opened) == 2
    assert os.fstat(held).st_ino == lock.stat().st_ino
    os.close(held)


def test_leaving_workers_are_told_apart(folder):
    """Lines that somebody damaged are left out; the latest of one process counts."""
    assert folder.leaving_workers() == {}
    before_ns = time.time_ns()
    folder.record_leaving()
    folder.record_leaving()
    with folder.leaving.open("ab") as file:
        file.write(b"7 12\n8\n9 soon\n\xff\xfe 1 2\n\n10 \xd9\xa1\n")
    found = folder.leaving_workers()
    assert found.pop(str(os.getpid())) >= before_ns
    assert found.pop("7") == 12
    assert set(found) <= {"10"}
    assert folder.leaving.stat().st_mode & 0o777 == 0o600
    folder.remove_old_leaving()
    assert folder.leaving.exists()
    os.utime(folder.leaving, (0, 0))
    folder.remove_old_leaving()
    folder.remove_old_leaving()
    assert folder.leaving_workers() == {}
