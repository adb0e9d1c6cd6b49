"""The kernel's account of a TCP connection: ``struct tcp_info`` (linux/tcp.h), as ``getsockopt`` and netlink give it."""

from __future__ import annotations

import struct
from typing import NamedTuple

#: Option of ``getsockopt(IPPROTO_TCP, …)``, and the bytes of the answer that are read here.
TCP_INFO = 11
SIZE = 216
#: The connection was reset or is closed on both sides: nothing more will be acknowledged.
CLOSED = 7
#: Bytes that a server may add to the head that the app gave: Date, Server, Connection. Where the head was not measured, a
#: difference up to this size is taken for it.
HEAD_DOUBT = 1024

#: tcpi_state, tcpi_bytes_acked, tcpi_notsent_bytes, tcpi_bytes_sent and tcpi_bytes_retrans.
_unpack = struct.Struct("=B119xQ16xI52xQQ").unpack_from


class TCPInfo(NamedTuple):
    """How far a connection is, in bytes since its start."""

    state: int
    #: Bytes that the peer's kernel acknowledged. An acknowledged FIN adds 1 (``tcp_ack()`` in net/ipv4/tcp_input.c).
    acked: int
    #: Bytes that were written into the connection: sent once, or still in the send buffer.
    position: int

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will be acknowledged."""
        return self.state == CLOSED


def read_tcp_info(answer: bytes) -> TCPInfo | None:
    """What *answer* says; ``None`` for the shorter structure of a kernel before 4.19."""
    try:
        state, acked, not_sent, sent, sent_again = _unpack(answer)
    except struct.error:
        return None
    position = sent - sent_again + not_sent
    # What TCPInfo(…) does, without a call in Python: this runs twice in each counted response.
    return tuple.__new__(TCPInfo, (state, acked, position if position > acked else acked))
