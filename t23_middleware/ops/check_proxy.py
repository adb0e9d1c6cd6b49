"""What ``check`` says of the proxy before the app: whether its log is there, can be read, and has what is needed."""

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
from .item import OK, WARN, WRONG, Item
from .status import Awaited, awaited

#: Where nginx's log is where nobody said: what distributions use.
USUAL_LOG = "/var/log/nginx/t23.log"
#: Seconds after which plays that wait for a log without news are worth a look.
LONG_AWAITED = 3600.0
#: Milliseconds within which nginx starts a request and its mirror.
MIRRORED_WITHIN = 1000
#: What an ``internal`` location needs that hands on to a store and does not inherit our ``limit_req``.
STORE_LINE = "set $t23play $upstream_http_x_t23_play;\n"
#: Files beside a log that are looked into for lines of plays that wait.
MOST_STRANGERS = 20
#: Days whose losses are worth a word.
RECENT_DAYS = 2


def proxy_items(settings: Settings, known: Snapshot) -> Iterator[Item]:
    """What is to be said by the settings, the logs, and what the relay *known*."""
    if settings.proxy_log:
        for path in settings.proxy_log:
            yield _log(path)
        yield from _causes(settings, known)
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


def _causes(settings: Settings, known: Snapshot) -> Iterator[Item]:
    """Why plays wait in vain, as far as the log and what waits tell."""
    lines = {path: last_lines(Path(path)) for path in settings.proxy_log}
    for path, latest in lines.items():
        if latest and latest[-1].cache == CACHE_NOT_TOLD:
            yield Item(WARN, "proxy", _NO_CACHE.format(path=path), NGINX_LINES.replace("{path}", path))
    plays: list[WaitingPlay] = []
    positions = set()
    if awaited(known).number:
        try:
            with OutboxView(StateFolder(settings.state_path()).outbox) as view:
                plays = waiting_plays(view.viewings())
                positions = {(place.device, place.inode) for place in all_positions(view.proxy_rows())}
        except (NoOutbox, OutboxError):
            pass  # the outbox has an item of its own
    all_lines = [line for latest in lines.values() for line in latest]
    found = [
        *(item for path in settings.proxy_log for item in _moved(path, plays, positions)),
        *_sent_elsewhere(plays, all_lines, known, settings.proxy_log[0]),
        *_mirrored([play for play in plays if not play.offloaded], all_lines),
    ]
    yield from found or _awaited(awaited(known))


_NO_CACHE = (
    "{path} is written with lines of ours that lack $upstream_cache_status, so an answer from nginx's cache"
    " (proxy_cache) may decide what a play is reported with: put these lines into /etc/nginx/conf.d/t23.conf, and reload"
    " nginx"
)


def _moved(path: str, plays: list[WaitingPlay], positions: set[tuple[int, int]]) -> Iterator[Item]:
    """A rotated file that is not followed, or that is not to be found any more."""
    waiting, siblings = {play.play for play in plays}, Siblings(Path(path))
    for stranger in siblings.similar_files()[:MOST_STRANGERS] if waiting else []:
        if number := len(waiting & {line.play for line in last_lines(stranger)}):
            said = (
                f"{number:,} plays wait for lines that are in {stranger}, which is none of the names that logrotate gives"
                f" to {path} and is not followed. Read it once: 't23-middleware ingest {stranger}'. Let the log keep to"
                " .1, a date, extension, or an olddir below its folder"
            )
            yield Item(WARN, "proxy", said)
            return
    there = {_identity(file) for file in siblings.all()}
    if waiting and positions and not positions & there:
        said = (
            f"the file that the relay read last is neither {path} nor beside it, and plays wait for their lines: did"
            " logrotate move it (olddir) or compress it? Let olddir be below the log's folder, add delaycompress, and"
            " read that file once: 't23-middleware ingest FILE'"
        )
        yield Item(WARN, "proxy", said)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        there = path.stat()
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _sent_elsewhere(
    plays: list[WaitingPlay], lines: list[ProxyLine], known: Snapshot, path: str
) -> Iterator[Item]:
    """Files that the app left to nginx, and of which the log says nothing."""
    offloaded = [play for play in plays if play.offloaded]
    since_ms = min((play.since_ms for play in offloaded), default=0)
    if any(line.ended_ms >= since_ms for line in lines):
        offloaded = []
    recent = time.strftime("%Y-%m-%d", time.gmtime(time.time() - RECENT_DAYS * 86400))
    lost = sum(loss.reports for loss in known.losses if loss.reason == "no_proxy_line" and loss.day >= recent)
    if not offloaded and not lost:
        return
    wait = f"{len(offloaded):,} plays that nginx sends for the app (X-Accel-Redirect) wait, and no line came since"
    were = f"{lost:,} plays that nginx sent for the app were lost lately, for no line came (no_proxy_line)"
    said = (
        f"{wait if offloaded else were}. If clients do not just load for so long: has the location that sends the file an"
        " access_log of its own? Repeat ours there. Does it hand on to a store (proxy_pass), and has a limit_req of its own?"
        " Put the first of these lines into it. The others belong into /etc/nginx/conf.d/t23.conf"
    )
    yield Item(WARN, "proxy", said, STORE_LINE + NGINX_LINES.replace("{path}", path))


def _mirrored(plays: list[WaitingPlay], lines: list[ProxyLine]) -> Iterator[Item]:
    """Plays beside each of which another one has a line that began at the same time, of the same part of the file."""
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
        said = (
            f"{len(twins):,} plays wait that began together with another one, of the same part of the same file, which has"
            " its line: does nginx mirror requests to an app that counts? Nobody sees what a mirror is answered, and it"
            " would be reported after T23_PROXY_WAIT. Set T23_ENABLED=0 in the mirrored app, or write 'proxy_method"
            " HEAD;' into the mirror's location"
        )
        yield Item(WARN, "proxy", said)


def _awaited(plays: Awaited) -> Iterator[Item]:
    age = time.time() - plays.since_ms / 1000
    if not plays.number or age < LONG_AWAITED or plays.last_line_ms >= plays.since_ms:
        return
    said = (
        f"{plays.number:,} plays wait for their lines, the oldest for {text.duration(age)}, and the log had none since:"
        " does the site, or the location that sends the file, have an access_log of its own? Repeat ours there. Does"
        " nginx write to this very file? Is the log moved to another folder (olddir)? Plays that come to the app without nginx wait so, too"
    )
    yield Item(WARN, "proxy", said)


def _clock(counters: Mapping[str, int]) -> Iterator[Item]:
    if number := counters.get("proxy_clock_differs", 0):
        said = (
            f"the clock in the log differed from this machine's by more than 2 s for {number:,} plays, whose end was"
            " then taken from their duration; synchronise both clocks (NTP)"
        )
        yield Item(WARN, "proxy", said)
