"""The figures in Prometheus' format, written by prometheus_client (extra ``metrics``).

They come from the outbox, so every worker returns the same figures, and a restart does not reset them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..relay.bounds import space_at
from ..relay.health import PAUSED, WELL
from ..relay.history import ANSWER, ANSWERS, BOUNDS, BYTES, PLAYS, TOOK, TOOK_MS, UNBOUNDED, History
from ..version import VERSION
from .status import Status

if TYPE_CHECKING:
    from prometheus_client.core import Metric

#: The remedy if prometheus_client is missing.
REMEDY = "prometheus_client is not installed here; run: pip install 't23_middleware[metrics]'"


class NotInstalled(Exception):
    """The extra ``metrics`` is missing."""


class Exposition(NamedTuple):
    """The metrics as a response to Prometheus."""

    content_type: str
    body: bytes


def exposition(status: Status, history: History, accept: str) -> Exposition:
    """The metrics, in the format that the header *accept* asks for. Raises :class:`NotInstalled`."""
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
    except ImportError as error:
        raise NotInstalled(REMEDY) from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(status, history))
    encode, content_type = choose_encoder(accept)
    return Exposition(content_type, encode(registry))


class _Collector:
    """The figures of one time, as a collector for prometheus_client."""

    def __init__(self, status: Status, history: History) -> None:
        self._status = status
        self._history = history

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        yield from self._reports()
        yield from self._delivery()
        yield from self._apis()
        yield from self._place()

    def _reports(self) -> Iterator[Metric]:
        stats, totals = self._status.stats, self._history.totals
        yield _counter(
            "t23_reports_captured", "Reports that were captured from streamed bytes.", stats.captured
        )
        yield _counter("t23_reports_sent", "Reports that the API accepted.", stats.sent)
        yield _counters(
            "t23_reports_lost", "Reports that were lost.", "reason", dict(self._status.lost_by_reason)
        )
        yield _gauge("t23_reports_waiting", "Reports that wait for delivery.", stats.waiting)
        yield _gauge(
            "t23_reports_dead", "Reports that the API refused permanently and that are kept.", stats.dead
        )
        yield _counter("t23_plays", "Reports that started a viewing (skip=0).", totals.get(PLAYS, 0))
        yield _counter("t23_streamed_bytes", "Streamed bytes, as reported.", totals.get(BYTES, 0))
        yield _counters(
            "t23_events",
            "Requests that were not reported, unusual cases and errors.",
            "event",
            self._status.other_counters,
        )

    def _delivery(self) -> Iterator[Metric]:
        totals = self._history.totals
        oldest = self._status.oldest_seconds
        yield _gauge("t23_report_oldest_seconds", "Age of the oldest waiting report.", oldest or 0.0)
        yield _histogram(totals)
        answers = {name: totals.get(ANSWER + name, 0) for name in ANSWERS}
        yield _counters(
            "t23_api_answers", "Attempts to deliver a report, by their result.", "answer", answers
        )

    def _apis(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        up = GaugeMetricFamily("t23_api_up", "Whether the API accepts reports.", labels=["host"])
        paused = GaugeMetricFamily(
            "t23_api_paused",
            "Whether the API denies all reports of this server until the cause is fixed.",
            labels=["host"],
        )
        for host, api in self._status.apis.items():
            up.add_metric([host], api.state == WELL)
            paused.add_metric([host], api.state == PAUSED)
        yield up
        yield paused

    def _place(self) -> Iterator[Metric]:
        status = self._status
        yield _gauge("t23_streams_open", "Counted responses that are in progress.", status.open_responses)
        yield _gauge(
            "t23_responses_draining",
            "Responses that are sent but not yet acknowledged by their clients.",
            status.draining,
        )
        yield _gauge(
            "t23_plays_awaited",
            "Plays that wait for their line in the proxy's log.",
            status.waiting_for_proxy.number,
        )
        yield _gauge(
            "t23_journal_unread_bytes", "Bytes in journals that no relay has read yet.", status.journal_bytes
        )
        yield _gauge("t23_relay_up", "Whether a relay runs.", status.relay is not None)
        if status.exists:
            free = space_at(status.folder).free
            yield _gauge("t23_disk_free_bytes", "Free bytes on the disk of the state folder.", free)
        yield _info()


def _counter(name: str, help: str, value: float) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(name, help, value=value)


def _counters(name: str, help: str, label: str, values: Mapping[str, int]) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, help, labels=[label])
    for word, value in sorted(values.items()):
        family.add_metric([word], value)
    return family


def _gauge(name: str, help: str, value: float) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(name, help, value=value)


def _histogram(totals: Mapping[str, int]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    below, buckets = 0, []
    for bound in BOUNDS:
        below += totals.get(f"{TOOK}{bound:g}", 0)
        buckets.append((str(float(bound)), float(below)))
    buckets.append(("+Inf", float(below + totals.get(UNBOUNDED, 0))))
    return HistogramMetricFamily(
        "t23_report_delivery_seconds",
        "Time from the capture of a report to its acceptance by the API.",
        buckets=buckets,
        sum_value=totals.get(TOOK_MS, 0) / 1000,
    )


def _info() -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(
        "t23_build_info", "The version of t23_middleware, as a label.", labels=["version"]
    )
    family.add_metric([VERSION], 1)
    return family
