"""``t23-middleware demo``: the example app under a real server, the stand-in API, the relay, and a page about them.

Everything runs on this machine. The site's server and its relay are separate processes, started in the usual way; the
stand-in and the page run in this process.
"""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from ..errors import StateError, UsageError
from ..settings import PREFIX, Settings, process_environment
from ..state import StateFolder, lock_is_held, lock_owner
from . import demo_nginx
from .child import running
from .demo_api import APISwitch
from .demo_page import DemoPage
from .demo_site import example_module, media_path
from .standin import StandIn, StandInServer, print_line
from .standin_http import HTTPServer

log = logging.getLogger(__name__)

#: Seconds that the server may take to answer, and the relay to stop.
PATIENCE_SECONDS = 15.0
#: Seconds between two polls of the journals and the server.
POLL_SECONDS = 0.2
#: Seconds that the relay has to stop by itself before it gets SIGTERM.
STOP_AFTER_SECONDS = 3.0
#: Reports that the stand-in keeps, at most: a demo may run for days.
MAX_RECORDED = 1000
#: Value of ``T23_TIMEOUT`` in seconds. It is shorter than the default, so that the page soon shows that an API hangs.
TIMEOUT_SECONDS = 3


def run_demo(port: int = 0, open_browser: bool = False, nginx: bool = False) -> int:
    """Run until Ctrl-C. Print the page's address, and each report as the stand-in records it.

    *port* 0 chooses a free one. *nginx*: run the site behind nginx and count from its log. Raises
    :class:`~t23_middleware.errors.UsageError` if the extra ``demo`` or nginx is missing, or the port is in use.
    """
    _require("flask", "gunicorn")
    if nginx:
        demo_nginx.program()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    port = _free_port(port)
    with (
        StandInServer(app=StandIn(print_line=print_line, limit=MAX_RECORDED)) as api,
        _state_folder() as state,
    ):
        environ = _environment(api.url, state)
        behind = port
        if nginx:
            behind = _free_port(0)
            environ["T23_PROXY_LOG"] = str(demo_nginx.log_in(state.parent / "nginx"))
        with (
            _switch(api, environ) as switch,
            _page(environ, api, switch) as (page, page_port),
            demo_nginx.before(behind, port, state.parent / "nginx") if nginx else nullcontext(),
            _server(behind, page_port, environ) as server,
        ):
            _wait_until_it_answers(server, behind)
            _print_introduction(port, api.url, open_browser, nginx)
            _follow_until(page, server, stop)
    return 0


def _follow_until(page: DemoPage, server: subprocess.Popen[bytes], stop: threading.Event) -> None:
    """Follow the journals until *stop*, also while no browser shows the page."""
    while not stop.wait(POLL_SECONDS):
        if server.poll() is not None:
            raise UsageError("the demo's server ended by itself; its output above has the reason")
        try:
            page.follow()
        except (StateError, OSError) as error:
            log.error(
                "the demo's page can't read the journals: %s",
                error,
                extra={"t23_event": "page_failed", "t23_reason": str(error)},
            )


_INTRODUCTION = """\
A video site is running at {page}
Open it, play and scrub: the page shows what is counted and reported. Ctrl-C ends the demo.
The site is a plain Flask app under gunicorn, started with 't23-middleware run'. Without a browser:
    curl -so /dev/null '{page}{media}?session_id=me&photo_id={photo}'
    curl -so /dev/null -r 600000- '{page}{media}?session_id=me&photo_id={photo}'
{nginx}The API is a stand-in at {api}. Each report appears below as it is recorded there:
"""
_NGINX = "nginx runs before it: each report has the bytes in nginx's log.\n"


def _print_introduction(port: int, api: str, open_browser: bool, nginx: bool) -> None:
    page = f"http://127.0.0.1:{port}/"
    video = importlib.import_module(example_module()).VIDEO
    media = media_path(video).lstrip("/")
    before = _NGINX if nginx else ""
    print_line(_INTRODUCTION.format(page=page, api=api, media=media, photo=video["photo"], nginx=before))
    if open_browser:
        webbrowser.open(page)


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
            raise UsageError(f"port {port} can't be used ({error}); choose another with --port") from None
        return int(probe.getsockname()[1])


@contextmanager
def _state_folder() -> Iterator[Path]:
    """A state folder for this run, removed after the relay has stopped."""
    with tempfile.TemporaryDirectory(prefix="t23-demo-", ignore_cleanup_errors=True) as name:
        path = Path(name) / "state"
        yield path
        _wait_for_relay_end(StateFolder(path))


def _wait_for_relay_end(folder: StateFolder) -> None:
    """Wait until the relay has delivered everything and stops. If it waits for an API that is off, send SIGTERM."""
    began = time.monotonic()
    signalled = 0
    while lock_is_held(folder.relay_lock) and time.monotonic() - began < PATIENCE_SECONDS:
        relay = lock_owner(folder.relay_lock)
        if relay and relay != signalled and time.monotonic() - began > STOP_AFTER_SECONDS:
            signalled = relay
            _stop_relay(relay)
        time.sleep(0.1)


def _stop_relay(relay: int) -> None:
    try:
        os.kill(relay, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it has just stopped


def _environment(api_url: str, state: Path) -> dict[str, str]:
    """The site's environment, without this user's settings for another site."""
    own = {name: value for name, value in process_environment().items() if not name.startswith(PREFIX)}
    return own | {
        "T23_API_URL": api_url,
        "T23_STATE_DIR": str(state),
        "T23_PHOTO_PATTERN": "twentythree",
        "T23_TIMEOUT": str(TIMEOUT_SECONDS),
    }


@contextmanager
def _switch(api: StandInServer, environ: Mapping[str, str]) -> Iterator[APISwitch]:
    switch = APISwitch(api, environ)
    try:
        yield switch
    finally:
        switch.close()


@contextmanager
def _page(
    environ: Mapping[str, str], api: StandInServer, switch: APISwitch
) -> Iterator[tuple[DemoPage, int]]:
    """The page, and the port on which the site reaches it."""
    page = DemoPage(Settings(environ=environ), api, switch)
    server = HTTPServer("127.0.0.1", 0, page)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="page", daemon=True)
    thread.start()
    try:
        yield page, int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.close_connections()


def _server(
    port: int, page_port: int, environ: Mapping[str, str]
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """gunicorn with the site, started with ``t23-middleware run``."""
    app = f"t23_middleware.ops.demo_site:site({page_port})"
    command = [sys.executable, "-m", "t23_middleware", "run", "gunicorn", app, "--bind", f"127.0.0.1:{port}"]
    # A response to a player takes minutes; at the end the demo does not wait for it.
    options = [
        "-w",
        "2",
        "-k",
        "gthread",
        "--threads",
        "16",
        "--graceful-timeout",
        "1",
        "--log-level",
        "warning",
    ]
    return running([*command, *options], env=environ, cwd=_working_folder())


def _working_folder() -> Path:
    """The folder to start gunicorn in. It is not the current one: gunicorn imports from its folder first, and in a
    clone it would find the package without the example instead of the installed package."""
    if example_module().startswith("t23_middleware."):
        return Path(tempfile.gettempdir())
    return Path(__file__).parents[2]


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            # Request a page, because gunicorn listens before its workers have imported the app.
            connection.request("GET", "/")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
        finally:
            connection.close()
    raise UsageError("the demo's server does not start; its output above has the reason")
