"""The random app of a request, and what it notes of its life: ``/seed/plain choices/request`` names it.

A line of the server's log that begins with ``EVENT`` is such a note.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from wsgiref.headers import Headers as WsgirefHeaders
from wsgiref.util import FileWrapper

from flask import Flask
from flask import send_file as flask_send_file
from werkzeug.datastructures import Headers
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response
from werkzeug.wsgi import ClosingIterator, wrap_file

from t23_middleware import T23Middleware

from .files import FILM, opened
from .plan import plan

FOLDER = Path(os.environ.get("SERVED_FOLDER", "."))
ERRORS = {
    error.__name__: error
    for error in (OSError, ValueError, BrokenPipeError, StopIteration, ConnectionResetError, KeyError)
}

flask_app = Flask(__name__)


@flask_app.get("/<path:_>")
def film(_: str) -> Any:
    return flask_send_file(FOLDER / "film", mimetype="video/mp4", conditional=True)


def _same(chunk: Any) -> Any:
    return chunk


class ShortBytes(bytes):
    def __len__(self) -> int:
        return 1


class Hostile:
    """A body that fails where it is asked for what it does not have."""

    def __init__(self, chunks: Iterator[Any]) -> None:
        self.chunks = chunks

    def __iter__(self) -> Iterator[Any]:
        return self.chunks

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")


class MostHostile:
    def __iter__(self) -> Iterator[Any]:
        return iter([b"abc"])

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")


class RandomApp:
    """The app of one request."""

    def __init__(self, number: int, plain: frozenset[str], request: str) -> None:
        self._plan = plan(number, plain)
        self._request = request

    def does(self, kind: str) -> str:
        return self._plan[kind]

    def note(self, what: str) -> None:
        os.write(2, f"EVENT {self._request} {what}\n".encode())

    def fail(self, where: str) -> None:
        if where in self.does("raises").split(" and "):
            raise ERRORS[self.does("error")](f"raised at {where}")

    # A call.

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        self.note("call")
        inner = self.does("inner")
        if inner.startswith("itself") and not environ.get("random.inner"):
            return self._itself(environ, start, inner)
        if inner == "wrapped again" and isinstance(environ["random.me"], T23Middleware):
            from .serve import again

            return again(self._answer, environ, start)
        return self._answer(environ, start)

    def _itself(self, environ: dict[str, Any], start: Callable[..., Any], how: str) -> Any:
        me = environ["random.me"]
        if how != "itself":
            environ = dict(environ)
        environ["random.inner"] = True
        if how == "itself late":
            return self._handed_on(me, environ, start)
        if how == "itself for another":
            # An app that reads an answer of its own before it gives its own.
            other = me(environ, lambda *_, **__: lambda data: None)
            self.note(f"read {sum(1 for _ in other)}")
            getattr(other, "close", lambda: None)()
            return self._answer(environ, start)
        return me(environ, start)

    def _handed_on(self, me: Any, environ: dict[str, Any], start: Any) -> Iterator[Any]:
        yield from me(environ, start)

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        self.fail("before")
        self._spoil(environ)
        wrapper = environ.get("wsgi.file_wrapper", FileWrapper)
        if self.does("body") == "flask":
            return flask_app.wsgi_app(environ, start)
        if self.does("body") in ("werkzeug range", "send_file"):
            return self._by_werkzeug(environ)(environ, start)
        how = self.does("start")
        if how == "late and returned":
            return self._late(self._body(environ, wrapper), start)
        if how.startswith("late") or how == "exc_info late":
            return self._late(self._body(environ, wrapper), start)
        if how in ("never", "in close") and not self._is_file() and self.does("body") != "most hostile":
            return self._body(environ, wrapper, start)
        write = self._begin(start)
        self.fail("after start")
        self._write(write)
        self._writer = write
        return self._body(environ, wrapper)

    def _spoil(self, environ: dict[str, Any]) -> None:
        how = self.does("environ")
        changes: dict[str, dict[str, Any]] = {
            "null query": {"QUERY_STRING": None},
            "bytes query": {"QUERY_STRING": environ.get("QUERY_STRING", "").encode()},
            "null path": {"PATH_INFO": None},
            "int path": {"PATH_INFO": 7},
            "odd input": {"wsgi.input": Hostile(iter(()))},
            "null protocol": {"SERVER_PROTOCOL": None},
            "method changed": {"REQUEST_METHOD": "HEAD"},
            "wrapper odd": {"wsgi.file_wrapper": 7},
            "odd session": {"t23.session_id": Hostile(iter(())), "t23.photo_id": 7, "t23.skip": []},
            "null cookie": {"HTTP_COOKIE": None},
            "ignored": {"t23.ignore": True},
        }
        environ.update(changes.get(how, {}))
        if how == "clear":
            environ.clear()
        elif how == "no query":
            environ.pop("QUERY_STRING", None)
        elif how == "wrapper taken":
            environ.pop("wsgi.file_wrapper", None)
        elif how == "hostile socket":
            for name in ("gunicorn.socket", "werkzeug.socket", "waitress.client_disconnected"):
                if name in environ:
                    environ[name] = MostHostile()

    # Its head.

    def _head(self) -> tuple[Any, Any]:
        status: Any = self.does("status")
        status = {
            "none": None,
            "int": 200,
            "bytes": b"200 OK",
            "subclass": type("Status", (str,), {})("200 OK"),
        }.get(status, status)
        return status, self._in_container(self._headers())

    def _headers(self) -> list[Any]:
        kind, length = self.does("type"), self.does("length")
        headers: list[Any] = []
        if kind != "none":
            headers.append(("Content-Type", b"video/mp4" if kind == "bytes" else kind))
        size = self._size()
        value: Any = {
            "right": str(size), "short": str(max(size - 7, 0)), "long": str(size + 9), "zero": "0", "junk": "many",
            "int": size, "bytes": str(size).encode(), "twice": str(size), "-1": "-1",
        }.get(length)  # fmt: skip
        if value is not None:
            headers += [("Content-Length", value)] * (2 if length == "twice" else 1)
        said = self.does("content range")
        if said != "none":
            said = f"bytes 0-{max(size - 1, 0)}/{size + 5}" if said != "junk" else "bytes junk"
            headers.append(
                ("Content-Range", said.encode() if self.does("content range") == "bytes" else said)
            )
        more: Any = {
            "int": ("X-More", 7), "bytes": ("X-More", b"seven"), "null": ("X-More", None), "latin": ("X-More", "\xe9"),
            "wide": ("X-More", "\u20ac"), "newline": ("X-More", "a\r\nb"), "bytes name": (b"X-More", b"a"),
            "connection": ("Connection", "close"), "empty": ("X-More", ""),
        }.get(self.does("header"))  # fmt: skip
        return headers if more is None else [*headers, more]

    def _in_container(self, headers: list[Any]) -> Any:
        how = self.does("headers")
        if how == "werkzeug":
            return Headers([(str(name), str(value)) for name, value in headers if value != "a\r\nb"])
        if how == "wsgiref":
            return WsgirefHeaders([(str(name), str(value)) for name, value in headers])
        if how == "raises":
            return self._failing(headers)
        made: dict[str, Callable[[Any], Any]] = {
            "tuple": tuple,
            "iterator": iter,
            "generator": lambda headers: (each for each in headers),
            "items": lambda headers: dict(headers).items(),
            "map": lambda headers: map(tuple, headers),
            "lists": lambda headers: [list(each) for each in headers],
            "none": lambda headers: None,
            "int": lambda headers: 7,
            "getitem": Getitem,
            "triples": lambda headers: [(*each, "more") for each in headers],
            "set": lambda headers: set(headers),
            "list subclass": type("HeaderList", (list,), {}),
        }
        return made.get(how, list)(headers)

    def _failing(self, headers: list[Any]) -> Iterator[Any]:
        yield from headers
        raise ValueError("the headers ran out")

    def _begin(self, start: Callable[..., Any]) -> Any:
        how = self.does("start")
        status, headers = self._head()
        if how == "empty call":
            return start()
        if how == "keywords":
            return start(status=status, headers=headers)
        write = start(status, headers)
        if how == "twice":
            status, headers = self._head()
            return start(status, headers)
        if how == "again with exc_info":
            return self._sorry(start)
        return write

    def _sorry(self, start: Callable[..., Any]) -> Any:
        try:
            raise OSError("the app's disk failed")
        except OSError:
            return start("500 Sorry", [("Content-Type", "text/plain")], sys.exc_info())

    def _write(self, write: Any) -> None:
        how = self.does("write")
        pieces: dict[str, list[Any]] = {
            "one": [FILM[:50]],
            "three": [FILM[:50], b"", FILM[50:90]],
            "all": self._pieces(),
            "bytearray": [bytearray(FILM[:50])],
            "str": ["text"],
            "null": [None],
            "raises": [FILM[:50]],
        }
        for piece in pieces.get(how, []):
            write(piece)
        if how == "raises":
            raise OSError("raised after write()")

    # Its body.

    def _pieces(self) -> list[bytes]:
        sizes = [int(size) for size in self.does("sizes").split()]
        film = FILM * 30
        return [film[sum(sizes[:place]) :][:size] for place, size in enumerate(sizes)]

    def _size(self) -> int:
        """The length that the app declares: of its file, or of its pieces and what it writes."""
        if self._is_file():
            return 5000 if self.does("position") == "0" else 3000
        return sum(map(len, self._pieces())) + {"one": 50, "three": 90, "bytearray": 50}.get(
            self.does("write"), 0
        )

    def _chunks(self, start: Any = None) -> Iterator[Any]:
        if self.does("write") == "in the body" and hasattr(self, "_writer"):
            self._writer(FILM[:20])
        for number, piece in enumerate(self._pieces() if self.does("write") != "all" else []):
            self.fail(f"next {number}")
            yield self._odd(piece)
        self.fail("next 2")

    def _odd(self, piece: bytes) -> Any:
        changes: dict[str, Callable[[bytes], Any]] = {
            "bytearray": bytearray,
            "memoryview": memoryview,
            "array": lambda piece: array("B", piece),
            "str": lambda piece: piece.decode("latin-1"),
            "none": lambda piece: None,
            "int": len,
            "subclass": type("Bytes", (bytes,), {}),
            "short subclass": ShortBytes,
            "wide view": lambda piece: memoryview(array("I", piece[: len(piece) // 4 * 4])),
        }
        return changes.get(self.does("chunks"), lambda piece: piece)(piece)

    def _late(self, body: Any, start: Any) -> Iterator[Any]:
        how = self.does("start")
        if how == "late after empty":
            yield b""
        write = start(*self._head())
        self._write(write)
        self._writer = write
        try:
            for number, chunk in enumerate(body):
                if how == "exc_info late" and number == 1:
                    self._sorry(start)
                yield chunk
        finally:
            getattr(body, "close", lambda: None)()

    def _body(self, environ: dict[str, Any], wrapper: Any, start: Any = None) -> Any:
        kind = self.does("body")
        if self._is_file():
            return self._of_file(kind, environ, wrapper)
        if kind in ("bytes", "bytearray", "str", "memoryview", "array"):
            whole = b"".join(self._pieces())[:2000]
            return {
                "bytearray": bytearray(whole),
                "str": whole.decode("latin-1"),
                "memoryview": memoryview(whole),
                "array": array("B", whole),
            }.get(kind, whole)
        made: dict[str, Callable[[], Any]] = {
            "list": lambda: list(self._chunks()),
            "tuple": lambda: tuple(self._chunks()),
            "generator": self._chunks,
            "deque": lambda: deque(self._chunks()),
            "map": lambda: map(_same, self._chunks()),
            "chain": lambda: chain(self._chunks(), [b"end"]),
            "none": lambda: None,
            "int": lambda: 7,
            "set": lambda: {FILM[:10]},
            "dict": lambda: {FILM[:10]: 1},
            "hostile": lambda: Hostile(self._chunks()),
            "most hostile": MostHostile,
            "closing iterator": lambda: ClosingIterator(Own(self, start), lambda: self.note("callback")),
        }
        return made[kind]() if kind in made else BODIES[kind](self, start)

    # Files.

    def _is_file(self) -> bool:
        return self.does("body").startswith(("file", "wrapper", "werkzeug"))

    def _of_file(self, kind: str, environ: dict[str, Any], wrapper: Any) -> Any:
        file = opened(self.does("file"), self.does("position"), FOLDER)
        block = self.does("block")
        size = [] if block == "default" else [int(block)]
        if kind == "file":
            return file
        if kind == "werkzeug wrapper":
            return wrap_file(environ, file)
        if kind == "wrapper by keyword":
            name = "file" if wrapper.__module__.startswith("waitress") else "filelike"
            return wrapper(**{name: file})
        if kind == "wrapper subclass":
            return type("Sub", (wrapper,), {})(file, *size)
        if kind == "wrapper closes itself":
            return self._closes_itself(wrapper, file, size)
        if kind == "wrapper is asked":
            body = wrapper(file, *size)
            self.note(f"asked {isinstance(body, environ.get('wsgi.file_wrapper', FileWrapper))}")
            return body
        return wrapper(file, *size)

    def _closes_itself(self, wrapper: Any, file: Any, size: list[int]) -> Any:
        body = wrapper(file, *size)
        close = getattr(body, "close", lambda: None)

        def closed() -> None:
            self.note("close")
            close()

        body.close = closed
        return body

    def _by_werkzeug(self, environ: dict[str, Any]) -> Any:
        if self.does("body") == "send_file":
            return send_file(FOLDER / "film", environ, mimetype="video/mp4", conditional=True)
        file = opened(self.does("file"), self.does("position"), FOLDER)
        response = Response(wrap_file(environ, file), mimetype="video/mp4", direct_passthrough=True)
        return response.make_conditional(
            Request(environ), accept_ranges=True, complete_length=len(FILM) - len(FILM) % 7
        )


class Getitem:
    """A sequence of the old kind."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Own:
    """An iterator that is a class of the app's own."""

    def __init__(self, app: RandomApp, start: Any) -> None:
        self.app = app
        self.start = start
        self.is_begun = self.is_over = False
        self.chunks = app._chunks()

    def __iter__(self) -> Iterator[Any]:
        if not self.is_begun:
            self.app.note("iter")  # what asks an iterator again gets it again
        self.is_begun = True
        self.app.fail("iter")
        return self

    def __next__(self) -> Any:
        try:
            return next(self.chunks)
        except StopIteration:
            if not self.is_over:
                self.app.note("exhausted")  # who asks it again is nothing that an app sees
            self.is_over = True
            raise

    def close(self) -> None:
        self.app.note("close")
        if self.start is not None and self.app.does("start") == "in close":
            self.app._begin(self.start)
        if self.app.does("write") == "after close" and hasattr(self.app, "_writer"):
            self.app._writer(FILM[:20])
        self.app.fail("close")

    def __del__(self) -> None:
        self.app.note("dropped")


class Iterable(Own):
    """The same, but not its own iterator; the iterator has a close() too."""

    def __iter__(self) -> Iterator[Any]:
        self.app.note("iter")
        self.app.fail("iter")
        return self._noted()

    def _noted(self) -> Iterator[Any]:
        try:
            yield from self.app._chunks()
        finally:
            self.app.note("iterator ended")

    __next__ = None  # type: ignore[assignment]


class Sized(Iterable):
    def __len__(self) -> int:
        return len(self.app._pieces())


class LengthLies(Iterable):
    def __len__(self) -> int:
        return 1


class LengthRaises(Iterable):
    def __len__(self) -> int:
        raise ValueError("no length today")


BODIES: dict[str, Callable[..., Any]] = {
    "iterator": Own,
    "iterable": Iterable,
    "getitem": lambda app, start: Getitem(list(app._chunks())),
    "sized": Sized,
    "length lies": LengthLies,
    "length raises": LengthRaises,
}
