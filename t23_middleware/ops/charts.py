"""Small charts as SVG: axes with units, and gaps where no value is known. They need no script in the browser.

Pure functions. Colours are the classes ``c1`` to ``c6`` of the page's style sheet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

#: Size of the drawing, and edges of the plot in it: left, right, top, bottom.
WIDTH, HEIGHT = 420, 158
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 410, 12, 126

#: Possible ends of an axis of time spans, in seconds: half of each is easy to read, too.
_NICE_SECONDS = (
    (0.1, 0.2, 0.4, 1, 2, 4, 10, 20, 30, 60, 120, 240, 600, 1200, 1800, 3600, 7200, 4 * 3600, 12 * 3600)
    + (24 * 3600, 48 * 3600, 4 * 86400, 8 * 86400, 16 * 86400, 32 * 86400)
)  # fmt: skip


class Unit(NamedTuple):
    """How an axis is scaled and labelled."""

    #: Highest value -> end of the axis.
    end: Callable[[float], float]
    label: Callable[[float], str]
    #: Whether only whole numbers make sense.
    whole: bool


class Line(NamedTuple):
    """One figure over time."""

    label: str
    #: One value per step, ``None`` if it is not known.
    values: Sequence[float | None]
    #: Number of the colour, 1 to 6.
    colour: int


class Chart(NamedTuple):
    """Lines of the same unit over the same time."""

    lines: Sequence[Line]
    unit: Unit
    #: Start of the first step in minutes since the epoch, and length of a step in minutes.
    first: int
    step: int
    #: Draw stacked bars instead of lines.
    piled: bool = False

    @property
    def steps(self) -> int:
        """Number of values of each line."""
        return max(len(line.values) for line in self.lines)


def as_svg(chart: Chart, label: str) -> Markup:
    """The chart as an ``<svg>`` element; *label* is its name for screen readers."""
    end = chart.unit.end(_highest(chart))
    known = any(value is not None for line in chart.lines for value in line.values)
    marks = _bars(chart, end) if chart.piled else _lines(chart, end)
    return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}">{}{}{}{}</svg>').format(
        label,
        WIDTH,
        HEIGHT,
        _y_axis(chart.unit, end),
        _x_axis(chart),
        Markup("").join(marks),
        Markup("") if known else _nothing(),
    )


def _highest(chart: Chart) -> float:
    if chart.piled:
        piles = zip(*(line.values for line in chart.lines), strict=True)
        return max((sum(value or 0 for value in pile) for pile in piles), default=0)
    return max((value or 0 for line in chart.lines for value in line.values), default=0)


# Units.


def _nice_count(highest: float) -> float:
    """1, 2, 4, 10, 20, 40 …: half of each is a whole number, except for 1."""
    if highest <= 1:
        return 1
    power = 10.0 ** math.floor(math.log10(highest))
    return next(times * power for times in (1, 2, 4, 10) if times * power >= highest)


def _nice_seconds(highest: float) -> float:
    return next((end for end in _NICE_SECONDS if end >= highest), max(highest, 0.1))


def count_label(value: float) -> str:
    """A number in a short form for an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def seconds_label(value: float) -> str:
    """A time span in the largest unit that fits."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


COUNT = Unit(_nice_count, count_label, whole=True)
SECONDS = Unit(_nice_seconds, seconds_label, whole=False)


# Parts of the drawing.


def _x(at: float, steps: int) -> float:
    return _LEFT + (_RIGHT - _LEFT) * at / steps


def _y(value: float, end: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * min(value / end, 1)


def _y_axis(unit: Unit, end: float) -> Markup:
    ticks = (0, end) if unit.whole and end < 2 else (0, end / 2, end)
    return Markup("").join(
        Markup('<path class="grid" d="M{} {:.1f}H{}"/><text x="{}" y="{:.1f}" class="y">{}</text>').format(
            _LEFT, _y(value, end), _RIGHT, _LEFT - 6, _y(value, end) + 4, unit.label(value) if value else "0"
        )
        for value in ticks
    )


def _x_axis(chart: Chart) -> Markup:
    return Markup("").join(
        Markup('<path class="tick" d="M{:.1f} {}v5"/><text x="{:.1f}" y="{}" class="x">{}</text>').format(
            x, _BOTTOM, min(x, _RIGHT - 14), _BOTTOM + 21, words
        )
        for x, words in _times(chart)
    )


def _times(chart: Chart) -> Iterator[tuple[float, str]]:
    """Position and label of the round times: quarters of an hour, or every sixth hour of a day."""
    for at in range(chart.steps):
        moment = time.localtime((chart.first + at * chart.step) * 60)
        round_time = moment.tm_hour % 6 == 0 and moment.tm_min < chart.step
        if moment.tm_min % 15 == 0 if chart.step == 1 else round_time:
            yield _x(at, chart.steps), time.strftime("%H:%M", moment)


def _lines(chart: Chart, end: float) -> Iterator[Markup]:
    for number, line in enumerate(chart.lines, 1):
        runs = list(_runs(line.values))
        points = [[(_x(at + 0.5, chart.steps), _y(value, end)) for at, value in run] for run in runs]
        if number == 1:
            yield _path("area", line, "".join(map(_area, points)))
        yield _path("line dashed" if number == 2 else "line", line, "".join(map(_stroke, points)))


def _runs(values: Sequence[float | None]) -> Iterator[list[tuple[int, float]]]:
    """The values between the gaps, with their step numbers."""
    run: list[tuple[int, float]] = []
    for at, value in enumerate([*values, None]):
        if value is not None:
            run.append((at, value))
        elif run:
            yield run
            run = []


def _stroke(points: list[tuple[float, float]]) -> str:
    """A line as an SVG path. One point becomes a line without length, which round caps show as a dot."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("h.01" if len(points) == 1 else "")


def _area(points: list[tuple[float, float]]) -> str:
    return f"{_stroke(points)}V{_BOTTOM}H{points[0][0]:.1f}Z"


def _bars(chart: Chart, end: float) -> Iterator[Markup]:
    width = (_RIGHT - _LEFT) / chart.steps
    piled = [0.0] * chart.steps
    for line in chart.lines:
        bars = []
        for at, value in enumerate(line.values):
            if value:
                foot, piled[at] = _y(piled[at], end), piled[at] + value
                bars.append(
                    f"M{_x(at, chart.steps):.1f} {foot:.1f}h{width * 0.85:.1f}V{_y(piled[at], end):.1f}"
                )
                bars.append(f"h-{width * 0.85:.1f}Z")
        yield _path("bar", line, "".join(bars))


def _path(kind: str, line: Line, path: str) -> Markup:
    return Markup('<path class="{} c{}" d="{}"/>').format(kind, line.colour, path) if path else Markup("")


def _nothing() -> Markup:
    return Markup('<text x="{}" y="{}" class="nothing">no data for this time</text>').format(
        (_LEFT + _RIGHT) / 2, (_TOP + _BOTTOM) / 2
    )
