"""Finds the TCP connection that a response leaves by, and asks the kernel how far it is.

Each server keeps its socket in another place: :data:`_ENVIRON`, :data:`_START_RESPONSE`, :data:`_INPUT` and
:func:`link_of` are the only list of these places. Servers without a reachable socket: bjoern, granian, mod_wsgi,
hypercorn.
"""

from __future__ import annotations

import socket
import struct
import sys
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..tcp_info import SIZE, TCP_INFO, TCPInfo, read_tcp_info
from ..transfer import Connection

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

#: Linux, asm-generic/socket.h; Python has no name for it.
_SO_COOKIE = 57
# As plain numbers: each use of an enum's member costs as much as the question.
_TCP, _SOCKET = int(socket.IPPROTO_TCP), int(socket.SOL_SOCKET)
_unpack_cookie = struct.Struct("=q").unpack
_IS_LINUX = sys.platform == "linux"
#: By the number of items in an address.
_FAMILIES = {2: int(socket.AF_INET), 4: int(socket.AF_INET6)}

#: Keys of the environ that hold the socket: gunicorn (http/wsgi.py), werkzeug (serving.py).
_ENVIRON = ("gunicorn.socket", "werkzeug.socket")
#: Attributes that lead from the object behind ``start_response`` to the socket: gevent's pywsgi, cheroot, wsgiref.
_START_RESPONSE: tuple[tuple[str, ...], ...] = (("socket",), ("req", "conn", "socket"), ("stdout", "_sock"))
#: Attributes that lead from ``wsgi.input`` to it, where another middleware hides the server's ``start_response``:
#: wsgiref; gevent's pywsgi and cheroot; Django's runserver.
_INPUT = (
    ("raw", "_sock"),
    ("rfile", "raw", "_sock"),
    ("rfile", "rfile", "raw", "_sock"),
    ("_read", "__self__", "raw", "_sock"),
)


class Link(Protocol):
    """A response's way to the kernel's account of its connection. Nothing of it raises."""

    @property
    def runs_ahead(self) -> bool:
        """The server accepts bytes that it has not written to the socket yet: the socket's position says nothing."""

    @property
    def is_encrypted(self) -> bool:
        """TLS adds bytes to what the server writes."""

    def ask(self) -> TCPInfo | None:
        """How far the connection is now; ``None`` where the kernel does not say."""

    def name(self, position: int) -> Connection | None:
        """What names the connection in the journal; ``None`` where it is no TCP connection."""


class SocketLink:
    """The link of a server that writes to its socket before it asks for the next chunk."""

    runs_ahead = False

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self.is_encrypted = hasattr(sock, "cipher")

    def ask(self) -> TCPInfo | None:
        try:
            return read_tcp_info(self._socket.getsockopt(_TCP, TCP_INFO, SIZE))
        except Exception:  # a closed descriptor, no TCP socket, an object that is no socket at all
            return None

    def name(self, position: int) -> Connection | None:
        try:
            address = self._socket.getsockname()
            (cookie,) = _unpack_cookie(self._socket.getsockopt(_SOCKET, _SO_COOKIE, 8))
            # Two or four items; a UNIX socket's is a text. `socket.family` makes an enum each time it is asked.
            return Connection(cookie, address[1], _FAMILIES[len(address)], position)
        except Exception:
            return None


class _Descriptor:
    """uWSGI's connection, a bare descriptor that uWSGI closes and may use again for the next client."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._cookie = self._with_socket(_cookie)

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        def ask(sock: socket.socket) -> bytes:
            if _cookie(sock) != self._cookie:
                raise OSError("the descriptor is another connection's")
            return sock.getsockopt(level, option, size)

        answer: bytes = self._with_socket(ask)
        return answer

    def getsockname(self) -> Any:
        return self._with_socket(lambda sock: sock.getsockname())

    def _with_socket(self, use: Any) -> Any:
        sock = socket.socket(fileno=self._descriptor)
        try:
            return use(sock)
        finally:
            sock.detach()


def _cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


class UwsgiServer(NamedTuple):
    """How the uWSGI server around this process is run."""

    module: Any
    #: Its ``sendfile`` runs in the request's own thread, before it closes the file.
    sends_in_this_thread: bool
    #: It sends chunks of other types than bytes, which it else drops without a word.
    takes_buffers: bool


def uwsgi_server() -> UwsgiServer | None:
    """uWSGI, where this process is one of its workers; the module exists only there."""
    module = sys.modules.get("uwsgi")
    if module is None or not hasattr(module, "connection_fd"):
        return None
    elsewhere = ("offload-threads", "async", "gevent", "ugreen", "asyncio")
    buffers = ("wsgi-accept-buffer", "wsgi-accept-buffers")
    return UwsgiServer(
        module,
        sends_in_this_thread=not any(name in module.opt for name in elsewhere),
        takes_buffers=any(name in module.opt for name in buffers),
    )


def has_own_connection(environ: WSGIEnvironment) -> bool:
    """Whether the connection belongs to one response at a time, on a system where the kernel can be asked about it.

    With HTTP/2 several responses share it (gunicorn sets ``gunicorn.socket`` there too).
    """
    return _IS_LINUX and str(environ.get("SERVER_PROTOCOL", "HTTP/1"))[:6] == "HTTP/1"


def link_of(environ: WSGIEnvironment, start_response: object) -> SocketLink | None:
    """The link of this request's connection; ``None`` where it can't be reached. Never raises.

    *start_response* is the one that the server gave.
    """
    try:
        found = _socket_of(environ, start_response)
        return None if found is None else SocketLink(found)
    except Exception:  # an attribute of the server or of the app's own objects that fails
        return None


def _socket_of(environ: WSGIEnvironment, start_response: object) -> Any:
    for key in _ENVIRON:
        if key in environ:
            return environ[key]
    server = uwsgi_server()
    if server is not None:
        return _Descriptor(server.module.connection_fd())
    if isinstance(start_response, MethodType):
        for path in _START_RESPONSE:
            if (found := _follow(start_response.__self__, path)) is not None:
                return found
    for path in _INPUT:
        if (found := _follow(environ.get("wsgi.input"), path)) is not None:
            return found
    return None


def _follow(start: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        start = getattr(start, name, None)
    return start if hasattr(start, "getsockopt") else None
