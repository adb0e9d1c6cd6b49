"""What a server holds of a body: it took it, has not sent it, and throws it away when the client leaves.

Most servers hand a chunk to the kernel before they ask for the next one, and :mod:`.body` is right about them. The
two here run far ahead of the client, and tell how far to whoever knows where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

from .body import CountedIterable, Ending

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Holder(Protocol):
    """A server's end of the connection, during one response."""

    def sends(self) -> bool:
        """Whether a chunk that is handed out now may reach the client."""

    def took(self) -> None:
        """A chunk was taken."""

    def held(self) -> int:
        """Bytes that it took and has not sent yet."""

    def finish(self, taken: int, ending: Ending) -> None:
        """No more will come: end *ending*, once it is known what was sent of *taken* bytes."""


#: What is used of a waitress channel; a version without one of them is counted like other servers.
_CHANNEL = ("adj", "connected", "current_outbuf_count", "outbuf_lock", "outbufs", "total_outbufs_len")


def holder_of(environ: WSGIEnvironment) -> Holder | None:
    """The holder of this request's connection, where the server is one that has any."""
    asks = environ.get("waitress.client_disconnected")
    channel = getattr(asks, "__self__", None) if isinstance(asks, MethodType) else None
    if all(hasattr(channel, name) for name in _CHANNEL):
        return WaitressQueue(channel)
    receives = getattr(environ.get("wsgi.input"), "receive", None)
    cycle = getattr(receives, "__self__", None) if isinstance(receives, MethodType) else None
    return UvicornCycle(cycle) if hasattr(cycle, "disconnected") else None


def hides_leaving(start_response: object) -> bool:
    """Whether the server tells the app nothing of a client that left, and takes the whole body all the same.

    hypercorn's ``send`` says nothing, and its ``start_response`` is all that it lets the app know of itself
    (hypercorn/app_wrappers.py, ``run_app``).
    """
    return getattr(start_response, "__module__", None) == "hypercorn.app_wrappers"


class WaitressQueue:
    """waitress holds up to 16 MB (``outbuf_high_watermark``), and all that is left when the app is done.

    A mark in its queue of buffers is closed when all before it is sent, or when the queue is thrown away: waitress
    does the same with a file that it was handed (waitress/channel.py, ``write_soon``, ``handle_close``).
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._mark: _Mark | None = None

    def sends(self) -> bool:
        return True  # it raises into the app's thread else

    def took(self) -> None:
        """See to it that a mark stands in the queue while something does."""
        if self._channel.total_outbufs_len and (self._mark is None or self._mark.is_passed):
            with self._channel.outbuf_lock:
                self._mark = _Mark(self._channel)

    def held(self) -> int:
        return self._channel.total_outbufs_len  # type: ignore[no-any-return]

    def finish(self, taken: int, ending: Ending) -> None:
        with self._channel.outbuf_lock:
            if self._channel.connected and self._channel.total_outbufs_len:
                _Mark(self._channel, lambda unsent: ending.end(taken - unsent))
                return
        lost = 0 if self._mark is None else self._mark.lost
        ending.end(taken - lost)


class _Mark:
    """An empty buffer at the end of a channel's queue; made while its ``outbuf_lock`` is held."""

    def __init__(self, channel: Any, told: Callable[[int], object] | None = None) -> None:
        self._channel = channel
        self._told = told
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
        queue, told, self._told = self._channel.outbufs, self._told, None
        self.is_passed = self not in queue
        if not self.is_passed:
            self.lost = self._channel.total_outbufs_len
        if told is not None:
            # What stands behind the last mark of a response is not its body.
            told(self.lost - sum(map(len, queue[queue.index(self) :])) if self.lost else 0)


class UvicornCycle:
    """uvicorn's ``send`` returns without a word once the client left, so a2wsgi drains the app (h11_impl.py:459)."""

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle

    def sends(self) -> bool:
        return not self._cycle.disconnected

    def took(self) -> None:
        pass

    def held(self) -> int:
        return 0

    def finish(self, taken: int, ending: Ending) -> None:
        ending.end(taken)


class CountedHeld(CountedIterable):
    """Round an app's iterable, for a server that holds what it took."""

    def __init__(self, body: Iterable[bytes], ending: Ending, holder: Holder) -> None:
        super().__init__(body, ending)
        self._holder = holder
        #: Bytes that were taken when nothing could arrive any more.
        self._in_vain = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in super().__iter__():
            # Looked at before: a client may leave with the last chunk of a whole answer in its hands.
            may_arrive = self._holder.sends()
            yield chunk
            self._holder.took()
            if not may_arrive:
                self._in_vain += len(chunk)

    def _taken(self) -> int:
        return super()._taken() - self._in_vain

    def _tell_progress(self) -> None:
        if self._ending is not None:
            self._ending.progress(self._taken() - self._holder.held())

    def _finish(self, ending: Ending) -> None:
        self._holder.finish(self._taken(), ending)


class CountedHeldSequence(CountedHeld):
    """Round a list."""

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]
