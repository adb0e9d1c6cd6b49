"""A response's span of its connection: converts positions of the connection to body bytes."""

from __future__ import annotations

from typing import NamedTuple

from ..tcp_info import HEAD_DOUBT
from ..transfer import Connection
from .connection import Link

#: Share of body bytes with TLS 1.3, whose records have up to 16 KiB plus 22 bytes; used until it is measured.
TLS_SHARE = 16384 / 16406


class SentCount(NamedTuple):
    """The known bytes of a body that were sent."""

    #: Body bytes that the client's kernel acknowledged; or that the server handed over, if *position* is given.
    sent: int
    #: The connection's position after the body; ``None`` if the client's kernel has acknowledged all of it.
    position: int | None = None


class Span:
    """The part of a connection between the position before a response and the position after its body.

    *before* is the position before the response. *connection* has the position before the first byte of the body, as
    estimated from the app's headers. *is_framed*: the server also writes framing: TLS records, or chunks (RFC 9112,
    section 7.1).
    """

    __slots__ = ("_before", "_body_share", "_first", "_is_framed", "_link", "_start", "connection")

    def __init__(self, link: Link, before: int, connection: Connection, *, is_framed: bool) -> None:
        self._link = link
        self._before = before
        self.connection = connection
        self._start = connection.position
        is_encrypted = link.is_encrypted
        self._body_share = TLS_SHARE if is_encrypted else 1.0
        self._is_framed = is_framed or is_encrypted
        self._first: tuple[int, int] | None = None

    def measure(self, counted: int) -> int | None:
        """Measure the size of the head and of the framing, when the server has written exactly *counted* body bytes.

        Returns the connection's position, ``None`` if it is unknown.
        """
        info = None if self._link.runs_ahead else self._link.read_info()
        if info is None:
            return None
        if self._first is None:
            self._first = (counted, info.position)
        elif self._is_framed and info.position > self._first[1]:
            self._body_share = min((counted - self._first[0]) / (info.position - self._first[1]), 1.0)
        self._move_start(*self._first)
        return info.position

    def end(self, counted: int, offered: int) -> SentCount:
        """The response has ended: the server has written at least *counted* bytes of its body, at most *offered*."""
        info = self._link.read_info()
        if info is None or self._link.runs_ahead:
            # The server has closed its socket, or has unsent bytes: the relay reads the final count from the kernel.
            handed, position = counted, self._position_after(counted)
        else:
            handed, position = self._handed_over(info.position, counted, offered)
        if info is None:
            return SentCount(handed, position)
        if info.acked >= position:
            return SentCount(handed)
        if info.is_closed:
            return SentCount(min(max(self._body_bytes(info.acked), 0), handed))
        return SentCount(handed, position)

    def end_before_sent(self, offered: int) -> SentCount:
        """The server writes up to *offered* bytes after it released the body; the relay reads the final count."""
        return SentCount(offered, self._position_after(offered))

    def _handed_over(self, position: int, counted: int, offered: int) -> tuple[int, int]:
        """Body bytes written when the connection was at *position*, and the position after them."""
        written = self._body_bytes(position)
        if written > offered + HEAD_DOUBT:
            return offered, self._position_after(offered)  # more than the Content-Length: not only body
        if self._first is not None:
            return min(max(written, counted), offered), position
        # The server may have added to the app's head, so *written* is too high by these bytes.
        handed = min(written, offered) if written - counted > HEAD_DOUBT or written >= offered else counted
        self._move_start(handed, position)
        return handed, position

    def _body_bytes(self, position: int) -> int:
        return round((position - self._start) * self._body_share)

    def _position_after(self, sent: int) -> int:
        return self._start + round(sent / self._body_share)

    def _move_start(self, sent: int, position: int) -> None:
        """Set the start of the body: *sent* bytes of it were written when the connection was at *position*."""
        self._start = max(position - round(sent / self._body_share), self._before)
