"""The follower of the proxy's log, on files as a test writes them and as nginx and Apache do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t23_middleware.relay.proxy_line import (
    APACHE_LINES,
    CACHE_NOT_TOLD,
    LONGEST_LINE,
    NGINX_LINES,
    ProxyLine,
    parse_line,
)
from t23_middleware.relay.proxy_log import HEAD, POSITIONS_KEPT, LogPosition, ProxyLog
from t23_middleware.transfer import Part, parse_play_id, play_id
from tests.harness import PATIENCE, need, until
from tests.ports import free_port

WRITER = "4711-0123456789abcdef"
UNKNOWN = Part(None, None, None)


def fields(number: int = 1, **changed: Any) -> dict[str, Any]:
    """What nginx says of a play, as JSON has it."""
    return {
        "t23": 1,
        "play": play_id(WRITER, number),
        "end": 1764547200.123,
        "seconds": 0.456,
        "status": 206,
        "body": 5_000_000,
        "complete": "OK",
        "type": "video/mp4",
        "range": "bytes 1000000-5999999/256000000",
        "length": "5000000",
        "cache": "",
        **changed,
    }


def line(number: int = 1, **changed: Any) -> bytes:
    return json.dumps(fields(number, **changed), separators=(",", ":")).encode() + b"\n"


def lines(*numbers: int) -> bytes:
    return b"".join(line(number, end=1764547200.123 + number) for number in numbers)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


class Follower:
    """A relay's use of a log: it keeps what it took, and goes on from there after a restart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store: list[str] = []
        self.numbers: list[int] = []
        self.counts: Counter[str] = Counter()
        self.restart()

    def restart(self) -> None:
        self.log = ProxyLog(self.path, [LogPosition.from_text(text) for text in self.store])

    def look(self, limit: int = 1 << 20) -> bool:
        """Take one reading; whether there is more."""
        reading = self.log.read(limit)
        self.store = [position.to_text() for position in reading.positions]
        self.numbers += [int(line.play.rpartition(".")[2]) for line in reading.lines]
        self.counts += reading.counts
        self.log.committed(reading)
        return reading.more

    def poll(self, limit: int = 1 << 20) -> list[int]:
        """Take all there is; the numbers of its plays."""
        before = len(self.numbers)
        while self.look(limit):
            pass
        return self.numbers[before:]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t23.log"


@pytest.fixture
def follower(path: Path) -> Follower:
    return Follower(path)


# --- one line


def test_nginx_line_is_parsed() -> None:
    """Each field of an nginx line is parsed."""
    assert parse_line(line(7).decode().rstrip()) == ProxyLine(
        play=f"{WRITER}.7",
        ended_ms=1764547200123,
        seconds=0.456,
        status=206,
        body=5_000_000,
        complete=True,
        content_type="video/mp4",
        part=Part(1_000_000, 5_999_999, 256_000_000),
        length=5_000_000,
        cache="",
    )


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"status": 200, "range": "", "length": "100"}, Part(0, 99, 100)),
        ({"status": 200, "range": "", "length": ""}, Part(0, None, None)),
        ({"range": "bytes 5-9/*"}, Part(5, 9, None)),
        ({"range": ""}, UNKNOWN),
        ({"range": "bytes */100"}, UNKNOWN),
        ({"range": "items 0-1/2"}, UNKNOWN),
        ({"range": "rubbish"}, UNKNOWN),
        ({"range": f"bytes 0-{10**30}/{10**31}"}, UNKNOWN),
    ],
)
def test_part_from_status_length_range(changed: dict[str, Any], part: Part) -> None:
    """The part of the file comes from the status, the length and the range."""
    parsed = parse_line(json.dumps(fields(**changed)))
    assert isinstance(parsed, ProxyLine)
    assert parsed.part == part


def test_cut_and_cached_transfers_parsed() -> None:
    """A line shows that a transfer was cut off, and that it came from the cache."""
    parsed = parse_line(json.dumps(fields(complete="", cache="HIT", length="")))
    assert isinstance(parsed, ProxyLine)
    assert (parsed.complete, parsed.cache, parsed.length) == (False, "HIT", None)


def apache(**changed: Any) -> str:
    said = {name: value for name, value in fields().items() if name not in ("body", "complete", "cache")}
    return json.dumps(
        said | {"B": 1000, "O": 700, "X": "+", "method": "GET", "range": "-", "length": "-"} | changed
    )


@pytest.mark.parametrize(
    ("changed", "body", "complete"),
    [
        ({}, 1000, True),
        ({"X": "-"}, 1000, True),
        ({"X": "X"}, 700, False),
        ({"X": "X", "O": 1200}, 1000, False),
        ({"method": "HEAD"}, 0, True),
    ],
)
def test_apache_cut_and_whole_transfers(changed: dict[str, Any], body: int, complete: bool) -> None:
    """For a cut transfer Apache logs the bytes that were sent, for a whole one the size of its body."""
    parsed = parse_line(apache(**changed))
    assert isinstance(parsed, ProxyLine)
    assert (parsed.body, parsed.complete, parsed.length, parsed.part) == (body, complete, None, UNKNOWN)


@pytest.mark.parametrize(
    "changed",
    [
        {"t23": 2},
        {"play": ""},
        {"play": "no-number"},
        {"play": f"{WRITER}.-1"},
        {"play": f"{WRITER}.01"},
        {"play": f"{WRITER}.1\n"},
        {"play": f"{WRITER}.\u0661"},
        {"play": 5},
        {"play": None},
        {"play": "a" * 65 + ".1"},
        {"end": "1764547200.123"},
        {"end": -1},
        {"end": float("nan")},
        {"end": float("inf")},
        {"end": 10**400},
        {"seconds": None},
        {"seconds": True},
        {"status": "200"},
        {"status": 99},
        {"status": 1000},
        {"status": 200.0},
        {"body": -1},
        {"body": True},
        {"body": 1 << 63},
        {"body": "5"},
        {"complete": "ok"},
        {"complete": None},
        {"complete": []},
        {"type": None},
        {"type": ["video/mp4"]},
        {"range": 5},
        {"length": "-1"},
        {"length": "1e3"},
        {"length": "\u0663"},
        {"length": str(1 << 63)},
        {"length": "9" * 5000},
        {"length": 5},
        {"cache": 1},
    ],
)
def test_invalid_value_is_bad(changed: dict[str, Any]) -> None:
    """A line with an impossible value is counted as bad."""
    assert parse_line(json.dumps(fields(**changed))) == "proxy_bad"


def test_line_without_cache_says_so() -> None:
    """It is written with lines of ours that did not have that field yet; Apache's never have it."""
    without = {name: value for name, value in fields().items() if name != "cache"}
    parsed = parse_line(json.dumps(without))
    assert isinstance(parsed, ProxyLine)
    assert (parsed.cache, parsed.is_cached) == (CACHE_NOT_TOLD, False)
    assert ProxyLine.from_text(parsed.to_text()) == parsed


@pytest.mark.parametrize(
    ("cache", "is_cached"),
    [
        *((cache, True) for cache in ("HIT", "STALE", "UPDATING", "REVALIDATED")),
        *((cache, False) for cache in ("", "MISS", "EXPIRED", "BYPASS", "SCARCE")),
    ],
)
def test_cached_is_what_nobody_asked_for(cache: str, is_cached: bool) -> None:
    parsed = parse_line(json.dumps(fields(cache=cache)))
    assert isinstance(parsed, ProxyLine)
    assert parsed.is_cached is is_cached


@pytest.mark.parametrize("missing", [name for name in fields() if name != "cache"])
def test_missing_field_is_bad(missing: str) -> None:
    """A line without one of its fields is bad, or foreign if the mark ``t23`` is missing."""
    said = fields()
    del said[missing]
    assert parse_line(json.dumps(said)) == ("proxy_foreign" if missing == "t23" else "proxy_bad")


@pytest.mark.parametrize(
    "text",
    [
        '["t23"]',
        '"t23"',
        '{"t23":1',
        '{"t23":1,"status":000}',
        '{"t23":' + "[" * 5000,
        line().decode()[:90] + line().decode().rstrip(),
        json.dumps(fields(type="x" * LONGEST_LINE)),
        '\0\0{"t23":1}',
    ],
)
def test_broken_marked_line_is_bad(text: str) -> None:
    """A broken line with the mark ``t23`` is bad."""
    assert parse_line(text) == "proxy_bad"


@pytest.mark.parametrize(
    "text",
    [
        '127.0.0.1 - - [24/Nov/2026:10:00:00 +0000] "GET /v.mp4 HTTP/1.1" 200 5 "-" "curl"',
        '{"play":"x.1"}',
        "\ufffd\ufffd\0",
    ],
)
def test_a_line_without_our_mark_is_foreign(text: str) -> None:
    assert parse_line(text) == "proxy_foreign"


def test_play_id_is_parsed_back() -> None:
    """The id of a play is parsed back into writer and number. Other text gives None."""
    assert parse_play_id(play_id(WRITER, 0)) == (WRITER, 0)
    assert parse_play_id(play_id(WRITER, 10**17)) == (WRITER, 10**17)
    assert [parse_play_id(text) for text in ("", ".1", "a.", "a.b.1", "a.1x", " a.1")] == [None] * 6


# --- positions


def test_a_place_survives_its_text() -> None:
    position = LogPosition(2049, 1 << 60, bytes(range(HEAD)), 1 << 40)
    assert LogPosition.from_text(position.to_text()) == position


@pytest.mark.parametrize(
    "text", ["", "{}", "5", "[1,2,3]", '[1,2,"zz",4]', "[1,2,null,4]", '[1,2,"",-4]', "[" * 9999]
)
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        LogPosition.from_text(text)


def test_uncommitted_reading_is_repeated(path: Path) -> None:
    """A reading that is not committed is read again."""
    append(path, lines(1, 2))
    log = ProxyLog(path, [])
    first, again = log.read(), log.read()
    assert first == again
    log.committed(again)
    assert not log.read().lines


def test_a_look_without_news_changes_nothing(path: Path, follower: Follower) -> None:
    append(path, lines(1))
    assert follower.log.read().changed
    follower.poll()
    assert not follower.log.read().changed
    append(path, lines(2))
    assert follower.log.read().changed


# --- lines in the making


def test_half_a_line_waits_for_its_end(path: Path, follower: Follower) -> None:
    data = lines(1, 2)
    for cut in (10, len(lines(1)) + 50, len(data) - 1):
        append(path, data[path.stat().st_size if path.exists() else 0 : cut])
        follower.poll()
        follower.restart()
    assert follower.numbers == [1]
    append(path, data[-1:])
    assert follower.poll() == [2]


def test_interrupted_line_is_dropped(path: Path, follower: Follower) -> None:
    """Half a line with another line behind it is dropped and counted, and the next line is read."""
    append(path, lines(1) + line(2)[:100] + lines(3, 4))
    assert follower.poll() == [1, 4]
    assert follower.counts == {"proxy_bad": 1}


def test_foreign_lines_counted_and_skipped(path: Path, follower: Follower) -> None:
    """Rubbish and lines in other formats are counted and skipped."""
    rubbish = bytes(byte for byte in range(256) if byte != 10) * 4
    append(
        path,
        rubbish + b"\n\n" + lines(1) + b'1.2.3.4 - - "GET /"\n' + b'{"t23":1}\n' + b"\xff\xfe\n" + lines(2),
    )
    assert follower.poll() == [1, 2]
    assert follower.counts == {"proxy_foreign": 3, "proxy_bad": 1}


def test_oversized_line_needs_little_memory(path: Path, follower: Follower) -> None:
    """A line of 20 MB is skipped in less than 4 MB of memory, also across a restart."""
    append(path, lines(1) + b"x" * 20_000_000)
    tracemalloc.start()
    try:
        assert follower.poll(1 << 18) == [1]
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    follower.restart()
    append(path, b"rest of it " + lines(2) + lines(3))
    assert follower.poll() == [3]
    assert follower.counts == {"proxy_foreign": 1}


def test_one_mb_line_is_skipped(path: Path, follower: Follower) -> None:
    """A line of 1 MB is the only one that is lost."""
    append(path, lines(1) + b'{"t23":1,"play":"' + b"x" * 1_000_000 + b'"}\n' + lines(2))
    assert follower.poll(1 << 16) == [1, 2]
    assert follower.counts == {"proxy_bad": 1}


def test_a_backlog_comes_in_pieces(path: Path, follower: Follower) -> None:
    append(path, lines(*range(1000)))
    pieces = 1
    while follower.look(20_000):
        pieces += 1
    assert follower.numbers == list(range(1000))
    assert path.stat().st_size // 20_000 <= pieces <= path.stat().st_size // 19_000 + 1


# --- rotation


def shift(path: Path) -> None:
    """Make room for a new ``.1``."""
    for number in range(20, 0, -1):
        old = path.with_name(f"{path.name}.{number}")
        if old.exists():
            old.replace(path.with_name(f"{path.name}.{number + 1}"))


def rotate(path: Path) -> Path:
    """Rename as logrotate does; the renamed file."""
    shift(path)
    return path.replace(path.with_name(f"{path.name}.1"))


def copy_and_truncate(path: Path) -> None:
    shift(path)
    shutil.copy(path, path.with_name(f"{path.name}.1"))
    os.truncate(path, 0)


def test_rotation_reads_renamed_log_first(path: Path, follower: Follower) -> None:
    """A renamed log is read on, and before its successor."""
    append(path, lines(1))
    follower.poll()
    renamed = rotate(path)
    append(renamed, lines(2))
    append(path, lines(3))
    append(renamed, lines(4))
    assert follower.poll() == [2, 4, 3]
    append(renamed, lines(5))
    follower.restart()
    assert follower.poll() == [5]


@pytest.mark.parametrize(
    "form", ["{}-2026112{}", "{}-2026-11-2{}", "{}.2026112{}", "{}-2026112{}-176400000{}"]
)
def test_dated_names_are_followed_too(path: Path, follower: Follower, form: str) -> None:
    for day in (1, 2, 3):
        append(path, lines(day))
        path.replace(path.with_name(form.format(path.name, day, day)))
    append(path, lines(4))
    assert follower.poll() == [2, 3, 4]
    append(path, lines(5))
    assert follower.poll() == [5]


#: Names that logrotate's ``extension``, ``dateformat`` and ``olddir`` give; the latter two are counted by {day}.
NAMES = [
    "t23-2026112{day}.log",
    "t23_2026-11-2{day}.log",
    "t23.log_2026112{day}",
    "t23.log2026112{day}",
    "t23.log.2026-11-2{day}T10:00",
    "t23.log-179500000{day}",
    "old/t23.log-2026112{day}",
    "old/t23-2026112{day}.log",
]


@pytest.mark.parametrize("form", NAMES)
def test_logrotates_names_are_followed(path: Path, follower: Follower, form: str) -> None:
    """Also where the relay was away, and knows a file by its name only."""
    (path.parent / "old").mkdir()
    append(path, lines(0))
    follower.poll()
    for day in (1, 2, 3):
        append(path, lines(day))
        path.replace(path.parent / form.format(day=day))
    append(path, lines(4))
    follower.restart()
    assert follower.poll() == [1, 2, 3, 4]


@pytest.mark.parametrize("form", ["t23.{}.log", "old/t23.{}.log", "old/t23.log.{}"])
def test_numbers_before_the_extension_are_followed(path: Path, follower: Follower, form: str) -> None:
    (path.parent / "old").mkdir()
    append(path, lines(0))
    follower.poll()
    append(path, lines(1))
    path.replace(path.parent / form.format(2))
    append(path, lines(2))
    path.replace(path.parent / form.format(1))
    append(path, lines(3))
    follower.restart()
    assert follower.poll() == [1, 2, 3]


def test_day_first_dates_go_by_time(path: Path, follower: Follower) -> None:
    """``dateformat .%d-%m-%Y``: the text of a date does not sort as its time does."""
    for number, date in enumerate(("29-10-2026", "30-10-2026", "01-11-2026"), 1):
        rotated = path.with_name(f"t23.log.{date}")
        append(rotated, lines(number))
        os.utime(rotated, (1_795_000_000 + number, 1_795_000_000 + number))
    append(path, lines(4))
    assert follower.poll() == [2, 3, 4]


@pytest.mark.parametrize("form", ["elsewhere/{}", "t23.log.before-{}", "{}-of-yesterday", "gone"])
def test_any_name_is_followed_while_running(path: Path, follower: Follower, form: str) -> None:
    """A relay that runs has the file open: what nginx writes on to it until it reopens is read, wherever that is."""
    (path.parent / "elsewhere").mkdir()
    follower.poll()
    for number in (1, 3, 5):
        append(path, lines(number))
        assert follower.poll() == [number]
        with path.open("ab") as old:
            if form == "gone":
                path.unlink()
            else:
                path.rename(path.parent / form.format(number))
            old.write(lines(number + 1))
            old.flush()
            assert follower.poll() == [number + 1], "before the next log is made"
            append(path, lines(number + 10))
            old.write(lines(number + 20))
            old.flush()
            assert follower.poll() == [number + 20, number + 10], "the older file first"
    assert follower.log.problem is None


def test_removed_log_is_closed_in_time(path: Path) -> None:
    """So that its room on the disk comes back; others are closed when two more were rotated."""
    now = [100.0]
    log = ProxyLog(path, [], clock=lambda: now[0])

    def open_files() -> int:
        log.read()
        return kept_open(path.parent)

    append(path, lines(1))
    assert open_files() == 1
    path.unlink()
    assert open_files() == 1
    now[0] += 61
    assert open_files() == 0
    for number in range(6):
        append(path, lines(number))
        assert open_files() == 1 + min(number, 2)
        path.rename(path.with_name(f"anything-{number}"))
    log = ProxyLog(path, [])
    assert kept_open(path.parent) == 0, "what nobody follows any more is closed"


def kept_open(folder: Path) -> int:
    """How many files in *folder* this process has open."""
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.is_relative_to(folder) for link in links)


def test_rotation_with_two_naming_schemes(path: Path, follower: Follower) -> None:
    """If rotated files follow two naming schemes, the newer one is followed."""
    for number in (1, 2, 3):
        append(path.with_name(f"{path.name}.{number}"), lines(number))
        os.utime(path.with_name(f"{path.name}.{number}"), (1, 1))
    append(path.with_name(f"{path.name}-20261124"), lines(4))
    append(path.with_name(f"{path.name}-20261125"), lines(5))
    append(path, lines(6))
    assert follower.poll() == [4, 5, 6]


def test_compressed_files_and_neighbours_are_left_alone(path: Path, follower: Follower) -> None:
    for name in (
        "t23.log.1.gz",
        "t23.log.old",
        "t23.log.1~",
        "at23.log.1",
        "t23.log1",
        "t23xlog.1",
        "t23.log-",
    ):
        append(path.with_name(name), lines(9))
    path.with_name("t23.log.1").mkdir()
    append(path, lines(1))
    assert follower.poll() == [1]
    assert follower.log.problem is None


def test_rotation_first_poll_reads_two_files(path: Path, follower: Follower) -> None:
    """The first poll goes back no further than two files."""
    for number in range(5):
        append(path, lines(number))
        rotate(path)
    assert follower.poll() == [3, 4]


def test_rotation_while_relay_was_down(path: Path, follower: Follower) -> None:
    """A relay that was down for some rotations reads all lines since then."""
    append(path, lines(0))
    follower.poll()
    for number in range(1, 20):
        append(path, lines(number))
        rotate(path)
    append(path, lines(20))
    follower.restart()
    assert follower.poll(1) == [*range(1, 21)]
    append(path, lines(21))
    assert follower.poll() == [21], "of the older files no position is kept, and they are left alone"


@pytest.mark.parametrize("name", ["{}.{}", "{}-2026112{}"])
def test_rotation_between_listing_and_opening(
    path: Path, follower: Follower, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A rotation between the listing of the folder and the opening of a file skips no line."""

    def rotate_and_go_on(number: int) -> None:
        if name == "{}.{}":
            rotate(path)
        else:
            path.replace(path.with_name(name.format(path.name, number)))
        append(path, lines(number))

    append(path, lines(1))
    follower.poll()
    append(path, lines(2))
    rotate_and_go_on(3)
    rotate_and_go_on(4)
    follower.restart()
    really_open = os.open

    def open_late(file: Path, flags: int) -> int:
        monkeypatch.setattr(os, "open", really_open)
        rotate_and_go_on(5)
        return really_open(file, flags)

    monkeypatch.setattr(os, "open", open_late)
    follower.poll()
    follower.poll()
    assert sorted(follower.numbers) == [1, 2, 3, 4, 5]


def test_copytruncate_continues_at_offset(path: Path, follower: Follower) -> None:
    """A log that was copied and truncated is read on from its old offset in the copy."""
    append(path, lines(1, 2))
    follower.poll()
    append(path, lines(3))
    copy_and_truncate(path)
    append(path, lines(4))
    follower.restart()
    assert follower.poll() == [3, 4]


def test_copytruncate_poll_during_copy(path: Path, follower: Follower) -> None:
    """A poll while the copy is being written reads nothing twice."""
    append(path, lines(*range(10)))
    follower.poll()
    copy = path.with_name("t23.log.1")
    data = path.read_bytes()
    copy.write_bytes(data[:500])
    assert follower.poll() == []
    follower.restart()
    append(path, lines(10))
    append(copy, data[500:] + lines(10))
    assert follower.poll() == [10]
    os.truncate(path, 0)
    assert follower.poll() == []
    append(path, lines(11))
    assert follower.poll() == [11]


def test_truncated_log_grown_past_offset(path: Path, follower: Follower) -> None:
    """A truncated log that has grown past the old offset is read from its start."""
    append(path, lines(1))
    follower.poll()
    os.truncate(path, 0)
    append(path, lines(2, 3, 4))
    assert follower.poll() == [2, 3, 4]


def test_lost_tail_continues_at_end(path: Path, follower: Follower) -> None:
    """A log whose tail was lost is read on from its new end."""
    append(path, lines(1, 2, 3))
    follower.poll()
    os.truncate(path, len(lines(1, 2)))
    follower.poll()
    append(path, lines(4))
    assert follower.poll() == [4]


def test_short_log_truncated_in_place(path: Path, follower: Follower) -> None:
    """A log that is still short is recognised after a truncation by the bytes that were read."""
    append(path, b"short\n" + line(1)[:50])
    follower.poll()
    os.truncate(path, 6)
    append(path, lines(2))
    assert follower.poll() == [2]
    assert follower.counts == {"proxy_foreign": 1}


def test_short_log_replaced_in_place(path: Path, follower: Follower) -> None:
    """A short log is not mistaken for the earlier log with the same inode."""
    append(path, b"short\n")
    follower.poll()
    os.truncate(path, 0)
    append(path, lines(1))
    assert follower.poll() == [1]


def test_hard_linked_log_read_once(path: Path, follower: Follower) -> None:
    """A log with two names is read once."""
    append(path, b"short\n")
    path.with_name("t23.log.1").hardlink_to(path)
    for number in range(3):
        append(path, lines(number))
        assert follower.poll() == [number]
    assert follower.counts == {"proxy_foreign": 1}


def test_missing_file_found_again(path: Path, follower: Follower) -> None:
    """A file that was missing in one poll is recognised when it appears again."""
    append(path, lines(1))
    follower.poll()
    away = path.replace(path.with_name("t23.log.away"))
    append(path, lines(2))
    assert follower.poll() == [2]
    follower.restart()
    append(away, lines(3))
    away.replace(path.with_name("t23.log.1"))
    assert follower.poll() == [3]


def test_rotation_with_unchanged_folder_time(path: Path, follower: Follower) -> None:
    """A rotation that does not change the modification time of the folder is noticed."""
    soon = (2**31 - 1) * 10**9  # two changes within one tick, or a clock that was set back
    append(path, lines(1))
    os.utime(path.parent, ns=(soon, soon))
    follower.poll()
    append(rotate(path), lines(2))
    os.utime(path.parent, ns=(soon, soon))
    assert follower.poll() == [2]


def test_removed_log_inode_reused(path: Path, follower: Follower) -> None:
    """After a log was removed the next one is read, also if it has the same inode."""
    for number in range(20):
        append(path, lines(number))
        assert follower.poll() == [number]
        path.unlink()
    assert len(follower.store) <= POSITIONS_KEPT


def test_log_with_same_first_play(path: Path, follower: Follower) -> None:
    """A log that begins with the same play as the one before it is another log."""
    for second in range(3):  # a proxy that answers from its cache names the first play again and again
        append(path, line(10**9, end=1764547200 + second, cache="HIT"))
        assert follower.poll() == [10**9]
        rotate(path)


def test_log_moved_to_another_disk(path: Path, follower: Follower) -> None:
    """A log that moved to another disk is the same log and is not read twice."""
    append(path, lines(1))
    follower.poll()
    follower.store = [
        LogPosition.from_text(text)._replace(device=1, inode=2).to_text() for text in follower.store
    ]
    follower.restart()
    append(path, lines(2))
    assert follower.poll() == [2]


def test_symlinked_log_finds_rotated_files(tmp_path: Path) -> None:
    """The rotated files of a symbolic link are found in the folder of its target."""
    real = tmp_path / "data" / "plays.log"
    real.parent.mkdir()
    append(real, lines(1))
    link = tmp_path / "t23.log"
    link.symlink_to(real)
    follower = Follower(link)
    rotate(real)
    append(real, lines(2))
    assert follower.poll() == [1, 2]


def test_symlink_changed_to_another_folder(tmp_path: Path) -> None:
    """A symbolic link that is changed to a file in another folder is followed."""
    first, second = tmp_path / "a" / "plays.log", tmp_path / "b" / "plays.log"
    for number, real in enumerate((first, second), 1):
        real.parent.mkdir()
        append(real, lines(number))
    link = tmp_path / "t23.log"
    link.symlink_to(first)
    follower = Follower(link)
    follower.poll()
    os.utime(first.parent, ns=(1, 1))  # its names are known for long
    append(first, lines(3))
    follower.poll()
    link.unlink()
    link.symlink_to(second)
    follower.poll()
    follower.poll()
    assert follower.numbers == [1, 3, 2]


class Writer:
    """nginx, logrotate and the relay on one log, by the operations that the property test draws."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "t23.log"
        self.follower = Follower(self.path)
        self.written = 0
        self.rest = b""
        self.unseen_rotations = 0
        self.descriptor = -1
        self.reopen()

    def write(self, count: int) -> None:
        self.finish_line()
        for _ in range(count):
            os.write(self.descriptor, self.next_line())

    def half(self) -> None:
        self.finish_line()
        data = self.next_line()
        cut = 1 + self.written * 37 % (len(data) - 1)
        os.write(self.descriptor, data[:cut])
        self.rest = data[cut:]

    def next_line(self) -> bytes:
        self.written += 1
        return line(self.written, end=1764547200 + self.written)

    def finish_line(self) -> None:
        os.write(self.descriptor, self.rest)
        self.rest = b""

    def rename(self) -> None:
        if self.may_rotate():
            rotate(self.path)

    def reopen(self) -> None:
        if self.descriptor >= 0:
            self.finish_line()
            os.close(self.descriptor)
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def copy(self, looks: list[bool]) -> None:
        """Copy and truncate, with or without looks in between."""
        if not self.may_rotate():
            return
        self.finish_line()
        shift(self.path)
        data = self.path.read_bytes()
        copy = self.path.with_name("t23.log.1")
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            append(copy, piece)
            if looks and looks.pop():
                self.follower.look()
        os.truncate(self.path, 0)

    def remove(self) -> None:
        self.finish_line()
        self.poll()
        self.path.unlink(missing_ok=True)
        self.reopen()

    def may_rotate(self) -> bool:
        """Older than two rotations, unread lines are lost; that is no news."""
        if not self.path.exists():
            return False
        if self.unseen_rotations >= 2:
            self.poll()
        self.unseen_rotations += 1
        return True

    def look(self) -> None:
        self.follower.look(1)

    def poll(self) -> None:
        self.follower.poll()
        self.unseen_rotations = 0

    def crash(self) -> None:
        """The relay dies between reading and keeping."""
        self.follower.log.read()
        self.follower.restart()


OPERATIONS = st.one_of(
    st.tuples(st.just("write"), st.integers(1, 60)),
    st.tuples(st.just("copy"), st.lists(st.booleans(), max_size=2)),
    st.tuples(st.sampled_from(["half", "rename", "reopen", "remove", "look", "poll", "crash"])),
)


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OPERATIONS, max_size=40))
def test_random_operations_lose_no_line(operations: list[Any]) -> None:
    """No line is lost or read twice, whatever happens to the log in whatever order."""
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder))
        try:
            for name, *arguments in operations:
                getattr(writer, name)(*arguments)
            writer.finish_line()
            writer.poll()
        finally:
            os.close(writer.descriptor)
    assert sorted(writer.follower.numbers) == list(range(1, writer.written + 1))
    assert not writer.follower.counts


# --- what is wrong with the file


def trouble(path: Path) -> str:
    log = ProxyLog(path, [])
    assert log.read().lines == []
    assert log.problem is not None
    return log.problem


def test_readable_log_is_no_problem(path: Path) -> None:
    """A log that can be read is not a problem, whether it is empty or has lines of other formats too."""
    path.touch()
    log = ProxyLog(path, [])
    log.read()
    assert log.problem is None
    append(path, b"other\n" + lines(1))
    log.committed(log.read())
    assert log.problem is None


def test_missing_log_names_remedy(path: Path) -> None:
    """A missing log is reported with its remedy."""
    assert "does not exist" in trouble(path)
    assert "docs/nginx.md" in trouble(path)
    assert "Not a directory" in trouble(Path(__file__) / "t23.log")


def test_rotation_gap_is_no_problem(path: Path) -> None:
    """A log that is missing for a moment of a rotation is not a problem. After some seconds it is one."""
    now = [100.0]
    log = ProxyLog(path, [], clock=lambda: now[0])
    append(path, lines(1))
    log.committed(log.read())
    rotate(path)
    now[0] += 1
    log.read()
    assert log.problem is None
    now[0] += 10
    log.read()
    assert "does not exist" in (log.problem or "")
    append(path, lines(2))
    log.read()
    assert log.problem is None


def test_special_files_reported_without_waiting(tmp_path: Path) -> None:
    """A folder, a FIFO, a socket and a device are reported, and the relay never waits for them."""
    assert "is a folder" in trouble(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "is a FIFO" in trouble(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        assert "is a socket" in trouble(tmp_path / "s")
    (tmp_path / "stdout").symlink_to("/dev/null")  # as nginx's image links its logs
    assert "is a device" in trouble(tmp_path / "stdout")


def test_fifo_swapped_in_before_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO that replaces the log between two system calls does not block the relay."""
    append(path, lines(1))
    really_open = os.open

    def exchange(name: Path, flags: int) -> int:
        name.unlink()
        os.mkfifo(name)
        return really_open(name, flags)

    def waited(number: int, frame: object) -> None:
        raise AssertionError("it waits for the FIFO")

    monkeypatch.setattr(os, "open", exchange)
    former = signal.signal(signal.SIGALRM, waited)
    signal.alarm(int(PATIENCE))
    try:
        assert ProxyLog(path, []).read().lines == []
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def test_a_log_in_another_format_is_told(path: Path) -> None:
    append(path, b'127.0.0.1 - - [24/Nov/2026:10:00:00 +0000] "GET / HTTP/1.1" 200 5\n' * 3)
    assert "has 3 lines, but none in the format t23" in trouble(path)
    path.write_bytes(b'{"t23":1,"play":"a.1"}\n')
    assert "none that can be understood" in trouble(path)


def test_huge_foreign_log_reported_early(path: Path) -> None:
    """A huge log in another format is reported after its first piece."""
    append(path, b'127.0.0.1 - - "GET / HTTP/1.1" 200 5\n' * 100_000)
    log = ProxyLog(path, [])
    assert log.read().more
    assert "in the format t23" in (log.problem or "")


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder, and this process as a user that is not root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def become_nobody() -> None:
    if os.getuid() == 0:
        os.seteuid(65534)


def test_unreadable_log_is_reported() -> None:
    """A log without read permission is reported, and its readable rotated files are read."""
    with as_nobody() as folder:
        path = folder / "t23.log"
        append(path, lines(1))
        rotate(path)
        append(path, lines(2))
        path.chmod(0)
        become_nobody()
        follower = Follower(path)
        assert follower.poll() == [1]
        assert "can't be read by" in (follower.log.problem or "")
        assert "create 0640" in (follower.log.problem or "")


def test_a_group_that_may_read_is_named() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file to another group")
    with as_nobody() as folder:
        path = folder / "t23.log"
        append(path, lines(1))
        os.chown(path, 0, 4)  # adm, as Debian's logrotate makes it
        path.chmod(0o640)
        become_nobody()
        assert "usermod -aG adm nobody" in trouble(path)


def test_unlistable_folder_is_reported() -> None:
    """A folder that may not be listed, or not entered, is reported."""
    with as_nobody() as folder:
        path = folder / "nginx" / "t23.log"
        path.parent.mkdir()
        append(path, lines(1))
        rotate(path)
        append(path, lines(2))
        path.parent.chmod(0o111 if os.getuid() == 0 else 0o311)  # as Red Hat's nginx has it
        become_nobody()
        follower = Follower(path)
        assert follower.poll() == [1, 2]
        assert "can't be listed by" in (follower.log.problem or "")
        if os.getuid() == 0:
            os.seteuid(0)
        path.parent.chmod(0o600)
        become_nobody()
        assert "can't be reached by" in trouble(path)
        if os.getuid() == 0:
            os.seteuid(0)
        path.parent.chmod(0o755)


# --- real proxies


CLIP = 64_000_000
NGINX_CONF = """
daemon off;
user {user};
worker_processes 2;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    types {{ }}
    default_type video/mp4;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/t23.conf;
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://127.0.0.1:{upstream}; }}
        location /protected/ {{ internal; alias {folder}/; }}
    }}
    server {{
        listen 127.0.0.1:{upstream};
        root {folder};
        location / {{ add_header X-T23-Play $arg_play always; }}
        location /accel/ {{
            add_header X-T23-Play $arg_play;
            add_header X-Accel-Redirect /protected/clip.bin;
            default_type text/html;
            return 200;
        }}
    }}
}}
"""


class Proxy:
    """A proxy that logs plays, before an upstream that names them as the query says; ended by its pid."""

    def __init__(self, command: list[str], port: int, upstream: int, log: Path) -> None:
        self.port, self.upstream, self.log = port, upstream, log
        self.process = subprocess.Popen(command, start_new_session=True)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def reopen(self) -> None:
        """Tell it that its log was renamed, and wait until it has the new one."""
        self.signal(signal.SIGUSR1)
        assert until(self.log.exists)

    def get(
        self, number: int, path: str = "/small.bin", method: str = "GET", **headers: str
    ) -> tuple[int, int]:
        """Status and body size."""
        connection = self.connect()
        try:
            answer = self.ask(connection, number, path, method, **headers)
            return answer.status, len(answer.read())
        finally:
            connection.close()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(
        self,
        connection: http.client.HTTPConnection,
        number: int,
        path: str,
        method: str = "GET",
        **headers: str,
    ) -> http.client.HTTPResponse:
        connection.request(method, f"{path}?play={play_id(WRITER, number)}", headers=headers)
        answer = connection.getresponse()
        assert answer.getheader("X-T23-Play") is None
        return answer

    def answers(self) -> bool:
        assert self.process.poll() is None
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the proxy's workers can enter, with files to serve."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "small.bin").write_bytes(bytes(1000))
    (folder / "clip.bin").touch()
    os.truncate(folder / "clip.bin", CLIP)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def nginx(folder: Path) -> Iterator[Proxy]:
    program = need("nginx")
    port, upstream = free_port(), free_port()
    (folder / "t23.conf").write_text(NGINX_LINES.replace("{path}", str(folder / "t23.log")))
    user = "root" if os.getuid() == 0 else "nobody"
    (folder / "nginx.conf").write_text(
        NGINX_CONF.format(user=user, folder=folder, port=port, upstream=upstream)
    )
    command = [program, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    proxy = Proxy(command, port, upstream, folder / "t23.log")
    try:
        assert until(proxy.answers)
        yield proxy
    finally:
        proxy.stop()


def next_lines(log: ProxyLog, count: int) -> list[ProxyLine]:
    """The next *count* lines; they are there soon after the client has its answer."""
    found: list[ProxyLine] = []

    def look() -> bool:
        reading = log.read()
        log.committed(reading)
        assert not reading.counts
        found.extend(reading.lines)
        return len(found) >= count

    assert until(look)
    return found


def test_nginx_logs_sent_bytes(nginx: Proxy) -> None:
    """nginx logs what it sent for each play: whole files, ranges, offloads, HEAD and 404."""
    log = ProxyLog(nginx.log, [])
    assert nginx.get(1) == (200, 1000)
    assert nginx.get(2, "/clip.bin", Range="bytes=1000-5999") == (206, 5000)
    assert nginx.get(3, "/accel/x", Range="bytes=100-") == (206, CLIP - 100)
    assert nginx.get(4, "/clip.bin", method="HEAD") == (200, 0)
    assert nginx.get(5, "/none.bin")[0] == 404
    told = {int(line.play.split(".")[1]): line for line in next_lines(log, 5)}
    whole, ranged, offloaded, head, missing = (told[number] for number in range(1, 6))
    assert (whole.status, whole.body, whole.complete, whole.length) == (200, 1000, True, 1000)
    assert (whole.content_type, whole.part, whole.cache) == ("video/mp4", Part(0, 999, 1000), "")
    assert (ranged.status, ranged.body, ranged.part) == (206, 5000, Part(1000, 5999, CLIP))
    assert (offloaded.body, offloaded.part) == (CLIP - 100, Part(100, CLIP - 1, CLIP))
    assert (head.body, missing.status) == (0, 404)
    assert abs(whole.ended_ms / 1000 - nginx.log.stat().st_mtime) < 60
    assert log.problem is None


def leave(proxy: Proxy, number: int, path: str) -> None:
    """Take a little of the answer and go."""
    connection = proxy.connect()
    try:
        assert len(proxy.ask(connection, number, path).read(100_000)) == 100_000
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/clip.bin", "/accel/x"])
def test_nginx_tells_that_the_client_left(nginx: Proxy, path: str) -> None:
    log = ProxyLog(nginx.log, [])
    leave(nginx, 1, path)
    (line,) = next_lines(log, 1)
    assert (line.complete, line.length) == (False, CLIP)
    assert 100_000 <= line.body < CLIP / 2


def test_nginx_rotation_under_load(nginx: Proxy) -> None:
    """No line of a busy nginx is lost or read twice with renamed logs and restarts of the relay."""
    total, threads = 8000, 4
    follower = Follower(nginx.log)
    dice = random.Random(8)

    def ask(first: int) -> None:
        connection = nginx.connect()
        for number in range(first, total, threads):
            nginx.ask(connection, number, "/small.bin").read()
        connection.close()

    clients = [threading.Thread(target=ask, args=(first,)) for first in range(threads)]
    for client in clients:
        client.start()
    rotations = 0
    while any(client.is_alive() for client in clients) or rotations < 5:
        rotate(nginx.log)
        if dice.random() < 0.5:
            follower.look(1)
        nginx.reopen()
        rotations += 1
        follower.poll()
        if dice.random() < 0.3:
            follower.log.read()
            follower.restart()
        until(lambda: not any(client.is_alive() for client in clients), 0.03)
    for client in clients:
        client.join()
    assert until(lambda: follower.poll() == [] and len(follower.numbers) >= total)
    assert sorted(follower.numbers) == list(range(total))
    assert not follower.counts


@pytest.mark.parametrize("event", ["rename", "reload"])
def test_nginx_rotation_during_transfer(nginx: Proxy, event: str) -> None:
    """A transfer during a rotation or a reload is logged once."""
    follower = Follower(nginx.log)
    nginx.get(1)
    connection = nginx.connect()
    answer = nginx.ask(connection, 2, "/clip.bin")
    answer.read(1000)
    if event == "rename":
        rotate(nginx.log)
        nginx.reopen()
    else:
        nginx.signal(signal.SIGHUP)
    nginx.get(3)
    follower.poll()
    follower.restart()
    assert len(answer.read()) == CLIP - 1000
    connection.close()
    assert until(lambda: follower.poll() == [] and len(follower.numbers) >= 3)
    assert sorted(follower.numbers) == [1, 2, 3]


def test_nginx_copytruncate_loses_no_line(nginx: Proxy) -> None:
    """A log of nginx that is copied and truncated is read on without a lost or repeated line."""
    follower = Follower(nginx.log)
    for number in range(60):
        nginx.get(number)
        if number % 20 == 19:
            # No line may be on its way: what falls between copy and truncation is lost to everybody.
            assert until(lambda: nginx.log.read_bytes().count(b"\n") == 20)
            copy_and_truncate(nginx.log)
        if number % 7 == 3:
            follower.look()
    assert until(lambda: follower.poll() == [] and len(follower.numbers) >= 60)
    assert sorted(follower.numbers) == list(range(60))


APACHE_CONF = """
ServerName localhost
ServerRoot {folder}
Listen 127.0.0.1:{port}
PidFile {folder}/apache.pid
DefaultRuntimeDir {folder}
ErrorLog {folder}/apache-error.log
User {user}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule headers_module {modules}/mod_headers.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_http_module {modules}/mod_proxy_http.so
ProxyPass / http://127.0.0.1:{upstream}/
{lines}
"""


@pytest.fixture
def apache_proxy(nginx: Proxy, folder: Path) -> Iterator[Proxy]:
    program = need("apache2")
    port = free_port()
    log = folder / "apache.log"
    (folder / "apache.conf").write_text(
        APACHE_CONF.format(
            folder=folder,
            port=port,
            upstream=nginx.upstream,
            user="www-data",
            modules="/usr/lib/apache2/modules",
            lines=APACHE_LINES.replace("{path}", str(log)),
        )
    )
    proxy = Proxy([program, "-D", "FOREGROUND", "-f", str(folder / "apache.conf")], port, nginx.upstream, log)
    try:
        assert until(proxy.answers)
        yield proxy
    finally:
        proxy.stop()


def test_apache_tells_the_same(apache_proxy: Proxy) -> None:
    log = ProxyLog(apache_proxy.log, [])
    assert apache_proxy.get(1) == (200, 1000)
    assert apache_proxy.get(2, "/clip.bin", Range="bytes=1000-5999") == (206, 5000)
    leave(apache_proxy, 3, "/clip.bin")
    told = {int(line.play.split(".")[1]): line for line in next_lines(log, 3)}
    assert (told[1].status, told[1].body, told[1].complete, told[1].content_type) == (
        200,
        1000,
        True,
        "video/mp4",
    )
    assert (told[2].status, told[2].body, told[2].part) == (206, 5000, Part(1000, 5999, CLIP))
    assert (told[3].complete, told[3].length) == (False, CLIP)
    assert 100_000 <= told[3].body < CLIP / 2
    assert abs(told[1].ended_ms / 1000 - apache_proxy.log.stat().st_mtime) < 60
