"""What a random WSGI app does: one choice of each kind, drawn by a seed."""

from __future__ import annotations

from random import Random

#: For each kind of choice: how often it is another than the first, and what it can be. The first is an ordinary app.
CHOICES: dict[str, tuple[float, list[str]]] = {
    "body": (
        0.9,
        [
            "list", "tuple", "generator", "iterator", "iterable", "getitem", "sized", "deque", "map", "chain",
            "closing iterator", "bytes", "bytearray", "str", "none", "int", "set", "dict", "memoryview", "array",
            "hostile", "most hostile", "length lies", "length raises",
            "file", "wrapper", "wrapper", "wrapper", "wrapper by keyword", "wrapper subclass", "wrapper closes itself",
            "wrapper is asked", "werkzeug wrapper", "werkzeug range", "send_file", "send_file", "flask",
        ],
    ),
    "file": (
        0.5,
        [
            "disk", "raw", "bytesio", "gzip", "temporary", "spooled", "text", "pipe", "minimal", "slots", "closed",
            "short reads", "none once", "bytearrays", "texts", "read raises", "fileno raises", "fileno lies",
            "fileno is none", "tell raises", "tell lies", "seek raises", "seekable raises", "seekable is a flag",
            "close raises", "no close", "hostile", "most hostile", "sequential", "no seek", "tells only",
        ],
    ),
    "position": (0.3, ["0", "5", "4096", "end", "beyond", "after a read"]),
    "block": (0.3, ["8192", "99", "777", "65536", "default"]),
    "sizes": (
        0.7,
        ["10 20", "", "0", "1", "0 10 0", "1000 1000 1000", "100000", "70000 70000 5", "5 0 0", "3000000"],
    ),
    "chunks": (
        0.15,
        ["bytes", "bytearray", "memoryview", "array", "str", "none", "int", "subclass", "short subclass", "wide view"],
    ),
    "type": (0.3, ["video/mp4", "audio/mpeg", "Video/MP4; codecs=x", "text/html", "none", "video/mp2t", "bytes"]),
    "status": (
        0.2,
        [
            "200 OK", "206 Partial Content", "404 Not Found", "204 No Content", "304 Not Modified", "500 Oh", "200",
            "200  OK", "2OO", "", "none", "int", "bytes", "201 Created", "subclass", "200 \xe9t\xe9", "200 \u20ac",
        ],
    ),
    "length": (0.6, ["none", "right", "right", "right", "short", "long", "zero", "junk", "int", "bytes", "twice", "-1"]),
    "headers": (
        0.25,
        [
            "list", "tuple", "iterator", "generator", "items", "werkzeug", "wsgiref", "map", "lists", "none", "int",
            "getitem", "raises", "triples", "set", "list subclass",
        ],
    ),
    "header": (0.15, ["none", "int", "bytes", "null", "latin", "wide", "newline", "bytes name", "connection", "empty"]),
    "content range": (0.1, ["none", "right", "junk", "bytes"]),
    "start": (
        0.3,
        [
            "once", "late", "late after empty", "late and returned", "twice", "again with exc_info", "exc_info late",
            "keywords", "never", "empty call", "in close",
        ],
    ),
    "write": (0.15, ["none", "one", "three", "all", "bytearray", "str", "null", "in the body", "after close", "raises"]),
    "raises": (
        0.15,
        ["never", "before", "after start", "iter", "next 0", "next 1", "next 2", "close", "next 1 and close"],
    ),
    "error": (0.5, ["OSError", "ValueError", "BrokenPipeError", "StopIteration", "ConnectionResetError", "KeyError"]),
    "environ": (
        0.12,
        [
            "kept", "clear", "no query", "null query", "bytes query", "null path", "int path", "odd input",
            "null protocol", "method changed", "wrapper taken", "wrapper odd", "odd session", "null cookie", "ignored",
            "hostile socket",
        ],
    ),
    "outer": (
        0.3,
        [
            "none", "yield from", "close by hand", "list", "drop", "closing iterator", "break", "close twice",
            "peek", "peek and again", "retry", "copy", "never closed", "iterator closed", "twice wrapped",
            "start wrapped", "broken query", "next only",
        ],
    ),
    "inner": (0.08, ["none", "itself", "itself copied", "itself late", "itself for another", "wrapped again"]),
    "method": (0.12, ["GET", "HEAD", "POST"]),
    "range": (0.3, ["none", "bytes=0-", "bytes=5-20", "bytes=-7", "bytes=100-", "bytes=0-1,5-9", "junk"]),
    "session": (0.15, ["yes", "no", "cookie", "no photo"]),
    "client": (0.35, ["close", "kept", "kept", "leaves", "1.0"]),
}  # fmt: skip


def plan(seed: int, plain: frozenset[str] = frozenset()) -> dict[str, str]:
    """The choices of app *seed*, with those in *plain* set back to the ordinary ones."""
    random = Random(seed)
    chosen = {}
    for name, (often, options) in CHOICES.items():
        other, option = random.random() < often, random.choice(options)
        chosen[name] = option if other and name not in plain else options[0]
    return chosen


def odd_choices(chosen: dict[str, str]) -> list[str]:
    """The kinds of which *chosen* has another than the ordinary choice."""
    return [name for name, (_, options) in CHOICES.items() if chosen[name] != options[0]]
