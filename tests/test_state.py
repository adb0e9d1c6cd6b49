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


def test_a_new_folder_and_all_that_is_made_on_the_way_is_its_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)  # as servers that became daemons leave it
    try:
        StateFolder(tmp_path / "a" / "b").create()
    finally:
        os.umask(before)
    for made in ("a", "a/b", "a/b/journals"):
        assert (tmp_path / made).stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    StateFolder(folder).create()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_file_in_place_of_the_folder_is_told_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StateError, match=r"state can't be used \(.+\); set T23_STATE_DIR to a folder"):
        StateFolder(tmp_path / "state").create()


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
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
def test_a_folder_inside_one_that_another_user_made_where_everybody_may_write_is_refused(
    tmp_path: Path,
) -> None:
    everybodys = tmp_path / "tmp"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    (everybodys / "t23-0").mkdir()
    os.chown(everybodys / "t23-0", 65534, 65534)
    with pytest.raises(StateError, match="link or another user's"):
        StateFolder(everybodys / "t23-0" / "t23-middleware" / "video.example.com").create()


def test_a_folder_behind_a_link_that_anybody_may_have_laid_is_refused(tmp_path: Path) -> None:
    everybodys = tmp_path / "tmp"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    (tmp_path / "target").mkdir()
    (everybodys / "t23-0").symlink_to(tmp_path / "target")
    with pytest.raises(StateError, match="link or another user's"):
        StateFolder(everybodys / "t23-0" / "t23-middleware").create()


def test_only_a_journal_or_unfinished_deliveries_are_work(tmp_path: Path) -> None:
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


def test_a_journal_that_only_another_version_can_read_is_none_of_our_work(tmp_path: Path) -> None:
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


def test_a_lock_is_seen_by_others_and_goes_with_a_killed_holder(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
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


def test_a_lock_that_was_never_taken_is_free(tmp_path: Path) -> None:
    assert not lock_is_held(tmp_path / "nothing")
    (tmp_path / "lock").touch()
    assert not lock_is_held(tmp_path / "lock")


def test_a_lock_whose_file_was_removed_between_open_and_lock_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
