"""The score of the relay's machine over traces, run as a developer runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trace_halves import varied

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "score_traces.py"
TOTAL = 33_000_000


def request(t: float, t_close: float, first: int, sent: int, **other: Any) -> dict[str, Any]:
    """A request of a trace, answered with a 206 from *first* to the end of the file."""
    length = TOTAL - first
    return {
        "t": t,
        "t_close": t_close,
        "method": "GET",
        "range": f"bytes={first}-",
        "status": 206,
        "content_range": f"bytes {first}-{TOTAL - 1}/{TOTAL}",
        "length": length,
        "sent": sent,
        "aborted": sent < length,
        **other,
    }


def trace(player: str, scenario: str, viewings: int, scrubs: int, *requests: dict[str, Any]) -> str:
    """One line of a file of traces."""
    truth = {"viewings": viewings, "scrubs": scrubs}
    return json.dumps({"player": player, "scenario": scenario, "truth": truth, "requests": requests})


PLAY, SCRUB = request(0, 5, 0, 3_000_000), request(5.01, 9, 20_000_000, 2_000_000)
TRACES = [
    trace("mpv", "seek1", 1, 1, PLAY, SCRUB),
    trace("mpv", "plain", 1, 0, PLAY, SCRUB),
    trace("curl", "head", 0, 0, request(0, 0.1, 0, 0, method="HEAD", status=200, content_range=None)),
    trace("vlc", "seek3", 2, 3, PLAY, SCRUB, request(10, 10.1, TOTAL, 0, status=416, content_range=None)),
]


def score(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def traces(tmp_path: Path) -> str:
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(TRACES) + "\n\n")
    return str(path)


def test_over_and_under_are_sums_over_traces(traces: str) -> None:
    answer = score(traces, "--per", "stream", "--json")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("\n") == 1
    scores = json.loads(answer.stdout)
    assert set(scores) == {"all", "players"}
    assert scores["all"] == {
        "traces": 4,
        "plays_right": 3,
        "both_right": 2,
        "plays_over": 0,
        "plays_under": 1,
        "false_scrubs": 1,
        "missed_scrubs": 2,
        "plays_told": 3,
        "scrubs_told": 3,
        "reports": 6,
        "bytes_unreported": 0,
    }
    assert set(scores["players"]) == {"mpv", "curl", "vlc"}
    assert scores["players"]["mpv"]["traces"] == 2


def test_score_lines_per_name(traces: str) -> None:
    """Both modes and both groupings print a line for each name, and the sum."""
    for per in ("stream", "response"):
        for by, names in (
            ("player", ["curl", "mpv", "vlc"]),
            ("scenario", ["head", "plain", "seek1", "seek3"]),
        ):
            answer = score(traces, traces, "--per", per, "--by", by)
            lines = answer.stdout.splitlines()
            assert [line.split()[0] for line in lines] == [by, *names, "all"]
            assert lines[-1].split()[1] == "8"


def test_bytes_that_make_no_report_are_told(tmp_path: Path) -> None:
    path = tmp_path / "preload.jsonl"
    path.write_text(trace("firefox", "meta_only", 0, 0, request(0, 0.1, 0, 74_000)))
    assert (
        json.loads(score(str(path), "--per", "stream", "--json").stdout)["all"]["bytes_unreported"] == 74_000
    )
    assert json.loads(score(str(path), "--json").stdout)["all"]["plays_over"] == 1


def test_halves_judge_unseen_traces(traces: str) -> None:
    """Each split is judged as recorded and varied, with fitted constants and with those that are shipped."""
    answer = score(traces, "--halves", "3", "--seed", "7")
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    heads = [number for number, line in enumerate(lines) if line.split()[0] in ("variation", "split")]
    variations, splits = lines[heads[0] + 1 : heads[1]], lines[heads[1] + 1 :]
    # mpv's play without a scrub is told as one with a scrub: 1 false for the 4 real ones.
    assert variations[0].split() == ["as", "recorded", "4", "1", "25.0%", "2"]
    assert [line.split()[:2] for line in splits] == [
        [str(split), kind] for split in (1, 2, 3) for kind in ("recorded", "varied") * 2
    ]
    assert [line.partition("  fitted: ")[2] != "" for line in splits[::4]] == [True] * 3
    assert all("AT_ONCE_NS=3e+07" in line for line in splits[2::4])
    assert score(traces, "--halves", "3", "--seed", "7").stdout == answer.stdout


def test_a_trace_is_varied() -> None:
    """Times, sizes and counts change; what was whole stays whole, and what was cut off stays that."""
    whole = request(10, 10.5, TOTAL - 1000, 1000)
    one = {"truth": {}, "requests": [request(0, 5, 0, 3_000_000), whole]}
    first, second = varied(one, time=2, wait=0.1, size=0.5, more=-1_000_000)["requests"]
    assert (first["t"], first["t_close"], first["sent"], first["length"]) == (0, 10, 500_000, TOTAL // 2)
    assert first["content_range"] == f"bytes 0-{TOTAL // 2 - 1}/{TOTAL // 2}"
    assert (second["t"], second["t_close"]) == (20.1, 21.1)
    assert second["sent"] == second["length"] == 500
    assert one["requests"][1]["sent"] == 1000


@pytest.mark.parametrize("content", ["{", "[]", '{"player": "mpv"}', '{"player": 1, "scenario": "x"}'])
def test_file_without_traces_refused(tmp_path: Path, content: str) -> None:
    """A file that has no traces is refused in one sentence."""
    path = tmp_path / "no_traces.jsonl"
    path.write_text(content)
    answer = score(str(path))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("score_traces: ") and answer.stderr.count("\n") == 1


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """A file that does not exist is refused in one sentence."""
    answer = score(str(tmp_path / "nowhere.jsonl"))
    assert answer.returncode == 2
    assert answer.stderr.startswith("score_traces: ") and answer.stderr.count("\n") == 1
