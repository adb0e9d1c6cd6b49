"""``t23-middleware dead list|retry|purge``: the reports that the API refused permanently, with its answer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import owned
from ..errors import UsageError
from ..relay.outbox import DeadLetters, DeadReport, NoOutbox, OutboxView
from ..settings import Settings
from ..state import StateFolder, lock_is_held
from . import text
from .status import refuse_unless_readable

_HEAD = ("ID", "SINCE", "VIDEO", "SESSION", "BYTES", "SKIP", "THE API'S ANSWER")
_FIGURES = (0, 4, 5)
_HINT = (
    "'t23-middleware dead retry ID' sends a report again, 't23-middleware dead purge ID' deletes it;"
    " --all instead of ID: all reports."
)


def run_list(settings: Settings, *, machine: bool) -> int:
    """Print the dead reports, oldest first; as JSON if *machine*."""
    dead = _dead(_folder(settings))
    if machine:
        print(json.dumps([_as_json(each) for each in dead], indent=2))
    elif dead:
        print("\n".join(text.table(_HEAD, [_row(each) for each in dead], _FIGURES, text.width())))
        print("\n" + text.wrapped(_HINT, text.width()))
    else:
        print("No report is dead: the API refused none permanently.")
    return 0


def run_retry(settings: Settings, ids: Sequence[int] | None) -> int:
    """Let dead reports wait for delivery again; *ids* ``None`` means all. Returns 1 if one of *ids* is not dead."""
    folder = _folder(settings)
    try:
        with DeadLetters(folder.outbox) as letters:
            done = letters.retry(ids)
    except NoOutbox:
        done = []
    if done:
        owned.touch(folder.unfinished)
    if done or not ids:
        what = "waits to be sent again" if len(done) == 1 else "wait to be sent again"
        print(
            text.wrapped(f"{text.reports(len(done))} {what}{_sender_words(folder, len(done))}", text.width())
        )
    return _report_missing(ids, done)


def run_purge(settings: Settings, ids: Sequence[int] | None) -> int:
    """Delete dead reports, which count as lost; *ids* ``None`` means all. Returns 1 if one of *ids* is not dead."""
    try:
        with DeadLetters(_folder(settings).outbox) as letters:
            done = letters.purge(ids, time.time_ns() // 1_000_000)
    except NoOutbox:
        done = []
    if done or not ids:
        what = "is deleted and counts" if len(done) == 1 else "are deleted and count"
        print(f"{text.reports(len(done))} {what} as lost (purged).")
    return _report_missing(ids, done)


def selected_ids(ids: Sequence[int], every: bool, command: str) -> Sequence[int] | None:
    """The ids that a command line names; ``None`` for all.

    Raises :class:`~t23_middleware.errors.UsageError` if it has neither ids nor ``--all``, or both.
    """
    if bool(ids) == every:
        raise UsageError(
            f"name the reports: either ids from 't23-middleware dead list', or --all ({command})"
        )
    return None if every else ids


def _folder(settings: Settings) -> StateFolder:
    folder = StateFolder(settings.state_path())
    refuse_unless_readable(folder.path)
    return folder


def _dead(folder: StateFolder) -> list[DeadReport]:
    try:
        with OutboxView(folder.outbox) as view:
            return view.dead()
    except NoOutbox:
        return []


def _row(dead: DeadReport) -> tuple[str, ...]:
    report = dead.report
    since = text.moment(dead.died_ms)[5:16]
    figures = (f"{report.sent:,}", str(report.skip))
    return (str(dead.id), since, report.photo_id, text.masked(report.session_id), *figures, _answer(dead))


def _answer(dead: DeadReport) -> str:
    """The code and the API's message, without control characters: both come from outside."""
    answer = dead.answer if dead.answer.startswith(dead.code) else f"{dead.code}: {dead.answer}"
    return "".join(char for char in answer if char.isprintable())


def _as_json(dead: DeadReport) -> dict[str, Any]:
    report = dead.report
    return {
        "id": dead.id,
        "died": dead.died_ms / 1000,
        "time": report.time_ms / 1000,
        "host": report.host,
        "photo_id": report.photo_id,
        "session": text.masked(report.session_id),
        "bytes": report.sent,
        "skip": report.skip,
        "code": dead.code,
        "answer": dead.answer,
    }


def _sender_words(folder: StateFolder, number: int) -> str:
    if not number or lock_is_held(folder.relay_lock):
        return "."
    return (
        "; no relay runs: the app's next play starts one, or run 't23-middleware relay --once' to send now."
    )


def _report_missing(ids: Sequence[int] | None, done: Sequence[int]) -> int:
    missing = sorted(set(ids or ()) - set(done))
    if not missing:
        return 0
    numbers = ", ".join(map(str, missing))
    print(
        f"t23-middleware: no dead report has the id {numbers}; see 't23-middleware dead list'",
        file=sys.stderr,
    )
    return 1
