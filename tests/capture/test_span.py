"""A response's span of its connection: positions of the connection become body bytes."""

from __future__ import annotations

import pytest

from t23_middleware.capture.span import SentCount, Span
from t23_middleware.tcp_info import CLOSED, TCPInfo
from t23_middleware.transfer import Connection

ESTABLISHED = 1
#: Bytes on the connection before the response, of the head as the app gave it, and of what the server added to that.
BEFORE, HEAD, ADDED = 5000, 200, 75


class FakeLink:
    """A connection at the place where a test puts it."""

    def __init__(self, *, runs_ahead: bool = False, is_encrypted: bool = False) -> None:
        self.runs_ahead = runs_ahead
        self.is_encrypted = is_encrypted
        self.info: TCPInfo | None = None

    def read_info(self) -> TCPInfo | None:
        return self.info

    def connection_at(self, position: int) -> Connection | None:
        return Connection(7, 8000, 2, position)

    def at(self, written: int, acked: int | None = None, state: int = ESTABLISHED) -> None:
        """*written* bytes were written behind the whole head, and *acked* of them acknowledged (all, if not given)."""
        start = BEFORE + HEAD + ADDED
        self.info = TCPInfo(state, start + (written if acked is None else acked), start + written)


def span(link: FakeLink, *, is_framed: bool = False) -> Span:
    return Span(link, BEFORE, Connection(7, 8000, 2, BEFORE + HEAD), is_framed=is_framed)


def test_complete_and_acknowledged_is_final() -> None:
    """All was handed over and acknowledged: the server's count is the answer, whatever it added to the head."""
    link = FakeLink()
    link.at(3_000_000)
    assert span(link).end(3_000_000, 3_000_000) == SentCount(3_000_000)


def test_complete_and_unacknowledged_drains() -> None:
    """The position is the one at which all of the body is acknowledged."""
    link = FakeLink()
    link.at(3_000_000, 400_000)
    assert span(link).end(3_000_000, 3_000_000) == SentCount(3_000_000, BEFORE + HEAD + ADDED + 3_000_000)


def test_reset_connection_counts_acknowledged() -> None:
    """A file that left by one sendfile: its position says what was handed over, the kernel what was taken."""
    link = FakeLink()
    link.at(5_000_000, 1_234_567, CLOSED)
    assert span(link).end(5_000_000, 100_000_000) == SentCount(1_234_567)


def test_cut_off_chunk_counts_its_part() -> None:
    """Of the chunk in which the client leaves, only the connection knows how much left."""
    link = FakeLink()
    measured = span(link)
    link.at(100_000)
    measured.measure(100_000)
    link.at(140_000, 120_000, CLOSED)
    assert measured.end(100_000, 50_000_000) == SentCount(120_000)


def test_interrupted_sendfile_counts_position() -> None:
    """A signal ends the worker before the file's position is noted: the connection's position has to do."""
    link = FakeLink()
    link.at(6_000_000, 2_000_000)
    counted = span(link).end(0, 90_000_000)
    assert counted == SentCount(6_000_000 + ADDED, BEFORE + HEAD + ADDED + 6_000_000)


def test_chunked_framing_is_scaled() -> None:
    """9 bytes are added to each chunk of 64 KiB."""
    link = FakeLink()
    measured = span(link, is_framed=True)
    for chunks in (1, 2, 128):
        link.at(chunks * 65545)
        measured.measure(chunks * 65536)
    link.at(150 * 65545, 140 * 65545, CLOSED)
    counted = measured.end(149 * 65536, 150 * 65536)
    assert abs(counted.sent - 140 * 65536) < 64


def test_tls_without_measure_is_scaled() -> None:
    """One large chunk is never measured: records hold 16 KiB and 22 bytes more."""
    link = FakeLink(is_encrypted=True)
    records = 5_000
    link.at(records * 16406, 1_000 * 16406, CLOSED)
    counted = span(link).end(0, 200_000_000)
    assert abs(counted.sent - 1_000 * 16384) < 2048


def test_closed_socket_leaves_count_to_relay() -> None:
    """A server that closes its socket first: the relay may know the connection's end."""
    assert span(FakeLink()).end(3_000_000, 3_000_000) == SentCount(3_000_000, BEFORE + HEAD + 3_000_000)


def test_server_that_runs_ahead() -> None:
    """What the server holds is not on the socket yet: its own count gives the position after the body."""
    link = FakeLink(runs_ahead=True)
    link.at(1_000, 1_000)
    assert span(link).measure(500_000) is None
    assert span(link).end(500_000, 500_000) == SentCount(500_000, BEFORE + HEAD + 500_000)


def test_bytes_behind_content_length() -> None:
    """uWSGI sends a whole file whatever the Content-Length says: what follows is no body."""
    link = FakeLink()
    link.at(8_000_000, 4_000_000)
    assert span(link).end(0, 4_000_000) == SentCount(4_000_000)


@pytest.mark.parametrize("acked", [0, BEFORE, BEFORE + HEAD])
def test_client_that_took_nothing(acked: int) -> None:
    """Less than the head was acknowledged: no byte of the body, and none below 0."""
    link = FakeLink()
    link.info = TCPInfo(CLOSED, acked, BEFORE + HEAD + ADDED + 70_000)
    assert span(link).end(70_000, 10_000_000) == SentCount(0)
