"""The example site with a film in the place of its clip, behind a link as slow as the request asks for.

gunicorn imports this as ``tests.players.site``; FILM names the file. Where a request's query or cookie says
``rate=N``, its answer leaves at N bytes a second; else it is the example app's own answer, untouched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples import flask_app as example
from t23_middleware.ops.demo_site import ThrottledBody

example.CLIP = Path(os.environ["FILM"])


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    body = example.app(environ, start_response)
    asked = re.search(r"\brate=(\d+)", f"{environ['QUERY_STRING']};{environ.get('HTTP_COOKIE', '')}")
    return body if asked is None else ThrottledBody(body, int(asked[1]), burst=0)
