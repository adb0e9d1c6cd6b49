"""A response's span of its connection: turns positions of the connection into body bytes."""

from __future__ import annotations

from typing import NamedTuple

from ..tcp_info import HEAD_DOUBT
from ..transfer import Connection
from .connection import Link

#: A TLS record holds up to 16 KiB, and 22 bytes more with TLS 1.3; measured in the response itself where that is possible.
TLS_SHARE = 16384 / 16406


class Count(NamedTuple):
    """How much of a body is known to have been sent."""

    #: Body bytes that the client's kernel acknowledged, or that the server handed over where *position* is given.
    sent: int
    #: The connection's position after the body, where the client's kernel has not acknowledged all of it yet.
    position: int | None = None


class Span:
    """From the connection's position before a response to the one after its body.

    *before* is the position before the response, *connection* names it with the position before the first byte of the
    body, as far as the app's headers tell it. *is_framed* says that more than the body's own bytes is written: TLS records, or chunks (RFC 9112, 7.1).
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
        """The server has written *counted* bytes of the body and no more: learn the head and the framing from it.

        Returns the connection's position, ``None`` where it can't be asked.
        """
        info = None if self._link.runs_ahead else self._link.ask()
        if info is None:
            return None
        if self._first is None:
            self._first = (counted, info.position)
        elif self._is_framed and info.position > self._first[1]:
            self._body_share = min((counted - self._first[0]) / (info.position - self._first[1]), 1.0)
        self._move_start(*self._first)
        return info.position

    def end(self, counted: int, offered: int) -> Count:
        """The response is over: the server has written at least *counted* bytes of its body, at most *offered*."""
        info = self._link.ask()
        if info is None or self._link.runs_ahead:
            # The server has closed its socket, or holds bytes of its own: the relay knows more from the kernel.
            handed, position = counted, self._position_after(counted)
        else:
            handed, position = self._handed_over(info.position, counted, offered)
        if info is None:
            return Count(handed, position)
        if info.acked >= position:
            return Count(handed)
        if info.is_closed:
            return Count(min(max(self._body_bytes(info.acked), 0), handed))
        return Count(handed, position)

    def end_before_sent(self, offered: int) -> Count:
        """The server goes on to write *offered* bytes after it has dropped the body: the relay finds out how many."""
        return Count(offered, self._position_after(offered))

    def _handed_over(self, position: int, counted: int, offered: int) -> tuple[int, int]:
        """Body bytes that were written when the connection stood at *position*, and the position after them."""
        written = self._body_bytes(position)
        if written > offered + HEAD_DOUBT:
            return offered, self._position_after(offered)  # more than the Content-Length: that is no body
        if self._first is not None:
            return min(max(written, counted), offered), position
        # The head is at least as long as the app gave it, so *written* is too high by what the server added.
        handed = min(written, offered) if written - counted > HEAD_DOUBT or written >= offered else counted
        self._move_start(handed, position)
        return handed, position

    def _body_bytes(self, position: int) -> int:
        return round((position - self._start) * self._body_share)

    def _position_after(self, sent: int) -> int:
        return self._start + round(sent / self._body_share)

    def _move_start(self, sent: int, position: int) -> None:
        """*sent* bytes of the body were written when the connection stood at *position*."""
        self._start = max(position - round(sent / self._body_share), self._before)
