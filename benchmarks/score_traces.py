"""How well the relay's own playback distinguishes plays and scrubs, over traces of real players.

A trace is one scripted viewing on one line of JSON: ``player, scenario, truth {viewings, scrubs}, requests [{t,
t_close (seconds), method, status, content_range, length, sent, …}]``. Its GETs that were answered with 200 or 206
are given to a :class:`~t23_middleware.relay.playback.Playback` as the openings and transfers that the middleware
would have written. The reports until the viewing is dropped are compared with the truth: one ``skip=0`` per viewing,
one ``skip=1`` per scrub. ``--halves`` fits the rule's constants to half of the traces and judges them on the other
half, see :mod:`trace_halves`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from trace_halves import by_variation, halves  # noqa: E402

from t23_middleware.capture.ranges import part_of  # noqa: E402
from t23_middleware.relay.playback import Playback  # noqa: E402
from t23_middleware.relay.report import Report  # noqa: E402
from t23_middleware.transfer import Opening, Play, Transfer  # noqa: E402

#: The second at which a trace begins, on the machine's time axis; any will do.
BEGIN_S = 1000.0
#: Seconds between two polls of the relay, and until it has dropped every viewing.
LOOK_S = 0.2
DROPPED_S = 7200.0

Trace = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Print the scores; 2 where a file can't be read."""
    options = _options(arguments)
    try:
        traces = [trace for path in options.files for trace in read(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"score_traces: {error}; give files with one trace of a viewing per line", file=sys.stderr)
        return 2
    if options.halves:
        for lines in (
            by_variation(traces, lambda trace: score_one(trace, options.per)),
            halves(traces, lambda trace: score_one(trace, options.per), options.halves, options.seed),
        ):
            for line in lines:
                print(line, flush=True)
        return 0
    scores = score_all(traces, options.per, options.by)
    if options.json:
        print(json.dumps({"all": scores.pop(""), f"{options.by}s": scores}))
    else:
        print(table(scores, options.by))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="traces, one a line")
    parser.add_argument("--per", choices=("stream", "response"), default="response", help="T23_REPORT_PER")
    parser.add_argument("--by", choices=("player", "scenario"), default="player", help="one line per what")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument(
        "--halves",
        metavar="N",
        type=int,
        default=0,
        help="fit the rule's constants to a random half of the traces and judge them on the other, N times (some minutes)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random halves (default: 1)")
    options = parser.parse_args(arguments)
    if options.halves:
        options.per = "stream"  # the only mode that tells scrubs
    return options


def read(path: Path) -> Iterator[Trace]:
    """The traces in the file at *path*; raises OSError, or ValueError where a line is not one."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _checked(json.loads(line), f"{path}:{number}")


def _checked(trace: Any, where: str) -> Trace:
    if not isinstance(trace, dict) or not {"player", "scenario", "truth", "requests"} <= trace.keys():
        raise ValueError(f"{where} is not a trace")
    return trace


def score_all(traces: Iterable[Trace], per: str, by: str) -> dict[str, Counter[str]]:
    """The scores for each value of *by*, and for all traces under ``""``."""
    scores: dict[str, Counter[str]] = {"": empty_score()}
    for trace in traces:
        score = score_one(trace, per)
        scores[""].update(score)
        scores.setdefault(trace[by], empty_score()).update(score)
    return scores


#: The columns that are added up, in the order in which they are printed.
COLUMNS = {
    "traces": "traces",
    "plays_right": "plays right",
    "both_right": "both right",
    "plays_over": "plays over",
    "plays_under": "plays under",
    "false_scrubs": "false scrubs",
    "missed_scrubs": "missed scrubs",
    "plays_told": "skip=0",
    "scrubs_told": "skip=1",
    "reports": "reports",
    "bytes_unreported": "bytes unreported",
}


def empty_score() -> Counter[str]:
    """All columns, at 0."""
    return Counter(dict.fromkeys(COLUMNS, 0))


def score_one(trace: Trace, per: str) -> Counter[str]:
    """The columns for one trace."""
    facts = list(facts_of(trace))
    reports = replay(facts, per)
    told = Counter(report.skip for report in reports)
    plays = told[0] - trace["truth"]["viewings"]
    scrubs = told[1] - trace["truth"]["scrubs"]
    counted = sum(fact.sent for fact in facts if isinstance(fact, Transfer))
    return Counter(
        traces=1,
        plays_right=int(plays == 0),
        both_right=int(plays == scrubs == 0),
        plays_over=max(plays, 0),
        plays_under=max(-plays, 0),
        false_scrubs=max(scrubs, 0),
        missed_scrubs=max(-scrubs, 0),
        plays_told=told[0],
        scrubs_told=told[1],
        reports=len(reports),
        bytes_unreported=counted - sum(report.sent for report in reports),
    )


def facts_of(trace: Trace) -> Iterator[Opening | Transfer]:
    """The lines that the middleware would have written, in the order of their time."""
    play = Play(str(trace.get("sid", "trace")), "1")
    transfers = []
    for number, request in enumerate(trace["requests"], 1):
        if request["method"] == "GET" and request["status"] in (200, 206):
            transfers.append(_transfer(number, request, play))
    lines: list[tuple[int, int, Opening | Transfer]] = []
    for transfer in transfers:
        lines.append((transfer.opening.started_ns, 0, transfer.opening))
        lines.append((transfer.ended_ns, 1, transfer))
    return (line for _, _, line in sorted(lines, key=lambda line: line[:2]))


def _transfer(number: int, request: dict[str, Any], play: Play) -> Transfer:
    part = part_of(request["status"], request["length"], request["content_range"], request["range"])
    started, ended = BEGIN_S + request["t"], BEGIN_S + request["t_close"]
    opening = Opening(
        number, int(started * 1e9), int(started * 1e3), play, part, request["status"], request["length"]
    )
    return Transfer(opening, int(ended * 1e9), int(ended * 1e3), request["sent"])


def replay(facts: Iterable[Opening | Transfer], per: str) -> list[Report]:
    """The relay's reports of *facts*, from the first to long after the last."""
    playback = Playback(per=per)
    now = BEGIN_S
    reports = []
    for fact in facts:
        at = (fact.started_ns if isinstance(fact, Opening) else fact.ended_ns) / 1e9
        while now + LOOK_S < at:
            now += LOOK_S
            reports += playback.advance(int(now * 1e9), int(now * 1e3))
        reports += (
            playback.opened("trace", fact) if isinstance(fact, Opening) else playback.closed("trace", fact)
        )
    end = now + DROPPED_S
    return reports + playback.advance(int(end * 1e9), int(end * 1e3))


def table(scores: dict[str, Counter[str]], by: str) -> str:
    """The scores as lines of text, those of all last."""
    heads = list(COLUMNS.values())
    names = [*sorted(name for name in scores if name), ""]
    width = max(len(by), *(len(name) for name in names))
    lines = [f"{by:{width}}  " + "  ".join(heads)]
    for name in names:
        cells = [f"{scores[name][column]:>{len(head)}}" for column, head in COLUMNS.items()]
        lines.append(f"{name or 'all':{width}}  " + "  ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
