"""The operator's page as HTML. All text is inserted by :class:`markupsafe.Markup`, which escapes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from ..relay.bounds import space_at
from ..relay.health import FAILING, PAUSED
from ..relay.history import (
    ANSWER,
    BYTES,
    CAPTURED,
    DEAD,
    GAUGES,
    LOST,
    MOST_REFUSED,
    OLDEST,
    OPEN,
    PLAYS,
    SENT,
    TOOK,
    WAITING,
    History,
    Refusal,
    Series,
    VideoFigures,
    quantile,
    quantiles,
    troubles_of,
)
from ..version import VERSION
from . import text
from .charts import COUNT, SECONDS, Chart, Line, as_svg, seconds_label
from .page_style import STYLE
from .status import Status, relay_description, sentences

#: Seconds between two automatic refreshes of the page, if they are on.
REFRESH = 30
#: Errors that are shown, at most.
MOST_ERRORS = 12

_TONES = {"idle": "good", "delivering": "good", "no_relay": "warn", "failing": "bad", "paused": "bad"}
#: Result of an attempt -> label and colour, in the order of the bars.
_ANSWERS = {
    "accepted": ("accepted", 3),
    "refused": ("report refused", 4),
    "denied": ("server denied", 5),
    "busy": ("“not now”", 2),
    "no_answer": ("no answer", 1),
    "unreachable": ("not reached", 6),
}

_PAGE = Markup("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
{refresh}<style>{style}</style>
</head>
<body>
<header><h1>Reports to {site}</h1><p>t23_middleware {version}</p></header>
<nav aria-label="This page">{links}</nav>
<main>
<div class="state {tone}" role="status">{state}</div>
<dl class="figures" aria-label="Figures">{figures}</dl>
<h2>Over the last hour and day</h2>
<p class="soft">Times are those of the server ({zone}).</p>
{charts}
<h2>Videos of the last day</h2>
<div class="tables">{videos}</div>
<h2>Recent errors</h2>
{errors}
{not_reported}
</main>
<footer>{footer}</footer>
</body>
</html>
""")


class Links(NamedTuple):
    """Addresses of the pages, for this request."""

    page: str
    json: str
    metrics: str


def html(status: Status, history: History, charts: Markup, links: Links, *, refreshing: bool) -> str:
    """The whole page, with *charts* from :func:`charts_html`; if *refreshing*, it reloads every 30 seconds."""
    state = status_sentences(status)
    return _PAGE.format(
        title=f"{state[0].partition(':')[0].partition('.')[0]} · t23_middleware",
        refresh=Markup('<meta http-equiv="refresh" content="{}">\n').format(REFRESH) if refreshing else "",
        style=Markup(STYLE),
        site=status.site,
        version=VERSION,
        links=_links(links, refreshing),
        tone=tone(status),
        state=_repeat("<p>{}</p>", ((sentence,) for sentence in state)),
        figures=_repeat(
            '<div><dt>{}</dt><dd class="number">{}</dd><dd class="remark">{}</dd></div>',
            _figures(status, history),
        ),
        zone=time.strftime("%Z", time.localtime(status.now_ms / 1000)),
        charts=charts,
        videos=_videos(history),
        errors=_errors(status, history),
        not_reported=_not_reported(status),
        footer=_footer(status),
    )


def status_sentences(status: Status) -> list[str]:
    """The state in sentences, the most important first."""
    return [*_about_the_disk(status), *sentences(status)]


def _about_the_disk(status: Status) -> list[str]:
    if not status.exists:
        return []
    space = space_at(status.folder)
    if space.free >= space.low_water:
        return []
    return [
        f"The disk is nearly full: {text.size(space.free)} free for the state folder. Delete files, or enlarge the disk."
    ]


def tone(status: Status) -> str:
    """Severity of the state, as a class of the style sheet: ``good``, ``warn`` or ``bad``."""
    return "bad" if _about_the_disk(status) else _TONES[status.state]


def _repeat(pattern: str, rows: Iterable[Sequence[object]]) -> Markup:
    return Markup("").join(Markup(pattern).format(*row) for row in rows)


def _links(links: Links, refreshing: bool) -> Markup:
    toggle = (
        (links.page, "Stop refreshing")
        if refreshing
        else (f"{links.page}?refresh", f"Refresh every {REFRESH} s")
    )
    rows = [(f"{links.page}?refresh" if refreshing else links.page, "Refresh now"), toggle]
    return _repeat('<a href="{}">{}</a>', [*rows, (links.json, "JSON"), (links.metrics, "Metrics")])


# Figures.


def _figures(status: Status, history: History) -> Iterator[tuple[str, str, object]]:
    stats, oldest, day = status.stats, status.oldest_seconds, history.day
    yield "Streams open", f"{status.open_responses:,}", f"{day.total(PLAYS):,} plays started in 24 hours"
    if status.draining:
        yield "Draining", f"{status.draining:,}", "sent, but not yet acknowledged by their clients"
    if plays := status.waiting_for_proxy.number:
        age = text.duration((status.now_ms - status.waiting_for_proxy.since_ms) / 1000)
        yield "Waiting for the proxy", f"{plays:,}", f"for their lines in its log, the oldest for {age}"
    yield "Captured", f"{stats.captured:,}", f"{text.size(day.total(BYTES))} streamed in 24 hours"
    yield "Waiting", f"{stats.waiting:,}", "to be delivered"
    yield "Oldest waiting", "–" if oldest is None else text.duration(oldest), "since its stream ended"
    yield "Sent", f"{stats.sent:,}", _last_answer(status)
    yield "Dead", f"{stats.dead:,}", "run ‘t23-middleware dead list’" if stats.dead else "refused by the API"
    reasons = [
        f"{number:,} {_with_spaces(reason)}" for reason, number in sorted(status.lost_by_reason.items())
    ]
    yield "Lost", f"{stats.lost:,}", ", ".join(reasons) or "never delivered"
    yield (
        "Delivered within",
        _within(history.hour, 0.5),
        f"50 % of reports; 95 % within {_within(history.hour, 0.95)} (last hour)",
    )


def _last_answer(status: Status) -> str:
    answered_ms = max((api.answered_ms for api in status.apis.values()), default=0)
    return (
        f"last answer {text.duration((status.now_ms - answered_ms) / 1000)} ago"
        if answered_ms
        else "none yet"
    )


def _within(series: Series, share: float) -> str:
    took = quantile({name: series.total(name) for name in series.values if name.startswith(TOOK)}, share)
    return "–" if took is None else seconds_label(took)


def _with_spaces(name: str) -> str:
    return name.replace("_", " ")


# Charts.


class _ChartSpec(NamedTuple):
    """One figure, which gets a chart of the last hour and one of the last day."""

    title: str
    #: Unit of the axis; ``{}`` is replaced by the length of a step.
    unit: str
    chart: Callable[[Series], Chart]
    #: The value in a line's legend.
    legend_value: Callable[[Series, Line], str]


def charts_html(history: History) -> Markup:
    """All charts. They take most of a page's time, so the caller caches them."""
    return Markup("").join(_charts(history))


def _charts(history: History) -> Iterator[Markup]:
    for spec in _CHART_SPECS:
        figures = [
            _figure(spec, series, over)
            for series, over in ((history.hour, "last hour"), (history.day, "last 24 hours"))
        ]
        yield Markup('<h3>{}</h3><div class="charts">{}</div>\n').format(spec.title, Markup("").join(figures))


def _figure(spec: _ChartSpec, series: Series, over: str) -> Markup:
    chart = spec.chart(series)
    unit = spec.unit.format("minute" if series.step == 1 else f"{series.step} minutes")
    legend = [
        (
            line.colour,
            " dashed" if number == 2 and not chart.piled else "",
            line.label,
            spec.legend_value(series, line),
        )
        for number, line in enumerate(chart.lines, 1)
    ]
    return Markup("<figure>{}<figcaption><p>{}: {}</p><ul>{}</ul></figcaption></figure>").format(
        as_svg(chart, f"Chart: {spec.title.lower()}, {unit}, {over}"),
        over[0].upper() + over[1:],
        unit,
        _repeat('<li><span class="key c{}{}" aria-hidden="true"></span>{} <b>{}</b></li>', legend),
    )


def _line_chart(*lines: tuple[str, str, int]) -> Callable[[Series], Chart]:
    """A chart with one line per tuple of name, label and colour."""

    def chart(series: Series) -> Chart:
        drawn_lines = [Line(label, series.of(name), colour) for name, label, colour in lines]
        if lines[0][0] not in GAUGES:
            drawn_lines = [
                line._replace(values=_without_unfinished_step(line.values)) for line in drawn_lines
            ]
        unit = SECONDS if lines[0][0] == OLDEST else COUNT
        return Chart(drawn_lines, unit, series.first, series.step)

    return chart


def _without_unfinished_step(values: Sequence[float | None]) -> Sequence[float | None]:
    """Omit the last step, which is not over, unless it is higher than the one before: it would look like a fall."""
    return values if (values[-1] or 0) > (values[-2] or 0) else [*values[:-1], None]


def _quantile_chart(series: Series) -> Chart:
    lines = [Line("50 % within", quantiles(series, 0.5), 1), Line("95 % within", quantiles(series, 0.95), 2)]
    return Chart(lines, SECONDS, series.first, series.step)


def _answer_chart(series: Series) -> Chart:
    lines = [Line(label, series.of(ANSWER + name), colour) for name, (label, colour) in _ANSWERS.items()]
    return Chart(_without_empty(lines), COUNT, series.first, series.step, piled=True)


def _loss_chart(series: Series) -> Chart:
    reasons = sorted(name for name in series.values if name.startswith(LOST))
    lines = [Line("dead", series.of(DEAD), 4)]
    for number, name in enumerate(reasons):
        colour = (2, 5, 6, 1, 3)[number % 5]
        lines.append(Line(_with_spaces(name.removeprefix(LOST)), series.of(name), colour))
    return Chart(_without_empty(lines), COUNT, series.first, series.step, piled=True)


def _without_empty(lines: list[Line]) -> list[Line]:
    """The first line, and the others that have a value other than 0."""
    return [line for number, line in enumerate(lines) if number == 0 or any(line.values)]


def _sum(series: Series, line: Line) -> str:
    return f"{sum(value or 0 for value in line.values):,.0f}"


def _total(series: Series, line: Line) -> str:
    return f"{series.total(line.label):,}"


def _highest(series: Series, line: Line) -> str:
    known = [value for value in line.values if value is not None]
    return f"{max(known):,.0f}" if known else "–"


def _longest(series: Series, line: Line) -> str:
    known = [value for value in line.values if value is not None]
    return text.duration(max(known)) if known else "–"


def _share(series: Series, line: Line) -> str:
    return _within(series, 0.5 if line.label.startswith("50") else 0.95)


_CHART_SPECS = (
    _ChartSpec("Streams open", "streams", _line_chart((OPEN, "at most", 1)), _highest),
    _ChartSpec(
        "Reports captured and sent",
        "reports per {}",
        _line_chart((CAPTURED, CAPTURED, 1), (SENT, SENT, 3)),
        _total,
    ),
    _ChartSpec("Reports waiting", "reports", _line_chart((WAITING, "at most", 2)), _highest),
    _ChartSpec("Oldest report waiting", "age", _line_chart((OLDEST, "at most", 2)), _longest),
    _ChartSpec("Delivery time, from the stream’s end to the API’s answer", "time", _quantile_chart, _share),
    _ChartSpec("The API’s answers", "attempts per {}", _answer_chart, _sum),
    _ChartSpec("Dead and lost", "reports per {}", _loss_chart, _sum),
)


# Tables.


def _videos(history: History) -> Markup:
    if not history.by_bytes:
        return Markup("<p>No video was watched.</p>")
    played = [video for video in history.by_plays if video.plays]
    return _table_of_videos("Most bytes", history.by_bytes) + _table_of_videos("Most plays", played)


def _table_of_videos(caption: str, videos: Sequence[VideoFigures]) -> Markup:
    with_host = any(video.host for video in videos)
    rows = [
        (
            f"{video.photo_id} on {video.host}" if with_host else video.photo_id,
            f"{video.plays:,}",
            text.size(video.bytes),
        )
        for video in videos
    ]
    row = '<tr><th scope="row">{}</th><td class="right">{}</td><td class="right">{}</td></tr>'
    return Markup(
        '<div class="wide"><table><caption>{}</caption><thead><tr><th scope="col">Video (photo_id)</th>'
        '<th scope="col" class="right">Plays</th><th scope="col" class="right">Streamed</th></tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(caption, _repeat(row, rows))


class RecentError(NamedTuple):
    """An error, or the end of one."""

    at_ms: int
    what: str


def recent_errors(status: Status, history: History) -> list[RecentError]:
    """The latest API errors and refusals, newest first."""
    errors = [
        RecentError(each.at_ms, _trouble_sentence(each.state, each.reason, each.host))
        for each in troubles_of(status.outbox.notes)
    ]
    errors += [RecentError(same[0].at_ms, _refusal_sentence(same)) for same in _grouped(history.refused)]
    return sorted(errors, key=lambda each: each.at_ms, reverse=True)[:MOST_ERRORS]


def _grouped(refused: Iterable[Refusal]) -> Iterable[list[Refusal]]:
    """Refusals grouped by API and answer, newest first."""
    groups: dict[tuple[str, str, str], list[Refusal]] = {}
    for each in refused:
        groups.setdefault((each.host, each.code, each.answer), []).append(each)
    return groups.values()


def _refusal_sentence(same: list[Refusal]) -> str:
    last = same[0]
    answer = last.answer if last.answer.startswith(last.code) else f"{last.code}: {last.answer}"
    if len(same) == 1:
        return f"A report of video {last.photo_id} was refused{_for(last.host)}: {answer}"
    videos = list(dict.fromkeys(each.photo_id for each in same))
    named = ", ".join(videos[:3]) + (" …" if len(videos) > 3 else "")
    many = f"{len(same)} or more" if len(same) >= MOST_REFUSED else str(len(same))
    return f"{many} reports ({'video' if len(videos) == 1 else 'videos'} {named}) were refused{_for(last.host)}: {answer}"


def _trouble_sentence(state: str, reason: str, host: str) -> str:
    if state == PAUSED:
        return f"Delivery paused{_for(host)}: {reason}"
    if state == FAILING:
        return f"The API went down{_for(host)}: {reason}"
    return f"Reports were delivered again{_for(host)}."


def _for(host: str) -> str:
    return f" for {host}" if host else ""


def _errors(status: Status, history: History) -> Markup:
    rows = [(_iso(each.at_ms), text.moment(each.at_ms), each.what) for each in recent_errors(status, history)]
    if not rows:
        return Markup("<p>None.</p>")
    return Markup('<ol class="errors">{}</ol>').format(
        _repeat('<li><time datetime="{}">{}</time> <span>{}</span></li>', rows)
    )


def _not_reported(status: Status) -> Markup:
    rows = [(_with_spaces(name), f"{value:,}") for name, value in sorted(status.other_counters.items())]
    if not rows:
        return Markup("")
    return Markup(
        '<details><summary>Not reported, or unusual</summary><div class="wide"><table>'
        '<thead><tr><th scope="col">Counter</th><th scope="col" class="right">Count</th></tr></thead>'
        "<tbody>{}</tbody></table></div></details>"
    ).format(_repeat('<tr><th scope="row">{}</th><td class="right">{}</td></tr>', rows))


def _footer(status: Status) -> Markup:
    lines = [
        f"Relay: {relay_description(status.relay)}.",
        f"Journals: {text.size(status.journal_bytes)} not read yet.",
        f"State folder: {status.folder}.",
    ]
    return Markup("{}<p>As of <time datetime='{}'>{}</time>.</p>").format(
        _repeat("<p>{}</p>", ((line,) for line in lines)), _iso(status.now_ms), text.moment(status.now_ms)
    )


def _iso(ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms / 1000))


def error_page(words: str) -> str:
    """The page that is shown if the figures can't be read."""
    return Markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{0}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><style>{1}</style></head>\n'
        '<body><main><h1>Operator’s page</h1><p class="state bad" role="alert">{0}</p></main></body></html>\n'
    ).format(words, Markup(STYLE))
