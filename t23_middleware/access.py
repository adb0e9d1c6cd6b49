"""Checks the operator's token in a request."""

from __future__ import annotations

import base64
import binascii
import hmac


def is_allowed(authorization: str, token: bytes) -> bool:
    """Whether the Authorization header carries *token*: as the password of Basic (RFC 7617) or as Bearer (RFC 6750).

    Compares in constant time. An empty *token* never matches.
    """
    scheme, _, credentials = authorization.strip().partition(" ")
    given = credentials.strip().encode("latin-1", "replace")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except binascii.Error:
            given = b""
    elif scheme.lower() != "bearer":
        given = b""
    return bool(token) and hmac.compare_digest(given, token)
