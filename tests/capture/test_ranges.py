"""What part of a file a response says it carries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t23_middleware.capture.ranges import LONGEST, UNKNOWN, asked_first, part_of
from t23_middleware.transfer import Part


@pytest.mark.parametrize(
    ("status", "length", "content_range", "asked", "part"),
    [
        (200, 1000, None, None, Part(0, 999, 1000)),
        (200, None, None, None, Part(0, None, None)),
        (200, 1000, None, "bytes=500-", Part(0, 999, 1000)),  # the app ignored the Range
        (206, 500, "bytes 500-999/1000", "bytes=500-", Part(500, 999, 1000)),
        (206, 500, "bytes 500-999/*", "bytes=500-", Part(500, 999, None)),
        (206, 500, "Bytes 500-999/1000", None, Part(500, 999, 1000)),
        (206, 10, "bytes 0-9/1000", "bytes=500-", Part(0, 9, 1000)),  # what was said beats what was asked
        (206, 500, None, "bytes=500-", Part(500, None, None)),
        (206, 10, None, "bytes=500-509", Part(500, 509, None)),
        (206, 500, None, "bytes=-500", UNKNOWN),
        (206, 500, None, "bytes=0-9,20-29", UNKNOWN),
        (206, 500, None, "bytes=0-9,20-", UNKNOWN),
        (206, 500, None, "bytes=9-0", UNKNOWN),
        (206, 500, None, "bytes=abc", UNKNOWN),
        (206, 500, None, "seconds=0-9", UNKNOWN),
        (206, 500, "bytes */1000", None, UNKNOWN),
        (206, 500, "bytes 9-0/1000", None, UNKNOWN),
        (206, 500, "seconds 0-9/60", None, UNKNOWN),
        (206, 500, "bytes 500-999/1000\r\nX: y", None, UNKNOWN),
        (206, 500, None, "bytes=" + "9" * 30 + "-", UNKNOWN),
        (206, 500, None, "bytes=0-" + "9" * 30, UNKNOWN),
        (206, 500, "bytes 0-9/" + "9" * 30, None, UNKNOWN),
        (206, 500, None, "bytes=" + "9" * 5000 + "-", UNKNOWN),
        (206, 500, None, None, UNKNOWN),
    ],
)
def test_the_part_of_a_response(
    status: int, length: int | None, content_range: str | None, asked: str | None, part: Part
) -> None:
    assert part_of(status, length, content_range, asked) == part


@pytest.mark.parametrize(
    ("status", "length", "asked", "first"),
    [
        (200, 1000, "bytes=500-", 500),
        (200, None, "bytes=500-", 500),
        (200, 1000, "bytes=500-509", 500),
        (200, 1000, "bytes=0-", 0),
        (200, 1000, "bytes=0-1", 0),
        (200, 1000, "bytes=-200", 800),
        (200, 1000, "bytes=-2000", 0),
        (200, None, "bytes=-200", None),  # where that is, nobody said
        (200, 1000, "bytes=300-309,500-", 300),
        (200, 1000, "bytes=2000-", 2000),
        (200, 1000, "Bytes = 500-", 500),
        (206, 500, "bytes=500-", None),
        (200, 1000, None, None),
        (200, 1000, "", None),
        (200, 1000, "bytes=9-0", None),
        (200, 1000, "bytes=abc", None),
        (200, 1000, "seconds=5-", None),
        (200, 1000, "bytes=" + "9" * 30 + "-", None),
        (200, 1000, "bytes=" + "9" * 5000 + "-", None),
    ],
)
def test_what_a_whole_answer_was_asked(
    status: int, length: int | None, asked: str | None, first: int | None
) -> None:
    """The place that the player wanted is noted where the answer is the whole file."""
    assert asked_first(status, length, asked) == first


headers = st.none() | st.text(max_size=40) | st.text("bytes =-/*,0123456789\r\n", max_size=40)


@given(st.sampled_from([200, 206]), st.none() | st.integers(0, 2**62), headers, headers)
def test_any_header_gives_valid_numbers(
    status: int, length: int | None, content_range: str | None, asked: str | None
) -> None:
    """No header makes the parsers raise or return a number that no file has."""
    first = asked_first(status, length, asked)
    assert first is None or 0 <= first <= LONGEST
    part = part_of(status, length, content_range, asked)
    assert all(number is None or -1 <= number <= LONGEST for number in part)
    if status == 206 and part.size is not None:
        assert part.size > 0
