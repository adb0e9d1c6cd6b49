"""The server's side: the random app of each request, with or without us, behind a random outer middleware."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from werkzeug.wsgi import ClosingIterator

from t23_middleware import T23Middleware

from .app import RandomApp


class Current:
    """The app that our one middleware wraps: a middleware for each request would open a journal each."""

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        differs = environ["random.differs"]()
        app = environ["random.app"]
        if differs:
            app.note(f"environ differs: {differs}")
        return app(environ, start)


wrapped = T23Middleware(Current())


_another = T23Middleware(lambda environ, start: environ["random.next"](environ, start))


def again(app: Any, environ: dict[str, Any], start: Any) -> Any:
    """Call *app* in another middleware of ours, so that there are two of them."""
    environ["random.next"] = app
    return _another(environ, start)


def application(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
    parts = environ["PATH_INFO"].split("/")
    if len(parts) != 4:
        gc.collect()  # what the last app left in cycles is dropped now, with us or without
        start("404 Not Found", [("Content-Type", "text/plain"), ("Content-Length", "9")])
        return [b"not here\n"]
    app = RandomApp(int(parts[1]), frozenset(parts[2].split(",")), parts[3])
    inside = Current() if environ.pop("HTTP_X_BARE", None) else wrapped
    environ.update({"random.app": app, "random.me": inside, "random.differs": lambda: ""})
    before = {key: id(value) for key, value in environ.items()}

    def differs() -> str:
        now = {key: id(value) for key, value in environ.items() if not key.startswith("t23.")}
        return "" if now == before else str(sorted(set(now.items()) ^ set(before.items())))

    if app.does("outer") in ("none", "yield from"):
        environ["random.differs"] = differs
        before["random.differs"] = id(differs)
    return outer(app, inside)(environ, start)


def outer(app: RandomApp, inside: Any) -> Any:
    """*inside* behind the outer middleware that *app* is to have."""
    how = app.does("outer")
    if how in SPOILERS:
        return lambda environ, start: SPOILERS[how](app, inside, environ, start)
    if how not in HANDED_ON:
        return inside
    return lambda environ, start: HANDED_ON[how](inside(environ, start))


# Outer middlewares that do something to the body.


def _same(chunk: Any) -> Any:
    return chunk


def _yields(body: Any) -> Iterator[Any]:
    yield from body


def _breaks(body: Any) -> Iterator[Any]:
    for chunk in body:
        yield chunk[:5]  # a file's first block may be larger with us
        break


def _peeks(body: Any) -> Any:
    chunks = iter(body)
    first = next(chunks, b"")
    return ClosingIterator(chain([first], chunks), getattr(body, "close", lambda: None))


def _peeks_again(body: Any) -> Any:
    first = next(iter(body), b"")
    return ClosingIterator(chain([first], iter(body)), getattr(body, "close", lambda: None))


def _closes_twice(body: Any) -> Any:
    return ClosingIterator(body, [getattr(body, "close", lambda: None)] * 2)


def _lists(body: Any) -> Any:
    try:
        return list(body)
    finally:
        getattr(body, "close", lambda: None)()


def _closes_iterator(body: Any) -> Iterator[Any]:
    chunks = iter(body)
    try:
        yield from map(_same, chunks)
    finally:
        getattr(chunks, "close", lambda: None)()


class _ByHand:
    """Closes the body, and has no other way to it."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def __iter__(self) -> Iterator[Any]:
        return iter(self.body)

    def close(self) -> None:
        if hasattr(self.body, "close"):
            self.body.close()


class _NextOnly:
    """An iterator that asks with next() only, and never closes."""

    def __init__(self, body: Any) -> None:
        self.chunks = iter(body)

    def __iter__(self) -> _NextOnly:
        return self

    def __next__(self) -> Any:
        return next(self.chunks)


HANDED_ON: dict[str, Callable[[Any], Any]] = {
    "yield from": _yields,
    "close by hand": _ByHand,
    "list": _lists,
    "drop": lambda body: [b"something else"],
    "closing iterator": lambda body: ClosingIterator(body, lambda: None),
    "break": _breaks,
    "close twice": _closes_twice,
    "peek": _peeks,
    "peek and again": _peeks_again,
    "never closed": lambda body: map(_same, body),
    "iterator closed": _closes_iterator,
    "next only": _NextOnly,
}


# Outer middlewares that do something to the call.


def _retries(app: RandomApp, inside: Any, environ: dict[str, Any], start: Any) -> Any:
    said: list[Any] = []

    def noted(status: Any, headers: Any, exc_info: Any = None) -> Any:
        said.append(status)
        return lambda data: None

    try:
        first = inside(environ, noted)
        getattr(first, "close", lambda: None)()
    except Exception as error:
        app.note(f"outer saw {type(error).__name__}")
    app.note(f"said {len(said)}")
    return inside(environ, start)


def _copies(app: RandomApp, inside: Any, environ: dict[str, Any], start: Any) -> Any:
    return inside(dict(environ), start)


def _wraps_again(app: RandomApp, inside: Any, environ: dict[str, Any], start: Any) -> Any:
    return again(inside, environ, start) if isinstance(inside, T23Middleware) else inside(environ, start)


def _wraps_start(app: RandomApp, inside: Any, environ: dict[str, Any], start: Any) -> Any:
    def start_response(status: Any, headers: Any, exc_info: Any = None) -> Any:
        return start(status, headers, exc_info) if exc_info else start(status, headers)

    return inside(environ, start_response)


def _breaks_query(app: RandomApp, inside: Any, environ: dict[str, Any], start: Any) -> Any:
    environ.update({"QUERY_STRING": None, "HTTP_COOKIE": 7, "PATH_INFO": None, "SERVER_PROTOCOL": 1.1})
    return inside(environ, start)


SPOILERS: dict[str, Callable[..., Any]] = {
    "retry": _retries,
    "copy": _copies,
    "twice wrapped": _wraps_again,
    "start wrapped": _wraps_start,
    "broken query": _breaks_query,
}

if __name__ == "__main__":
    if sys.argv[1] == "pywsgi":
        from gevent import monkey

        monkey.patch_all()
    from tests.servers.serve import SERVERS

    SERVERS[sys.argv[1]](application, int(sys.argv[2]))
