"""Whether a request carries the operator's token."""

from __future__ import annotations

import base64
import binascii
import hmac


def is_allowed(authorization: str, token: bytes) -> bool:
    """Whether the header carries *token*, as Basic's password (RFC 7617) or Bearer (RFC 6750); in constant time."""
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
