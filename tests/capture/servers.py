"""Servers as small as a test needs them: each calls an app in this process as the real one does."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults

from gunicorn.http.wsgi import FileWrapper
from waitress.buffers import ReadOnlyFileBasedBuffer


class OldFileWrapper:
    """gunicorn's wrapper before version 24, to the letter: a sequence of the old kind, without ``__next__``."""

    def __init__(self, filelike: Any, blksize: int = 8192) -> None:
        self.filelike = filelike
        self.blksize = blksize
        if hasattr(filelike, "close"):
            self.close = filelike.close

    def __getitem__(self, key: int) -> bytes:
        data = self.filelike.read(self.blksize)
        if data:
            return data
        raise IndexError


class Answer(NamedTuple):
    """What the client got, and what the server met."""

    status: str | None
    headers: list[tuple[str, str]]
    body: bytes
    error: BaseException | None


def request(
    path: str = "/film.mp4", query: str = "session_id=s1&photo_id=7", method: str = "GET", **more: Any
) -> dict[str, Any]:
    """The environ of a request that names a play."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "SCRIPT_NAME": "",
        **more,
    }
    setup_testing_defaults(environ)
    return environ


def media(*chunks: bytes, kind: str = "video/mp4", status: str = "200 OK", length: bool = True) -> Any:
    """An app that answers every request with *chunks*, in a list."""

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        headers = [("Content-Type", kind)]
        if length:
            headers.append(("Content-Length", str(sum(map(len, chunks)))))
        start_response(status, headers)
        return list(chunks)

    return app


def ask(
    app: Any, environ: dict[str, Any] | None = None, *, stop_after: int | None = None, closes: int = 1
) -> Answer:
    """Call *app* as a server without a file wrapper does.

    After *stop_after* chunks the client is gone: sending the next fails. The body is closed *closes* times.
    """
    exchange = _Exchange()
    try:
        body = app(request() if environ is None else environ, exchange.start_response)
        try:
            for number, chunk in enumerate(body):
                if number == stop_after:
                    break
                exchange.out.append(chunk)
        finally:
            for _ in range(closes):
                _close(body)
    except Exception as error:
        return exchange.answer(error)
    return exchange.answer(None)


class _Exchange:
    def __init__(self, write: Callable[[bytes], object] | None = None) -> None:
        self.head: tuple[str, list[tuple[str, str]]] | None = None
        self.out: list[bytes] = []
        self.write = write or self.out.append

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
        if exc_info is not None and self.out:
            raise exc_info[1]
        assert exc_info is not None or self.head is None, "start_response was called twice"
        self.head = (status, list(headers))
        return self.write

    def answer(self, error: BaseException | None) -> Answer:
        status, headers = self.head or (None, [])
        return Answer(status, headers, b"".join(self.out), error)


def _close(body: Any) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()


def as_gunicorn(
    app: Any, environ: dict[str, Any], *, read: int | None = None, wrapper: Any = FileWrapper
) -> Answer:
    """Serve as gunicorn's sync worker: the file goes by sendfile where the body is its own wrapper.

    The client hangs up after *read* bytes. ``Answer.body`` is what it read, ``error`` the server's.
    """
    environ["wsgi.file_wrapper"] = wrapper
    error: BaseException | None = None
    ours, theirs = socket.socketpair()
    exchange = _Exchange(ours.sendall)
    received: list[bytes] = []
    client = threading.Thread(target=_read, args=(theirs, read, received))
    client.start()
    with ours:
        try:
            body = app(environ, exchange.start_response)
            try:
                if isinstance(body, environ["wsgi.file_wrapper"]):
                    _send_file(ours, body, _content_length(exchange))
                else:
                    for chunk in body:
                        ours.sendall(chunk)
            finally:
                _close(body)
        except OSError as failed:
            error = failed
    client.join()
    status, headers = exchange.head or (None, [])
    return Answer(status, headers, b"".join(received), error)


def _send_file(sock: socket.socket, body: Any, length: int | None) -> None:
    """gunicorn/http/wsgi.py, ``Response.sendfile``."""
    descriptor = body.filelike.fileno()
    offset = os.lseek(descriptor, 0, os.SEEK_CUR)
    count = os.fstat(descriptor).st_size - offset if length is None else length
    sock.sendfile(body.filelike, offset=offset, count=count)
    os.lseek(descriptor, offset, os.SEEK_SET)


def _read(sock: socket.socket, limit: int | None, received: list[bytes]) -> None:
    left = limit
    with sock:
        while left is None or left > 0:
            data = sock.recv(65536 if left is None else min(left, 65536))
            if not data:
                return
            received.append(data)
            left = None if left is None else left - len(data)


def _content_length(exchange: _Exchange) -> int | None:
    headers = exchange.head[1] if exchange.head else []
    return next((int(value) for name, value in headers if name.lower() == "content-length"), None)


def as_waitress(app: Any, environ: dict[str, Any], *, sends: Iterable[int] | None = None) -> Answer:
    """Serve as waitress: it reads a piece, seeks back, sends, and skips what was sent; it closes files twice.

    *sends* says how much the kernel takes of each piece; afterwards the client is gone.
    """
    environ["wsgi.file_wrapper"] = ReadOnlyFileBasedBuffer
    exchange = _Exchange()
    body = app(environ, exchange.start_response)
    if not isinstance(body, ReadOnlyFileBasedBuffer):
        exchange.out.extend(body)
        _close(body)
        return exchange.answer(None)
    body.prepare(_content_length(exchange))
    takes = iter(sends) if sends is not None else None
    while len(body) > 0:
        piece = body.get(1000)
        taken = len(piece) if takes is None else next(takes, None)
        if taken is None:
            break
        exchange.out.append(piece[:taken])
        body.skip(min(taken, len(piece)), True)
    body.close()
    body.close()
    return exchange.answer(None)
