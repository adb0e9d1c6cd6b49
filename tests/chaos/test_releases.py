"""Releases that a symbolic link switches, under load: each brings its own Python, and the former one is removed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import time
import venv
from pathlib import Path

import pytest

from t23_middleware.capture.launch import NEEDED
from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import StateFolder

from ..harness import PATIENCE, end_relay, need, until
from ..ports import free_port
from .api import end, plain_api
from .load import Oracle, Verdict, all_arrived, load

pytestmark = pytest.mark.chaos

SWITCHES = 5
APP = """
import os
from t23_middleware import T23Middleware

def site(environ, start_response):
    size = int(environ.get("HTTP_RANGE", "bytes=0-0").rpartition("-")[2]) + 1
    start_response("206 Partial Content", [
        ("Content-Type", "video/mp4"), ("Content-Length", str(size)), ("Worker", str(os.getpid())),
        ("Content-Range", f"bytes 0-{size - 1}/9000000"),
    ])
    for start in range(0, size, 8192):
        yield bytes(min(8192, size - start))

app = T23Middleware(site)
"""


class Site:
    """A folder of releases, and the link to the current one, from which gunicorn serves."""

    def __init__(self, folder: Path, api: StandInServer) -> None:
        self.state = StateFolder(folder / "state")
        self.port = free_port()
        self._releases = folder / "releases"
        self._current = folder / "current"
        self._log = folder / "app.log"
        self._environ = os.environ | {
            "T23_API_URL": api.url,
            "T23_STATE_DIR": str(self.state.path),
            "T23_PHOTO_PATTERN": "twentythree",
        }
        self._served: tuple[Path, subprocess.Popen[bytes]] | None = None
        self._number = 0

    def deploy(self) -> None:
        """Make a release, switch the link, start its server, end the former one, and remove its release."""
        self._number += 1
        release = self._made(self._releases / str(self._number))
        new = self._current.with_suffix(".new")
        new.symlink_to(release)
        new.replace(self._current)
        former, self._served = self._served, (release, self._started())
        if former is not None:
            end(former[1])
            shutil.rmtree(former[0])

    def stop(self) -> None:
        """End the server and the relay."""
        if self._served is not None:
            end(self._served[1])
        end_relay(self.state)

    def log(self) -> str:
        return self._log.read_text() + self.state.relay_log.read_text()

    def _made(self, release: Path) -> Path:
        venv.create(release / "venv", symlinks=True)
        (packages,) = (release / "venv").glob("lib/python*/site-packages")
        for name in ("t23_middleware", "gunicorn", "packaging", *NEEDED):
            found = importlib.util.find_spec(name)
            if found is not None and found.submodule_search_locations:
                shutil.copytree(found.submodule_search_locations[0], packages / name)
        (release / "site_app.py").write_text(APP)
        return release

    def _started(self) -> subprocess.Popen[bytes]:
        python = self._current / "venv/bin/python"
        options = f"-w 2 --reuse-port --no-control-socket -b 127.0.0.1:{self.port}".split()
        begun = self._log.read_text().count("Booting worker") if self._log.exists() else 0
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [python, "-m", "gunicorn", *options, "site_app:app"],
                env=self._environ,
                cwd=self._current,
                stdout=log,
                stderr=log,
            )
        assert until(lambda: self._log.read_text().count("Booting worker") >= begun + 2), (
            self._log.read_text()
        )
        return process


def test_switched_releases_lose_nothing(tmp_path: Path) -> None:
    """Whatever relay runs when its release is removed, each complete response is reported once, with its bytes."""
    need("gunicorn")
    oracle = Oracle()
    with plain_api() as api:
        site = Site(tmp_path, api)
        try:
            site.deploy()
            with load(site.port, oracle, clients=4):
                for _ in range(SWITCHES):
                    enough = len(oracle.held()) + 20
                    assert until(lambda enough=enough: len(oracle.held()) > enough), site.log()
                    site.deploy()
                time.sleep(1)
            stopped = time.monotonic()
            assert until(lambda: all_arrived(oracle.held(), api.recorded()), PATIENCE), site.log()
            took = time.monotonic() - stopped
        finally:
            site.stop()
        verdict = Verdict.of(oracle.held(), api.recorded())
    print(f"the last report came {took:.1f} s after the last play; {verdict}")
    assert verdict.held > 20 * SWITCHES
    assert verdict.nothing_is_lost()
    assert verdict.doubled == 0
