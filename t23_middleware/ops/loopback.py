"""Distinguishes requests of the developer at this machine from requests of a web site's page in the browser.

Such a page can send forms to 127.0.0.1. If its own host name resolves to 127.0.0.1 (DNS rebinding), it can also read
the answers.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


def request_refusal(environ: WSGIEnvironment, *, any_short_name: bool = False) -> str:
    """Why the request is refused, as a sentence; ``""`` if it is accepted.

    *any_short_name* as for :func:`host_refusal`.
    """
    if refused := host_refusal(environ, any_short_name=any_short_name):
        return refused
    host = environ.get("HTTP_HOST", "").strip().lower()
    origin = environ.get("HTTP_ORIGIN", "").strip().lower()
    if origin and origin not in (f"http://{host}", f"https://{host}"):
        return "Requests from pages of other origins are refused."
    if environ.get("HTTP_SEC_FETCH_SITE", "").strip().lower() == "cross-site":
        return "Requests from pages of other sites are refused; type the address into the browser."
    return ""


def host_refusal(environ: WSGIEnvironment, *, any_short_name: bool = False) -> str:
    """Why the request's ``Host`` is refused, as a sentence; ``""`` if it is a name of the loopback interface.

    *any_short_name*: also accept a name without a dot, or no name. No domain on the internet can have such a name.
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
