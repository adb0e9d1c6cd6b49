"""What the playback of a busy relay costs: memory of open viewings, and transfers per second on one core.

Each viewing has handed over a small file's head and has one response open, as for a player that plays. Then transfers of
those viewings end and start: plays that continue, seek, and stop. The state is stored after each batch, as the relay
does when it reads journals.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from t23_middleware.relay.playback import Playback  # noqa: E402
from t23_middleware.transfer import Opening, Part, Play, Transfer, decode, encode  # noqa: E402

TOTAL = 200_000_000
Lines = TypeVar("Lines", bound=tuple[Opening | Transfer, ...])

#: Transfers that the relay reads at a time.
BATCH = 200


def main() -> int:
    """Print the figures, one line of JSON per mode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--viewings", type=int, default=100_000)
    parser.add_argument("--transfers", type=int, default=100_000)
    parser.add_argument("--per", choices=("stream", "response"), nargs="+", default=["response", "stream"])
    options = parser.parse_args()
    for per in options.per:
        print(json.dumps(measure(per, options.viewings, options.transfers)))
    return 0


def measure(per: str, viewings: int, transfers: int) -> dict[str, float | str]:
    """The figures of one mode."""
    playback = Playback(per=per)
    gc.collect()
    before = resident_mb()
    for number in range(viewings):
        feed(playback, through_the_journal(begin(number)))
        if number % BATCH == 0:
            stored = sum(len(state or "") for _, state in playback.changed())
    memory = resident_mb() - before
    lines = [through_the_journal(step) for step in steps(viewings, transfers)]
    started = time.process_time()
    reports = 0
    for at in range(0, transfers, BATCH):
        for step in lines[at : at + BATCH]:
            reports += feed(playback, step)
        now_ns = lines[min(at + BATCH, transfers) - 1][0].ended_ns
        reports += len(playback.advance(now_ns, now_ns // 1_000_000))
        stored = sum(len(state or "") for _, state in playback.changed())
    spent = time.process_time() - started
    return {
        "per": per,
        "open_viewings": len(list(playback.open_responses())),
        "memory_mb": round(memory, 1),
        "resident_mb": round(resident_mb(), 1),
        "bytes_per_viewing": round(memory * 1e6 / viewings),
        "stored_bytes_per_viewing": round(stored / BATCH),
        "transfers_per_s": round(transfers / spent),
        "reports": reports,
    }


def feed(playback: Playback, step: tuple[Opening | Transfer, ...]) -> int:
    """Give the playback the lines of *step*; the number of reports."""
    reports = 0
    for line in step:
        told = playback.opened("w", line) if isinstance(line, Opening) else playback.closed("w", line)
        reports += len(told)
    return reports


def through_the_journal(lines: Lines) -> Lines:
    """The lines as a relay reads them: each with its own strings."""
    return tuple(decode(encode(line)[:-1]) for line in lines)  # type: ignore[misc,return-value]


def play_of(viewing: int) -> Play:
    """A play with a session id of the usual length."""
    return Play(f"{viewing:032x}", str(10_000_000 + viewing % 500), "", None, "html5", "1.0", "1920x1080")


def begin(viewing: int) -> tuple[Opening | Transfer, ...]:
    """A first response that ended, and a second one that is open."""
    started_ns = 10**12 + viewing * 1000
    first = opening(2 * viewing, viewing, started_ns, 0)
    second = opening(2 * viewing + 1, viewing, started_ns + 20, 40_000_000)
    return first, second, Transfer(first, started_ns + 2 * 10**9, 1_700_000_000_000, 5_000_000)


def opening(number: int, viewing: int, started_ns: int, first: int) -> Opening:
    """A response from *first* to the end of the file."""
    part = Part(first, TOTAL - 1, TOTAL)
    return Opening(number, started_ns, started_ns // 1_000_000, play_of(viewing), part, 206, TOTAL - first)


def steps(viewings: int, transfers: int) -> Iterator[tuple[Transfer, Opening]]:
    """For viewings in random order: the open response is cut off, and one from another place starts."""
    dice = random.Random(5)
    latest: dict[int, Opening] = {}
    now_ns = 10**12 + 10 * 10**9
    for number in range(2 * viewings, 2 * viewings + transfers):
        viewing = dice.randrange(viewings)
        now_ns += 100_000
        open_now = latest.get(viewing) or opening(
            2 * viewing + 1, viewing, 10**12 + viewing * 1000 + 20, 40_000_000
        )
        end = Transfer(open_now, now_ns, now_ns // 1_000_000, 3_000_000)
        latest[viewing] = opening(number, viewing, now_ns, dice.randrange(TOTAL))
        yield end, latest[viewing]


def resident_mb() -> float:
    """Resident memory of this process, in MB (10**6)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    sys.exit(main())
