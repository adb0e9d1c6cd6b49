"""What operators are told of the proxy: by ``check``, ``status`` and the page."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from t23_middleware.ops.status import read_status
from t23_middleware.relay.outbox import EarlyLoss, Ingest, SQLiteOutbox
from t23_middleware.relay.proxy_line import NGINX_LINES
from t23_middleware.settings import Settings
from t23_middleware.state import StateFolder
from t23_middleware.transfer import OFFLOADED, PROXY, Opening

from ..harness import let_others_in, need_root
from ..relay.test_proxied import FILM, closed, journal, offloaded, opening, says
from .commands import Site
from .pages import TOKEN, basic, serving
from .test_check import items

HOUR_MS = 3_600_000


def knows(folder: StateFolder, counts: Mapping[str, int], **notes: int) -> None:
    """A relay was here, and left these figures."""
    folder.create()
    outbox = SQLiteOutbox(folder.outbox)
    outbox.ingest(Ingest([], [], {}, counts, {name: str(value) for name, value in notes.items()}))
    outbox.close()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def proxy(site: Site, **environ: str) -> tuple[str, str]:
    """What ``check`` says of the proxy; ``""`` where it says nothing."""
    return items(site.run("check", **environ).stdout).get("proxy", ("", ""))


def test_check_without_proxy(site: Site):
    """``check`` shows nothing about a proxy for an app that has none."""
    assert proxy(site) == ("", "")


def test_proxy_log_readable_is_ok(site: Site, tmp_path: Path):
    """A log that can be read is ok, with plays in it and without."""
    log = tmp_path / "t23.log"
    log.touch()
    level, words = proxy(site, T23_PROXY_LOG=str(log))
    assert (level, words.endswith("t23.log can be read; it has no play yet")) == ("ok", True)
    log.write_text(says(1, 100))
    level, words = proxy(site, T23_PROXY_LOG=str(log))
    assert (level, words.endswith("t23.log can be read, and has plays")) == ("ok", True)


def test_proxy_log_missing(site: Site, tmp_path: Path):
    """A log that does not exist is WRONG and named, with the lines for nginx that write it."""
    log = tmp_path / "t23.log"
    done = site.run("check", T23_PROXY_LOG=str(log))
    assert done.returncode == 1
    level, words = items(done.stdout)["proxy"]
    assert level == "WRONG"
    assert "t23.log does not exist" in words
    for line in NGINX_LINES.replace("{path}", str(log)).splitlines():
        assert f"    {line}\n" in done.stdout, "to be copied as it is"


def test_proxy_log_folder_or_fifo(site: Site, tmp_path: Path):
    """A folder or a FIFO in place of the log is WRONG, and the message names its kind."""
    folder, fifo = tmp_path / "a.log", tmp_path / "b.log"
    folder.mkdir()
    os.mkfifo(fifo)
    level, words = proxy(site, T23_PROXY_LOG=str(folder))
    assert (level, "is a folder" in words) == ("WRONG", True)
    level, words = proxy(site, T23_PROXY_LOG=str(fifo))
    assert (level, "is a FIFO" in words) == ("WRONG", True)


def test_proxy_log_in_other_format(site: Site, tmp_path: Path):
    """A log without lines in the format t23 is WRONG, and the message says that."""
    log = tmp_path / "access.log"
    log.write_text("192.0.2.1 - - [24/Nov/2026] GET\n" * 10)
    level, words = proxy(site, T23_PROXY_LOG=str(log))
    assert level == "WRONG"
    assert "10 lines, but none in the format t23" in words


def test_proxy_log_unreadable_by_worker(site: Site, tmp_path: Path):
    """A log that the workers' user may not read is WRONG, with the command that adds the user to its group."""
    if os.geteuid() != 0:
        need_root()
    knows(site.folder, {})
    let_others_in(tmp_path)
    for path in (site.folder.path, *site.folder.path.rglob("*")):
        os.chown(path, 65534, 65534)
    log = tmp_path / "t23.log"
    log.write_text(says(1, 100))
    os.chown(log, 0, 4)
    log.chmod(0o640)
    level, words = proxy(site, T23_PROXY_LOG=str(log))
    assert level == "WRONG"
    assert "can't be read by nobody" in words
    assert "usermod -aG adm nobody" in words


def test_proxy_log_silent_warns(site: Site, tmp_path: Path):
    """Plays that wait for over an hour are a warning if the log has had no new line in that time."""
    log = tmp_path / "t23.log"
    log.write_text(says(1, 100))
    since = now_ms() - 2 * HOUR_MS
    knows(site.folder, {}, awaited=3, awaited_since_ms=since, proxy_line_ms=since - 1000)
    level, words = proxy(site, T23_PROXY_LOG=str(log))
    assert level == "warn"
    assert words.startswith("3 plays wait for their lines, the oldest for 2 h")
    knows(site.folder, {}, proxy_line_ms=since + 1000)
    assert proxy(site, T23_PROXY_LOG=str(log))[0] == "ok", "others got theirs, so theirs may come"


def test_a_clock_that_differs_is_told(site: Site, tmp_path: Path):
    log = tmp_path / "t23.log"
    log.write_text(says(1, 100))
    knows(site.folder, {"proxy_clock_differs": 4})
    level, words = proxy(site, T23_PROXY_LOG=str(log))
    assert (level, "for 4 plays" in words) == ("warn", True)


def test_offloaded_plays_without_log_warn(site: Site):
    """Offloaded plays without a log are a warning, with the lines to add to nginx's configuration."""
    knows(site.folder, {"offloaded": 12, "behind_proxy": 1})
    done = site.run("check")
    level, words = items(done.stdout)["proxy"]
    assert (level, words.startswith("12 plays were left to the proxy")) == ("warn", True)
    lines = NGINX_LINES.replace("{path}", "/var/log/nginx/t23.log").splitlines()
    assert len(lines) == 5
    assert all(f"    {line}\n" in done.stdout for line in lines)
    assert "T23_PROXY_LOG" in " ".join(site.run("status").stdout.split())


def test_proxy_without_log_warns(site: Site):
    """A proxy without a log is a warning that explains its buffering: buffered bytes count as played."""
    knows(site.folder, {"behind_proxy": 2})
    level, words = proxy(site)
    assert level == "warn"
    assert "Bytes that it buffers count as played" in words


def test_server_without_disconnects_warns(site: Site, tmp_path: Path):
    """A server that does not report disconnects is a warning, unless nginx counts the bytes."""
    knows(site.folder, {"leaving_unseen": 1})
    level, words = items(site.run("check").stdout)["server"]
    assert level == "warn"
    assert words.startswith("hypercorn does not report to the app that a client disconnected")
    log = tmp_path / "t23.log"
    log.write_text(says(1, 100))
    assert "server" not in items(site.run("check", T23_PROXY_LOG=str(log)).stdout)


def test_status_plays_waiting_for_proxy(site: Site, state: Path):
    """``status`` and the page show how many plays wait for the proxy's log, but only where any do."""
    knows(site.folder, {"unconfirmed": 1})
    assert "proxy" not in site.run("status").stdout
    knows(site.folder, {"proxy_cached": 2}, awaited=3, awaited_since_ms=now_ms() - HOUR_MS)
    said = site.run("status").stdout
    assert "3 plays wait for their lines in its log" in said
    assert all(name in said for name in ("unconfirmed", "proxy_cached"))
    assert site.status()["waiting_for_proxy"] == 3
    with serving(state) as pages:
        page = pages.ask("/_t23/", Authorization=basic("", TOKEN)).body
    assert "Waiting for the proxy" in page
    assert "plays wait for their lines" in page


@pytest.mark.parametrize("noted", ["", "-1", "many", "१"])
def test_invalid_note_is_ignored(site: Site, noted: str):
    """A note in the outbox that is not a number is ignored."""
    site.folder.create()
    outbox = SQLiteOutbox(site.folder.outbox)
    outbox.note({"awaited": noted})
    outbox.close()
    assert read_status(Settings(environ=site.environ)).waiting_for_proxy == (0, 0, 0)


# What waits in vain, and why.


def waits(site: Site, log: Path, *plays: Opening) -> None:
    """A relay took these plays in; their lines are missing of them."""
    site.folder.create()
    sent = {OFFLOADED: 0, PROXY: FILM}
    journal(
        site.folder,
        *(line for play in plays for line in (play, closed(play, sent[play.counted_by]))),
    )
    site.run("relay", "--once", T23_PROXY_LOG=str(log))
    assert site.status()["waiting_for_proxy"] == len(plays)


def warned(site: Site, log: Path) -> str:
    """What ``check`` warns of, with the lines to copy."""
    done = site.run("check", T23_PROXY_LOG=str(log))
    assert "Traceback" not in done.stderr
    words = " ".join(done.stdout.partition("\n\n")[0].split())
    return words if "warn proxy" in words else ""


def test_offloaded_play_without_line_is_told(site: Site, tmp_path: Path):
    """A store behind X-Accel-Redirect: the remedy is a line for its location. A later line of any play says that it works."""
    log = tmp_path / "t23.log"
    log.write_text(says(7, 100, ago=60))
    waits(site, log, offloaded(1, ago=20))
    said = warned(site, log)
    assert "1 plays that nginx sends for the app (X-Accel-Redirect) wait" in said
    assert "set $t23play $upstream_http_x_t23_play;" in said
    with log.open("a") as file:
        file.write(says(8, 100, ago=1))
    assert warned(site, log) == ""


def test_lost_offloaded_plays_are_told(site: Site, tmp_path: Path):
    log = tmp_path / "t23.log"
    log.write_text(says(7, 100, ago=1))
    site.folder.create()
    outbox = SQLiteOutbox(site.folder.outbox)
    outbox.ingest(Ingest([], [], {}, {}, losses=[EarlyLoss("no_proxy_line", 3, 0)], at_ms=now_ms()))
    outbox.close()
    assert "3 plays that nginx sent for the app were lost recently" in warned(site, log)


def test_mirrored_plays_are_told(site: Site, tmp_path: Path):
    """Each began with another one that has its line; what began at another time, or elsewhere in the file, is no mirror."""
    log = tmp_path / "t23.log"
    log.write_text(says(1, FILM, ago=10, seconds=10.0))
    of_the_third = says(4, FILM, ago=8, seconds=7.1)
    waits(site, log, opening(2, ago=20.1), opening(3, ago=15))
    assert warned(site, log) == "", "one of two may be chance"
    with log.open("a") as file:
        file.write(of_the_third)
    said = warned(site, log)
    assert "2 plays wait that began together with another play" in said
    assert "T23_ENABLED=0" in said
    assert "proxy_method HEAD;" in said


def test_another_part_is_no_mirror(site: Site, tmp_path: Path):
    log = tmp_path / "t23.log"
    half = FILM // 2
    part = {"status": 206, "range": f"bytes {half}-{FILM - 1}/{FILM}", "length": str(half)}
    log.write_text(says(1, half, ago=10, seconds=10.0, **part))
    waits(site, log, opening(2, ago=20))
    assert warned(site, log) == ""


@pytest.mark.parametrize("name", ["t23.log.before", "t23.yesterday.log", "old/t23-of-monday"])
def test_lines_in_an_unknown_file_are_found(site: Site, tmp_path: Path, name: str):
    """The relay was away while somebody moved the log: ``check`` names the file, and ``ingest`` reads it."""
    log = tmp_path / "log" / "t23.log"
    (log.parent / "old").mkdir(parents=True)
    log.write_text(says(7, 100, ago=60))
    waits(site, log, opening(1, ago=20))
    moved = log.rename(log.parent / name)
    with moved.open("a") as file:
        file.write(says(1, 4_000_000, ago=5, seconds=15.0))
    log.touch()
    said = warned(site, log)
    assert f"1 plays wait for lines that are in {moved}" in said
    assert f"t23-middleware ingest {moved}" in said
    done = site.run("ingest", str(moved), T23_PROXY_LOG=str(log))
    assert done.returncode == 0, done.stderr
    assert warned(site, log) == ""


def test_log_that_left_its_folder_is_told(site: Site, tmp_path: Path):
    """An olddir elsewhere, or compression at once."""
    log = tmp_path / "log" / "t23.log"
    log.parent.mkdir()
    log.write_text(says(7, 100, ago=60))
    waits(site, log, opening(1, ago=20))
    log.rename(tmp_path / "t23.log.1")
    log.touch()
    said = warned(site, log)
    assert "the file that the relay read last is neither" in said
    assert "delaycompress" in said


def test_log_without_cache_is_told(site: Site, tmp_path: Path):
    """By its latest line, for the former ones stay when the lines of nginx were taken anew."""
    log = tmp_path / "t23.log"
    old = says(1, 100).replace(',"cache":""', "")
    log.write_text(old)
    said = warned(site, log)
    assert "without $upstream_cache_status" in said
    assert NGINX_LINES.split("\n")[1] in said
    log.write_text(old + says(2, 100))
    assert warned(site, log) == ""
