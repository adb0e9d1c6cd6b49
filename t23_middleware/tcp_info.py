"""The kernel's counters of a TCP connection: ``struct tcp_info`` (linux/tcp.h), read by ``getsockopt`` or netlink."""

from __future__ import annotations

import struct
from typing import NamedTuple

#: Option of ``getsockopt(IPPROTO_TCP, …)``, and how many bytes of the answer are read.
TCP_INFO = 11
SIZE = 216
#: The connection was reset or is closed on both sides: nothing more will be acknowledged.
CLOSED = 7
#: Bytes that a server may add to the app's response head: Date, Server, Connection. If the head was not measured, a
#: difference up to this size is counted as head.
HEAD_DOUBT = 1024

#: tcpi_state, tcpi_bytes_acked, tcpi_notsent_bytes, tcpi_bytes_sent and tcpi_bytes_retrans.
_unpack = struct.Struct("=B119xQ16xI52xQQ").unpack_from


class TCPInfo(NamedTuple):
    """How far a connection is, in bytes since its start."""

    state: int
    #: Bytes that the peer's kernel acknowledged. An acknowledged FIN adds 1 (``tcp_ack()`` in net/ipv4/tcp_input.c).
    acked: int
    #: Bytes that were written to the connection: sent at least once, or still in the send buffer.
    position: int

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will be acknowledged."""
        return self.state == CLOSED


def read_tcp_info(answer: bytes) -> TCPInfo | None:
    """The counters in *answer*; ``None`` for the shorter structure of a kernel before 4.19."""
    try:
        state, acked, not_sent, sent, sent_again = _unpack(answer)
    except struct.error:
        return None
    position = sent - sent_again + not_sent
    # Same as TCPInfo(…), without its Python-level call: this runs twice per counted response.
    return tuple.__new__(TCPInfo, (state, acked, position if position > acked else acked))
