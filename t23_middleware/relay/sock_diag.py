"""Reads TCP connections from the kernel by netlink's SOCK_DIAG family, which ``ss`` uses too. Linux only.

Any user may ask about the network namespace of the process. Structures: linux/netlink.h, linux/inet_diag.h,
linux/sock_diag.h; each is read only up to its own length.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ..tcp_info import TCPInfo, read_tcp_info

_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_ERROR, _DONE, _OVERRUN = 2, 3, 4
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_INTERRUPTED = 0x10  # NLM_F_DUMP_INTR
#: Multicast groups for destroyed sockets. IPv4 clients of a dual-stack listener are in the second.
_DESTROYED = (1, 3)
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
#: Bytes of a listener's receive buffer; the kernel's default holds 168 events.
_RECEIVE_BUFFER = 8 << 20
#: With more ports nothing is filtered: a jump in the filter reaches only 255 instructions.
_MOST_PORTS = 200

_HEADER = struct.Struct("=IHHII")
#: State and cookie of struct inet_diag_msg, after the header.
_ROW = struct.Struct("=xB2x40xII")
_ROW_SIZE = 72
_ATTRIBUTE = struct.Struct("=HH")
_INFO = 2  # INET_DIAG_INFO
_FIN_WAIT2, _TIME_WAIT = 5, 6
#: All states in which bytes are acknowledged: neither listening nor in the handshake.
_STATES = sum(1 << state for state in (1, 4, 5, 6, 7, 8, 9, 11))
#: Error numbers of a kernel without IPv6.
_NO_IPV6 = (errno.ENOENT, errno.EINVAL, errno.EAFNOSUPPORT)
#: Longest time for a part of a dump, in seconds.
_PATIENCE = 2.0


class Row(NamedTuple):
    """A connection in the kernel."""

    cookie: int
    #: ``None`` if the kernel has no TCP_INFO for it, or one that is too short.
    info: TCPInfo | None
    #: Whether everything was acknowledged, since only the end of the closing handshake is left.
    is_done: bool


def dump(ports: Iterable[int]) -> dict[int, Row]:
    """Cookie -> connection, for all with a local port in *ports*. Raises :class:`OSError` if the list is incomplete."""
    rows: dict[int, Row] = {}
    for port in ports:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                rows.update((row.cookie, row) for row in _dump(port, family))
            except OSError as error:
                if family == socket.AF_INET or error.errno not in _NO_IPV6:
                    raise
    return rows


def _dump(port: int, family: int) -> Iterator[Row]:
    with _netlink() as asking:  # new each time: the rest of a failed dump must not answer the next
        asking.settimeout(_PATIENCE)
        asking.send(_question(port, family))
        while True:
            for kind, flags, body in _messages(asking.recv(1 << 16)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise _refusal(body)
                if kind == _OVERRUN or flags & _INTERRUPTED:
                    raise OSError(errno.ENOBUFS, "the kernel's answer is not whole")
                if kind == _SOCK_DIAG_BY_FAMILY and (row := _row(body)):
                    yield row


def _netlink() -> socket.socket:
    family = getattr(socket, "AF_NETLINK", None)
    if family is None:
        raise OSError(errno.EAFNOSUPPORT, "this system has no netlink")
    return socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG)


def _question(port: int, family: int) -> bytes:
    """The request for a dump of the TCP connections with the local port *port*, with their TCP_INFO."""
    at_least = struct.pack("=BBHBBH", 2, 8, 20, 0, 0, port)  # if not, jump beyond the end, which means no
    at_most = struct.pack("=BBHBBH", 3, 8, 12, 0, 0, port)
    filter = _ATTRIBUTE.pack(4 + len(at_least + at_most), 1) + at_least + at_most
    request = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 1 << (_INFO - 1), _STATES) + filter
    return _HEADER.pack(16 + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + request


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and body of each message in *data*, up to the first that is not valid."""
    at = 0
    while at + 16 <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, at)
        if not 16 <= length <= len(data) - at:
            return
        yield kind, flags, data[at + 16 : at + length]
        at += (length + 3) & ~3


def _refusal(body: bytes) -> OSError:
    number = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else errno.EPROTO
    return OSError(number, os.strerror(number))


def _row(body: bytes) -> Row | None:
    if len(body) < _ROW_SIZE:
        return None
    state, low, high = _ROW.unpack_from(body)
    cookie = low | high << 32
    signed = cookie - (1 << 64) if cookie >> 63 else cookie
    answer = _attribute(body, _INFO)
    info = None if answer is None else read_tcp_info(answer)
    return Row(signed, info, answer is None and state in (_FIN_WAIT2, _TIME_WAIT))


def _attribute(body: bytes, wanted: int) -> bytes | None:
    at = _ROW_SIZE
    while at + 4 <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < 4:
            return None
        if kind == wanted:
            return body[at + 4 : at + length]
        at += (length + 3) & ~3
    return None


class Listener:
    """Receives an event for each TCP socket that is destroyed, in its own thread.

    The thread calls *on_destroyed* with the socket's row, and *on_missed* when the kernel dropped events. Raises
    :class:`OSError` if the kernel refuses. Until :meth:`filter_ports`, events of all ports are received.
    """

    def __init__(self, on_destroyed: Callable[[Row], None], on_missed: Callable[[], None]) -> None:
        self._on_destroyed = on_destroyed
        self._on_missed = on_missed
        self._socket = _netlink()
        try:
            _enlarge(self._socket)
            self._socket.bind((0, 0))
            for group in _DESTROYED:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
            self._socket.setblocking(False)
            self._wake_out, self._wake_in = os.pipe()
        except OSError:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._run, name="t23-listener", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # RLIMIT_NPROC, or the container's pids.max
            self._close()
            raise OSError(errno.EAGAIN, str(error)) from error

    def filter_ports(self, ports: Iterable[int]) -> None:
        """From now on, receive only events of sockets with these local ports. Raises :class:`OSError`."""
        if program := _filter(sorted(ports)):
            code = array("B", program)
            filter_program = struct.pack("HP", len(program) // 8, code.buffer_info()[0])
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_program)

    def stop(self) -> None:
        """End the thread, after all events that the kernel has sent before."""
        os.write(self._wake_in, b"0")
        self._thread.join()
        self._close()

    def _close(self) -> None:
        self._socket.close()
        os.close(self._wake_out)
        os.close(self._wake_in)

    def _run(self) -> None:
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        waiting.register(self._wake_out, select.POLLIN)
        while True:
            stopping = any(descriptor == self._wake_out for descriptor, _ in waiting.poll())
            self._read_all()
            if stopping:
                return

    def _read_all(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                self._on_missed()
                if error.errno != errno.ENOBUFS:
                    time.sleep(_PATIENCE)  # the error may repeat at once
                return
            for kind, _, body in _messages(data):
                if kind == _SOCK_DIAG_BY_FAMILY and (row := _row(body)):
                    self._on_destroyed(row)


def _enlarge(listening: socket.socket) -> None:
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    with contextlib.suppress(OSError):  # only root may exceed net.core.rmem_max
        listening.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)


def _filter(ports: list[int]) -> bytes:
    """A classic BPF program that accepts messages with a local port in *ports*; all messages if there are too many."""
    if len(ports) > _MOST_PORTS:
        return struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF)
    load = struct.pack("=HBBI", 0x28, 0, 0, 20)  # idiag_sport, the half word 4 bytes after the header
    jumps = [struct.pack("=HBBI", 0x15, len(ports) - number, 0, port) for number, port in enumerate(ports)]
    drop, take = struct.pack("=HBBI", 0x06, 0, 0, 0), struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF)
    return load + b"".join(jumps) + drop + take
