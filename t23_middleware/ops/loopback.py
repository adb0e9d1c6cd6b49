"""Whether a request comes from the developer at this machine, or from a page of some web site in the browser.

Such a page can send forms to 127.0.0.1, and by a name of its own that it lets point there it can read the answers
(DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


def request_refusal(environ: WSGIEnvironment, *, any_short_name: bool = False) -> str:
    """Why the request is refused, as a sentence; ``""`` where it may be answered.

    *any_short_name* as for :func:`foreign_host`.
    """
    if refused := host_refusal(environ, any_short_name=any_short_name):
        return refused
    host = environ.get("HTTP_HOST", "").strip().lower()
    origin = environ.get("HTTP_ORIGIN", "").strip().lower()
    if origin and origin not in (f"http://{host}", f"https://{host}"):
        return "Pages of other origins are not answered."
    if environ.get("HTTP_SEC_FETCH_SITE", "").strip().lower() == "cross-site":
        return "Pages of other sites are not answered; write the address into the browser yourself."
    return ""


def host_refusal(environ: WSGIEnvironment, *, any_short_name: bool = False) -> str:
    """Why the request's ``Host`` is refused, as a sentence; ``""`` where it is a name of this machine's loopback.

    *any_short_name*: one without a dot, or none, will do. Nobody on the internet can own such a name.
    """
    name = _without_port(environ.get("HTTP_HOST", "").strip().lower())
    if _is_loopback(name) or (any_short_name and _is_short(name)):
        return ""
    return "The Host must be 127.0.0.1, [::1] or localhost."


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _is_short(name: str) -> bool:
    return not any(sign in name for sign in ".:[@")


def _is_loopback(name: str) -> bool:
    if name.rstrip(".") == "localhost" or name.rstrip(".").endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
