"""The stand-in's answers: the documented behaviour of the API, as pure functions.

Sources: the method's own page (parameters, examples) and the documentation's pages on requests, errors and caching.
What they leave open is chosen so that mistakes become visible: a malformed parameter is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from urllib.parse import urlencode
from xml.sax.saxutils import quoteattr

from werkzeug.wrappers import Request, Response

_DIGITS = re.compile("[0-9]{1,18}")
_JS_NAME = re.compile(r"[A-Za-z_$][\w$]*(\.[A-Za-z_$][\w$]*)*", re.ASCII)


@dataclass(frozen=True)
class Call:
    """The parts of a request that the API uses."""

    method: str
    host: str
    path: str
    fields: Mapping[str, str]
    cookies: Mapping[str, str]

    @classmethod
    def of(cls, request: Request) -> Call:
        """The call in *request*. POST has its parameters in the body (the query is ignored), GET in the query."""
        fields = request.form if request.method == "POST" else request.args
        host = request.environ.get("HTTP_HOST", "")
        return cls(request.method, host, request.path, fields.to_dict(), request.cookies.to_dict())

    def session(self, cookie: str) -> str:
        """The session from either of the two documented parameters, else from the cookie; empty if there is none."""
        fields = self.fields
        return fields.get("session_id") or fields.get("seesion_id") or self.cookies.get(cookie, "")

    def digest(self, session: str) -> bytes:
        """The key in the cache, equal for equal requests."""
        parts = (self.method, self.host, self.path, session, urlencode(sorted(self.fields.items())))
        return blake2b("\0".join(parts).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class StandInAnswer:
    """An answer of the API: an error if it has a code; `cached_at` (epoch seconds) if it comes from the cache."""

    message: str
    code: str = ""
    cached_at: int | None = None

    def attributes(self) -> dict[str, str]:
        """The documented names and values of the answer, all strings as in the documentation's examples."""
        if self.code:
            return {
                "status": "error",
                "code": self.code,
                "permission_level": "anonymous",
                "message": self.message,
            }
        attributes = {"status": "ok", "permission_level": "anonymous", "message": self.message, "cached": "0"}
        return (
            attributes
            if self.cached_at is None
            else attributes | {"cached": "1", "cache_time": str(self.cached_at)}
        )


#: The answer to an accepted report, with the message of the method's documentation.
REPORTED = StandInAnswer("The download was reported")
#: The answer to every report from a server that is not whitelisted.
DENIED = StandInAnswer("This server is not whitelisted for the method", "permission_denied")


def refusal(call: Call, cookie: str) -> StandInAnswer | None:
    """The error for this report's parameters, or None if they are valid."""
    fields = call.fields
    for name in ("photo_id", "bytes_total"):
        if not fields.get(name):
            return _invalid(f"The parameter {name} is missing")
        if not _DIGITS.fullmatch(fields[name]):
            return _invalid(f"The parameter {name} must be a whole number of at most 18 digits")
    if not call.session(cookie):
        return _invalid("The parameter session_id is missing, and there is no session cookie")
    if fields.get("skip", "0") not in ("0", "1"):
        return _invalid("The parameter skip must be 0 or 1")
    if fields.get("format", "xml") not in ("xml", "json"):
        return _invalid("The parameter format must be xml or json")
    return None


def _invalid(message: str) -> StandInAnswer:
    return StandInAnswer(message, "invalid_input")


def encoded(answer: StandInAnswer, call: Call) -> Response:
    """The answer as XML, JSON or JavaScript, as the request asks; always with HTTP 200."""
    if call.fields.get("format") != "json":
        attributes = " ".join(f"{name}={quoteattr(value)}" for name, value in answer.attributes().items())
        return Response(f"<response {attributes}/>", mimetype="text/xml")
    text = json.dumps(_json(answer, call))
    if "raw" in call.fields:
        return Response(text, mimetype="application/json")
    callback = call.fields.get("callback", "")
    if _JS_NAME.fullmatch(callback):
        return Response(f"{callback}({text});", mimetype="text/javascript")
    name = call.fields.get("varname", "")
    return Response(
        f"var {name if _JS_NAME.fullmatch(name) else 'visual'} = {text};", mimetype="text/javascript"
    )


def _json(answer: StandInAnswer, call: Call) -> dict[str, object]:
    if answer.code:
        return {**answer.attributes(), "endpoint": call.path}
    site = {"domain": call.host, "secure_domain": call.host}
    return {**answer.attributes(), "report": {}, "p": "1", "size": "1", "site": site, "endpoint": call.path}
