"""Each file and command of ``docs/frameworks.md``, run as it stands: its plays are reported with the bytes that arrived."""

from __future__ import annotations

import http.client
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import StateFolder

from ..harness import CLIP, CLIP_BYTES, PATIENCE, ROOT, end_relay, lacking, until
from ..ports import free_port
from .pages import PAGE, Told, told

TOLD = list(told(PAGE.read_text()))
FILM = "/media/7190971.mp4"
#: Frameworks whose answer to a Range is the whole file.
WITHOUT_RANGE = ("Django", "Werkzeug's SharedDataMiddleware")
#: The host that a proxy passes on, where the page shows one.
PUBLIC_HOST = "localhost"


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Site:
    """A command of the page, at work in a folder with the page's files."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self._log = log
        self._process = process

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def answers(self) -> bool:
        assert self._process.poll() is None, self.log()
        try:
            return self.ask("/", "HEAD").status > 0
        except OSError:
            return False

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, headers=sent)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def play(self, session: str, **headers: str) -> Answer:
        return self.ask(f"{FILM}?session_id={session}&photo_id=7190971", **headers)


def needs(case: Told) -> None:
    """Skip where what the page's command needs is not there."""
    if "egg:t23_middleware" in "".join(case.files.values()):
        try:
            importlib.metadata.distribution("t23_middleware")
        except importlib.metadata.PackageNotFoundError:
            lacking("t23_middleware is not installed, and 'egg:' names what is")


def prepared(case: Told, folder: Path, api_port: int, port: int) -> str:
    """The command for this port and API, with the page's files in *folder*."""
    if case.section == "Django":
        command = [sys.executable, "-m", "django", "startproject", "mysite", str(folder)]
        subprocess.run(command, check=True, timeout=PATIENCE)
    case.write_into(folder)
    (folder / "films").mkdir()
    shutil.copy(CLIP, folder / "films" / "7190971.mp4")
    for path in filter(Path.is_file, [folder / name for name in (*case.files, *case.added)]):
        path.write_text(here(path.read_text(), api_port, port))
    return here(case.command, api_port, port)


def here(text: str, api_port: int, port: int) -> str:
    """*text* with the page's addresses exchanged for those of this test."""
    text = text.replace("https://video.example.com", f"http://127.0.0.1:{api_port}")
    text = text.replace("https://{host}", f"http://{{host}}:{api_port}").replace("a.example.com", PUBLIC_HOST)
    return text.replace("8000", str(port))


@contextmanager
def running(case: Told, tmp_path: Path, api: StandInServer) -> Iterator[Site]:
    folder, state, port = tmp_path / "site", tmp_path / "state", free_port()
    folder.mkdir()
    command = prepared(case, folder, int(api.url.rpartition(":")[2]), port)
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["sh", "-ec", command],
            env=os.environ
            | {"PATH": programs(tmp_path), "PYTHONPATH": str(ROOT), "T23_STATE_DIR": str(state)},
            cwd=folder,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    site = Site(port, log, process)
    try:
        assert until(site.answers), site.log()
        yield site
    finally:
        end(process)
        end_relay(StateFolder(state))


def programs(tmp_path: Path) -> str:
    """A search path on which ``t23-middleware`` and the servers are found, installed or not."""
    ours = tmp_path / "bin" / "t23-middleware"
    ours.parent.mkdir()
    ours.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m t23_middleware "$@"\n')
    ours.chmod(0o755)
    return os.pathsep.join([str(ours.parent), str(Path(sys.executable).parent), os.environ["PATH"]])


def end(process: subprocess.Popen[bytes]) -> None:
    """The whole group: the shell of the command does not pass a signal on."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(PATIENCE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


@pytest.mark.parametrize("case", TOLD, ids=str)
def test_page_commands_report_arrived_bytes(case: Told, tmp_path: Path, api: StandInServer):
    """Each command of docs/frameworks.md, run as it is written, reports the bytes that arrived."""
    needs(case)
    film = CLIP.read_bytes()
    # Only where the page is about a proxy is there one; elsewhere nobody may choose the host by a header.
    via = {"X_Forwarded_Host": PUBLIC_HOST} if case.section == "ProxyFix" else {}
    with running(case, tmp_path, api) as site:
        whole = site.play("whole", **via)
        part = site.play("part", Range="bytes=1000-200000", **via)
        assert site.ask(f"{FILM}?session_id=head&photo_id=7190971", "HEAD", **via).status in (200, 405)
        assert (whole.status, whole.body) == (200, film), site.log()
        expected = film if case.section in WITHOUT_RANGE else film[1000:200_001]
        assert part.body == expected
        reports = api.wait_for(2, PATIENCE)
    assert {report["session_id"]: report["bytes_total"] for report in reports} == {
        "whole": str(CLIP_BYTES),
        "part": str(len(expected)),
    }
    assert {report["photo_id"] for report in reports} == {"7190971"}
    assert "Traceback" not in site.log()


@pytest.mark.parametrize("case", [case for case in TOLD if case.section == "ProxyFix"], ids=str)
def test_host_without_proxy_not_counted(case: Told, tmp_path: Path, api: StandInServer):
    """A play on a host that no proxy named is not counted."""
    with running(case, tmp_path, api) as site:
        assert site.play("foreign").body == CLIP.read_bytes()
        assert site.play("ours", X_Forwarded_Host=PUBLIC_HOST).body == CLIP.read_bytes()
        reports = api.wait_for(1, PATIENCE)
    assert [report["session_id"] for report in reports] == ["ours"]


def test_page_shows_all_frameworks():
    """The page shows each framework that people ask for."""
    sections = {case.section for case in TOLD}
    assert sections >= {
        "Flask",
        "Django",
        "Bottle",
        "Pyramid, and all that PasteDeploy loads",
        "Falcon",
        "WhiteNoise",
        "Werkzeug's SharedDataMiddleware",
        "ProxyFix",
    }
