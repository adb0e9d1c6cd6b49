"""An outbox with a past: an hour of traffic with an outage, a pause, refusals and losses, as a relay would have kept it."""

from __future__ import annotations

import math

from t23_middleware.relay.health import FAILING, PAUSED, WELL, Health, as_notes
from t23_middleware.relay.history import Trouble, troubles_note
from t23_middleware.relay.outbox import Acked, Dead, Ingest, Lost, Retry, Settlement, SQLiteOutbox
from t23_middleware.relay.report import Report
from t23_middleware.state import StateFolder

MINUTE = 60_000
#: Words of an API that wants to be run as a script.
MARKUP = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
SESSION = "a-session-that-nobody-may-see"


def fill(folder: StateFolder, now_ms: int, minutes: int = 60, markup: str = MARKUP) -> None:
    """Traffic of the last *minutes*; 20 to 16 minutes ago the API was down, 12 minutes ago it paused for one."""
    folder.create()
    outbox = SQLiteOutbox(folder.outbox)
    try:
        with outbox.atomic():
            for ago in range(minutes, -1, -1):
                _minute(outbox, now_ms - ago * MINUTE, ago, markup)
            _notes(outbox, now_ms, markup)
    finally:
        outbox.close()


def _minute(outbox: SQLiteOutbox, at_ms: int, ago: int, markup: str) -> None:
    count = int(14 + 8 * math.sin(ago / 9))
    reports = [
        Report(
            at_ms - 400, "", f"{SESSION}-{ago}-{n}", str(7190971 + n % 12), 100_000 * (n + 1), int(n % 3 != 0)
        )
        for n in range(count)
    ]
    outbox.ingest(Ingest(reports, [], {}, {"bad_signature": ago % 2}))
    # While the API is down a few tries are made; all that waited goes at once when it is back.
    entries = outbox.claim(3 if 16 <= ago <= 20 else 1000, at_ms, [""])
    settlements: list[Settlement] = []
    for number, entry in enumerate(entries):
        took_ms = at_ms - entry.report.time_ms
        if 16 <= ago <= 20:
            settlements.append(
                Retry(entry.id, at_ms, 1, outcome=("busy", "no_answer", "unreachable")[number % 3])
            )
        elif number == 0 and ago % 10 == 0:
            settlements.append(Dead(entry.id, "no_such_photo", f"no_such_photo: {markup}", "refused"))
        elif number == 1 and ago % 25 == 0:
            settlements.append(Lost(entry.id, "ambiguous", "no_answer"))
        elif ago or number < 5:
            settlements.append(Acked(entry.id, took_ms, "accepted"))
        else:
            settlements.append(Retry(entry.id, at_ms + MINUTE, 0, outcome="denied"))
    outbox.settle(settlements, at_ms)
    outbox.begin_minute(at_ms, count // 2)


def _notes(outbox: SQLiteOutbox, now_ms: int, markup: str) -> None:
    reason = f"https://video.example.com denies this server (permission_denied); ask TwentyThree to whitelist it {markup}"
    troubles = [
        Trouble(now_ms - 20 * MINUTE, "", FAILING, "https://video.example.com answered HTTP 503"),
        Trouble(now_ms - 15 * MINUTE, "", WELL, ""),
        Trouble(now_ms, "", PAUSED, reason),
    ]
    health = {"": Health(PAUSED, reason, now_ms, now_ms - 4000)}
    outbox.note({**as_notes(health, {}), **troubles_note(troubles, []), "open_responses": "7"})
