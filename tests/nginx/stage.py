"""A proxy, the apps behind it, their relays, and the API that these report to."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from t23_middleware.ops.standin import StandInServer

from ..chaos.api import plain_api
from ..harness import PATIENCE, ROOT, Server, running, until
from .proxies import Apache, Nginx, ended

FILM, FILM_BYTES = "film.mp4", 256_000_000
SHORT, SHORT_BYTES = "short.mp4", 1_000_000
TINY, TINY_BYTES = "tiny.mp4", 10_000
#: When the films were made.
MODIFIED, MODIFIED_S = "Thu, 01 Jan 2026 00:00:00 GMT", 1_767_225_600

#: The servers' own commands.
COMMANDS = {
    "gunicorn": "gunicorn -w 1 -k gthread --threads 16 -b 127.0.0.1:PORT tests.nginx.app:app",
    "uwsgi": (
        "uwsgi --socket 127.0.0.1:PORT --master --processes 1 --threads 16 --die-on-term --need-app"
        " --module tests.nginx.app:app"
    ),
}
_numbers = itertools.count(1)


def target(way: str, session: str, name: str = FILM, server: str = "gunicorn") -> str:
    return f"/{server}/{way}/{name}?session_id={session}&photo_id=7"


def new_session() -> str:
    """A session that no request had yet."""
    return f"s{next(_numbers)}"


class Stage:
    """What runs for a test; :attr:`apps` have a state folder each, and all of them one log."""

    def __init__(self, proxy: Nginx | Apache, apps: dict[str, Server], api: StandInServer) -> None:
        self.proxy = proxy
        self.apps = apps
        self.api = api

    @property
    def nginx(self) -> Nginx:
        assert isinstance(self.proxy, Nginx)
        return self.proxy

    def reports(self, session: str) -> list[dict[str, Any]]:
        return [report for report in self.api.recorded() if report["session_id"] == session]

    def wait(self, session: str, count: int = 1) -> list[dict[str, Any]]:
        """The reports of *session*, once there are so many."""
        assert until(lambda: len(self.reports(session)) >= count), self.said()
        return self.reports(session)

    def sizes(self, session: str) -> list[int]:
        """The bytes of each report of *session*, once there is one."""
        return [int(report["bytes_total"]) for report in self.wait(session)]

    def status(self, server: str = "gunicorn") -> dict[str, Any]:
        """What ``status --json`` says of that app."""
        done = self.command(server, "status", "--json")
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def command(self, server: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """``t23-middleware *words`` with the settings of that app."""
        return subprocess.run(
            [sys.executable, "-m", "t23_middleware", *words],
            env=self.apps[server].environ | environ, cwd=ROOT, text=True, capture_output=True, timeout=4 * PATIENCE,
        )  # fmt: skip

    def said(self) -> str:
        return self.proxy.said() + "".join(
            app.log() + (app.state.relay_log.read_text() if app.state.relay_log.exists() else "")
            for app in self.apps.values()
        )


@contextmanager
def places() -> Iterator[tuple[Path, Path]]:
    """A folder for a proxy and one with the films; under no folder of pytest's, for the workers' user enters none."""
    with ExitStack() as ends:
        made = []
        for prefix in ("proxy-", "films-"):
            folder = Path(tempfile.mkdtemp(prefix=prefix))
            ends.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.chmod(0o755)
            made.append(folder)
        for name, size in ((FILM, FILM_BYTES), (SHORT, SHORT_BYTES), (TINY, TINY_BYTES)):
            (made[1] / name).touch()
            os.truncate(made[1] / name, size)
            os.utime(made[1] / name, (MODIFIED_S, MODIFIED_S))
        yield made[0], made[1]


@contextmanager
def behind_nginx(
    *servers: str, api: StandInServer | None = None, counts: bool = True, **environ: str
) -> Iterator[Stage]:
    """The *servers* behind nginx. Without *counts* nginx has none of our lines, and the apps are told of no log."""
    with ExitStack() as stack:
        folder, films = stack.enter_context(places())
        api = stack.enter_context(api or plain_api())
        told = {"T23_PROXY_LOG": str(folder / "t23.log")} if counts else {}
        apps = {
            name: stack.enter_context(
                running(COMMANDS[name], folder / name, api.url, FILMS=str(films), **told, **environ)
            )
            for name in servers
        }
        nginx = Nginx(folder, films, counts=counts, **{name: app.port for name, app in apps.items()})
        stack.enter_context(ended(nginx))
        yield Stage(nginx.start(), apps, api)


@contextmanager
def behind_apache() -> Iterator[Stage]:
    """gunicorn behind Apache."""
    with ExitStack() as stack:
        folder, films = stack.enter_context(places())
        api = stack.enter_context(plain_api())
        told = {"T23_PROXY_LOG": str(folder / "t23.log"), "FILMS": str(films)}
        app = stack.enter_context(running(COMMANDS["gunicorn"], folder / "gunicorn", api.url, **told))
        apache = Apache(folder, films, gunicorn=app.port)
        stack.enter_context(ended(apache))
        yield Stage(apache.start(), {"gunicorn": app}, api)
