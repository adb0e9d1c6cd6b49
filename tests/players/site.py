"""The example site with a film in the place of its clip, behind a link as slow as the request asks for.

gunicorn imports this as ``tests.players.site``; FILM names the file. Where a request's query or cookie says
``rate=N``, its answer leaves at N bytes a second; else it is the example app's own answer, untouched.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from examples import flask_app as example

example.CLIP = Path(os.environ["FILM"])


class Throttled:
    """A body that is handed on at *rate* bytes a second."""

    def __init__(self, body: Any, rate: int) -> None:
        self._body = body
        self._rate = rate

    def __iter__(self) -> Iterator[bytes]:
        began, sent = time.monotonic(), 0
        for chunk in self._body:
            yield chunk
            sent += len(chunk)
            time.sleep(max(0.0, began + sent / self._rate - time.monotonic()))

    def close(self) -> None:
        if hasattr(self._body, "close"):
            self._body.close()


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    body = example.app(environ, start_response)
    asked = re.search(r"\brate=(\d+)", f"{environ['QUERY_STRING']};{environ.get('HTTP_COOKIE', '')}")
    return body if asked is None else Throttled(body, int(asked[1]))
