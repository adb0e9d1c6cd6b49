"""``t23-middleware demo``: the example app under a real server, the stand-in API and the relay, on this machine."""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError
from ..settings import process_environment
from ..state import StateFolder, lock_is_held
from .standin import StandIn, StandInServer, say

#: Seconds that the server may take to answer, and that the relay may take to leave.
PATIENCE = 15.0


def run_demo(port: int = 0, open_browser: bool = False) -> int:
    """Run until Ctrl-C; prints the page's address, and each report as the stand-in records it.

    *port* 0 takes a free one. Raises :class:`~t23_middleware.errors.UsageError` where the extra ``demo`` is missing
    or the port is taken.
    """
    _require("flask", "gunicorn")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    port = _free_port(port)
    with (
        StandInServer(app=StandIn(say=say)) as api,
        _state_folder() as state,
        _server(port, api.url, state) as server,
    ):
        _wait_until_it_answers(server, port)
        page = f"http://127.0.0.1:{port}/"
        say(_introduction(page, api.url))
        if open_browser:
            webbrowser.open(page)
        while not stop.wait(0.2):
            if server.poll() is not None:
                raise UsageError("the demo's server ended by itself; its own words stand above")
    return 0


_INTRODUCTION = """\
A video site is running at {page} (Ctrl-C ends it).
It is a plain Flask app under gunicorn, started with 't23-middleware run'. Open it and play, or:
    curl -so /dev/null '{page}{media}?session_id=me&photo_id={photo}'
    curl -so /dev/null -r 600000- '{page}{media}?session_id=me&photo_id={photo}'
The API is a stand-in at {api}. Each report appears below as it is recorded there:
"""


def _introduction(page: str, api: str) -> str:
    example = importlib.import_module(_example()[0])
    media = re.sub(r"<(\w+)>", lambda part: example.VIDEO[part[1]], example.PATH).lstrip("/")
    return _INTRODUCTION.format(page=page, api=api, media=media, photo=example.VIDEO["photo"])


def _example() -> tuple[str, Path]:
    """The example's module, and the folder to start it in.

    Not the folder that one stands in: gunicorn looks there first, and in a clone finds the package without its
    example instead of the installed one.
    """
    installed = "t23_middleware.examples.flask_app"
    checkout = Path(__file__).parents[2]
    if importlib.util.find_spec("t23_middleware.examples") is not None:
        return installed, Path(tempfile.gettempdir())
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return "examples.flask_app", checkout


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {' and '.join(missing)}; pip install 't23_middleware[demo]'")


def _free_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"port {port} can't be had ({error}); choose another with --port") from None
        return int(probe.getsockname()[1])


@contextmanager
def _state_folder() -> Iterator[Path]:
    """A folder for this run; gone once the relay has left it."""
    with tempfile.TemporaryDirectory(prefix="t23-demo-", ignore_cleanup_errors=True) as name:
        path = Path(name) / "state"
        yield path
        deadline = time.monotonic() + PATIENCE
        while lock_is_held(StateFolder(path).relay_lock) and time.monotonic() < deadline:
            time.sleep(0.1)


@contextmanager
def _server(port: int, api_url: str, state: Path) -> Iterator[subprocess.Popen[bytes]]:
    """gunicorn with the example, started as a user would: by ``t23-middleware run``."""
    module, folder = _example()
    environ = process_environment() | {
        "T23_API_URL": api_url,
        "T23_STATE_DIR": str(state),
        "T23_PHOTO_PATTERN": "twentythree",
    }
    command = [sys.executable, "-m", "t23_middleware", "run", "gunicorn", f"{module}:app"]
    options = [
        "--bind",
        f"127.0.0.1:{port}",
        "-w",
        "2",
        "-k",
        "gthread",
        "--threads",
        "8",
        "--log-level",
        "warning",
    ]
    server = subprocess.Popen([*command, *options], env=environ, cwd=folder, start_new_session=True)
    try:
        yield server
    finally:
        server.terminate()
        try:
            server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            # Its page, not its port: gunicorn listens before its workers have found the app.
            connection.request("GET", "/")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
        finally:
            connection.close()
    raise UsageError("the demo's server does not start; its own words stand above")
