"""One line of the log in which nginx or Apache writes what it sent of a play, and the configuration for that log."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from werkzeug.http import parse_content_range_header

from ..transfer import Part, parse_play_id

#: The lines for a file in nginx's ``conf.d/``, with the path of the log for ``{path}``. If X-Accel-Redirect leads to a
#: store behind ``proxy_pass``, ``$upstream_http_…`` has the store's headers when the line is written. So ``$t23play``
#: must be evaluated before the request to the store: ``limit_req`` does that, and limits nothing, since each id comes once.
NGINX_LINES = r"""
map $upstream_http_x_t23_play $t23play { default $upstream_http_x_t23_play; } map $upstream_http_x_t23_play $t23named { volatile; "" ""; default $t23play; } map $upstream_http_x_t23_play $t23cache { "" ""; default $upstream_cache_status; }
log_format t23 escape=json '{"t23":1,"play":"$t23play","end":$msec,"seconds":$request_time,"status":$status,"body":$body_bytes_sent,'
  '"complete":"$request_completion","type":"$sent_http_content_type","range":"$sent_http_content_range","length":"$sent_http_content_length","cache":"$t23cache"}';
access_log {path} t23 if=$t23play;
limit_req_zone $t23named zone=t23:1m rate=1000r/s; limit_req zone=t23; proxy_hide_header X-T23-Play; uwsgi_hide_header X-T23-Play;
""".lstrip()

#: The same for Apache (2.4.19), with mod_headers. GlobalLog, since a virtual host with a log of its own does not use
#: the server's CustomLog. ``%B`` is the size that Apache meant to send, so a cut-off response needs ``%O`` too.
APACHE_LINES = r"""
Header note X-T23-Play t23play
Header unset X-T23-Play
LogFormat "{\"t23\":1,\"play\":\"%{t23play}n\",\"end\":%{end:sec}t.%{end:msec_frac}t,\"seconds\":%T,\"status\":%>s,\"B\":%B,\"O\":%O,\"X\":\"%X\",\"method\":\"%m\",\"type\":\"%{Content-Type}o\",\"range\":\"%{Content-Range}o\",\"length\":\"%{Content-Length}o\"}" t23
GlobalLog {path} t23 "expr=-n note('t23play')"
""".lstrip()

#: Longest line that is accepted, in bytes; ours have about 200.
LONGEST_LINE = 8192
#: No file is longer, in bytes, and SQLite can't store much larger numbers.
LARGEST = 1 << 62
#: Seconds since the epoch; a later time is not valid.
LATEST = 1e11

UNKNOWN = Part(None, None, None)

#: Values of ``$upstream_cache_status`` if the cache answered, with or without asking the app.
_FROM_CACHE = frozenset(("HIT", "STALE", "UPDATING", "REVALIDATED"))
#: :attr:`ProxyLine.cache` of a line by nginx without that field.
CACHE_NOT_TOLD = "?"


class ProxyLine(NamedTuple):
    """A response that the proxy ended, by its log."""

    #: ``<writer>.<number>``, see :func:`~t23_middleware.transfer.parse_play_id`.
    play: str
    #: Its end by the proxy's clock, in ms since the epoch.
    ended_ms: int
    #: Duration of the request, in seconds.
    seconds: float
    status: int
    #: Body bytes that the next hop's kernel accepted, including the framing of a chunked body.
    body: int
    #: Whether the client got all of it.
    complete: bool
    content_type: str
    part: Part
    #: Content-Length in bytes, if the response had one.
    length: int | None
    #: ``HIT``, ``MISS``... of nginx's ``proxy_cache``; ``""`` without one; :data:`CACHE_NOT_TOLD`.
    cache: str

    def to_text(self) -> str:
        """The line as JSON, for a store."""
        return json.dumps(self)

    @classmethod
    def from_text(cls, text: str) -> ProxyLine:
        """The line that :meth:`to_text` wrote; raises :class:`ValueError` for anything else."""
        try:
            fields = cls(*json.loads(text))
            line = fields._replace(part=Part(*fields.part))
        except (TypeError, RecursionError) as error:
            raise ValueError(f"not a line: {text!r}") from error
        if [type(value) for value in line] != _KINDS and [*map(type, line)] != _KINDS_WITHOUT_LENGTH:
            raise ValueError(f"not a line: {text!r}")
        return line

    @property
    def writer_and_number(self) -> tuple[str, int]:
        """Writer and number of its response."""
        parsed = parse_play_id(self.play)
        assert parsed is not None  # checked when the line was parsed
        return parsed

    @property
    def is_ok(self) -> bool:
        """Whether the client got the file or a part of it; nothing else is a play."""
        return self.status in (200, 206)

    @property
    def is_cached(self) -> bool:
        """Whether the proxy's cache answered: then its client is not the one of the app's response."""
        return self.cache in _FROM_CACHE


_KINDS = [str, int, float, int, int, bool, str, Part, int, str]
_KINDS_WITHOUT_LENGTH = [*_KINDS[:8], type(None), str]


def parse_line(text: str) -> ProxyLine | str:
    """The line in *text* (without its newline), or the name of the counter for its fault; ``""`` for an empty one."""
    if '"t23"' not in text:
        return "proxy_foreign" if text else ""
    try:
        return _line(json.loads(text)) if len(text) <= LONGEST_LINE else "proxy_bad"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "proxy_bad"


def _line(fields: dict[str, Any]) -> ProxyLine:
    if type(fields) is not dict or fields["t23"] != 1 or parse_play_id(fields["play"]) is None:
        raise ValueError
    body, complete = _body(fields)
    status, length = whole(fields["status"]), _length(fields["length"])
    if not 100 <= status <= 999:
        raise ValueError
    return ProxyLine(
        play=fields["play"],
        ended_ms=round(_time(fields["end"]) * 1000),
        seconds=_time(fields["seconds"]),
        status=status,
        body=body,
        complete=complete,
        content_type=_text(fields["type"]),
        part=_part(status, length, _text(fields["range"])),
        length=length,
        cache=_text(fields.get("cache", "" if "B" in fields else CACHE_NOT_TOLD)),
    )


def _body(fields: dict[str, Any]) -> tuple[int, bool]:
    """Body bytes, and whether they are all. Apache has ``B``, ``O`` and ``X`` for nginx's ``body`` and ``complete``."""
    if "B" not in fields:
        return whole(fields["body"]), {"OK": True, "": False}[fields["complete"]]
    complete = _text(fields["X"]) != "X"
    meant, sent = whole(fields["B"]), whole(fields["O"])
    if fields["method"] == "HEAD":  # with X-Sendfile, %B is the file's
        meant = 0
    return meant if complete else min(meant, sent), complete


def _part(status: int, length: int | None, content_range: str) -> Part:
    """The part of the file in the response, by its headers (RFC 9110, section 14.4)."""
    if status != 206:
        return Part(0, None if length is None else length - 1, length)
    parsed = parse_content_range_header(content_range)
    if (
        parsed is None
        or (parsed.units or "").lower() != "bytes"
        or parsed.start is None
        or parsed.stop is None
    ):
        return UNKNOWN
    return (
        UNKNOWN
        if max(parsed.stop, parsed.length or 0) > LARGEST
        else Part(parsed.start, parsed.stop - 1, parsed.length)
    )


def whole(value: Any) -> int:
    """*value*, if it is a whole number of a possible size; ``isinstance`` would accept a JSON ``true`` too."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError
    return value


def _time(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < LATEST:  # NaN is not, either
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError
    return "" if value == "-" else value  # Apache writes "-" for an empty value


def _length(value: Any) -> int | None:
    text = _text(value)
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError
    return whole(int(text)) if text else None
