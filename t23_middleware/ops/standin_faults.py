"""Faults of the stand-in: what can go wrong in an API or in a proxy before it.

A `Fault` is one fault with its options, `FaultSwitch` has the current one, `with_fault` applies it to an answer.
`FAULT_KINDS` lists the kinds and their options.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from werkzeug.wrappers import Response

from t23_middleware.errors import UsageError
from t23_middleware.ops.standin_answers import DENIED, StandInAnswer
from t23_middleware.ops.standin_http import Hangup


class FaultKind(NamedTuple):
    """A kind of fault: its effect, whether its reports are recorded by default, and its own options."""

    does: str
    record: bool
    options: tuple[str, ...] = ()
    seconds: float = 0.0


FAULT_KINDS: Mapping[str, FaultKind] = {
    "refuse": FaultKind("resets the connection after reading the request", False),
    "hang": FaultKind(
        "waits until the fault ends; then answers if the report was recorded, else closes the connection",
        False,
    ),
    "status": FaultKind(
        "answers with this HTTP status and a page", False, ("status", "retry_after", "location")
    ),
    "deny": FaultKind("answers permission_denied", False),
    "error": FaultKind("answers with this error", False, ("code", "message")),
    "html": FaultKind("answers with a page and HTTP 200", False),
    "cut": FaultKind("closes the connection in the middle of the answer", True),
    "huge": FaultKind("answers with `size` extra bytes", True, ("size",)),
    "slow": FaultKind("waits `seconds` before each byte of the answer", True, ("seconds",), 0.05),
    "latency": FaultKind("waits `seconds` before the answer", True, ("seconds",), 1.0),
    "cached": FaultKind("marks the answer as cached", False),
}
_COMMON = ("kind", "count", "record", "photo_id")
_BODILESS = (204, 304)
#: Placeholder for the extra bytes of a huge answer. They are sent piece by piece and never kept in memory.
_FILLER = "(many bytes)"
_PIECE_BYTES = 65536


@dataclass(frozen=True)
class Fault:
    """One fault; `FAULT_KINDS` lists the options of each kind.

    `count`: the number of requests to the API that it affects, all if None. `record`: whether affected reports are
    recorded. `photo_id`: affect only the reports of this video. `size` is in bytes.
    """

    kind: str
    record: bool
    count: int | None = None
    photo_id: str | None = None
    status: int = 503
    retry_after: str | None = None
    location: str | None = None
    code: str = "unknown_error"
    message: str = "The stand-in answers with this error on request"
    size: int = 8 * 1024 * 1024
    seconds: float = 1.0

    @classmethod
    def parse(cls, asked: Mapping[str, object]) -> Fault:
        """The fault for the names and values of a form or of a JSON object; UsageError if they are invalid."""
        name = str(asked.get("kind", ""))
        if name not in FAULT_KINDS:
            raise UsageError(f"No fault of kind {name!r}; kinds are {', '.join(FAULT_KINDS)}.")
        kind = FAULT_KINDS[name]
        allowed = (*_COMMON, *kind.options)
        unknown = [option for option in asked if option not in allowed]
        if unknown:
            raise UsageError(f"The fault {name} takes no {unknown[0]!r}, only {', '.join(allowed[1:])}.")
        return replace(cls(name, kind.record, seconds=kind.seconds), **_values(asked))

    def shown(self) -> dict[str, object]:
        """The options of this kind, as `GET /_faults` shows them."""
        names = (*_COMMON, *FAULT_KINDS[self.kind].options)
        return {name: value for name, value in asdict(self).items() if name in names and value is not None}


def _values(asked: Mapping[str, object]) -> dict[str, Any]:
    given = {name: value for name, value in asked.items() if name != "kind" and value is not None}
    return {name: _value(name, value) for name, value in given.items()}


def _value(name: str, value: object) -> object:
    text = str(value).strip()
    try:
        match name:
            case "record":
                return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
            case "count" | "size" | "status":
                return _within(int(text), *_RANGES[name])
            case "seconds":
                return _within(float(text), *_RANGES[name])
        return _printable(text)
    except (KeyError, ValueError):
        raise UsageError(f"The fault's {name} can't be {text!r}; it is {_ALLOWED[name]}.") from None


_RANGES = {
    "count": (1, 1_000_000_000),
    "size": (1, 64 * 1024 * 1024),
    "status": (200, 599),
    "seconds": (0, 86_400),
}
_ALLOWED = {
    "record": "true or false",
    "count": "a number of requests from 1",
    "size": "a number of bytes from 1 to 67108864",
    "status": "an HTTP status from 200 to 599",
    "seconds": "a number of seconds from 0 to 86400",
    **dict.fromkeys(("photo_id", "retry_after", "location", "code", "message"), "printable ASCII"),
}


def _within(number: float, low: float, high: float) -> float:
    if not low <= number <= high:
        raise ValueError
    return number


def _printable(text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise ValueError
    return text


class FaultSwitch:
    """The current fault, if any; safe for use by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._released = threading.Event()

    @property
    def fault(self) -> Fault | None:
        """The current fault, with its remaining count."""
        return self._fault

    def set_fault(self, fault: Fault | None) -> None:
        """Replace the current fault, and let its waiting requests continue; None turns faults off."""
        with self._lock:
            self._fault = fault
            self._release()

    def release_waiting(self) -> None:
        """Let the requests that wait now continue; the fault stays on."""
        with self._lock:
            self._release()

    def next_fault(self, photo_id: str) -> tuple[Fault, threading.Event] | None:
        """The fault that affects a request for this video now, and the event that ends its wait. Counts the request."""
        with self._lock:
            fault = self._fault
            if fault is None or fault.photo_id not in (None, photo_id):
                return None
            if fault.count is not None:
                self._fault = replace(fault, count=fault.count - 1) if fault.count > 1 else None
            return fault, self._released

    def _release(self) -> None:
        self._released.set()
        self._released = threading.Event()


def changed_answer(answer: StandInAnswer, fault: Fault, now: float) -> StandInAnswer:
    """The answer that the API itself gives instead of *answer* while it has the fault."""
    match fault.kind:
        case "deny":
            return DENIED
        case "error":
            return StandInAnswer(fault.message, fault.code)
        case "cached":
            return replace(answer, cached_at=int(now))
        case "huge":
            return replace(answer, message=answer.message + _FILLER)
    return answer


def with_fault(response: Response, fault: Fault, released: threading.Event) -> Response:
    """The response as the client gets it with this fault; raises `Hangup` if the client gets none."""
    match fault.kind:
        case "refuse":
            raise Hangup(reset=True)
        case "hang":
            released.wait()
            if not fault.record:
                raise Hangup
        case "latency":
            released.wait(fault.seconds)
        case "slow":
            return _streamed(response, _slowly(response.get_data(), fault.seconds, released))
        case "cut":
            return _streamed(response, _half(response.get_data()))
        case "huge":
            return _hugely(response, fault.size)
        case "html":
            return page(200, "Welcome")
        case "status":
            return _front_end(fault)
    return response


def page(status: int, text: str) -> Response:
    """An HTML page, such as a front end answers instead of the API."""
    html = f"<!doctype html>\n<html><head><title>{text}</title></head><body><h1>{text}</h1></body></html>\n"
    return Response(html, status, mimetype="text/html")


def _front_end(fault: Fault) -> Response:
    response = page(fault.status, f"{fault.status} by the stand-in's front end")
    if fault.status in _BODILESS:
        response = Response(status=fault.status)
    if fault.retry_after is not None:
        response.headers["Retry-After"] = fault.retry_after
    if fault.location is not None:
        response.headers["Location"] = fault.location
    return response


def _streamed(response: Response, body: Iterator[bytes]) -> Response:
    headers = response.headers.copy()
    headers["Content-Length"] = str(len(response.get_data()))
    return Response(body, response.status, headers)


def _hugely(response: Response, size: int) -> Response:
    before, _, after = response.get_data().rpartition(_FILLER.encode())
    dots = (b"." * min(_PIECE_BYTES, size - at) for at in range(0, size, _PIECE_BYTES))
    huge = Response(chain([before], dots, [after]), response.status, response.headers.copy())
    huge.headers["Content-Length"] = str(len(before) + size + len(after))
    return huge


def _slowly(body: bytes, seconds: float, released: threading.Event) -> Iterator[bytes]:
    for position in range(len(body)):
        released.wait(seconds)
        yield body[position : position + 1]


def _half(body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    raise Hangup
