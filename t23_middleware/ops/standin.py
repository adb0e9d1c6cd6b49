"""The stand-in: a local API that behaves as TwentyThree's documentation describes, for trials and tests.

`StandIn` is the API as a WSGI app, `StandInServer` serves it on a socket, `run_standin` is the command. Its answers are
in `standin_answers`. It also has these control addresses. They are never affected by a fault, and they refuse requests
from web sites in the same browser (403, see `loopback`):

- ``GET /_recorded``: the reports as JSON, oldest first; ``DELETE`` (or ``POST /_clear``) removes them.
- ``POST /_faults``: turns on a fault of `standin_faults` (form or JSON); ``GET`` shows it; ``DELETE`` turns it off.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import HTTPException
from werkzeug.http import http_date
from werkzeug.wrappers import Request, Response

from t23_middleware.errors import UsageError
from t23_middleware.ops.loopback import host_refusal, request_refusal
from t23_middleware.ops.standin_answers import DENIED, REPORTED, Call, StandInAnswer, encoded, refusal
from t23_middleware.ops.standin_faults import Fault, FaultSwitch, changed_answer, page, with_fault
from t23_middleware.ops.standin_http import HTTPServer
from t23_middleware.relay.report import REPORT_PATHS

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

DEFAULT_PORT = 8023
#: Seconds for which an anonymous answer may be cached (documentation, "Caching").
CACHE_SECONDS = 1800


class StandIn:
    """The API as a WSGI app (PEP 3333).

    `cookie` is the name of the cookie that may contain the session. If not `whitelisted`, every report is denied.
    Reports of `unknown_photos` are answered with ``no_such_photo``. `clock` returns epoch seconds. Beyond `limit`
    reports the oldest are dropped. `print_line` is called with a line for each recorded report, its session masked.
    """

    def __init__(
        self,
        *,
        cookie: str = "session_id",
        whitelisted: bool = True,
        unknown_photos: Collection[str] = (),
        clock: Callable[[], float] = time.time,
        limit: int = 1_000_000,
        print_line: Callable[[str], None] | None = None,
    ) -> None:
        self.whitelisted = whitelisted
        #: Paths that accept reports.
        self.methods = set(REPORT_PATHS)
        #: Number of reports that were dropped because of the limit.
        self.dropped = 0
        self.faults = FaultSwitch()
        self._cookie = cookie
        self._unknown_photos = frozenset(unknown_photos)
        self._clock = clock
        self._limit = limit
        self._print_line = print_line
        self._changed = threading.Condition()
        # JSON text needs a third of the memory of a dict.
        self._rows: deque[str] = deque(maxlen=limit)
        self._cache: dict[bytes, float] = {}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        try:
            response = self._response(request)
        except HTTPException as error:
            response = Response(error.get_body(), error.code, mimetype="text/html")
        response.headers["Date"] = http_date(self._clock())
        return response(environ, start_response)

    def recorded(self) -> list[dict[str, Any]]:
        """The reports, oldest first: the fields as received, and received (epoch s), method, path, host, cookies."""
        with self._changed:
            rows = list(self._rows)
        return [json.loads(row) for row in rows]

    def wait_for(self, count: int, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Wait for `count` reports and return all; TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._rows) >= count, timeout):
                raise TimeoutError(f"{len(self._rows)} of {count} reports were recorded in {timeout} s")
        return self.recorded()

    def clear(self) -> None:
        """Remove the reports and the cached answers."""
        with self._changed:
            self._rows.clear()
            self._cache.clear()
            self.dropped = 0

    def _response(self, request: Request) -> Response:
        control = request.path.startswith("/_")
        # Every local client may send reports; only the developer may use the control addresses.
        environ = request.environ
        if refused := request_refusal(environ) if control else host_refusal(environ, any_short_name=True):
            return _as_json({"error": refused}, 403)
        if control:
            return self._control_response(request)
        if not request.path.startswith("/api/"):
            return page(404, "There is no such page")
        call = Call.of(request)
        matched = self.faults.next_fault(call.fields.get("photo_id", ""))
        if matched is None:
            return encoded(self._answer(call), call)
        fault, released = matched
        answer = self._answer(call) if fault.record else REPORTED
        return with_fault(encoded(changed_answer(answer, fault, self._clock()), call), fault, released)

    def _answer(self, call: Call) -> StandInAnswer:
        if call.path not in self.methods:
            return StandInAnswer(f"There is no method {call.path}", "invalid_method")
        if call.method not in ("GET", "POST"):
            return StandInAnswer(f"The method {call.path} takes GET and POST only", "invalid_method")
        if not self.whitelisted:
            return DENIED
        refused = refusal(call, self._cookie)
        if refused is not None:
            return refused
        if call.fields["photo_id"] in self._unknown_photos:
            return StandInAnswer("There is no video with this photo_id", "no_such_photo")
        return self._record_report(call)

    def _record_report(self, call: Call) -> StandInAnswer:
        now, session = self._clock(), call.session(self._cookie)
        with self._changed:
            cached_at = self._cached_since(call.digest(session), now)
            if cached_at is not None:
                return replace(REPORTED, cached_at=int(cached_at))
            self._record(call, now)
        if self._print_line is not None:
            self._print_line(_report_line(call, session, now))
            if self.dropped == 1:
                self._print_line(f"More than {self._limit} reports: the oldest are dropped from now on.")
        return REPORTED

    def _cached_since(self, digest: bytes, now: float) -> float | None:
        """When the answer to this request was cached, or None if it was not; then it is cached now."""
        while self._cache:
            oldest = next(iter(self._cache))
            if now - self._cache[oldest] < CACHE_SECONDS and len(self._cache) <= self._limit:
                break
            del self._cache[oldest]
        if digest in self._cache:
            return self._cache[digest]
        self._cache[digest] = now
        return None

    def _record(self, call: Call, now: float) -> None:
        facts = {"received": now, "method": call.method, "path": call.path, "host": call.host}
        self.dropped += len(self._rows) == self._limit
        self._rows.append(json.dumps({**call.fields, **facts, "cookies": dict(call.cookies)}))
        self._changed.notify_all()

    def _control_response(self, request: Request) -> Response:
        match request.method, request.path:
            case "GET" | "HEAD", "/_recorded":
                return self._recorded_response()
            case ("DELETE", "/_recorded") | ("POST", "/_clear"):
                self.clear()
            case "GET" | "HEAD", "/_faults":
                pass
            case "POST", "/_faults":
                return self._set_fault(request)
            case "DELETE", "/_faults":
                self.faults.set_fault(None)
            case _:
                return _as_json(
                    {"error": "Use /_recorded (GET, DELETE) or /_faults (GET, POST, DELETE)"}, 404
                )
        return self._fault_response() if request.path == "/_faults" else Response(status=204)

    def _recorded_response(self) -> Response:
        with self._changed:
            rows, dropped = list(self._rows), self.dropped
        headers = {"T23-Dropped": str(dropped)}
        return Response(f"[{','.join(rows)}]\n", headers=headers, mimetype="application/json")

    def _fault_response(self) -> Response:
        fault = self.faults.fault
        return _as_json([] if fault is None else [fault.shown()])

    def _set_fault(self, request: Request) -> Response:
        asked = request.get_json(silent=True) if request.is_json else request.form.to_dict()
        try:
            if not isinstance(asked, dict):
                raise UsageError("Send a fault as a form or as one JSON object, with at least a kind.")
            self.faults.set_fault(Fault.parse(asked))
        except UsageError as error:
            return _as_json({"error": str(error)}, 400)
        return self._fault_response()


def _as_json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value) + "\n", status, mimetype="application/json")


def _report_line(call: Call, session: str, now: float) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(now))
    photo, size, skip = call.fields["photo_id"], int(call.fields["bytes_total"]), call.fields.get("skip", "0")
    return f"{clock} video {photo}, session {_masked_session(session)}, {size:,} bytes, skip {skip}"


def _masked_session(session: str) -> str:
    shown = session[: min(4, len(session) // 2)]
    return (shown if shown.isprintable() else "") + "…"


class StandInServer:
    """A `StandIn` on a socket, one thread per connection, as a context manager or by `start` and `stop`.

    `port` 0 chooses a free port, which a later `start` uses again. Other arguments are those of `StandIn`.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, app: StandIn | None = None, **options: Any
    ) -> None:
        self.host, self.port = host, port
        self.app = app if app is not None else StandIn(**options)
        self._server: HTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The site's address in the form of `T23_API_URL`."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def start(self) -> StandInServer:
        """Start to accept connections; UsageError if the address can't be used."""
        try:
            self._server = HTTPServer(self.host, self.port, self.app)
        except (OSError, OverflowError) as error:
            raise UsageError(_unavailable(self.host, self.port, error)) from error
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="standin")
        self._thread.daemon = True
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close all connections; later ones are refused until `start`. Reports and fault are kept."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for thread in self._server.close_connections():
            while thread.is_alive():  # its wait for the fault may begin only now
                self.app.faults.release_waiting()
                thread.join(0.1)
        self._server = self._thread = None

    def __enter__(self) -> StandInServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def recorded(self) -> list[dict[str, Any]]:
        """As `StandIn.recorded`."""
        return self.app.recorded()

    def wait_for(self, count: int, timeout: float = 10.0) -> list[dict[str, Any]]:
        """As `StandIn.wait_for`."""
        return self.app.wait_for(count, timeout)

    def clear(self) -> None:
        """As `StandIn.clear`."""
        self.app.clear()

    def fault(self, kind: str, **options: object) -> None:
        """Turn on a fault instead of the current one; UsageError for an unknown fault or option."""
        self.app.faults.set_fault(Fault.parse({"kind": kind, **options}))

    def heal(self) -> None:
        """Turn the fault off, and let the requests that wait for it continue."""
        self.app.faults.set_fault(None)


def _unavailable(host: str, port: int, error: OSError | OverflowError) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is already in use; choose another with --port, or 0 for a free one."
    reason = error.strerror if isinstance(error, OSError) else "the highest port is 65535"
    return f"The stand-in can't listen on port {port} of {host} ({reason}); choose another with --port."


def run_standin(host: str = "127.0.0.1", port: int = DEFAULT_PORT, **options: Any) -> int:
    """The command: print the address and each report until SIGINT or SIGTERM, then return 0.

    It blocks these two signals in the calling thread, which must be the main thread, and waits for them. Options are
    those of `StandIn`. UsageError if it can't listen on the address.
    """
    ends = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        with StandInServer(host, port, print_line=print_line, **options) as server:
            print_line(
                f"The stand-in answers at {server.url} (T23_API_URL={server.url}); each report is printed here."
            )
            signal.sigwait(ends)
    finally:
        while signal.sigpending() & ends:  # ignore a second Ctrl-C
            signal.sigwait(ends)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def print_line(line: str) -> None:
    """Print *line* in the terminal's encoding. If stdout is closed, end the command with SIGTERM."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        # One write: print() would write the line end separately, and another thread could write in between.
        sys.stdout.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stdout.flush()
    except OSError:  # the reader is gone; the flush at exit must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGTERM)
