"""The app behind every server of this matrix: each way in which a WSGI app hands out a body.

``application`` is it, wrapped; a request with ``X-Bare: 1`` meets it as it is, in the same process.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper

import django
import flask
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import FileResponse
from django.urls import path

from t23_middleware import T23Middleware

#: Where ``film.mp4`` and ``long.mp4`` lie.
FOLDER = Path(os.environ.get("SERVED_FOLDER", "."))
BLOCK = 1 << 16
LARGE_CHUNK = 48 << 20

Environ = dict[str, Any]
Start = Callable[..., Any]


def opened(environ: Environ) -> tuple[Any, int]:
    """The file that the last segment of the path names, and its size."""
    file = (FOLDER / Path(environ["PATH_INFO"]).name).open("rb")
    return file, os.fstat(file.fileno()).st_size


def begin(start: Start, length: int | None, status: str = "200 OK", *more: tuple[str, str]) -> Any:
    headers = [("Content-Type", "video/mp4"), *more]
    if length is not None:
        headers.append(("Content-Length", str(length)))
    return start(status, headers)


def wrapper(environ: Environ, start: Start) -> Iterable[bytes]:
    file, size = opened(environ)
    begin(start, size)
    return environ.get("wsgi.file_wrapper", FileWrapper)(file, BLOCK)


def wrapper_without_length(environ: Environ, start: Start) -> Iterable[bytes]:
    file, _ = opened(environ)
    begin(start, None)
    return environ.get("wsgi.file_wrapper", FileWrapper)(file, BLOCK)


def positioned(environ: Environ, start: Start) -> Iterable[bytes]:
    """The second half, by a file that the app has set to it."""
    file, size = opened(environ)
    file.seek(size // 2)
    begin(
        start,
        size - size // 2,
        "206 Partial Content",
        ("Content-Range", f"bytes {size // 2}-{size - 1}/{size}"),
    )
    return environ.get("wsgi.file_wrapper", FileWrapper)(file, BLOCK)


def generator(environ: Environ, start: Start) -> Iterator[bytes]:
    file, size = opened(environ)
    begin(start, size)
    return blocks(file)


def late_generator(environ: Environ, start: Start) -> Iterator[bytes]:
    """``start_response`` is called as late as PEP 3333 allows: with the first chunk."""
    file, size = opened(environ)
    begin(start, size)
    yield from blocks(file)


def generator_without_length(environ: Environ, start: Start) -> Iterator[bytes]:
    file, _ = opened(environ)
    begin(start, None)
    return blocks(file)


def blocks(file: Any) -> Iterator[bytes]:
    with file:
        while block := file.read(BLOCK):
            yield block


def one_chunk(environ: Environ, start: Start) -> list[bytes]:
    begin(start, None)
    return [bytes(100_000)]


def large_chunk(environ: Environ, start: Start) -> list[bytes]:
    begin(start, LARGE_CHUNK)
    return [bytes(LARGE_CHUNK)]


def several_chunks(environ: Environ, start: Start) -> list[bytes]:
    begin(start, 300_000)
    return [bytes(100_000), b"", bytes(200_000)]


def written(environ: Environ, start: Start) -> list[bytes]:
    """Half by ``write()``, half by a list."""
    file, size = opened(environ)
    write = begin(start, size)
    with file:
        while file.tell() < size // 2:
            write(file.read(BLOCK))
        return [file.read()]


def written_whole(environ: Environ, start: Start) -> list[bytes]:
    file, size = opened(environ)
    write = begin(start, size)
    for block in blocks(file):
        write(block)
    return []


def empty(environ: Environ, start: Start) -> list[bytes]:
    begin(start, 0)
    return []


def raises_before(environ: Environ, start: Start) -> list[bytes]:
    raise RuntimeError("the app fails before it answers")


def raises_midway(environ: Environ, start: Start) -> Iterator[bytes]:
    begin(start, 10 * BLOCK)
    return failing_blocks()


def failing_blocks() -> Iterator[bytes]:
    for _ in range(3):
        yield bytes(BLOCK)
    raise RuntimeError("the app fails in the middle of its answer")


class FailsToClose:
    """A complete body whose ``close()`` raises."""

    def __iter__(self) -> Iterator[bytes]:
        yield bytes(BLOCK)
        yield bytes(BLOCK)

    def close(self) -> None:
        raise RuntimeError("the app fails as it closes")


def close_fails(environ: Environ, start: Start) -> FailsToClose:
    begin(start, 2 * BLOCK)
    return FailsToClose()


def zipped(environ: Environ, start: Start) -> Iterator[bytes]:
    """What an inner middleware that compresses makes of :func:`generator`."""
    file, _ = opened(environ)
    begin(start, None, "200 OK", ("Content-Encoding", "gzip"))
    return compressed(blocks(file))


def compressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    buffer = BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as packer:
        for chunk in chunks:
            packer.write(chunk)
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


flask_app = flask.Flask(__name__)


@flask_app.get("/flask/<name>")
def flask_film(name: str) -> flask.Response:
    return flask.send_file(FOLDER / name, mimetype="video/mp4", conditional=True)


def django_film(request: Any, name: str) -> FileResponse:
    return FileResponse((FOLDER / name).open("rb"), content_type="video/mp4")


urlpatterns = [path("django/<name>", django_film)]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="of a test", LOGGING_CONFIG=None)
django.setup()

ROUTES: dict[str, Any] = {
    "wrapper": wrapper,
    "wrapper-without-length": wrapper_without_length,
    "positioned": positioned,
    "generator": generator,
    "late-generator": late_generator,
    "generator-without-length": generator_without_length,
    "one-chunk": one_chunk,
    "large-chunk": large_chunk,
    "several-chunks": several_chunks,
    "write": written,
    "write-all": written_whole,
    "empty": empty,
    "raises-before": raises_before,
    "raises-midway": raises_midway,
    "close-fails": close_fails,
    "gzip": zipped,
    "flask": flask_app,
    "django": get_wsgi_application(),
}


class Text(bytes):
    """A bytes class of the app's own."""


PIECE = bytes(range(250)) * 100
#: What an app may return instead of an iterable of bytes; some servers take it.
ODD_BODIES: dict[str, Callable[[], Any]] = {
    # Some servers send their numbers one by one.
    "bytes": lambda: PIECE[:1000],
    "bytes-subclass": lambda: Text(PIECE[:1000]),
    "bytearray": lambda: bytearray(PIECE[:1000]),
    "str": lambda: "text" * 1000,
    "none": lambda: None,
    "number": lambda: 7,
    "bytearrays": lambda: [bytearray(PIECE), bytearray(PIECE)],
    "views": lambda: (memoryview(PIECE) for _ in range(3)),
    "bytes-subclasses": lambda: iter([Text(PIECE), Text(b""), Text(PIECE)]),
    "strings": lambda: ["text"],
    "nones": lambda: [PIECE, None, PIECE],
}
ODD_HEADERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda headers: (each for each in headers),
    "items": lambda headers: dict(headers).items(),
    "values-of-bytes": lambda headers: [(name, value.encode()) for name, value in headers],
    "lists": lambda headers: [list(each) for each in headers],
}


def odd_body(environ: Environ, start: Start) -> Any:
    start("200 OK", [("Content-Type", "video/mp4")])
    return ODD_BODIES[Path(environ["PATH_INFO"]).name]()


def odd_headers(environ: Environ, start: Start) -> Any:
    headers = [("Content-Type", "video/mp4"), ("Content-Length", str(len(PIECE)))]
    start("200 OK", ODD_HEADERS[Path(environ["PATH_INFO"]).name](headers))
    return [PIECE]


ROUTES |= {"odd-body": odd_body, "odd-headers": odd_headers}


def app(environ: Environ, start: Start) -> Iterable[bytes]:
    route = ROUTES.get(environ["PATH_INFO"].split("/")[1])
    if route is None:
        start("404 Not Found", [("Content-Type", "text/plain"), ("Content-Length", "9")])
        return [b"not here\n"]
    return route(environ, start)  # type: ignore[no-any-return]


wrapped = T23Middleware(app)


def application(environ: Environ, start: Start) -> Iterable[bytes]:
    return (app if "HTTP_X_BARE" in environ else wrapped)(environ, start)
