"""The demo's page, a WSGI app: the player, and live what is captured and reported.

Served ranges come from the journals, waiting reports from the outbox, sent reports from the stand-in. The page's script
polls all of it several times per second. The data kept for it is bounded, and it contains sessions in short form only.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from importlib import resources
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from markupsafe import Markup
from werkzeug.exceptions import Forbidden, HTTPException, MethodNotAllowed, NotFound, UnsupportedMediaType
from werkzeug.wrappers import Request, Response

from ..errors import T23Error
from ..relay.outbox import DeadReport, NoOutbox, OutboxView, Waiting
from ..settings import Settings
from ..state import StateFolder
from ..version import VERSION
from . import text
from .demo_api import CONDITIONS, WELL, APISwitch
from .demo_site import FILM, PAGES, RATE, media_path
from .demo_strips import ServedRange, ViewingRow, ViewingRows
from .loopback import request_refusal
from .page import JSON, SAFE_HEADERS
from .page_html import status_sentences, tone
from .page_style import STYLE
from .standin import StandInServer
from .status import Status, read_status

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

#: Reports that are shown, at most.
MAX_REPORTS = 30
#: Seconds for which the figures are cached, for any number of open pages.
CACHE_SECONDS = 0.1

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {"svg": "image/svg+xml", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}


class DemoPage:
    """The page of one demo. *settings* are those of its site, *switch* sets the condition of its *api*."""

    def __init__(self, settings: Settings, api: StandInServer, switch: APISwitch) -> None:
        self._settings = settings
        self._api = api
        self._switch = switch
        self._rows = ViewingRows(StateFolder(settings.state_path()))
        self._lock = threading.Lock()
        self._cached: tuple[float, bytes] = 0.0, b""
        #: Key for hashing sessions into ids for the page; and the id of this run.
        self._key = secrets.token_bytes(16)
        self._run = secrets.token_hex(4)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            response = self._response(Request(environ))
        except HTTPException as error:
            response = Response(f"{error.description}\n", error.code, mimetype="text/plain")
        except T23Error as error:
            response = Response(f"{error}\n", 503, mimetype="text/plain")
        for name, value in (*SAFE_HEADERS, ("Content-Security-Policy", _POLICY)):
            response.headers[name] = value
        return response(environ, start_response)

    def follow(self) -> None:
        """Read the new journal lines. Call this several times per second, also while no browser shows the page."""
        with self._lock:
            self._rows.follow()

    def _response(self, request: Request) -> Response:
        if refused := request_refusal(request.environ):
            raise Forbidden(refused)
        method = "GET" if request.method == "HEAD" else request.method
        match method, request.path.removeprefix(PAGES):
            case "GET", "/":
                return Response(self._html(), mimetype="text/html")
            case "GET", "page.css":
                return Response(STYLE + _file("demo_page.css"), content_type=_TYPES["css"])
            case "GET", "page.js":
                return Response(_file("demo_page.js"), content_type=_TYPES["js"])
            case "GET", "poster.svg":
                return Response(_file("demo_page.svg"), content_type=_TYPES["svg"])
            case "GET", "state.json":
                return Response(self._state(), content_type=JSON)
            case "POST", "api":
                return self._set_condition(request)
            case "GET", _:
                raise NotFound("There is no such page.")
        raise MethodNotAllowed(["GET"])

    def _html(self) -> str:
        """The page with a new session, so that each reload starts a new viewing."""
        session = secrets.token_urlsafe(16)
        query = {"session_id": session, "photo_id": FILM["photo"], "rate": RATE}
        return Markup(_file("demo_page.html")).format(
            pages=PAGES,
            version=VERSION,
            media=f"{media_path(FILM)}?{urlencode(query)}",
            rate=f"{RATE // 1000} KB",
            mine=self._name(session, FILM["photo"]),
        )

    def _set_condition(self, request: Request) -> Response:
        """Accept only JSON: a page of another origin can't send it without a preflight request, which is refused."""
        if request.mimetype != JSON:
            raise UnsupportedMediaType("The demo's own page sends JSON.")
        fields = request.get_json(silent=True)
        condition = str(fields.get("is")) if isinstance(fields, dict) else ""
        if condition not in CONDITIONS:
            return Response(json.dumps({"error": f"is: one of {', '.join(CONDITIONS)}"}), 400, mimetype=JSON)
        self._switch.switch_to(condition)
        if condition == WELL and read_status(self._settings).stats.waiting:
            self._switch.deliver()
        with self._lock:
            self._cached = 0.0, b""
        return Response(self._state(), content_type=JSON)

    # The state as JSON.

    def _state(self) -> bytes:
        with self._lock:
            made_at, content = self._cached
            if not content or time.monotonic() - made_at > CACHE_SECONDS:
                self._rows.follow()
                content = json.dumps(self._state_json()).encode()
                self._cached = time.monotonic(), content
            return content

    def _state_json(self) -> dict[str, object]:
        status = read_status(self._settings)
        return {
            "run": self._run,
            "now": status.now_ms,
            "tone": tone(status),
            "state": _demo_sentences(status),
            "api": {"is": self._switch.condition, "delivered": self._switch.delivered},
            "figures": {**status.stats._asdict(), "open": self._rows.open_responses},
            "oldest": status.oldest_seconds,
            "viewings": [self._viewing(row) for row in reversed([*self._rows])],
            "reports": self._reports(),
        }

    def _viewing(self, row: ViewingRow) -> dict[str, object]:
        return {
            "id": f"{self._name(row.play.session_id, row.play.photo_id)}-{row.started_ms}",
            "of": self._name(row.play.session_id, row.play.photo_id),
            "session": text.masked(row.play.session_id),
            "video": row.play.photo_id,
            "player": row.play.player_type,
            "started": row.started_ms,
            "total": row.total,
            "bars": [self._range(served) for served in row.ranges],
        }

    def _range(self, served: ServedRange) -> dict[str, object]:
        return {
            "id": self._name(served.writer, str(served.number)),
            "first": served.first,
            "size": served.size,
            "sent": served.sent,
            "skip": served.skip,
            "jump": served.jump,
            "open": served.ended_ms is None,
            "started": served.started_ms,
        }

    def _reports(self) -> list[dict[str, object]]:
        """The latest reports, newest first. One in the stand-in and still in the outbox is shown as sent."""
        waiting, dead = self._from_outbox()
        rows = {row["id"]: row for row in (*map(self._dead, dead), *map(self._waiting, waiting))}
        rows |= {row["id"]: row for row in map(self._recorded, self._api.recorded()[-MAX_REPORTS:])}
        latest = sorted(rows.values(), key=lambda row: int(row["at"]), reverse=True)
        return [*islice(latest, MAX_REPORTS)]

    def _from_outbox(self) -> tuple[list[Waiting], list[DeadReport]]:
        try:
            with OutboxView(StateFolder(self._settings.state_path()).outbox) as view:
                return view.waiting(MAX_REPORTS), view.dead()[-MAX_REPORTS:]
        except NoOutbox:
            return [], []

    def _waiting(self, waiting: Waiting) -> dict[str, Any]:
        report = waiting.report
        return self._report_row(
            report.session_id,
            report.photo_id,
            report.time_ms,
            report.sent,
            report.skip,
            "asking" if waiting.in_flight else "waiting",
        )

    def _dead(self, dead: DeadReport) -> dict[str, Any]:
        report = dead.report
        row = self._report_row(
            report.session_id, report.photo_id, report.time_ms, report.sent, report.skip, "refused"
        )
        return row | {"said": dead.answer}

    def _recorded(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A report from the stand-in. It may be from any local client, so its fields are not trusted."""
        received_ms = int(fields["received"] * 1000)
        sent_ms = str(fields.get("time", ""))
        at_ms = int(sent_ms) if sent_ms.isdecimal() and len(sent_ms) < 15 else received_ms
        session = fields.get("session_id") or fields.get("seesion_id") or ""
        row = self._report_row(
            session,
            fields["photo_id"],
            at_ms,
            int(fields["bytes_total"]),
            int(fields.get("skip", 0)),
            "sent",
        )
        return row | {"took": max(received_ms - at_ms, 0)}

    def _report_row(
        self, session: str, photo: str, at_ms: int, sent: int, skip: int, state: str
    ) -> dict[str, Any]:
        return {
            "id": f"{self._name(session, photo)}-{at_ms}-{sent}-{skip}",
            "session": text.masked(session),
            "video": photo,
            "at": at_ms,
            "bytes": sent,
            "skip": skip,
            "is": state,
        }

    def _name(self, *of: str) -> str:
        return hashlib.blake2b(
            "\0".join(of).encode("utf-8", "replace"), key=self._key, digest_size=6
        ).hexdigest()


def _demo_sentences(status: Status) -> list[str]:
    """The sentences of the operator's page, with two exceptions for newcomers."""
    if not status.stats.captured and not status.journal_bytes:
        return ["Nothing was streamed yet: press play."]
    if status.state == "delivering" and status.stats.waiting:
        return [f"Delivering {text.reports(status.stats.waiting)}."]
    return status_sentences(status)


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
