"""What a server holds of a body: it chunk_taken it, has not sent it, and drops it when the client leaves.

Most servers write a chunk to the kernel before they ask for the next one, and :mod:`.body` is right about them. The
two here run far ahead of the client; their own objects say how far.
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
    """A server's end of the connection, during one response."""

    @property
    def link(self) -> Link:
        """The way to the kernel's account of the connection."""

    def can_reach_client(self) -> bool:
        """Whether a chunk that is handed out now may reach the client."""

    def chunk_taken(self) -> None:
        """A chunk was taken."""

    def unsent(self) -> int:
        """Bytes that it took and has not sent yet."""

    def file_ended(self) -> None:
        """A file that the server can_reach_client itself is at its end: all before it is sent or dropped."""

    def end_when_sent(self, taken: int, listener: BodyListener) -> None:
        """No more will come: end *listener*, once it is known how much was sent of *taken* bytes."""


#: What is used of a waitress channel; a version without one of them is counted like other servers.
_CHANNEL = (
    "adj", "connected", "current_outbuf_count", "outbuf_lock", "outbufs", "socket", "total_outbufs_len",
)  # fmt: skip


def server_buffer_of(environ: WSGIEnvironment) -> ServerBuffer | None:
    """The buffer of this request's connection, where the server is one that has any. Never raises."""
    try:
        return _find_server_buffer(environ)
    except Exception:  # an attribute of an object that the app has put there
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
    """Whether the server tells the app nothing of a client that left, and takes the whole body all the same.

    hypercorn's ``send`` says nothing, and its ``start_response`` is all that it lets the app know of itself
    (hypercorn/app_wrappers.py, ``run_app``).
    """
    return getattr(start_response, "__module__", None) == "hypercorn.app_wrappers"


class WaitressBuffer:
    """waitress holds up to 16 MB (``outbuf_high_watermark``), and all that is left when the app is done.

    A mark in its queue of buffers is closed when all before it is sent, or when the queue is thrown away: waitress
    does the same with a file that it was handed (waitress/channel.py, ``write_soon``, ``handle_close``).
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._mark: _QueueMark | None = None
        self.link: WaitressLink = WaitressLink(channel)

    def can_reach_client(self) -> bool:
        return True  # it raises into the app's thread else

    def chunk_taken(self) -> None:
        """See to it that a mark stands in the queue while something does."""
        if self._channel.total_outbufs_len and (self._mark is None or self._mark.is_passed):
            with self._channel.outbuf_lock:
                self._mark = _QueueMark(self._channel, self.link)

    def unsent(self) -> int:
        return self._channel.total_outbufs_len  # type: ignore[no-any-return]

    def file_ended(self) -> None:
        self.link.keep()

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
    """The socket of a waitress channel, with what stands in the channel's queue before it.

    waitress closes the socket before the app's ``close()`` runs, so the last account is kept that a mark saw.
    """

    runs_ahead = False
    is_encrypted = False  # waitress speaks no TLS

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._socket = SocketLink(channel.socket)
        self._last: TCPInfo | None = None

    def ask(self) -> TCPInfo | None:
        if self._last is not None:
            return self._last
        with self._channel.outbuf_lock:
            info = self._socket.ask()
            return info and info._replace(position=info.position + self._channel.total_outbufs_len)

    def keep(self) -> None:
        """Keep what the socket says now, without what stands in the queue."""
        self._last = self._socket.ask()

    def name(self, position: int) -> Connection | None:
        return self._socket.name(position)


class _QueueMark:
    """An empty buffer at the end of a channel's queue; made while its ``outbuf_lock`` is held."""

    def __init__(
        self, channel: Any, link: WaitressLink, on_passed: Callable[[int], object] | None = None
    ) -> None:
        self._channel = channel
        self._link = link
        self._on_passed = on_passed
        self.is_passed = False
        #: Bytes of the queue that were thrown away.
        self.lost = 0
        # The last buffer in the queue must be one that waitress can append to.
        channel.outbufs += [self, type(channel.outbufs[-1])(channel.adj.outbuf_overflow)]
        channel.current_outbuf_count = 0

    def __len__(self) -> int:
        return 0

    def close(self) -> None:
        """waitress takes a buffer that was sent out of its queue first, and else closes all of them from the front."""
        queue, on_passed, self._on_passed = self._channel.outbufs, self._on_passed, None
        self.is_passed = self not in queue
        if not self.is_passed:
            self.lost = self._channel.total_outbufs_len
        if on_passed is not None or self.lost:
            self._link.keep()
        if on_passed is not None:
            # What stands behind the last mark of a response is not its body.
            on_passed(self.lost - sum(map(len, queue[queue.index(self) :])) if self.lost else 0)


class UvicornBuffer:
    """uvicorn's ``send`` returns without a word once the client left, so a2wsgi drains the app (h11_impl.py:459)."""

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
    """The socket of a uvicorn connection; between it and the app are a2wsgi's queue and the transport's buffer."""

    runs_ahead = True

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        ask = getattr(transport, "get_extra_info", lambda name: None)
        self._socket = SocketLink(ask("socket"))
        self.is_encrypted = ask("ssl_object") is not None

    def ask(self) -> TCPInfo | None:
        info = self._socket.ask()
        return info and info._replace(position=info.position + self._transport.get_write_buffer_size())

    def name(self, position: int) -> Connection | None:
        return self._socket.name(position)


class BufferedListener:
    """Between a counted body and *listener*, for a server that holds what it chunk_taken: looks at the server after each chunk."""

    def __init__(self, listener: BodyListener, buffer: ServerBuffer) -> None:
        self._listener = listener
        self._buffer = buffer
        self._counted = 0
        self._next = listener.progress_at
        #: After each chunk.
        self.progress_at = 1
        self._reaches_client = True
        #: Bytes that were taken when nothing could arrive any more.
        self._undeliverable = 0

    def progress(self, counted: int, unsent: int = 0) -> int:
        if not self._reaches_client:
            self._undeliverable += counted - self._counted
        self._counted = counted
        self._buffer.chunk_taken()
        # Asked before the next chunk: a client may leave with the last chunk of a whole answer in its hands.
        self._reaches_client = self._buffer.can_reach_client()
        if counted >= self._next:
            self._next = self._listener.progress(counted - self._undeliverable, self._buffer.unsent())
        return counted + 1

    def end(self, counted: int, offered: int) -> None:
        self._buffer.end_when_sent(counted - self._undeliverable, self._listener)

    def drop(self, counted: int, offered: int) -> None:
        """An outer middleware that stops early has handed on the last chunk, unless the client has left."""
        self.end(offered if self._buffer.can_reach_client() else counted, offered)
