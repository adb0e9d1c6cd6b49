"""Whether the rule for scrubs fits players in general, or only the traces from which it was made.

The traces are split at random. The rule's constants are fitted to one half. The other half judges them, as it was
recorded and in variations: slower and faster networks, a longer distance, larger files, other counts of what was cut
off. Only the lines of fitted constants are an independent judgement. The shipped constants, and the conditions
themselves, were chosen with all of the shared traces known: their lines show how they do on these traces, not elsewhere.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from t23_middleware.relay import viewing

Trace = dict[str, Any]
Score = Callable[[Trace], Counter[str]]

#: What a trace becomes: arguments of :func:`varied`.
VARIATIONS: dict[str, dict[str, float]] = {
    "as recorded": {},
    **{f"time x{factor}": {"time": factor} for factor in (0.5, 1.5, 2, 3)},
    **{f"{ms} ms more before each request": {"wait": ms / 1000} for ms in (50, 100, 200, 300)},
    **{f"size x{factor}": {"size": factor} for factor in (0.5, 2, 4)},
    **{f"{mb:+} MB where cut off": {"more": mb * 1_000_000} for mb in (-4, -2, -1, 1, 2, 4)},
}
#: Constants of :mod:`t23_middleware.relay.viewing`, and what is tried for them.
FITTED: dict[str, tuple[float, ...]] = {
    "AT_ONCE_NS": (10_000_000, 30_000_000, 100_000_000, 300_000_000),
    "REPLACED_NS": (100_000_000, 300_000_000, 1_000_000_000),
    "STARTUP_FACTOR": (0, 1.5, 2),
    "BUFFERED": (0, 2 << 20, 4 << 20),
}
#: How many missed scrubs one false scrub weighs when constants are fitted: in doubt it is not a scrub.
FALSE_WEIGHS = 5


def varied(
    trace: Trace, *, time: float = 1.0, wait: float = 0.0, size: float = 1.0, more: float = 0
) -> Trace:
    """*trace* with all times and sizes multiplied, *wait* seconds before each request but the first, and *more* bytes
    (or fewer) counted where a response was cut off; 16 KiB of it are left at least."""
    requests = []
    for number, old in enumerate(trace["requests"]):
        new = dict(old)
        late = wait if number else 0.0
        new["t"] = old["t"] * time + late
        # A client that cuts a response off does so before its next request has got that far.
        new["t_close"] = max(old["t_close"] * time + (0 if old["aborted"] else late), new["t"] + 0.001)
        _resize(new, size)
        if old["aborted"] and new["sent"]:
            most = (new["length"] or new["sent"] + more + 1) - 1
            new["sent"] = int(max(min(new["sent"] + more, most), min(new["sent"], 16384)))
        requests.append(new)
    return {**trace, "requests": requests}


def _resize(request: dict[str, Any], size: float) -> None:
    if size == 1.0:
        return
    said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", request["content_range"] or "")
    if said:
        first, end, total = int(said[1]), int(said[2]) + 1, int(said[3])
        first, end, total = int(first * size), int(end * size), int(total * size)
        request["content_range"] = f"bytes {first}-{end - 1}/{total}"
        request["length"] = end - first
    elif request["length"]:
        request["length"] = int(request["length"] * size)
    whole = request["length"] and request["sent"] and not request["aborted"]
    request["sent"] = request["length"] if whole else int(request["sent"] * size)


@contextmanager
def constants(values: Mapping[str, float]) -> Iterator[None]:
    """The rule with these *values*, by name of the constant."""
    former = {name: getattr(viewing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(viewing, name, value)
        yield
    finally:
        for name, value in former.items():
            setattr(viewing, name, value)


def halves(traces: list[Trace], score: Score, splits: int, seed: int) -> Iterator[str]:
    """One line per split, side and kind of trace; *score* gives the columns of one trace."""
    ways = [{}, *({name: value} for name, values in FITTED.items() for value in values)]
    scored = [_scores(traces, score, way) for way in ways]
    rng = random.Random(seed)
    yield f"{'split':5}  {'judged':12}  {'real':>5}  {'false':>5}  {'share':>6}  {'missed':>6}  constants"
    for split in range(1, splits + 1):
        order = rng.sample(range(len(traces)), len(traces))
        half = order[: len(order) // 2]
        fitted = {name: _best(name, half, ways, scored) for name in FITTED}
        judges = [traces[number] for number in order[len(half) :]]
        sums = {
            "fitted": _scores(judges, score, fitted),
            "as shipped, saw all traces": _scores(judges, score, {}),
        }
        for name, of_traces in sums.items():
            values = fitted if name == "fitted" else {name: getattr(viewing, name) for name in FITTED}
            told = " ".join(f"{constant}={value:g}" for constant, value in values.items())
            yield _line(str(split), "recorded", (pair[0] for pair in of_traces), f"{name}: {told}")
            yield _line(str(split), "varied", (pair[1] for pair in of_traces), "")


def by_variation(traces: list[Trace], score: Score) -> Iterator[str]:
    """One line per variation, over all traces and with the constants as shipped."""
    yield f"{'variation':32}  {'real':>5}  {'false':>5}  {'share':>6}  {'missed':>6}"
    for name, change in VARIATIONS.items():
        yield _line(name, None, (_score(varied(trace, **change), score) for trace in traces), "")


def _scores(
    traces: list[Trace], score: Score, values: Mapping[str, float]
) -> list[tuple[Counter[str], Counter[str]]]:
    """The score of each trace as recorded, and of all its variations."""
    with constants(values):
        return [
            (
                _score(trace, score),
                sum((_score(varied(trace, **change), score) for change in VARIATIONS.values()), Counter()),
            )
            for trace in traces
        ]


def _score(trace: Trace, score: Score) -> Counter[str]:
    return score(trace) + Counter(real=trace["truth"]["scrubs"])


def _best(
    name: str,
    half: Iterable[int],
    ways: list[dict[str, float]],
    scored: list[list[tuple[Counter[str], Counter[str]]]],
) -> float:
    """The value of the constant *name* with the best score on the traces of *half*."""

    def cost(number: int) -> int:
        sums = [scored[number][trace][1] for trace in half]
        return sum(each["missed_scrubs"] + FALSE_WEIGHS * each["false_scrubs"] for each in sums)

    best = min((number for number, way in enumerate(ways) if name in way), key=cost)
    return ways[best][name]


def _line(name: str, kind: str | None, scores: Iterable[Counter[str]], rest: str) -> str:
    total = sum(scores, Counter[str]())
    share = 100 * total["false_scrubs"] / total["real"] if total["real"] else 0.0
    head = f"{name:32}" if kind is None else f"{name:5}  {kind:12}"
    figures = f"{total['real']:5}  {total['false_scrubs']:5}  {share:5.1f}%  {total['missed_scrubs']:6}"
    return f"{head}  {figures}  {rest}".rstrip()
