"""Bytes that a server has accepted but not yet sent, and discards if the client disconnects.

Most servers write a chunk to the kernel before they request the next one; :mod:`.body` counts them exactly. The two
servers in this module accept chunks far ahead of the client; their private attributes give the unsent bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

from ..tcp_info import TCPInfo
from ..transfer import Connection
from .body import BodyListener
from .connection import Link, SocketLink

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class ServerBuffer(Protocol):
    """A server's buffer for one connection, during one response."""

    @property
    def link(self) -> Link:
        """Reads the kernel's counters of the connection."""

    def can_reach_client(self) -> bool:
        """Whether a chunk that the server gets now can still reach the client."""

    def chunk_taken(self) -> None:
        """The server has accepted a chunk."""

    def unsent(self) -> int:
        """Bytes that the server has accepted and not sent yet."""

    def file_ended(self) -> None:
        """A file that the server sends itself has ended: all bytes before it are sent or dropped."""

    def end_when_sent(self, taken: int, listener: BodyListener) -> None:
        """The body has ended: call ``listener.end()`` when it is known how many of *taken* bytes were sent."""


#: Attributes of a waitress channel used here; a version without one of them is counted like other servers.
_CHANNEL = (
    "adj", "connected", "current_outbuf_count", "outbuf_lock", "outbufs", "socket", "total_outbufs_len",
)  # fmt: skip


def server_buffer_of(environ: WSGIEnvironment) -> ServerBuffer | None:
    """The buffer of this request's connection; ``None`` for a server without one. Never raises."""
    try:
        return _find_server_buffer(environ)
    except Exception:  # the app may have replaced an object in the environ
        return None


def _find_server_buffer(environ: WSGIEnvironment) -> ServerBuffer | None:
    asks = environ.get("waitress.client_disconnected")
    if isinstance(asks, MethodType) and all(hasattr(asks.__self__, name) for name in _CHANNEL):
        return WaitressBuffer(asks.__self__)
    receives = getattr(environ.get("wsgi.input"), "receive", None)
    if isinstance(receives, MethodType) and hasattr(receives.__self__, "disconnected"):
        return UvicornBuffer(receives.__self__)
    return None


def hides_disconnect(start_response: object) -> bool:
    """Whether the server accepts the whole body also after the client has disconnected, without an error.

    hypercorn's ``send`` raises nothing. Its ``start_response`` is the only object by which the app can recognise it
    (hypercorn/app_wrappers.py, ``run_app``).
    """
    return getattr(start_response, "__module__", None) == "hypercorn.app_wrappers"


class WaitressBuffer:
    """waitress buffers up to 16 MB (``outbuf_high_watermark``), and the rest of the body when the app has finished.

    A mark in its queue of buffers is closed when all before it is sent, or when waitress discards the queue. waitress
    does the same with a file that the app returned (waitress/channel.py, ``write_soon``, ``handle_close``).
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._mark: _QueueMark | None = None
        self.link: WaitressLink = WaitressLink(channel)

    def can_reach_client(self) -> bool:
        return True  # after a disconnect waitress raises in the app's thread

    def chunk_taken(self) -> None:
        """Add a mark to the queue if the queue is not empty and has none of ours."""
        if self._channel.total_outbufs_len and (self._mark is None or self._mark.is_passed):
            with self._channel.outbuf_lock:
                self._mark = _QueueMark(self._channel, self.link)

    def unsent(self) -> int:
        return self._channel.total_outbufs_len  # type: ignore[no-any-return]

    def file_ended(self) -> None:
        self.link.store_info()

    def end_when_sent(self, taken: int, listener: BodyListener) -> None:
        with self._channel.outbuf_lock:
            if self._channel.connected and self._channel.total_outbufs_len:
                _QueueMark(
                    self._channel, self.link, lambda unsent: listener.end(taken - unsent, taken - unsent)
                )
                return
        lost = 0 if self._mark is None else self._mark.lost
        listener.end(taken - lost, taken - lost)


class WaitressLink:
    """The socket of a waitress channel, plus the bytes in the channel's queue.

    waitress closes the socket before the app's ``close()`` runs, so the counters are stored when a mark is closed.
    """

    runs_ahead = False
    is_encrypted = False  # waitress has no TLS

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._socket = SocketLink(channel.socket)
        self._last: TCPInfo | None = None

    def read_info(self) -> TCPInfo | None:
        if self._last is not None:
            return self._last
        with self._channel.outbuf_lock:
            info = self._socket.read_info()
            return info and info._replace(position=info.position + self._channel.total_outbufs_len)

    def store_info(self) -> None:
        """Store the socket's counters of now, without the bytes in the queue."""
        self._last = self._socket.read_info()

    def connection_at(self, position: int) -> Connection | None:
        return self._socket.connection_at(position)


class _QueueMark:
    """An empty buffer at the end of a channel's queue; created while the channel's ``outbuf_lock`` is locked.

    *on_passed* is called with the lost bytes of the response, once.
    """

    def __init__(
        self, channel: Any, link: WaitressLink, on_passed: Callable[[int], object] | None = None
    ) -> None:
        self._channel = channel
        self._link = link
        self._on_passed = on_passed
        self.is_passed = False
        #: Bytes of the queue that were discarded.
        self.lost = 0
        # The last buffer in the queue must be one that waitress can append to.
        channel.outbufs += [self, type(channel.outbufs[-1])(channel.adj.outbuf_overflow)]
        channel.current_outbuf_count = 0

    def __len__(self) -> int:
        return 0

    def close(self) -> None:
        """Called by waitress: after it removed the sent mark from the queue, or when it discards the queue."""
        queue, on_passed, self._on_passed = self._channel.outbufs, self._on_passed, None
        self.is_passed = self not in queue
        if not self.is_passed:
            self.lost = self._channel.total_outbufs_len
        if on_passed is not None or self.lost:
            self._link.store_info()
        if on_passed is not None:
            # Buffers behind the last mark of a response are not its body.
            on_passed(self.lost - sum(map(len, queue[queue.index(self) :])) if self.lost else 0)


class UvicornBuffer:
    """uvicorn's ``send`` raises nothing after a disconnect, so a2wsgi reads the whole body (h11_impl.py:459)."""

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle
        self.link: UvicornLink = UvicornLink(getattr(cycle, "transport", None))

    def can_reach_client(self) -> bool:
        return not self._cycle.disconnected

    def chunk_taken(self) -> None:
        pass

    def unsent(self) -> int:
        return 0

    def file_ended(self) -> None:
        pass

    def end_when_sent(self, taken: int, listener: BodyListener) -> None:
        listener.end(taken, taken)


class UvicornLink:
    """The socket of a uvicorn connection; a2wsgi's queue and the transport's buffer are between it and the app."""

    runs_ahead = True

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        get = getattr(transport, "get_extra_info", lambda name: None)
        self._socket = SocketLink(get("socket"))
        self.is_encrypted = get("ssl_object") is not None

    def read_info(self) -> TCPInfo | None:
        info = self._socket.read_info()
        return info and info._replace(position=info.position + self._transport.get_write_buffer_size())

    def connection_at(self, position: int) -> Connection | None:
        return self._socket.connection_at(position)


class BufferedListener:
    """Between a counted body and *listener*, for a server with a buffer: checks the buffer after each chunk."""

    def __init__(self, listener: BodyListener, buffer: ServerBuffer) -> None:
        self._listener = listener
        self._buffer = buffer
        self._counted = 0
        self._next = listener.progress_at
        #: After each chunk.
        self.progress_at = 1
        self._reaches_client = True
        #: Bytes that the server accepted when nothing could reach the client any more.
        self._undeliverable = 0

    def progress(self, counted: int, unsent: int = 0) -> int:
        if not self._reaches_client:
            self._undeliverable += counted - self._counted
        self._counted = counted
        self._buffer.chunk_taken()
        # Checked before the next chunk: a client may disconnect after it got the last chunk of a complete response.
        self._reaches_client = self._buffer.can_reach_client()
        if counted >= self._next:
            self._next = self._listener.progress(counted - self._undeliverable, self._buffer.unsent())
        return counted + 1

    def end(self, counted: int, offered: int) -> None:
        self._buffer.end_when_sent(counted - self._undeliverable, self._listener)

    def drop(self, counted: int, offered: int) -> None:
        """An outer middleware that stops early has passed on the last chunk, unless the client has disconnected."""
        self.end(offered if self._buffer.can_reach_client() else counted, offered)
