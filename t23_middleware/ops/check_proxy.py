"""Findings of ``check`` about the proxy before the app: does its log exist, and is it complete and readable?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..relay.outbox import NoOutbox, OutboxError, OutboxView, Snapshot
from ..relay.proxy_files import Siblings
from ..relay.proxy_join import all_positions
from ..relay.proxy_line import CACHE_NOT_TOLD, NGINX_LINES, ProxyLine
from ..relay.proxy_log import ProxyLog
from ..relay.proxy_waiting import WaitingPlay, last_lines, waiting_plays
from ..settings import Settings
from ..state import StateFolder
from . import text
from .item import OK, WARN, WRONG, Finding
from .status import WaitingForProxy, waiting_for_proxy

#: Path of nginx's log if none is set: the folder that distributions use.
USUAL_LOG = "/var/log/nginx/t23.log"
#: Seconds that plays may wait for a log without new lines before ``check`` warns.
LONG_WAIT = 3600.0
#: Milliseconds between the start of a request and of its mirror in nginx, at most.
MIRRORED_WITHIN = 1000
#: The line for an ``internal`` location that proxies to a store and has a ``limit_req`` of its own, so that it does not
#: inherit ours.
STORE_LINE = "set $t23play $upstream_http_x_t23_play;\n"
#: Files beside a log that are searched for the lines of waiting plays, at most.
MAX_OTHER_FILES = 20
#: Losses of these last days cause a warning.
RECENT_DAYS = 2


def proxy_findings(settings: Settings, known: Snapshot) -> Iterator[Finding]:
    """The findings from the settings, the logs, and *known*, the relay's figures."""
    if settings.proxy_log:
        for path in settings.proxy_log:
            yield _log(path)
        yield from _waiting_causes(settings, known)
        yield from _clock(known.counters)
    elif known.counters.get("offloaded", 0):
        yield _offloaded(known.counters["offloaded"])
    elif known.counters.get("behind_proxy", 0):
        yield Finding(WARN, "proxy", _BUFFERING)
    if known.counters.get("leaving_unseen", 0) and not settings.proxy_log:
        yield Finding(WARN, "server", _LEAVING_UNSEEN)


_BUFFERING = (
    "requests come through a proxy (X-Forwarded-For or Via). Bytes that it buffers count as played, so a viewer who"
    " leaves early may be reported with the whole file. nginx can count instead: set T23_PROXY_LOG, see docs/nginx.md"
)

_LEAVING_UNSEEN = (
    "hypercorn does not report to the app that a client disconnected, so a play that was cut off is reported with the"
    " whole file. Use another server (for example uvicorn with a2wsgi), or let nginx count: set T23_PROXY_LOG, see"
    " docs/nginx.md"
)


def _offloaded(number: int) -> Finding:
    message = (
        f"{number:,} plays were left to the proxy (X-Accel-Redirect or similar) and are not reported, because the app"
        f" sends none of their bytes. Set T23_PROXY_LOG={USUAL_LOG}, write these lines into"
        " /etc/nginx/conf.d/t23.conf, and reload nginx"
    )
    return Finding(WARN, "proxy", message, NGINX_LINES.replace("{path}", USUAL_LOG))


def _log(path: str) -> Finding:
    log = ProxyLog(Path(path), [])
    found = log.read()
    if log.problem is not None:
        is_there = os.path.lexists(path)  # Path.exists() may raise
        return Finding(WRONG, "proxy", log.problem, "" if is_there else NGINX_LINES.replace("{path}", path))
    if not found.lines:
        return Finding(OK, "proxy", f"{path} can be read; it has no play yet")
    return Finding(OK, "proxy", f"{path} can be read, and has plays")


def _waiting_causes(settings: Settings, known: Snapshot) -> Iterator[Finding]:
    """Why plays wait for lines that will not come, as far as the log and the waiting plays show."""
    lines = {path: last_lines(Path(path)) for path in settings.proxy_log}
    for path, latest in lines.items():
        if latest and latest[-1].cache == CACHE_NOT_TOLD:
            yield Finding(WARN, "proxy", _NO_CACHE.format(path=path), NGINX_LINES.replace("{path}", path))
    plays: list[WaitingPlay] = []
    positions = set()
    if waiting_for_proxy(known).number:
        try:
            with OutboxView(StateFolder(settings.state_path()).outbox) as view:
                plays = waiting_plays(view.viewings())
                positions = {(place.device, place.inode) for place in all_positions(view.proxy_rows())}
        except (NoOutbox, OutboxError):
            pass  # _outbox() has a finding about that
    all_lines = [line for latest in lines.values() for line in latest]
    found = [
        *(finding for path in settings.proxy_log for finding in _rotated_away(path, plays, positions)),
        *_without_lines(plays, all_lines, known, settings.proxy_log[0]),
        *_mirrored([play for play in plays if not play.offloaded], all_lines),
    ]
    yield from found or _silent_log(waiting_for_proxy(known))


_NO_CACHE = (
    "{path} is written in our older format without $upstream_cache_status, so a play may be reported with the bytes of"
    " an answer from nginx's cache (proxy_cache). Write these lines into /etc/nginx/conf.d/t23.conf, and reload nginx"
)


def _rotated_away(path: str, plays: list[WaitingPlay], positions: set[tuple[int, int]]) -> Iterator[Finding]:
    """A rotated file that the relay does not follow, or that no longer exists where it was."""
    waiting, siblings = {play.play for play in plays}, Siblings(Path(path))
    for other in siblings.similar_files()[:MAX_OTHER_FILES] if waiting else []:
        if number := len(waiting & {line.play for line in last_lines(other)}):
            message = (
                f"{number:,} plays wait for lines that are in {other}. The relay does not follow this file, because its"
                f" name is not one that logrotate gives to {path}. Read it once: 't23-middleware ingest {other}'. Rotate"
                " to names with .1, a date or extension, or to an olddir below the log's folder"
            )
            yield Finding(WARN, "proxy", message)
            return
    there = {_identity(file) for file in siblings.all()}
    if waiting and positions and not positions & there:
        message = (
            f"the file that the relay read last is neither {path} nor beside it, and plays wait for their lines. Did"
            " logrotate move it (olddir) or compress it? Use an olddir below the log's folder, add delaycompress, and"
            " read that file once: 't23-middleware ingest FILE'"
        )
        yield Finding(WARN, "proxy", message)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        there = path.stat()
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _without_lines(
    plays: list[WaitingPlay], lines: list[ProxyLine], known: Snapshot, path: str
) -> Iterator[Finding]:
    """Plays of files that the app left to nginx, and that have no line in the log."""
    offloaded = [play for play in plays if play.offloaded]
    since_ms = min((play.since_ms for play in offloaded), default=0)
    if any(line.ended_ms >= since_ms for line in lines):
        offloaded = []
    recent = time.strftime("%Y-%m-%d", time.gmtime(time.time() - RECENT_DAYS * 86400))
    lost = sum(loss.reports for loss in known.losses if loss.reason == "no_proxy_line" and loss.day >= recent)
    if not offloaded and not lost:
        return
    wait = f"{len(offloaded):,} plays that nginx sends for the app (X-Accel-Redirect) wait, and no line came since"
    were = f"{lost:,} plays that nginx sent for the app were lost recently: no line came (no_proxy_line)"
    message = (
        f"{wait if offloaded else were}. This is normal while clients still load the files. If not: does the location"
        " that sends the file have its own access_log? Repeat ours there. Does it proxy to a store (proxy_pass), and"
        " does it have its own limit_req? Add the first of these lines to it. The others belong in"
        " /etc/nginx/conf.d/t23.conf"
    )
    yield Finding(WARN, "proxy", message, STORE_LINE + NGINX_LINES.replace("{path}", path))


def _mirrored(plays: list[WaitingPlay], lines: list[ProxyLine]) -> Iterator[Finding]:
    """Plays without a line that began together with a play that has one, of the same part of the file."""
    starts: dict[tuple[int | None, int | None], list[int]] = {}
    for line in lines:
        started_ms = line.ended_ms - round(line.seconds * 1000)
        starts.setdefault((line.part.first, line.length), []).append(started_ms)
    twins = [
        play
        for play in plays
        if any(
            abs(started_ms - play.started_ms) <= MIRRORED_WITHIN
            for started_ms in starts.get((play.part.first, play.length), ())
        )
    ]
    if 2 * len(twins) > len(plays):
        message = (
            f"{len(twins):,} plays wait that began together with another play of the same part of the same file, which"
            " has its line. Does nginx mirror requests to an app that counts? No viewer sees the response to a mirrored"
            " request, but it would be reported after T23_PROXY_WAIT. Set T23_ENABLED=0 in the mirrored app, or write"
            " 'proxy_method HEAD;' into the mirror's location"
        )
        yield Finding(WARN, "proxy", message)


def _silent_log(plays: WaitingForProxy) -> Iterator[Finding]:
    age = time.time() - plays.since_ms / 1000
    if not plays.number or age < LONG_WAIT or plays.last_line_ms >= plays.since_ms:
        return
    message = (
        f"{plays.number:,} plays wait for their lines, the oldest for {text.duration(age)}, and no line came"
        " since. Does the site, or the location that sends the file, have its own access_log? Repeat ours there. Does"
        " nginx write to this file? Is the log moved to another folder (olddir)? Requests that reach the app without"
        " nginx wait in the same way"
    )
    yield Finding(WARN, "proxy", message)


def _clock(counters: Mapping[str, int]) -> Iterator[Finding]:
    if number := counters.get("proxy_clock_differs", 0):
        message = (
            f"for {number:,} plays the clock in the log differed from this machine's by more than 2 s, so their end was"
            " computed from their duration; synchronise both clocks (NTP)"
        )
        yield Finding(WARN, "proxy", message)
