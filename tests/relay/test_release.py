"""Deploys: releases that go away under a relay, upgrades in place, and settings that change."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import t23_middleware
from t23_middleware.ops.standin import StandInServer
from t23_middleware.relay import client
from t23_middleware.relay.release import Release, import_all
from t23_middleware.state import StateFolder, lock_owner

from ..harness import PATIENCE, ROOT, end_relay, until

PACKAGE = Path(t23_middleware.__file__).parent
#: An app that streams one play for each line that it reads, and answers another request for an empty line.
APP = """
import sys
from t23_middleware import T23Middleware

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "video/mp4"), ("Content-Length", "5")])
    return [b"12345"]

wrapped = T23Middleware(app)
for line in sys.stdin:
    query = f"session_id={line.strip()}&photo_id=7" if line.strip() else ""
    body = wrapped({"REQUEST_METHOD": "GET", "PATH_INFO": "/", "QUERY_STRING": query}, lambda *answer: None)
    list(body)
    getattr(body, "close", lambda: None)()
    print("done", flush=True)
"""


class App:
    """The app, with the package from *release*."""

    def __init__(self, release: Path, folder: StateFolder, api: str, **environ: str) -> None:
        ours = {"PYTHONPATH": str(release), "T23_API_URL": api, "T23_STATE_DIR": str(folder.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", APP],
            env=os.environ | ours | environ,
            cwd=release,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def play(self, session: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{session}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def release(tmp_path: Path) -> Callable[[str], Path]:
    """Makes the folder of a release that holds the package."""

    def make(name: str) -> Path:
        home = tmp_path / "releases" / name
        shutil.copytree(
            PACKAGE,
            home / "t23_middleware",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        return home

    return make


@pytest.fixture
def start(folder: StateFolder, api: StandInServer) -> Iterator[Callable[..., App]]:
    apps: list[App] = []

    def begin(release: Path, **environ: str) -> App:
        apps.append(App(release, folder, api.url, **environ))
        return apps[-1]

    yield begin
    for app in apps:
        app.end()
    end_relay(folder)


def sessions(api: StandInServer) -> set[str]:
    return {report["session_id"] for report in api.recorded()}


def relay_of(folder: StateFolder) -> int:
    assert until(lambda: lock_owner(folder.relay_lock)), folder.relay_log.read_text()
    return lock_owner(folder.relay_lock) or 0


def play_until(app: App, api: StandInServer, session: str) -> None:
    """One play; then requests without any, as an app has them, until it is reported."""
    app.play(session)
    until_s = time.monotonic() + PATIENCE
    while session not in sessions(api):
        assert time.monotonic() < until_s
        time.sleep(0.2)
        app.play("")


def test_removed_release_is_left(folder: StateFolder, api: StandInServer, release: Any, start: Any) -> None:
    """A relay whose release is removed leaves, and the app of the next release starts its own."""
    one, two = release("1"), release("2")
    first = start(one)
    play_until(first, api, "one")
    relay = relay_of(folder)
    second = start(two)
    first.end()
    play_until(second, api, "two")
    shutil.rmtree(one)
    assert until(lambda: lock_owner(folder.relay_lock) != relay), folder.relay_log.read_text()
    play_until(second, api, "three")
    assert relay_of(folder) != relay


def test_upgrade_in_place(folder: StateFolder, api: StandInServer, release: Any, start: Any) -> None:
    """As pip install -U does it under a running app: the files are missing for a while, then there are others."""
    one = release("1")
    app = start(one)
    play_until(app, api, "one")
    relay = relay_of(folder)
    (one / "t23_middleware").rename(one / "old")
    app.play("two")
    shutil.copytree(PACKAGE, one / "t23_middleware")
    shutil.rmtree(one / "old")
    assert until(lambda: lock_owner(folder.relay_lock) != relay), folder.relay_log.read_text()
    play_until(app, api, "three")
    assert sessions(api) == {"one", "two", "three"}
    assert relay_of(folder) != relay


def test_newer_version_takes_over(folder: StateFolder, api: StandInServer, release: Any, start: Any) -> None:
    """The relay of a newer version stays with a worker of the older one, though it may name its settings otherwise."""
    one = release("1")
    app = start(one)
    play_until(app, api, "one")
    relay = relay_of(folder)
    (one / "t23_middleware" / "version.py").write_text('VERSION = "99.0.0"\n')
    settings = one / "t23_middleware" / "settings.py"
    settings.write_text(settings.read_text().replace("crc32(told", "crc32(b'new' + told"))
    (one / "t23_middleware" / "__init__.py").touch()
    assert until(lambda: lock_owner(folder.relay_lock) != relay), folder.relay_log.read_text()
    play_until(app, api, "two")
    newer = relay_of(folder)
    play_until(app, api, "three")
    assert relay_of(folder) == newer
    holder = folder.relay_holder()
    assert holder is not None
    assert holder.version == "99.0.0"


def test_changed_setting_in_outage(folder: StateFolder, api: StandInServer, release: Any, start: Any) -> None:
    """What waits for an API that is down leaves by the relay of the app's new settings, without another request."""
    one = release("1")
    first = start(one, T23_API_URL="http://127.0.0.1:9")
    first.play("one")
    relay = relay_of(folder)
    assert until(lambda: "can't be reached" in folder.relay_log.read_text())
    first.end()
    second = start(one)
    second.play("two")
    assert until(lambda: {"one", "two"} <= sessions(api)), folder.relay_log.read_text()
    assert relay_of(folder) != relay


@pytest.mark.parametrize("change", ["removed", "replaced", "rewritten"])
def test_release_sees_changed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Any of the files that this process was started from counts."""
    file = tmp_path / "python"
    file.write_text("one")
    monkeypatch.setattr(sys, "executable", str(file))
    release = Release()
    assert not release.is_replaced()
    match change:
        case "removed":
            file.unlink()
        case "replaced":
            (tmp_path / "new").write_text("one")
            (tmp_path / "new").replace(file)
        case "rewritten":
            file.write_text("another")
    release = _looked_at_again(release)
    assert release.is_replaced()


def _looked_at_again(release: Release) -> Release:
    release._check_at = 0.0
    return release


def test_nothing_is_imported_later(folder: StateFolder) -> None:
    """After the start, modules of ours are all there: their files may be gone when they are needed."""
    script = (
        "import sys, json; from t23_middleware.relay import process, release; release.import_all();"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(json.loads(done.stdout))
    files = (PACKAGE / "relay").rglob("*.py")
    names = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in files
    }
    assert names <= loaded
    assert {"encodings.idna", "encodings.utf_8_sig", "ssl", "sqlite3"} <= loaded
    import_all()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_authorities_are_held(tmp_path: Path, kind: str) -> None:
    """Certificates are read once, and stay when their file is removed; a file that changes is read again."""
    pem = ssl.DER_cert_to_PEM_cert(b"one")
    place = tmp_path / "ca"
    file = place / "one.0" if kind == "folder" else place
    if kind == "folder":
        place.mkdir()
    file.write_text("# Főtanúsítvány\n" + pem)
    assert client._authorities(str(place)) == pem.strip()
    other = ssl.DER_cert_to_PEM_cert(b"another one")
    (place / "two.0" if kind == "folder" else place).write_text(other)
    assert other.strip() in client._authorities(str(place))
    shutil.rmtree(place) if kind == "folder" else place.unlink()
    assert other.strip() in client._authorities(str(place))


def test_missing_authorities_are_named(tmp_path: Path) -> None:
    """What was never there can't be held."""
    with pytest.raises(OSError, match="no authorities at"):
        client._authorities(str(tmp_path / "nothing"))
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match="no certificate"):
        client._authorities(str(tmp_path / "empty"))
