"""What operators are told of the proxy: by ``check``, ``status`` and the page."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from t23_middleware.ops.status import look
from t23_middleware.relay.outbox import Ingest, SQLiteOutbox
from t23_middleware.relay.proxy_line import NGINX_LINES
from t23_middleware.settings import Settings
from t23_middleware.state import StateFolder

from ..harness import need_root
from ..relay.test_proxied import says
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


def test_of_an_app_without_a_proxy_nothing_is_said(site: Site):
    assert proxy(site) == ("", "")


def test_a_log_with_plays_is_well_and_one_without_is_too(site: Site, tmp_path: Path):
    log = tmp_path / "t23.log"
    log.touch()
    level, words = proxy(site, T23_PROXY_LOG=str(log))
    assert (level, words.endswith("t23.log can be read; no play is in it yet")) == ("ok", True)
    log.write_text(says(1, 100))
    level, words = proxy(site, T23_PROXY_LOG=str(log))
    assert (level, words.endswith("t23.log can be read, and has plays")) == ("ok", True)


def test_a_log_that_is_missing_is_named_with_the_lines_that_write_it(site: Site, tmp_path: Path):
    log = tmp_path / "t23.log"
    done = site.run("check", T23_PROXY_LOG=str(log))
    assert done.returncode == 1
    level, words = items(done.stdout)["proxy"]
    assert level == "WRONG"
    assert "t23.log does not exist" in words
    for line in NGINX_LINES.replace("{path}", str(log)).splitlines():
        assert f"    {line}\n" in done.stdout, "to be copied as it is"


def test_a_folder_or_a_fifo_is_named_as_such(site: Site, tmp_path: Path):
    folder, fifo = tmp_path / "a.log", tmp_path / "b.log"
    folder.mkdir()
    os.mkfifo(fifo)
    level, words = proxy(site, T23_PROXY_LOG=str(folder))
    assert (level, "is a folder" in words) == ("WRONG", True)
    level, words = proxy(site, T23_PROXY_LOG=str(fifo))
    assert (level, "is a FIFO" in words) == ("WRONG", True)


def test_a_log_without_our_lines_is_named_as_such(site: Site, tmp_path: Path):
    log = tmp_path / "access.log"
    log.write_text("192.0.2.1 - - [24/Nov/2026] GET\n" * 10)
    level, words = proxy(site, T23_PROXY_LOG=str(log))
    assert level == "WRONG"
    assert "10 lines, but none in the format t23" in words


def test_a_log_that_the_workers_user_may_not_read_is_told_with_the_group_to_join(site: Site, tmp_path: Path):
    if os.geteuid() != 0:
        need_root()
    knows(site.folder, {})
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
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


def test_plays_that_wait_for_an_hour_while_the_log_is_silent_are_worth_a_look(site: Site, tmp_path: Path):
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


def test_offloaded_plays_without_a_log_come_with_the_lines_to_add(site: Site):
    knows(site.folder, {"offloaded": 12, "behind_proxy": 1})
    done = site.run("check")
    level, words = items(done.stdout)["proxy"]
    assert (level, words.startswith("12 plays were left to the proxy")) == ("warn", True)
    lines = NGINX_LINES.replace("{path}", "/var/log/nginx/t23.log").splitlines()
    assert len(lines) == 5
    assert all(f"    {line}\n" in done.stdout for line in lines)
    assert "T23_PROXY_LOG" in " ".join(site.run("status").stdout.split())


def test_a_proxy_without_a_log_is_told_with_what_buffering_means(site: Site):
    knows(site.folder, {"behind_proxy": 2})
    level, words = proxy(site)
    assert level == "warn"
    assert "what it buffers counts as played" in words


def test_a_server_that_hides_who_left_is_told_unless_nginx_counts(site: Site, tmp_path: Path):
    knows(site.folder, {"leaving_unseen": 1})
    level, words = items(site.run("check").stdout)["server"]
    assert level == "warn"
    assert words.startswith("hypercorn tells the app nothing of a viewer who left")
    log = tmp_path / "t23.log"
    log.write_text(says(1, 100))
    assert "server" not in items(site.run("check", T23_PROXY_LOG=str(log)).stdout)


def test_status_and_page_tell_what_waits_for_the_proxy_only_where_something_does(site: Site, state: Path):
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
def test_a_note_that_is_no_number_is_none(site: Site, noted: str):
    site.folder.create()
    outbox = SQLiteOutbox(site.folder.outbox)
    outbox.note({"awaited": noted})
    outbox.close()
    assert look(Settings(environ=site.environ)).awaited == (0, 0, 0)
