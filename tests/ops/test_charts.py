"""The charts: well-formed SVG, axes that can be read, gaps where nothing is known."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from t23_middleware.ops.charts import COUNT, SECONDS, Chart, Line, Unit, as_svg, count_label, seconds_label

#: A midnight somewhere, in minutes since the epoch; in UTC, as the tests run in any zone only its quarters matter.
FIRST = 20_000 * 24 * 60


def chart(*values: float | None, unit: Unit = COUNT, piled: bool = False) -> ElementTree.Element:
    made = Chart([Line("line", values, 1)], unit, FIRST, 1, piled)
    return ElementTree.fromstring(as_svg(made, "a <label>"))


def paths(svg: ElementTree.Element, kind: str) -> list[str]:
    return [path.get("d", "") for path in svg.iter("path") if kind in path.get("class", "").split()]


def texts(svg: ElementTree.Element, kind: str) -> list[str | None]:
    return [text.text for text in svg.iter("text") if text.get("class") == kind]


def test_chart_is_a_named_image():
    """The SVG has the role img and the given label as its name."""
    svg = chart(1, 2)
    assert (svg.get("role"), svg.get("aria-label")) == ("img", "a <label>")


def test_chart_line_with_gaps():
    """A missing value splits the line. A value between two missing ones is drawn as a dot."""
    (line,) = paths(chart(1, 2, None, 3, None, None, 2, 2), "line")
    assert line.count("M") == 3
    assert line.count("h.01") == 1


def test_where_nothing_is_known_it_says_so():
    assert texts(chart(None, None), "nothing") == ["no data for this time"]
    assert texts(chart(0, None), "nothing") == []
    assert paths(chart(None, None), "line") == []


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [
        (0, ["0", "1"]),
        (1, ["0", "1"]),
        (2, ["0", "1", "2"]),
        (3, ["0", "2", "4"]),
        (7, ["0", "5", "10"]),
        (11, ["0", "10", "20"]),
        (3999, ["0", "2,000", "4,000"]),
        (50_000, ["0", "50k", "100k"]),
        (3_000_000, ["0", "2M", "4M"]),
    ],
)
def test_counts_have_axes_of_whole_round_numbers(highest: int, ticks: list[str]):
    assert texts(chart(0, highest), "y") == ticks


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [
        (0.0, ["0", "0.05 s", "0.1 s"]),
        (0.3, ["0", "0.2 s", "0.4 s"]),
        (15, ["0", "10 s", "20 s"]),
        (90, ["0", "1 min", "2 min"]),
        (5000, ["0", "1 h", "2 h"]),
        (86_400 * 7, ["0", "4 d", "8 d"]),
    ],
)
def test_times_have_axes_in_their_units(highest: float, ticks: list[str]):
    assert texts(chart(0, highest, unit=SECONDS), "y") == ticks


def test_nothing_is_drawn_outside_the_plot():
    for values in ([5.0] * 60, [0, 10**12], [10**9] * 3):
        for piled in (False, True):
            svg = chart(*values, piled=piled)
            for path in svg.iter("path"):
                numbers = [float(number) for number in re.findall(r"[MLVH](-?[\d.]+)", path.get("d", ""))]
                assert all(0 <= number <= 420 for number in numbers), path.get("d")


def test_bars_stand_on_each_other():
    made = Chart([Line("a", [1, 0], 1), Line("b", [1, 2], 2)], COUNT, FIRST, 1, piled=True)
    below, above = paths(ElementTree.fromstring(as_svg(made, "")), "bar")
    top_of_below = re.search(r"V([\d.]+)", below)
    foot_of_above = re.match(r"M[\d.]+ ([\d.]+)", above)
    assert top_of_below and foot_of_above
    assert top_of_below[1] == foot_of_above[1]


def test_the_hour_has_its_quarters():
    assert [text[-2:] for text in texts(chart(*[1] * 60), "x") if text] == ["00", "15", "30", "45"]


@pytest.mark.parametrize(
    ("value", "words"), [(0.5, "0.5"), (3, "3"), (9999, "9,999"), (12_500, "12.5k"), (2e9, "2G")]
)
def test_counts_are_short(value: float, words: str):
    assert count_label(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(0.36, "0.36 s"), (12.4, "12 s"), (90, "1.5 min"), (7200, "2 h"), (129_600, "1.5 d")]
)
def test_times_are_short(value: float, words: str):
    assert seconds_label(value) == words
