"""Ports for the tests' servers, which bind them some time after they were chosen."""

from __future__ import annotations

import atexit
import itertools
import socket
from collections.abc import Iterator
from functools import cache

#: Below what Linux gives to connections and to port 0 (``ip_local_port_range``, from 32768): a port from there may
#: be another socket's by the time that a server binds it.
FIRST, LAST = 20_000, 32_000
BLOCK = 400


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on, from this process's own block."""
    return next(port for port in _own_ports() if _can_be_bound(port))


@cache
def _own_ports() -> Iterator[int]:
    """The ports of one block, round and round; runs of the tests beside each other have one each."""
    first = next(port for port in range(FIRST, LAST, BLOCK) if _claimed(port))
    return itertools.cycle(range(first, first + BLOCK))


def _claimed(port: int) -> bool:
    """Whether the block that begins there is now this process's, until it ends: by UDP, in no server's way."""
    claim = socket.socket(type=socket.SOCK_DGRAM)
    try:
        claim.bind(("127.0.0.1", port))
    except OSError:
        claim.close()
        return False
    atexit.register(claim.close)
    return True


def _can_be_bound(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
