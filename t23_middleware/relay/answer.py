"""Decides what an answer of the API means: recorded, or one of the errors that decide what is done next.

Pure: bytes in, a value or an error out. The messages go to logs and dead letters, so they contain no session.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit
from xml.etree import ElementTree

from werkzeug.http import parse_date

from ..errors import Busy, DeliveryError, NoAnswer, NotAccepted, Refused, Unexplained
from .quoted import clean, clean_url, clip

#: Longest answer that is accepted, in bytes.
LONGEST_ANSWER = 65536

#: Longest ``Retry-After`` that is respected, in seconds.
LONGEST_WAIT = 3600.0
_LONGEST_CODE = 64
#: The form of a code, and the replacement for a code of another form.
_A_CODE, _NO_CODE = re.compile(r"[A-Za-z0-9]+(?:[-_.][A-Za-z0-9]+)*"), "unknown_code"
#: Codes that every report from this server would get.
SITE_CODES = frozenset({"permission_denied", "invalid_signature", "invalid_method"})
#: The other codes in the documentation ("Error codes"): the same report would always get them.
REPORT_CODES = frozenset(
    {
        "no_such_photo",
        "no_such_album",
        "no_such_tag",
        "no_such_user",
        "no_file",
        "invalid_input",
        "invalid_album",
        "invalid_album_token",
        "invalid_photo_token",
        "token_required",
        "couldnt_create_album",
        "couldnt_create_user",
        "couldnt_update_album",
        "error_processing_upload",
        "user_already_exists",
    }
)
#: Newer methods have more of these.
_REPORT_CODE = re.compile("(?:invalid|no_such)_[a-z0-9_]+")
#: HTTP statuses that every report would get, if the answer is not the API's; 407 and 410 are as permanent.
_SITE_STATUSES = frozenset({401, 403, 404, 405, 407, 410})
_REPORT_STATUSES = frozenset({400, 413})
_BUSY_STATUSES = frozenset({408, 425, 429})


class Accepted(NamedTuple):
    """The API accepted a report."""

    #: Whether the answer came from the API's cache, so that this POST was not recorded.
    cached: bool
    #: The API's message, printable and at most 200 characters.
    message: str
    #: Duration of the request, in seconds.
    seconds: float


class _ApiAnswer(NamedTuple):
    """The fields of an answer of the API, in JSON or XML."""

    ok: bool
    code: str
    message: str
    cached: bool


def judge(
    status: int, headers: Mapping[str, str], body: bytes, url: str = "", session_id: str = ""
) -> Accepted:
    """The answer (without its duration), or the error that it means.

    *headers* has names as in RFC 9110; *url* is the URL of the report; *session_id* is removed from all messages. The
    first row that matches decides:

    ================================================  =========================================================
    ``status: ok``                                    :class:`Accepted`, whatever the HTTP status
    429 or 503                                        :class:`~t23_middleware.errors.Busy`: the report was not
                                                      judged, and would be lost if it counted as refused
    ``permission_denied``, ``invalid_signature``,     :class:`~t23_middleware.errors.NotAccepted`
    ``invalid_method``
    other documented codes                            :class:`~t23_middleware.errors.Refused`
    3xx, 401, 403, 404, 405, 407, 410                 :class:`~t23_middleware.errors.NotAccepted`
    400, 413                                          :class:`~t23_middleware.errors.Refused`
    408, 425, 5xx                                     :class:`~t23_middleware.errors.Busy`
    undocumented code, no code, other 4xx             :class:`~t23_middleware.errors.Unexplained`
    2xx with HTML, nothing, more than 64 KB (also     :class:`~t23_middleware.errors.NoAnswer`, ``answered``:
    when unpacked)                                    something accepted the report, and it is unknown whether
                                                      that was the API
    ================================================  =========================================================
    """
    answer = _parsed(_unpacked(body, headers.get("Content-Encoding", "")))
    if answer is not None and answer.ok:
        return Accepted(answer.cached, clean(answer.message, session_id), 0.0)
    if status in (429, 503):
        raise _busy(status, headers, url)
    raise _by_code(answer, url, session_id) or _by_status(status, headers, answer, url, session_id)


def _by_code(answer: _ApiAnswer | None, url: str, session_id: str) -> DeliveryError | None:
    if answer is None:
        return None
    if answer.code in SITE_CODES:
        return NotAccepted(clip(f"{_remedy(answer.code, url)} {_quoted(answer, session_id)}"))
    if answer.code in REPORT_CODES:
        return Refused(answer.code, clean(answer.message, session_id))
    if _REPORT_CODE.fullmatch(answer.code):
        return Refused(_code(answer, session_id), clean(answer.message, session_id))
    return None


def _by_status(
    status: int, headers: Mapping[str, str], answer: _ApiAnswer | None, url: str, session_id: str
) -> DeliveryError:
    if 300 <= status < 400:
        return NotAccepted(_redirected(status, headers.get("Location", ""), url, session_id))
    if status in _SITE_STATUSES:
        return NotAccepted(clip(f"{_remedy(f'HTTP {status}', url)} {_quoted(answer, session_id)}"))
    if answer is None and status < 300:
        packed = headers.get("Content-Encoding", "").strip().casefold()
        how = (
            ""
            if packed in _READABLE
            else " and is compressed in a way that can't be read here (Content-Encoding)"
        )
        message = clip(f"{shown(url)} answered HTTP {status}, but not in the API's format{how}")
        return NoAnswer(message, answered=True)
    if status in _BUSY_STATUSES or status >= 500:
        return _busy(status, headers, url)
    code = (_code(answer, session_id) if answer else "") or f"http_{status}"
    message = clean(answer.message, session_id) if answer else clip(f"{shown(url)} answered HTTP {status}")
    return Refused(code, message) if status in _REPORT_STATUSES else Unexplained(code, message)


def _busy(status: int, headers: Mapping[str, str], url: str) -> Busy:
    return Busy(clip(f"{shown(url)} answered HTTP {status}"), _retry_after(headers))


def _remedy(what: str, url: str) -> str:
    """The message for an answer that every report would get, with the remedy."""
    place = shown(url)
    match what:
        case "permission_denied" | "HTTP 401" | "HTTP 403":
            return f"{place} denies this server ({what}); ask TwentyThree to whitelist it."
        case "invalid_signature":
            return f"{place} wants a signature ({what}); ask TwentyThree to whitelist this server."
        case "HTTP 407":
            return f"The proxy on the way to {place} asks for a user ({what}); correct the proxy's address."
    return f"There is no report method at {place} ({what}); correct T23_REPORT_PATH or T23_API_URL."


def _redirected(status: int, location: str, url: str, session_id: str) -> str:
    target = _target(url, location)
    if target is None:
        return clip(f"{shown(url)} redirects nowhere (HTTP {status}); correct T23_API_URL.")
    origin, path = target
    way = f"T23_API_URL to {clean_url(origin, session_id)}"
    if path != urlsplit(url).path:
        way += f" and T23_REPORT_PATH to {clean_url(path, session_id)}"
    return clip(f"Redirected to {clean_url(origin + path, session_id)}; if that is the API, set {way}.")


def _target(url: str, location: str) -> tuple[str, str] | None:
    """Origin and path of a redirect's target, or ``None``; without user, query and fragment."""
    try:
        parts = urlsplit(urljoin(url, location.strip()))
        host = parts.netloc.rpartition("@")[2]
        return (f"{parts.scheme}://{host}", parts.path) if location.strip() and host else None
    except ValueError:
        return None


#: Values of ``Content-Encoding`` that :func:`_unpacked` can decode.
_READABLE = ("", "identity", "gzip", "x-gzip", "deflate")
#: Most nested encodings of an answer.
_MOST_PACKINGS = 3
_GZIP = b"\x1f\x8b"


def _unpacked(body: bytes, encoding: str) -> bytes:
    """*body* without its ``Content-Encoding`` (RFC 9110 section 8.4), if it can be decoded.

    At most one byte more than the limit, however large it is unpacked. The header alone is not enough: some caches omit
    it, and some keep it after they unpacked the body.
    """
    names = [name.strip().casefold() for name in encoding.split(",")]
    for name in [*reversed(names), ""][:_MOST_PACKINGS]:
        if body.startswith(_GZIP):
            body = _inflated(body, zlib.MAX_WBITS + 16)
        elif name == "deflate":
            # Some servers omit the zlib header that RFC 9110 section 8.4.1.2 requires.
            body = _inflated(body, zlib.MAX_WBITS) or _inflated(body, -zlib.MAX_WBITS) or body
    return body


def _inflated(body: bytes, window: int) -> bytes:
    """The decompressed data, which may have several gzip members; empty if it is invalid or cut off."""
    found = b""
    while body and len(found) <= LONGEST_ANSWER:
        stream = zlib.decompressobj(window)
        try:
            found += stream.decompress(body, LONGEST_ANSWER + 1 - len(found))
        except zlib.error:
            return b""
        if not stream.eof:
            return found if len(found) > LONGEST_ANSWER else b""
        # What else follows is ignored, as other clients do: servers pad, or add a newline.
        body = stream.unused_data if stream.unused_data.startswith(_GZIP) else b""
    return found


def _parsed(body: bytes) -> _ApiAnswer | None:
    """The API's answer, or ``None`` if it does not come from the API."""
    if len(body) > LONGEST_ANSWER:
        return None
    # The API's documentation requires UTF-8; a server in front of it may write UTF-16 or UTF-32.
    text = body.decode(json.detect_encoding(body), "replace").strip().lstrip("\ufeff")
    values = (_xml(text) if text.startswith("<") else {}) or _json(text)
    status = _text(values.get("status")).casefold()
    if status not in _STATUSES:
        return None
    cached = _text(values.get("cached")).casefold() in ("1", "true", "t")
    return _ApiAnswer(status == "ok", _text(values.get("code")), _text(values.get("message")), cached)


_STATUSES = ("ok", "error")


def _text(value: object) -> str:
    return str(value).strip() if isinstance(value, (str, int)) else ""


def _xml(text: str) -> Mapping[str, object]:
    """The attributes of the root element ``response``, in any namespace."""
    # Only a DOCTYPE can declare entities, which can grow without limit or include files.
    if "<!DOCTYPE" in text:
        return {}
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        return {}
    if root.tag.rpartition("}")[2] != "response":
        return {}
    return {name.rpartition("}")[2]: value for name, value in root.attrib.items()}


#: A tag that messages of PHP or a proxy do not have. A text with one is a page, whose scripts may contain any JSON.
_PAGE = re.compile(r"<(?!/?(?:b|br|p)\b)[a-z!?/]", re.IGNORECASE)
#: The begin of an object with a name in it; other braces belong to the text around it.
_OBJECT = re.compile(r'\{\s*"')
#: Most objects that are parsed, to limit the time for one answer.
_MOST_OBJECTS = 10


def _json(text: str) -> Mapping[str, object]:
    """The one object with a status, with any text before or after it.

    v1 itself writes ``var visual =`` or ``callback(`` before it unless ``raw`` is requested, v2 a comment; servers add
    warnings before it and notes after it. An object within another one, or one of two, is not the answer.
    """
    text = _without_comments(text)
    found: list[Mapping[str, object]] = []
    around, position = "", 0
    for _ in range(_MOST_OBJECTS):
        start = _OBJECT.search(text, position)
        if start is None:
            break
        try:
            value, end = _DECODER.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            return {}
        around += text[position : start.start()]
        position = end
        if _text(value.get("status")).casefold() in _STATUSES:
            found.append(value)
    is_page = _PAGE.search(around + text[position:])
    return found[0] if len(found) == 1 and not is_page else {}


_DECODER = json.JSONDecoder()


def _without_comments(text: str) -> str:
    """*text* without ``<!-- -->``. A regular expression needs seconds for 64 KB of comments that never end."""
    *parts, rest = text.split("-->")
    cut = (part.partition("<!--") for part in parts)
    return "".join(before if start else f"{before}-->" for before, start, _ in cut) + rest


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of ``Retry-After`` (RFC 9110 section 10.2.3), 0 to an hour; a date counts from the server's ``Date``."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,300}", text):
        return min(float(text), LONGEST_WAIT)
    until = _date(text)
    if until is None:
        return None
    now = _date(headers.get("Date", "")) or datetime.now(timezone.utc)
    return min(max((until - now).total_seconds(), 0.0), LONGEST_WAIT)


def clock_ahead(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds that *now_s* (since the epoch) is ahead of the answer's ``Date`` (RFC 9110 section 6.6.1), if any."""
    date = _date(headers.get("Date", ""))
    return None if date is None else now_s - date.timestamp()


def _date(text: str) -> datetime | None:
    try:
        return parse_date(text)
    except OverflowError:  # a year or time zone that does not fit in a C integer
        return None


def _code(answer: _ApiAnswer, session_id: str) -> str:
    """The code, ``unknown_code`` if it does not look like one, or ``""``."""
    code = clean(answer.code, session_id)
    return code if len(code) <= _LONGEST_CODE and _A_CODE.fullmatch(code) else _NO_CODE * bool(code)


def _quoted(answer: _ApiAnswer | None, session_id: str) -> str:
    return "" if answer is None else clean(answer.message or answer.code, session_id)


def shown(url: str) -> str:
    """*url* without user, query and fragment."""
    target = _target(url, url)
    return "".join(target) if target else "the API"
