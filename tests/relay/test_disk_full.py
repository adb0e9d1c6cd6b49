"""Real disks that are full, read-only, somebody else's or gone: the app answers, and what is lost is counted.

Each test has a small disk of its own (tmpfs), which only root can mount.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.relay.outbox import NoOutbox, OutboxView, Snapshot, Stats
from t23_middleware.state import StateFolder, lock_owner

from ..chaos.api import plain_api, relay
from ..harness import MEDIA, PATIENCE, ROOT, Server, lacking, need_root, running, until
from .writers import living, opening, transfer

pytestmark = pytest.mark.chaos

GUNICORN = "gunicorn -w 2 -k gthread --threads 4 -b 127.0.0.1:PORT examples.flask_app:app"
#: Bytes of each play.
PLAYED = 1000
NOBODY = 65534


class Disk:
    """A small disk; the state folder is all of it."""

    def __init__(self, base: Path) -> None:
        self.path = base / "state"
        self.path.mkdir()
        self.state = StateFolder(self.path)
        self._filler: IO[bytes] | None = None

    def mount(self, size: str = "8m") -> None:
        self._run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "t23-test", str(self.path))

    def resize(self, size: str) -> None:
        self.remount(f"size={size}")

    def remount(self, options: str) -> None:
        self._run("mount", "-o", f"remount,{options}", str(self.path))

    def unmount(self) -> None:
        """What a process that could not be ended holds open must not keep it here."""
        try:
            self._run("umount", str(self.path))
        except subprocess.CalledProcessError:
            self._run("umount", "--lazy", str(self.path))

    def fill(self) -> None:
        """To the last byte."""
        for size in (1 << 16, 4096, 1):
            with (self.path / "filler").open("ab", buffering=0) as filler:
                try:
                    while filler.write(b"x" * size) == size:
                        pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC
        assert os.statvfs(self.path).f_bfree == 0

    def free(self) -> None:
        (self.path / "filler").unlink()

    def _run(self, *words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder that others may look into, as they may not into pytest's own."""
    if sys.platform != "linux":
        pytest.skip("tmpfs is Linux's")
    if os.geteuid() != 0:
        need_root()
    folder = Path(tempfile.mkdtemp(prefix="t23-disk-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def disk(base: Path) -> Iterator[Disk]:
    disk = Disk(base)
    try:
        disk.mount()
    except subprocess.CalledProcessError as error:
        lacking(f"tmpfs can't be mounted here: {error.stderr}")
    yield disk
    disk.unmount()


@pytest.fixture
def api() -> Iterator[StandInServer]:
    """Without a cache: what comes twice is seen twice."""
    with plain_api() as server:
        yield server


# What is looked at.


def snapshot(folder: StateFolder) -> Snapshot:
    """The figures, which add up at any moment."""
    with OutboxView(folder.outbox) as view:
        found = view.snapshot()
    stats = found.stats
    assert stats.captured == stats.waiting + stats.sent + stats.dead + stats.lost
    return found


def stats(folder: StateFolder) -> Stats:
    try:
        return snapshot(folder).stats
    except NoOutbox:
        return Stats(0, 0, 0, 0, 0)


def sessions(api: StandInServer) -> Counter[str]:
    return Counter(report["session_id"] for report in api.recorded())


def named(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def once_each(*names: str) -> Counter[str]:
    return Counter(names)


# Who plays.


def play(server: Server, session: str) -> None:
    status, body = server.get(f"{MEDIA}?session_id={session}", Range=f"bytes=0-{PLAYED - 1}")
    assert (status, len(body)) == (206, PLAYED), server.log()


def play_all(server: Server, names: list[str], seconds: float = 0.0) -> None:
    """All at once, or evenly over so many *seconds*."""
    if not seconds:
        with ThreadPoolExecutor(4) as clients:
            list(clients.map(lambda name: play(server, name), names))
    ends = time.monotonic() + seconds
    for left, name in zip(range(len(names), 0, -1), names, strict=True) if seconds else ():
        play(server, name)
        time.sleep(max(ends - time.monotonic(), 0) / left)


_SITE = """
import logging, os, sys
from t23_middleware import T23Middleware
from tests.capture.servers import ask, media, request
logging.basicConfig(format="%(levelname)s %(message)s")
site = T23Middleware(media(b"x" * 1000), relay="off")
user = int(sys.argv[1])
os.setgid(user), os.setuid(user)
print("ready", flush=True)
for line in sys.stdin:
    name, count, each = line.split()
    wrong = 0
    for number in range(int(count)):
        answer = ask(site, request(query=f"session_id={name}{number // int(each)}&photo_id=7"))
        wrong += answer.body != b"x" * 1000 or answer.error is not None
    print(wrong, flush=True)
"""


# After the imports: that user may not read where the tests run from.
_RELAY_OF_NOBODY = f"""
import os, sys
from t23_middleware.ops.cli import main
import t23_middleware.ops.logs, t23_middleware.ops.owner, t23_middleware.relay.process
t23_middleware.relay.process.import_all()
os.setgid({NOBODY}), os.setuid({NOBODY})
sys.exit(main(["relay"]))
"""


class Site:
    """An app of one process that answers as often as it is told; *user* is who it runs as."""

    def __init__(self, state: Path, api_url: str, log: Path, user: int = 0) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SITE, str(user)],
                env=os.environ | {"T23_API_URL": api_url, "T23_STATE_DIR": str(state)},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        assert self._answer() == "ready", self.log()

    def play(self, name: str, count: int, each: int = 1) -> None:
        """So many plays, *each* of a session; all are answered in full."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name} {count} {each}\n")
        self._process.stdin.flush()
        assert self._answer() == "0", self.log()

    def log(self) -> str:
        return self._log.read_text()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


# The disk is full.


def test_full_disk_delivers_waiting_once(disk, api, full_seconds):
    """While the disk is full the app answers, and the waiting reports are delivered once."""
    before, after = named("before", 240), named("after", 20)
    meanwhile = named("meanwhile", 100 + int(5 * full_seconds))  # two workers keep 500 plays each in memory
    api.fault("latency", seconds=0.4)
    with running(GUNICORN, disk.path, api.url) as server:
        play_all(server, before)
        assert until(lambda: stats(disk.state).captured == len(before)), server.log()
        assert stats(disk.state).waiting > 50, "too fast to see anything"
        assert disk.state.reserve.exists()
        disk.fill()
        waited = stats(disk.state).waiting
        play_all(server, meanwhile, full_seconds)
        assert until(lambda: stats(disk.state).sent >= len(before)), "acknowledgements go on"
        assert waited > 10
        assert os.statvfs(disk.path).f_bfree * 4096 < 1 << 20
        api.heal()
        disk.free()
        play_all(server, after)  # which also brings each worker what it had kept in memory
        everything = once_each(*before, *meanwhile, *after)
        assert until(lambda: play(server, "probe") or sessions(api).keys() >= everything.keys()), server.log()
        assert until(lambda: stats(disk.state).waiting == 0)
        assert until(disk.state.reserve.exists), "it is made anew"
        told = sessions(api)
    del told["probe"]
    assert told == everything
    found = snapshot(disk.state)
    assert (found.losses, found.stats.lost, found.stats.dead) == ([], 0, 0)
    assert "Traceback" not in server.log()


def test_full_memory_loss_is_counted(disk, api, base):
    """What does not fit in memory while the disk is full is lost, and counted to the byte."""
    with relay(disk.path, api.url), Site(disk.path, api.url, base / "site.log") as site:
        site.play("before", 5)
        api.wait_for(5, PATIENCE)
        disk.fill()
        site.play("meanwhile", 5000)
        disk.free()
        time.sleep(0.1)
        site.play("after", 1)
        assert until(lambda: stats(disk.state).captured == 5006), stats(disk.state)
        assert until(lambda: stats(disk.state).waiting == 0)
        site.play("later", 1)
        assert until(lambda: stats(disk.state).sent + stats(disk.state).lost == 5007)
        found, told = snapshot(disk.state), sessions(api)
    (loss,) = found.losses
    assert (loss.reason, loss.bytes) == ("capture_lost", loss.reports * PLAYED)
    assert loss.reports > 1000, "1,000 lines in memory are 500 plays, and the reserve may have taken some"
    everything = once_each(
        *named("before", 5), *named("meanwhile", 5000), *named("after", 1), *named("later", 1)
    )
    assert set(told.values()) == {1}
    assert set(told) <= set(everything)
    assert len(everything) - len(told) == loss.reports
    # Twice where the relay gave up its reserve in between, which is room for a moment.
    changes = [line.partition(" ")[0] for line in site.log().splitlines()]
    assert changes in (["ERROR", "WARNING"], ["ERROR", "WARNING"] * 2), site.log()


def test_disk_filled_by_plays_recovers(disk, api, base):
    """A disk that the plays themselves fill is emptied again.

    Nobody has to help: what is in the journals is read as the waiting reports leave.
    """
    disk.resize("3m")
    count = 0
    api.fault("latency", seconds=0.5)
    with relay(disk.path, api.url), Site(disk.path, api.url, base / "site.log") as site:
        assert until(disk.state.reserve.exists)
        while "ERROR" not in site.log():
            site.play(f"s{count}-", 300, each=20)
            count += 300
            time.sleep(0.1)
        assert stats(disk.state).captured > 1000
        assert "No space left" in site.log() or "only a part of the line" in site.log()
        api.heal()

        def all_accounted() -> bool:
            nonlocal count
            site.play("more", 1)  # brings what the site keeps in memory
            count += 1
            return until(lambda: stats(disk.state)[:2] == (count, 0), 2)

        assert until(all_accounted, 2 * PATIENCE), stats(disk.state)
        found, told = snapshot(disk.state), api.recorded()
    assert found.stats == Stats(count, 0, len(told), 0, count - len(told))
    assert {loss.reason for loss in found.losses} <= {"capture_lost"}
    assert sum(loss.bytes for loss in found.losses) == PLAYED * found.stats.lost
    assert found.stats.sent > 5000


def test_relay_starts_on_full_disk(disk, api, base):
    """A relay that starts on a full disk delivers the reports that wait there."""
    api.fault("status", status=503)
    log = disk.path.with_suffix(".relay.log")
    with relay(disk.path, api.url), living(disk.state) as writer:
        for number in range(100):
            writer.write(opening(number, time.monotonic_ns(), f"s{number}"))
            writer.write(transfer(number, time.monotonic_ns(), f"s{number}"))
        assert until(lambda: stats(disk.state).waiting == 100)
        assert until(disk.state.reserve.exists)
    api.heal()
    disk.fill()
    with relay(disk.path, api.url):
        api.wait_for(100, PATIENCE)
        assert until(lambda: stats(disk.state).sent == 100), log.read_text()
        assert sessions(api) == once_each(*named("s", 100))
        disk.free()
        assert until(disk.state.reserve.exists)
    assert "the reserve" in log.read_text()
    assert "there is room on the disk again" in log.read_text()
    assert "Traceback" not in log.read_text()


# The folder takes nothing, is gone, or is somebody else's.


def test_read_only_folder_logged_once(disk, api, base):
    """A read-only folder is logged once, and all plays are delivered when it is writable again."""
    disk.remount("ro")
    with Site(disk.path, api.url, base / "site.log") as site:
        site.play("meanwhile", 400)
        assert site.log().count("ERROR") == 1
        assert f"the state folder {disk.path} can't be used (Read-only file system)" in site.log()
        with relay(disk.path, api.url) as process:
            assert process.wait(PATIENCE) == 1
        said = disk.path.with_suffix(".relay.log").read_text()
        assert "Read-only file system" in said
        assert "set T23_STATE_DIR" in said
        assert "Traceback" not in said
        disk.remount("rw")
        time.sleep(1.1)  # a worker tries the folder each second
        site.play("after", 5)
        with relay(disk.path, api.url):
            api.wait_for(405, PATIENCE)
            assert until(lambda: stats(disk.state) == Stats(405, 0, 405, 0, 0))
    assert sessions(api) == once_each(*named("meanwhile", 400), *named("after", 5))


def test_removed_folder_is_created_again(base, api):
    """A folder that is removed at run time is logged once and created again."""
    state = StateFolder(base / "removed")
    with running(GUNICORN.replace("-w 2", "-w 1"), state.path, api.url) as server:
        play_all(server, named("before", 10))
        api.wait_for(10, PATIENCE)
        first = lock_owner(state.relay_lock)
        while state.path.exists():
            shutil.rmtree(state.path, ignore_errors=True)
        assert first is not None
        assert until(lambda: not Path(f"/proc/{first}").exists()), "the relay ends"

        def arrives(number: int = 0) -> bool:
            play(server, f"probe{time.monotonic_ns()}")
            return len(api.recorded()) > 10

        assert until(arrives), server.log()
        after = named("after", 50)
        play_all(server, after)
        assert until(lambda: sessions(api).keys() >= set(after)), server.log()
        assert set(sessions(api).values()) == {1}
        assert until(lambda: stats(state).waiting == 0)
        assert stats(state).lost == 0
        assert server.log().count("was removed or moved while the app runs") == 1
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("closed", ["", "journals"])
def test_closed_folder_ends_no_service(base: Path, api: StandInServer, closed: str) -> None:
    """A folder whose mode is changed and changed back: the relay that runs as a service stays, and delivers all."""
    folder = base / "state"
    (folder / "journals").mkdir(parents=True, mode=0o700)
    for each in (folder, folder / "journals"):
        os.chown(each, NOBODY, NOBODY)
    environ = {"T23_API_URL": api.url, "T23_STATE_DIR": str(folder), "T23_RELAY": "external"}
    process = subprocess.Popen([sys.executable, "-c", _RELAY_OF_NOBODY], env=os.environ | environ, cwd=ROOT)
    try:
        with Site(folder, api.url, base / "site.log", user=NOBODY) as site:
            site.play("before", 5)
            assert until(lambda: len(sessions(api)) == 5), site.log()
            (folder / closed).chmod(0)
            site.play("meanwhile", 5)
            assert not until(lambda: process.poll() is not None, 3)
            (folder / closed).chmod(0o700)
            site.play("after", 5)
            assert until(lambda: sessions(api).keys() >= {"meanwhile4", "after4"}), site.log()
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert set(sessions(api).values()) == {1}


def test_killed_relay_is_replaced_without_inodes(base: Path, api: StandInServer) -> None:
    """While no file can be created on the disk, a relay that was killed is replaced, and delivers what waits."""
    disk = Disk(base)
    try:
        disk.mount("8m,nr_inodes=64")
    except subprocess.CalledProcessError as error:
        lacking(f"tmpfs can't be mounted here: {error.stderr}")
    try:
        with running(GUNICORN, disk.path, api.url) as server:
            api.fault("status", status=503)
            play_all(server, named("before", 10))
            assert until(lambda: stats(disk.state).waiting == 10), server.log()
            with suppress(OSError):
                for number in range(64):
                    (disk.path / f"filler{number}").touch()
            relay_id = lock_owner(disk.state.relay_lock)
            assert relay_id
            os.kill(relay_id, signal.SIGKILL)
            api.heal()
            assert until(lambda: bool(play(server, "after")) or len(sessions(api)) == 11), server.log()
            assert os.statvfs(disk.path).f_ffree == 0
    finally:
        disk.unmount()


def test_folder_of_another_user(base, api):
    """A folder of another user is left alone by the app and by the relay."""
    folder = base / "theirs"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    os.chown(folder, 1, 1)  # neither root's nor that user's
    with Site(folder, api.url, base / "site.log", user=NOBODY) as site:
        site.play("s", 20)
        assert site.log().count("ERROR") == 1
        assert "the state folder" in site.log()
        assert f"user {NOBODY} may write" in site.log()
    done = subprocess.run(
        [sys.executable, "-c", _RELAY_OF_NOBODY],
        env=os.environ | {"T23_API_URL": api.url, "T23_STATE_DIR": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 1, done.stderr
    assert "the state folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []
    assert api.recorded() == []
