"""``t23-middleware ingest``: a rotated log is read once, whatever the relay has read of it already."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from t23_middleware.state import lock_is_held
from t23_middleware.transfer import APP, Part

from ..harness import PATIENCE, end_relay, let_others_in, need_root, until
from ..relay.test_proxied import FILM, closed, journal, offloaded, opening, says
from ..relay.writers import living
from .commands import Site

HOUR = 3600.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "t23.log.1"


@pytest.fixture
def site(site: Site) -> Site:
    """No relay but those that the tests start."""
    site.environ["T23_RELAY"] = "external"
    site.folder.create()
    return site


def plays(site: Site, numbers: range, ago: float = 2.0) -> None:
    """As many plays, which the app left to nginx, in the journal of a worker that has ended."""
    journal(site.folder, *(closed(offloaded(number, ago=ago)) for number in numbers))


def lines(numbers: range, ago: float = 1.0) -> str:
    return "".join(says(number, 1000 + number, ago) for number in numbers)


def delivered(site: Site) -> list[int]:
    """The bytes of each report, once all are with the API."""
    assert site.deliver().returncode == 0
    return sorted(int(report["bytes_total"]) for report in site.api.recorded())


def test_ingest_repeated_log_reported_once(site: Site, log: Path):
    """Each line of a log is reported once, however often the log is read."""
    plays(site, range(3))
    log.write_text(lines(range(3)))
    done = site.run("ingest", str(log))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "3 reports from 1 file.\n"
        "3 reports wait: start the relay, or run 't23-middleware relay --once'.\n"
    )  # fmt: skip
    assert site.run("ingest", str(log), str(log)).stdout.startswith("0 reports from 1 file.\n3 reports wait")
    assert delivered(site) == [1000, 1001, 1002]
    assert site.run("ingest", str(log)).stdout == "0 reports from 1 file.\n"
    assert site.status()["captured"] == 3


def test_ingest_skips_lines_relay_read(site: Site, tmp_path: Path, log: Path):
    """Lines that the relay has read are skipped, also in a copy of the log."""
    live = tmp_path / "t23.log"
    plays(site, range(4))
    live.write_text(lines(range(2)))
    later = lines(
        range(2, 4)
    )  # dated now: a relay may take seconds to start, and its clock would seem to differ
    with site.relay(T23_PROXY_LOG=str(live)):
        assert until(lambda: len(site.api.recorded()) == 2)
    with live.open("a") as more:
        more.write(later)
    shutil.copy(live, log)
    done = site.run("ingest", str(log), T23_PROXY_LOG=str(tmp_path / "none.log"))
    assert done.stdout.startswith("2 reports from 1 file.\n2 reports wait"), done.stderr
    assert delivered(site) == [1000, 1001, 1002, 1003]


def test_ingest_old_plays_not_dropped(site: Site, tmp_path: Path):
    """Plays of long ago are not dropped before their lines are read.

    No relay ran since then: the wait for a line ends only after the logs of that time are read.
    """
    plays(site, range(6), ago=30 * HOUR)
    files = [tmp_path / f"t23.log.{number}" for number in (1, 2, 3)]
    for number, file in enumerate(reversed(files)):
        file.write_text(lines(range(2 * number, 2 * number + 2), ago=(29 - number) * HOUR))
        os.utime(file, (number, number))
    done = site.run("ingest", *map(str, files))
    assert done.stdout.startswith("6 reports from 3 files.\n"), done.stdout + done.stderr
    assert delivered(site) == [1000 + number for number in range(6)]
    assert site.status()["lost"] == 0


def test_ingest_old_log_keeps_viewings(site: Site, log: Path):
    """Reading an old log does not remove the viewings of today: a further range of one has skip 1."""
    first = opening(1, "viewer", ago=4, by=APP)
    journal(site.folder, closed(first, 300_000), name="2-00000000000000aa")
    assert delivered(site) == [300_000]
    plays(site, range(2), ago=30 * HOUR)
    log.write_text(lines(range(2), ago=29 * HOUR))
    assert site.run("ingest", str(log)).stdout.startswith("2 reports")
    further = opening(1, "viewer", ago=2, by=APP, part=Part(200_000, FILM - 1, FILM))
    journal(site.folder, closed(further, 400_000), name="3-00000000000000aa")
    assert delivered(site) == [1000, 1001, 300_000, 400_000]
    skips = [report["skip"] for report in site.api.recorded() if report["session_id"] == "viewer"]
    assert skips == ["0", "1"]


def test_ingest_unmatched_plays_keep_waiting(site: Site, log: Path):
    """Plays that have no line in the log still wait for other logs."""
    journal(site.folder, closed(offloaded(1)), closed(opening(2), 500), closed(offloaded(3)))
    log.write_text(says(1, 100))
    assert site.run("ingest", str(log)).returncode == 0
    assert site.status()["lost"] == 0
    assert delivered(site) == [100]
    assert site.status()["waiting_for_proxy"] == 2


def test_odd_lines_are_told_and_counted_once(site: Site, log: Path):
    plays(site, range(2))
    log.write_text(lines(range(1)) + '{"t23":1,"play":\n' + "192.0.2.1 GET\n" + lines(range(1, 2)))
    done = site.run("ingest", str(log))
    assert (
        "2 reports from 1 file.\nNot reported: proxy_bad 1.\nNot reported: proxy_foreign 1.\n" in done.stdout
    )
    assert "Not reported" not in site.run("ingest", str(log)).stdout


def test_ingest_large_log_progress_bar(site: Site, log: Path):
    """A log that is read in many blocks is read to its end, with a progress bar on a terminal."""
    many = range(20_000)
    plays(site, many)
    log.write_text(lines(many))
    assert log.stat().st_size > 3 << 20
    with site.on_terminal("ingest", str(log)) as (process, screen):
        shown = everything(screen)
        assert process.wait(PATIENCE) == 0, shown
    assert "\r[##########" in shown
    assert "] 3." in shown, "MiB of the first pieces"
    assert "20,000 reports from 1 file." in shown
    assert site.status()["captured"] == 20_000


def everything(screen: int) -> str:
    """All that comes on the terminal until its program is gone."""
    shown = b""
    try:
        while piece := os.read(screen, 1 << 16):
            shown += piece
    except OSError:  # Linux's way to say that nobody has it open
        pass
    return shown.decode()


def missing(log: Path) -> None:
    pass


def folder(log: Path) -> None:
    log.mkdir()


def compressed(log: Path) -> None:
    log.write_bytes(gzip.compress(says(1, 100).encode()))


def combined(log: Path) -> None:
    log.write_text('192.0.2.1 - - [24/Nov/2026:10:00:00 +0000] "GET / HTTP/1.1" 200 5 "-" "curl"\n' * 3)


def rubbish(log: Path) -> None:
    log.write_bytes(bytes(range(256)) * 9000)


REFUSED: dict[Callable[[Path], object], str] = {
    missing: "there is no file",
    folder: "is a folder; name a file",
    os.mkfifo: "is a FIFO; name a file",
    compressed: "is compressed; unpack it into a copy",
    combined: "none in the format t23",
    rubbish: "none in the format t23",
}


@pytest.mark.parametrize("make", REFUSED)
def test_ingest_refuses_other_files(make: Callable[[Path], object], site: Site, tmp_path: Path, log: Path):
    """A path that is not a log in the format t23 is refused with the reason, before anything is read or written."""
    make(log)
    good = tmp_path / "t23.log.2"
    plays(site, range(1))
    good.write_text(lines(range(1)))
    done = site.run("ingest", str(good), str(log))
    assert (done.returncode, done.stdout) == (2, "")
    assert str(log) in done.stderr
    assert REFUSED[make] in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not site.folder.outbox.exists()


def test_ingest_unreadable_log_refused(site: Site, tmp_path: Path, log: Path):
    """A log that the app's user may not read is refused, with the remedy."""
    if os.geteuid() != 0:
        need_root()
    plays(site, range(1))
    log.write_text(lines(range(1)))
    log.chmod(0o600)
    for path in (site.folder.path, *site.folder.path.rglob("*")):
        shutil.chown(path, "nobody")
    let_others_in(tmp_path)
    done = site.run("ingest", str(log))
    assert done.returncode == 2
    assert (
        "t23.log.1 can't be read by this user; copy it to a place where the app's user may read it"
        in done.stderr
    )


def test_ingest_needs_state_folder(site: Site, log: Path):
    """Without a state folder the lines match no play: the command fails with the remedy and makes no folder."""
    shutil.rmtree(site.folder.path)
    log.write_text(lines(range(1)))
    done = site.run("ingest", str(log))
    assert done.returncode == 2
    assert "run this with the app's own settings" in done.stderr
    assert not site.folder.path.exists()


def test_an_empty_log_is_none_the_worse(site: Site, log: Path):
    log.touch()
    done = site.run("ingest", str(log))
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 reports from 1 file.\n", "")


def test_ingest_takes_over_automatic_relay(site: Site, tmp_path: Path, log: Path):
    """The command takes over from the workers' relay, and a relay of the workers delivers afterwards."""
    site.environ |= {"T23_RELAY": "auto", "T23_PROXY_LOG": str(tmp_path / "t23.log")}
    (tmp_path / "t23.log").touch()
    plays(site, range(2))
    log.write_text(lines(range(2)))
    # Further down than the relay looks by itself.
    log = log.rename(tmp_path / "saved")
    with living(site.folder, digest=site.digest()), site.relay(automatic=True) as relay:
        done = site.run("ingest", str(log))
        try:
            assert done.returncode == 0, done.stderr
            assert done.stdout == "2 reports from 1 file.\n2 reports wait: the relay delivers.\n"
            assert relay.wait(PATIENCE) == 0
            assert until(lambda: len(site.api.recorded()) == 2), site.folder.relay_log.read_text()
        finally:
            assert until(lambda: lock_is_held(site.folder.relay_lock))
            assert until(lambda: site.folder.relay_holder().automatic)
            end_relay(site.folder)


def test_ingest_leaves_service_relay_running(site: Site, log: Path):
    """A relay that runs as a service is not stopped. The command fails and names the relay's process."""
    plays(site, range(1))
    log.write_text(lines(range(1)))
    with site.relay() as relay:
        done = site.run("ingest", str(log))
        assert done.returncode == 2
        assert f"a relay that runs as a service (process {relay.pid})" in done.stderr
        assert relay.poll() is None


def test_ingest_unwritable_outbox_fails(site: Site, log: Path):
    """An outbox that can't be written makes the command fail with exit code 1."""
    plays(site, range(1))
    log.write_text(lines(range(1)))
    site.folder.outbox.mkdir()
    done = site.run("ingest", str(log))
    assert done.returncode == 1
    assert "can't be opened" in done.stderr
