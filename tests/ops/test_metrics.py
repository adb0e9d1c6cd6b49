"""The metrics: what Prometheus' own tool says of them, and that rules and documentation name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t23_middleware.state import StateFolder

from ..harness import ROOT, need
from .pages import PagesSite, serving
from .past import fill

ALERTS = ROOT / "docs" / "alerts.yml"
PAGE = ROOT / "docs" / "metrics.md"

#: Alerts that must fire, and must not, on what the API and the relay may be.
_ALERT_TEST = """
rule_files: ["{alerts}"]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 't23_api_up{{host="",instance="a",job="t23"}}', values: "0x200"}}
      - {{series: 't23_api_paused{{host="",instance="a",job="t23"}}', values: "1x200"}}
      - {{series: 't23_api_up{{host="",instance="b",job="t23"}}', values: "0x200"}}
      - {{series: 't23_api_paused{{host="",instance="b",job="t23"}}', values: "0x200"}}
      - {{series: 't23_relay_up{{instance="a",job="t23"}}', values: "0x200"}}
      - {{series: 't23_relay_up{{instance="b",job="t23"}}', values: "0x200"}}
      - {{series: 't23_reports_waiting{{instance="a",job="t23"}}', values: "5x200"}}
      - {{series: 't23_reports_waiting{{instance="b",job="t23"}}', values: "0x200"}}
      - {{series: 't23_journal_unread_bytes{{instance="b",job="t23"}}', values: "0x200"}}
      - {{series: 't23_reports_captured_total{{instance="a",job="t23"}}', values: "0+10x200"}}
      - {{series: 't23_reports_captured_total{{instance="b",job="t23"}}', values: "0+10x200"}}
      - {{series: 't23_api_answers_total{{answer="refused",instance="a",job="t23"}}', values: "0+1x200"}}
      - {{series: 't23_api_answers_total{{answer="refused",instance="b",job="t23"}}', values: "0x200"}}
    alert_rule_test:
      - {{eval_time: 2h, alertname: T23Paused, exp_alerts: [{{exp_labels: {{instance: a, job: t23, severity: critical}}, exp_annotations: {paused}}}]}}
      - {{eval_time: 2h, alertname: T23ApiDown, exp_alerts: [{{exp_labels: {{instance: b, job: t23, severity: warning}}, exp_annotations: {down}}}]}}
      - {{eval_time: 2h, alertname: T23NoRelay, exp_alerts: [{{exp_labels: {{instance: a, job: t23, severity: warning}}, exp_annotations: {relay}}}]}}
      - {{eval_time: 2h, alertname: T23ReportsRefused, exp_alerts: [{{exp_labels: {{instance: a, job: t23, severity: warning}}, exp_annotations: {refused}}}]}}
      - {{eval_time: 2h, alertname: T23ReportsLost, exp_alerts: []}}
      - {{eval_time: 2h, alertname: T23MetricsMissing, exp_alerts: []}}
"""


@pytest.fixture
def past(state: Path) -> Iterator[PagesSite]:
    fill(StateFolder(state), time.time_ns() // 1_000_000)
    with serving(state) as site:
        yield site


def promtool(*words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([need("promtool"), *words], input=stdin, capture_output=True, text=True)


def values(body: str) -> dict[str, float]:
    """Series -> value."""
    lines = [line.rpartition(" ") for line in body.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_promtool_finds_no_fault_in_the_metrics(past: PagesSite):
    done = promtool("check", "metrics", stdin=past.ask("/_t23/metrics").body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_metrics_equal_page_figures(past: PagesSite):
    """The metrics have the values of the figures on the page."""
    told, found = past.json(), values(past.ask("/_t23/metrics").body)
    assert found["t23_reports_captured_total"] == told["captured"] > 0
    assert found["t23_reports_sent_total"] == told["sent"] > 0
    assert found["t23_reports_waiting"] == told["waiting"] > 0
    assert found["t23_reports_dead"] == told["dead"] > 0
    assert found['t23_reports_lost_total{reason="ambiguous"}'] == told["lost"] > 0
    assert found['t23_events_total{event="bad_signature"}'] == told["counters"]["bad_signature"] > 0
    for answer, number in told["api_answers"].items():
        assert found[f't23_api_answers_total{{answer="{answer}"}}'] == number > 0
    assert found["t23_streams_open"] == 7
    assert (found['t23_api_up{host=""}'], found['t23_api_paused{host=""}'], found["t23_relay_up"]) == (
        0,
        1,
        0,
    )
    assert found["t23_report_oldest_seconds"] >= 0
    assert found["t23_disk_free_bytes"] > 0


def test_metrics_delivery_time_histogram(past: PagesSite):
    """Each sent report is in one bucket of the histogram of delivery times."""
    found = values(past.ask("/_t23/metrics").body)
    steps = [value for name, value in found.items() if name.startswith("t23_report_delivery_seconds_bucket")]
    assert steps == sorted(steps)
    assert steps[-1] == found["t23_report_delivery_seconds_count"] == found["t23_reports_sent_total"]
    # In the past that is tried most reports took 0.4 s, and those of the outage up to five minutes.
    assert 0 < found['t23_report_delivery_seconds_bucket{le="0.5"}'] < steps[-1]
    assert found['t23_report_delivery_seconds_bucket{le="0.2"}'] == 0
    assert found["t23_report_delivery_seconds_sum"] > 0


def test_metrics_openmetrics_by_accept(past: PagesSite):
    """A client whose Accept header asks for OpenMetrics gets that format."""
    answer = past.ask("/_t23/metrics", Accept="application/openmetrics-text;version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.body.endswith("# EOF\n")


def test_without_prometheus_client_the_remedy_is_told(past: PagesSite, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "prometheus_client"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    answer = past.ask("/_t23/metrics")
    assert answer.status == 501
    assert "pip install 't23_middleware[metrics]'" in answer.body
    assert past.ask("/_t23/").status == 200


def test_metrics_documentation_is_complete(past: PagesSite):
    """docs/metrics.md names each metric that exists, and no other."""
    text = PAGE.read_text()
    told = set(re.findall(r"^# TYPE (t23_\w+)", past.ask("/_t23/metrics").body, re.MULTILINE))
    named = {
        name
        for row in re.findall(r"^\| (`t23_.+?) \|", text, re.MULTILINE)
        for name in re.findall(r"t23_\w+", row)
    }
    assert named == told


def test_alerts_use_existing_metrics(past: PagesSite):
    """The alerts use only metrics that exist."""
    told = set(re.findall(r"^# TYPE (t23_\w+)", past.ask("/_t23/metrics").body, re.MULTILINE))
    expressions = re.findall(r"^ +expr: (.+)$", ALERTS.read_text(), re.MULTILINE)
    assert len(expressions) >= 8
    for expression in expressions:
        assert set(re.findall(r"\bt23_\w+", expression)) <= told, expression


def test_promtool_takes_the_alerts():
    done = promtool("check", "rules", str(ALERTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_only_when_due(tmp_path: Path):
    """Each alert fires for the instance with its problem, and for no other instance."""
    found = {
        name: annotations(name) for name in ("T23Paused", "T23ApiDown", "T23NoRelay", "T23ReportsRefused")
    }
    test = _ALERT_TEST.format(
        alerts=ALERTS,
        paused=found["T23Paused"],
        down=found["T23ApiDown"],
        relay=found["T23NoRelay"],
        refused=found["T23ReportsRefused"],
    )
    path = tmp_path / "test.yml"
    path.write_text(test)
    done = promtool("test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def annotations(alert: str) -> str:
    """The annotations of *alert*, as a mapping on one line of YAML."""
    rule = ALERTS.read_text().partition(f"alert: {alert}\n")[2].partition("- alert:")[0]
    summary = re.search(r"summary: (.+)", rule)
    description = re.search(r"description: (?:>-\n)?((?:.+\n)+)", rule)
    assert summary and description
    words = " ".join(description[1].split())
    return f'{{summary: "{summary[1]}", description: "{words}"}}'
