"""The one format between the two processes."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t23_middleware.transfer import (
    APP,
    FORMAT,
    LONGEST_LINE,
    OFFLOADED,
    PROXY,
    Acknowledged,
    Connection,
    Counts,
    ForeignLine,
    NotALine,
    Opening,
    Part,
    Play,
    Progress,
    TornLine,
    Transfer,
    Writer,
    decode,
    encode,
)

numbers = st.integers(0, 2**62)
optional = st.none() | numbers
words = st.text(st.characters(exclude_categories=("Cs",)), max_size=100)
plays = st.builds(
    Play,
    words,
    words,
    words,
    st.none() | st.integers(0, 1),
    st.none() | words,
    st.none() | words,
    st.none() | words,
)
openings = st.builds(
    Opening,
    numbers,
    numbers,
    numbers,
    plays,
    st.builds(Part, optional, optional, optional),
    numbers,
    optional,
    st.sampled_from([APP, PROXY, OFFLOADED]),
    optional,
    st.none() | st.builds(Connection, numbers, numbers, numbers, numbers),
)
lines = st.one_of(
    openings,
    st.builds(Transfer, openings, numbers, numbers, numbers, numbers, optional),
    st.builds(Progress, openings, numbers, numbers, numbers, optional),
    st.builds(Acknowledged, numbers, numbers, numbers, optional, numbers),
    st.builds(Writer, words, st.just(FORMAT), words, words, numbers, words, numbers),
    st.builds(Counts, st.dictionaries(words, numbers, max_size=5)),
)


def sealed(content: Any) -> bytes:
    """A line whose checksum fits, whatever it holds."""
    payload = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"%08x %b" % (zlib.crc32(payload), payload)


@given(lines)
def test_encoded_line_decodes_to_same(line: Any) -> None:
    """Anything encoded is one line, and it decodes to the same value."""
    encoded = encode(line)
    assert encoded.endswith(b"\n")
    assert encoded.count(b"\n") == 1
    assert decode(encoded[:-1]) == line


@given(lines, st.data())
def test_cut_line_is_torn(line: Any, data: st.DataObject) -> None:
    """A line that was cut short is torn."""
    encoded = encode(line)[:-1]
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(TornLine):
        decode(encoded[:cut])


@given(lines, st.data())
def test_overwritten_line_is_torn(line: Any, data: st.DataObject) -> None:
    """A line with one byte overwritten is torn."""
    encoded = bytearray(encode(line)[:-1])
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TornLine):
        decode(bytes(encoded))


@given(st.binary(max_size=200))
def test_no_bytes_make_decoding_raise_anything_else(line: bytes) -> None:
    with pytest.raises(NotALine):
        decode(line)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=20,
)


@pytest.mark.parametrize("more", [[], [None], ["1.0", "boot", 5, "digest", "later"]], ids=repr)
def test_writer_of_another_format(more: list[Any]) -> None:
    """A header of another format is recognised whatever else it says."""
    assert decode(sealed(["writer", "7-ab", FORMAT + 1, *more])) == Writer(
        "7-ab", FORMAT + 1, "", "", 0, "", 0
    )


@given(
    st.sampled_from(["writer", "open", "close", "acked", "counts", "later"]),
    st.lists(json_values, max_size=8),
)
def test_whole_lines_known_or_foreign(word: str, fields: list[Any]) -> None:
    """A whole line with any content is either known or foreign; it raises nothing else."""
    try:
        decode(sealed([word, *fields]))
    except ForeignLine:
        pass


@pytest.mark.parametrize(
    "content",
    [
        ["later", 1],
        ["counts", [1]],
        ["counts", {"no_session": True}],
        ["counts", {"no_session": "3"}],
        ["counts"],
        ["open", True, 1, 1, ["s", "1", "", None, None, None, None], [0, 1, 2], 200, 2],
        ["open", 1, 1, 1, ["s", "1", "", None, None, None], [0, 1, 2], 200, 2],
        ["open", 1, 1, 1, "abcdefg", [0, 1, 2], 200, 2],
        ["close", [1, 1, 1, ["s", "1", "", None, None, None, None], [0, 1, 2], 200, 2], 1, 1, 2.0],
        {"open": 1},
        [],
        None,
        [["open"], 1],
        b"\xff\xfe\xff",
        b"[" * 4000,
    ],
    ids=repr,
)
def test_unknown_whole_lines_are_foreign(content: Any) -> None:
    """Whole lines that this version does not know are foreign."""
    with pytest.raises(ForeignLine):
        decode(sealed(content))


def test_too_long_line_is_torn() -> None:
    """A line that is too long is not accepted, although its checksum is correct."""
    with pytest.raises(TornLine):
        decode(sealed(["counts", {"x" * LONGEST_LINE: 1}]))


def test_longest_play_fits_in_line() -> None:
    """The longest play that is accepted fits into one line."""
    widest = '"' * 256
    play = Play(widest, "9" * 20, "h" * 253, 1, '"' * 100, "\N{GRINNING FACE}" * 100, "\\" * 100)
    part = Part(2**62, 2**62, 2**62)
    line = Transfer(Opening(2**62, 2**62, 2**62, play, part, 206, 10**18), 2**62, 2**62, 2**62)
    assert decode(encode(line)[:-1]) == line


def test_part_size_needs_both_ends() -> None:
    """The size of a part is known only if both its ends are known."""
    assert Part(10, 19, None).size == 10
    assert Part(10, None, 100).size is None
    assert Part(None, None, None).size is None
