"""What is set up wrongly: `check` says so with its remedy, and the answers are untouched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from t23_middleware.relay.proxy_line import NGINX_LINES

from ..harness import need_root, until
from ..ports import free_port
from ..servers.client import Client
from .stage import SHORT, SHORT_BYTES, Stage, behind_nginx, new_session, target


@pytest.fixture
def stage() -> Iterator[Stage]:
    with behind_nginx("gunicorn") as stage:
        yield stage


def play(stage: Stage, way: str = "file") -> tuple[str, list[str]]:
    """A play, of which all comes; its session and the names of the headers that came with it."""
    session = new_session()
    with Client(stage.nginx.ports["plain"]) as client:
        answer = client.ask("GET", target(way, session, SHORT))
    assert (answer.status, len(answer.body)) == (200, SHORT_BYTES)
    return session, [name.lower() for name, _ in answer.headers]


def refused(stage: Stage, **environ: str) -> str:
    """What `check` says, which is not content."""
    done = stage.command("gunicorn", "check", T23_APP="tests.nginx.app:app", **environ)
    assert done.returncode == 1, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def test_right_setup_hides_our_header(stage: Stage):
    """With a right setup, a client gets none of our headers, and ``check`` passes."""
    for way in ("file", "accel"):
        session, headers = play(stage, way)
        assert stage.sizes(session) == [SHORT_BYTES]
        assert "x-t23-play" not in headers
    done = stage.command("gunicorn", "check", T23_APP="tests.nginx.app:app")
    assert done.returncode == 0, done.stdout + done.stderr


def test_log_missing_fails_check(stage: Stage):
    """A log that does not exist makes ``check`` fail, with the remedy."""
    elsewhere = str(stage.nginx.folder / "elsewhere.log")
    said = refused(stage, T23_PROXY_LOG=elsewhere)
    assert f"{elsewhere} does not exist" in said
    assert "reload it, or correct T23_PROXY_LOG" in said


def test_a_log_of_another_format_is_told(stage: Stage):
    play(stage)
    said = refused(stage, T23_PROXY_LOG=str(stage.nginx.folder / "access.log"))
    assert "none in the format t23" in said
    assert "docs/nginx.md" in said


def test_log_unreadable_fails_check(stage: Stage):
    """A log that the app's user may not read makes ``check`` fail, with the remedy.

    This is the second day's state: logrotate has made the log 0640, and the app's user is not in its group.
    """
    if os.geteuid() != 0:
        need_root()
    stage.wait(play(stage)[0])
    folder = stage.apps["gunicorn"].state.path
    give(folder, "nobody")
    stage.nginx.log.chmod(0o640)
    shutil.chown(stage.nginx.log, "www-data", "adm")
    said = refused(stage)
    assert "t23.log can't be read by nobody" in said
    assert "usermod -aG adm nobody" in said
    session, _ = play(stage)
    give(folder, "root")
    assert stage.sizes(session) == [SHORT_BYTES]


def give(folder: Path, user: str) -> None:
    """To *user*, with all that is in it."""
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, user)


def test_offloaded_without_proxy_log():
    """Without T23_PROXY_LOG, a file that nginx sends is counted as offloaded, and ``check`` shows the lines to add."""
    with behind_nginx("gunicorn", counts=False) as stage:
        _, headers = play(stage, "accel")
        assert "x-t23-play" not in headers
        assert until(lambda: stage.status()["counters"].get("offloaded") == 1), stage.status()
        done = stage.command("gunicorn", "check", T23_APP="tests.nginx.app:app")
        for line in NGINX_LINES.replace("{path}", "/var/log/nginx/t23.log").splitlines():
            assert line.strip() in done.stdout, done.stdout
        assert stage.api.recorded() == []


def reload(stage: Stage) -> None:
    """Until no worker of before is left that could take a request."""
    before = set(stage.nginx.workers())
    stage.nginx.reload()
    assert until(lambda: not before & set(stage.nginx.workers())), stage.nginx.said()


def change(stage: Stage, old: str, new: str) -> None:
    """*new* for *old* in the sites of nginx, from its next reload on."""
    path = stage.nginx.folder / "sites-enabled/films"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def store(stage: Stage, more: str) -> None:
    """X-Accel-Redirect leads to a store, which nginx asks over HTTP, with *more* in that location."""
    films = stage.apps["gunicorn"].environ["FILMS"]
    port = free_port()
    change(
        stage,
        f"location /protected/ {{ internal; alias {films}/; }}",
        f"location /protected/ {{ internal; {more} proxy_pass http://127.0.0.1:{port}/; }}",
    )
    site = stage.nginx.folder / "sites-enabled/store"
    site.write_text(
        "limit_req_zone $binary_remote_addr zone=own:1m rate=1000r/s;"
        f" server {{ listen 127.0.0.1:{port}; root {films}; access_log off; }}"
    )
    reload(stage)


@pytest.mark.parametrize(
    "more",
    [
        "",
        "proxy_cache films; proxy_cache_valid 200 1m; proxy_cache_key of-the-store;",
        "limit_req zone=own; set $t23play $upstream_http_x_t23_play;",
    ],
    ids=["plain", "cached", "limited"],
)
def test_store_behind_accel_is_counted(stage: Stage, more: str):
    """Also where the store's answer comes from nginx's cache: the app was asked all the same."""
    store(stage, more)
    for _ in range(2):
        session, headers = play(stage, "accel")
        assert stage.sizes(session) == [SHORT_BYTES]
        assert "x-t23-play" not in headers


def test_store_without_its_line_is_told(stage: Stage):
    store(stage, "limit_req zone=own burst=9;")
    play(stage, "accel")
    assert until(lambda: stage.status()["waiting_for_proxy"] == 1), stage.status()
    done = stage.command("gunicorn", "check", T23_APP="tests.nginx.app:app")
    assert "set $t23play $upstream_http_x_t23_play;" in done.stdout


@pytest.mark.parametrize("more", ["", "proxy_method HEAD;"], ids=["counted", "mended"])
def test_mirror_is_told_and_mended(stage: Stage, more: str):
    """The mirror's copies wait for lines that never come; as HEAD they are no plays."""
    upstream = f"http://127.0.0.1:{stage.apps['gunicorn'].port}"
    change(
        stage,
        f"proxy_pass {upstream};",
        f"mirror /mirror; proxy_pass {upstream};",
    )
    change(
        stage,
        "location /protected/",
        f"location = /mirror {{ internal; {more} proxy_pass {upstream}$request_uri; }} location /protected/",
    )
    reload(stage)
    for _ in range(3):
        session, _ = play(stage)
        assert stage.sizes(session) == [SHORT_BYTES]
    waiting = 0 if more else 3
    assert until(lambda: stage.status()["waiting_for_proxy"] == waiting), stage.status()
    said = " ".join(stage.command("gunicorn", "check", T23_APP="tests.nginx.app:app").stdout.split())
    assert ("Does nginx mirror requests to an app that counts?" in said) is not bool(more), said
