"""What ``check`` says of the proxy before the app: whether its log is there, can be read, and has what is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..relay.outbox import Snapshot
from ..relay.proxy_line import NGINX_LINES
from ..relay.proxy_log import ProxyLog
from ..settings import Settings
from . import text
from .item import OK, WARN, WRONG, Item
from .status import Awaited, awaited

#: Where nginx's log is where nobody said: what distributions use.
USUAL_LOG = "/var/log/nginx/t23.log"
#: Seconds after which plays that wait for a log without news are worth a look.
LONG_AWAITED = 3600.0


def proxy_items(settings: Settings, known: Snapshot) -> Iterator[Item]:
    """What is to be said by the settings, the logs, and what the relay *known*."""
    if settings.proxy_log:
        for path in settings.proxy_log:
            yield _log(path)
        yield from _awaited(awaited(known))
        yield from _clock(known.counters)
    elif known.counters.get("offloaded", 0):
        yield _offloaded(known.counters["offloaded"])
    elif known.counters.get("behind_proxy", 0):
        yield Item(WARN, "proxy", _BUFFERING)
    if known.counters.get("leaving_unseen", 0) and not settings.proxy_log:
        yield Item(WARN, "server", _LEAVING_UNSEEN)


_BUFFERING = (
    "requests come through a proxy (X-Forwarded-For or Via): what it buffers counts as played, so a viewer who leaves"
    " early may be reported with the whole file. nginx can count instead: set T23_PROXY_LOG, see docs/nginx.md"
)

_LEAVING_UNSEEN = (
    "hypercorn tells the app nothing of a viewer who left: a play that was cut off there is reported with the whole"
    " file. Use another server (uvicorn with a2wsgi does), or let nginx count: set T23_PROXY_LOG, see docs/nginx.md"
)


def _offloaded(number: int) -> Item:
    said = (
        f"{number:,} plays were left to the proxy (X-Accel-Redirect or the like) and are not reported, for the app sends"
        f" none of their bytes: set T23_PROXY_LOG={USUAL_LOG}, put these lines into /etc/nginx/conf.d/t23.conf, and"
        " reload nginx"
    )
    return Item(WARN, "proxy", said, NGINX_LINES.replace("{path}", USUAL_LOG))


def _log(path: str) -> Item:
    log = ProxyLog(Path(path), [])
    found = log.read()
    if log.problem is not None:
        is_there = os.path.lexists(path)  # Path.exists() may raise
        return Item(WRONG, "proxy", log.problem, "" if is_there else NGINX_LINES.replace("{path}", path))
    if not found.lines:
        return Item(OK, "proxy", f"{path} can be read; no play is in it yet")
    return Item(OK, "proxy", f"{path} can be read, and has plays")


def _awaited(plays: Awaited) -> Iterator[Item]:
    age = time.time() - plays.since_ms / 1000
    if not plays.number or age < LONG_AWAITED or plays.last_line_ms >= plays.since_ms:
        return
    said = (
        f"{plays.number:,} plays wait for their lines, the oldest for {text.duration(age)}, and the log had none since:"
        " does the site, or the location that sends the file, have an access_log of its own? Repeat ours there. Does"
        " nginx write to this very file? Plays that come to the app without nginx wait so, too"
    )
    yield Item(WARN, "proxy", said)


def _clock(counters: Mapping[str, int]) -> Iterator[Item]:
    if number := counters.get("proxy_clock_differs", 0):
        said = (
            f"the clock in the log differed from this machine's by more than 2 s for {number:,} plays, whose end was"
            " then taken from their duration; synchronise both clocks (NTP)"
        )
        yield Item(WARN, "proxy", said)
