"""What the relay reads: every whole line once, in the order of all writers together."""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t23_middleware.relay import journals as module
from t23_middleware.relay.journals import PIECE, Journals, Reading
from t23_middleware.state import StateFolder
from t23_middleware.transfer import FORMAT, LONGEST_LINE, Counts, Opening, encode

from .writers import MS, alive, header, journal, living, opening, transfer


def now() -> int:
    return time.monotonic_ns()


def take(journals: Journals, until_ns: int | None = None) -> Reading:
    """One look, kept by an outbox that never fails."""
    reading = journals.read(now() if until_ns is None else until_ns)
    journals.committed(reading)
    return reading


def drain(journals: Journals) -> list[Reading]:
    """Looks until nothing is left that can be read at once."""
    readings = [take(journals)]
    while readings[-1].more:
        readings.append(take(journals))
    return readings


def numbers(*readings: Reading) -> list[int]:
    """Numbers of the responses that ended, in the order in which they are judged."""
    return [fact.event.opening.number for each in readings for fact in each.facts if not is_opening(fact)]


def is_opening(fact: module.Fact) -> bool:
    return isinstance(fact.event, Opening)


# Order.


def test_two_writers_merged_by_time(folder):
    """The lines of two writers are merged in the order of their time."""
    start = now() - 10**9
    journal(folder, "1-a", *[transfer(n, start + n * MS) for n in (0, 2, 4)])
    journal(folder, "2-b", *[transfer(n, start + n * MS) for n in (1, 3, 5)])
    assert numbers(take(Journals(folder, {}))) == [0, 1, 2, 3, 4, 5]


def test_overtaking_threads_sorted_by_time(folder):
    """Lines of threads that overtook each other are returned in the order of their time."""
    start = now() - 10**9
    journal(folder, "1-a", *[transfer(n, start + n * MS) for n in (1, 0, 3, 2)])
    assert numbers(take(Journals(folder, {}))) == [0, 1, 2, 3]


def test_young_line_waits_for_others(
    folder,
):
    """A line after the limit waits, so that a late line of another writer still comes before it."""
    limit = now() - 10**9
    with living(folder) as first, living(folder) as second:
        first.write(transfer(1, limit - MS), transfer(3, limit + 2 * MS))
        journals = Journals(folder, {})
        assert numbers(take(journals, limit)) == [1]
        assert not journals.all_read()
        second.write(transfer(2, limit + MS))
        assert numbers(take(journals, limit + 5 * MS)) == [2, 3]
        assert journals.all_read()


def test_dead_writer_line_waits_too(folder):
    """A line that a dead writer wrote after the limit also waits until the limit passes it."""
    limit = now() - 10**9
    journal(folder, "1-a", transfer(2, limit + 2 * MS))
    journal(folder, "2-b", transfer(1, limit + MS))
    journals = Journals(folder, {})
    assert numbers(take(journals, limit)) == []
    assert journals.remove_finished() == []
    assert numbers(take(journals, limit + 5 * MS)) == [1, 2]


def test_backlog_read_in_ordered_pieces(folder):
    """A backlog of several MB from four writers is read in pieces, in order, and each line once."""
    start, total = now() - 3600 * 10**9, 16_000
    owners = [0 if n % 10 else 1 + n // 10 % 2 for n in range(total)]
    owners[-600:] = [3] * 600
    written: dict[int, list[bytes]] = {0: [], 1: [], 2: [], 3: []}
    for number, owner in enumerate(owners):
        at = start + number * MS * 10
        written[owner] += [encode(opening(number, at, "s" * 32)), encode(transfer(number, at + MS, "s" * 32))]
    for owner, lines in written.items():
        for sequence in range(0, len(lines), 5000):
            journal(folder, f"{owner}-w", *lines[sequence : sequence + 5000], sequence=sequence // 5000)
    assert sum(path.stat().st_size for path in folder.journals.iterdir()) > 4 << 20
    readings = drain(Journals(folder, {}))
    assert len(readings) > 5
    assert numbers(*readings) == list(range(total))
    assert len([fact for each in readings for fact in each.facts if is_opening(fact)]) == total
    assert [each.until_ns for each in readings] == sorted(each.until_ns for each in readings)


def test_backlog_decoded_once(folder, monkeypatch):
    """Each line of a backlog is decoded about once.

    Otherwise a night without a relay costs the square of what was written, and all of it in memory at once.
    """
    start, each = now() - 3600 * 10**9, 3000
    for sequence in range(6):
        lines = [transfer(n, start + n * MS) for n in range(sequence * each, (sequence + 1) * each)]
        journal(folder, "1-a", *lines, sequence=sequence)
    decoded = 0
    decode = module.decode

    def counting(line: bytes) -> object:
        nonlocal decoded
        decoded += 1
        return decode(line)

    monkeypatch.setattr(module, "decode", counting)
    assert numbers(*drain(Journals(folder, {}))) == list(range(6 * each))
    assert decoded < 1.5 * 6 * each


def test_reading_has_complete_until_time(folder):
    """A reading names the time up to which it contains every line."""
    start = now() - 3600 * 10**9
    journal(folder, "1-a", *[transfer(n, start + n * MS) for n in range(3000)])
    journal(folder, "2-b", transfer(10_000, start + 2_999_500_000))
    journals = Journals(folder, {})
    first = take(journals)
    assert first.more
    assert max(fact.at_ns for fact in first.facts) == first.until_ns < start + 2_999 * MS
    assert numbers(first, *drain(journals)) == [*range(3000), 10_000]


# Half lines, torn lines, and what is no line.


def test_half_line_of_live_writer(folder):
    """Half a line of a live writer waits for its end."""
    line = encode(transfer(1, now() - MS))
    path = journal(folder, "1-a", line[:50])
    with alive(folder, "1-a"):
        journals = Journals(folder, {})
        assert numbers(take(journals)) == []
        assert not journals.all_read()
        with path.open("ab") as file:
            file.write(line[50:])
        assert numbers(take(journals)) == [1]
        assert journals.remove_finished() == []


def test_half_line_of_dead_writer(folder):
    """Half a line of a dead writer is counted as torn and does not keep its journal."""
    path = journal(folder, "1-a", transfer(1, now() - MS), encode(transfer(2, now()))[:50])
    journals = Journals(folder, {})
    reading = take(journals)
    assert (numbers(reading), reading.counts) == ([1], Counter(journal_torn=1))
    assert journals.remove_finished() == [path.name]
    assert not path.exists()


def test_half_header_of_dead_writer(folder):
    """Half a header of a dead writer is counted as torn and does not keep its journal."""
    path = journal(folder, "1-a")
    path.write_bytes(path.read_bytes()[:20])
    journals = Journals(folder, {})
    assert take(journals).counts == Counter(journal_torn=1)
    assert journals.remove_finished() == [path.name]


def test_empty_journal_of_live_writer(folder):
    """An empty journal is kept while its writer lives and removed afterwards."""
    path = journal(folder, "1-a")
    path.write_bytes(b"")
    journals = Journals(folder, {})
    with alive(folder, "1-a"):
        take(journals)
        assert journals.remove_finished() == []
    time.sleep(module.CHECK_WRITERS_EVERY)
    take(journals)
    assert journals.remove_finished() == [path.name]


def sealed(content: object) -> bytes:
    """A whole line, whatever it says."""
    payload = json.dumps(content).encode()
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


BAD_LINES = {
    "flipped bit": (encode(transfer(9, 1)).replace(b"100000", b"100001"), "journal_torn"),
    "no checksum": (b"hello\n", "journal_torn"),
    "zeros": (b"\0" * 4096 + b"\n", "journal_torn"),
    "too long": (sealed(["counts", {"x" * LONGEST_LINE: 1}]), "journal_torn"),
    "unknown word": (sealed(["progress", 1, 2]), "journal_foreign"),
    "not a list": (sealed({"a": 1}), "journal_foreign"),
    "nested": (b"%08x %b\n" % (zlib.crc32(b"[" * 4000), b"[" * 4000), "journal_foreign"),
    "a number beyond 64 bits": (sealed(["counts", {"x": 1 << 70}]), "journal_foreign"),
    "half a surrogate pair": (sealed(["counts", {"\ud800": 1}]), "journal_foreign"),
}


@pytest.mark.parametrize(("bad", "counter"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_counted(bad, counter, folder):
    """A line that is not valid is counted and stops nothing."""
    start = now() - 10**9
    journal(folder, "1-a", transfer(1, start), bad, transfer(2, start + MS))
    reading = take(Journals(folder, {}))
    assert (numbers(reading), reading.counts) == ([1, 2], Counter({counter: 1}))


def test_blank_lines_are_no_events(folder):
    """The newline that separates a torn line from the next one is neither an event nor counted."""
    start = now() - 10**9
    journal(folder, "1-a", b"\n", transfer(1, start), b"\n\n", transfer(2, start + MS))
    reading = take(Journals(folder, {}))
    assert numbers(reading) == [1, 2]
    assert +reading.counts == Counter()


@pytest.mark.parametrize("writer_lives", [True, False])
def test_rubbish_without_newline_is_skipped(writer_lives, folder):
    """A MB of rubbish without a newline is skipped."""
    start = now() - 10**9
    path = journal(folder, "1-a", transfer(1, start), b"\xff" * (1 << 20))
    if writer_lives:
        with alive(folder, "1-a"):
            journals = Journals(folder, {})
            readings = drain(journals)
            with path.open("ab") as file:
                file.write(b"\n" + encode(transfer(2, start + MS)))
            readings += drain(journals)
            assert numbers(*readings) == [1, 2]
    else:
        journals = Journals(folder, {})
        readings = drain(journals)
        assert numbers(*readings) == [1]
        assert journals.remove_finished() == [path.name]
    assert set(sum((+each.counts for each in readings), Counter())) == {"journal_torn"}


def test_rubbish_holds_up_no_other_writer(folder):
    start = now() - 10**9
    journal(folder, "1-a").write_bytes(b"\xff" * (2 * PIECE))
    journal(folder, "2-b", transfer(1, start))
    assert numbers(*drain(Journals(folder, {}))) == [1]


def test_counts_are_added_up(folder):
    journal(folder, "1-a", Counts({"a": 1, "b": 2}), Counts({"a": 3}))
    assert take(Journals(folder, {})).counts == Counter(a=4, b=2)


# Places.


def test_restart_continues_at_offset(folder):
    """Another relay goes on at the offset of the last one."""
    start = now() - 10**9
    path = journal(folder, "1-a", transfer(1, start))
    first = take(Journals(folder, {}))
    with path.open("ab") as file:
        file.write(encode(transfer(2, start + MS)))
    assert numbers(take(Journals(folder, first.offsets))) == [2]


def test_uncommitted_reading_read_again(folder):
    """A reading that was not committed is read again."""
    path = journal(folder, "1-a", transfer(1, now() - MS))
    lost = Journals(folder, {}).read(now())
    again = Journals(folder, {}).read(now())
    assert numbers(lost) == numbers(again) == [1]
    assert path.exists()


def test_kill_before_unlink(folder):
    """After a kill between the commit and the unlink, the journal is removed without being read again."""
    path = journal(folder, "1-a", transfer(1, now() - MS))
    kept = take(Journals(folder, {}))
    journals = Journals(folder, kept.offsets)
    reading = take(journals)
    assert (reading.facts, reading.offsets) == ([], {})
    assert journals.remove_finished() == [path.name]
    assert not path.exists()


def test_kill_after_unlink(folder):
    """After a kill between the unlink and the removal of the offset, the removed journal is named again, once."""
    journals = Journals(folder, {"1-gone.000000.journal": 500})
    take(journals)
    assert journals.remove_finished() == ["1-gone.000000.journal"]
    assert journals.remove_finished() == []


def test_offset_beyond_end(folder):
    """An offset beyond the end of a journal, as after a power cut, makes no line, and the journal is removed."""
    path = journal(folder, "1-a", transfer(1, now() - MS))
    journals = Journals(folder, {path.name: path.stat().st_size + 4096})
    assert numbers(take(journals)) == []
    assert journals.remove_finished() == [path.name]


def test_removed_journal_is_no_error(folder):
    """A journal that somebody else removed is not an error."""
    path = journal(folder, "1-a", transfer(1, now() - MS))
    journals = Journals(folder, {})
    take(journals)
    path.unlink()
    assert take(journals).facts == []
    assert journals.remove_finished() == [path.name]


def test_foreign_files_are_left_alone(folder):
    """Files that are not journals are neither read nor removed."""
    strangers = ["notes.txt", "a.b.journal", "a.journal", "a.000000.more.journal"]
    for name in strangers:
        (folder.journals / name).write_text("hello\n")
    journals = Journals(folder, {})
    reading = take(journals)
    assert (reading.facts, reading.offsets, reading.counts) == ([], {}, Counter())
    assert journals.remove_finished() == []
    assert sorted(path.name for path in folder.journals.iterdir()) == sorted(strangers)


def test_unreadable_journal_is_logged_once(folder, caplog):
    """A journal that can't be read is logged once and kept, and blocks no other journal."""
    (folder.journals / "1-a.000000.journal").mkdir()
    journal(folder, "2-b", transfer(1, now() - MS))
    journals = Journals(folder, {})
    readings = [take(journals), take(journals)]
    assert numbers(*readings) == [1]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert journals.all_read()
    assert not journals.has_news()
    assert journals.remove_finished() == ["2-b.000000.journal"]
    assert journals.dead_writers({"1-a"}) == set()


# Who lives.


def test_journal_removed_after_writer_death(folder):
    """A journal is removed only when its writer is dead, and then together with its lock."""
    with living(folder) as writer:
        writer.write(transfer(1, now()))
        journals = Journals(folder, {})
        assert numbers(take(journals)) == [1]
        assert journals.remove_finished() == []
        assert journals.has_live_writer()
        assert [each.name for each in journals.live_writers()] == [writer.name]
        writer.write(transfer(2, now()))
        assert numbers(take(journals)) == [2]
        writer.kill()
        time.sleep(module.CHECK_WRITERS_EVERY)
        assert numbers(take(journals)) == []
        assert not journals.has_live_writer()
        assert journals.remove_finished() == [f"{writer.name}.000000.journal"]
    assert list(folder.journals.iterdir()) == []


def test_only_locks_of_the_dead_are_removed(folder):
    (folder.journals / "2-dead.lock").touch()
    with alive(folder, "3-b"):
        journals = Journals(folder, {})
        take(journals)
        journals.remove_finished()
        assert [path.name for path in folder.journals.iterdir()] == ["3-b.lock"]


def test_lock_kept_with_its_journal(folder):
    """A lock file stays as long as a journal of its writer exists."""
    path = journal(folder, "1-a")
    path.write_bytes(encode(header("1-a", format=FORMAT + 1)))
    lock = folder.journals / "1-a.lock"
    lock.touch()
    journals = Journals(folder, {})
    take(journals)
    assert journals.remove_finished() == []
    assert lock.exists()


def test_writer_starts_between_checks(folder, monkeypatch):
    """A writer that starts between the search for files and the check of the locks is not taken for dead."""
    with living(folder) as writer:
        journals = Journals(folder, {})
        find = Journals._find

        def find_and_then_begin(self: Journals) -> None:
            monkeypatch.undo()
            find(self)
            writer.write(transfer(1, now()))

        monkeypatch.setattr(Journals, "_find", find_and_then_begin)
        take(journals)
        assert journals.remove_finished() == []
        writer.write(transfer(2, now()))
        assert numbers(take(journals)) == [1, 2]
        assert journals.remove_finished() == []


def test_writer_starts_after_check(folder):
    """A writer that starts right after the check of the locks is found by the next one."""
    journals = Journals(folder, {})
    take(journals)
    with living(folder) as writer:
        writer.write(transfer(1, now()))
        assert numbers(take(journals)) == [1]
        assert journals.has_live_writer()
        assert journals.remove_finished() == []


def test_writer_dead_when_journals_read(folder, monkeypatch):
    """A writer is dead only when all its journals are read.

    This one began its next file after the search for files, and died before the check of the locks.
    """
    journal(folder, "1-a", opening(1, now() - 5 * MS))
    journals = Journals(folder, {})
    look = Journals._check_writers

    def rotate_die_and_look(self: Journals) -> None:
        monkeypatch.undo()
        journal(folder, "1-a", transfer(1, now() - MS), sequence=1)
        look(self)

    monkeypatch.setattr(Journals, "_check_writers", rotate_die_and_look)
    assert numbers(take(journals)) == []
    assert journals.dead_writers({"1-a"}) == set()
    assert numbers(take(journals)) == [1]
    assert journals.dead_writers({"1-a", "2-unheard-of"}) == {"1-a", "2-unheard-of"}


def test_journal_kept_for_two_rotations(folder):
    """A journal is kept until its live writer is two rotations further."""
    start = now() - 10**9
    paths = [journal(folder, "1-a", transfer(0, start))]
    with alive(folder, "1-a"):
        journals = Journals(folder, {})
        for sequence in (1, 2):
            assert numbers(take(journals)) == [sequence - 1]
            assert journals.remove_finished() == []
            paths.append(journal(folder, "1-a", transfer(sequence, start + sequence * MS), sequence=sequence))
        with paths[0].open("ab") as file:  # a thread that held the first file for long
            file.write(encode(transfer(9, start)))
        assert sorted(numbers(take(journals))) == [2, 9]
        assert journals.remove_finished() == [paths[0].name]


def test_former_journal_goes_in_time(folder: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has no more plays, or no room for them, does not keep its former journal for ever."""
    paths = [journal(folder, "1-a", transfer(n, now() - 10 * MS + n), sequence=n) for n in range(2)]
    with alive(folder, "1-a"):
        journals = Journals(folder, {})
        assert numbers(take(journals)) == [0, 1]
        assert journals.remove_finished() == []
        monkeypatch.setattr("t23_middleware.relay.journals.FORMER_FOR", 0.0)
        assert journals.remove_finished() == [paths[0].name]
        assert journals.remove_finished() == []


def test_rotation_found_during_dead_check(folder):
    """A rotation that is found only while dead writers are checked ends no file before it is read."""
    first = journal(folder, "1-a", transfer(0, now() - 10 * MS))
    with alive(folder, "1-a"):
        journals = Journals(folder, {})
        take(journals)
        with first.open("ab") as file:
            file.write(encode(transfer(1, now() - 9 * MS)))
        journal(folder, "1-a", sequence=1)
        journal(folder, "1-a", sequence=2)
        assert journals.dead_writers({"1-a"}) == set()
        assert journals.remove_finished() == []
        assert numbers(take(journals)) == [1]


def test_rotation_by_real_writer(folder):
    """A real writer rotates while its files are read, and no line is lost and no old file is left."""
    with living(folder) as writer:
        journals, seen = Journals(folder, {}), []
        for first in range(0, 30_000, 20):
            # One write of many lines, else the test's own pipe takes most of the time.
            writer.write(b"".join(encode(transfer(n, now() - 10**9 + n)) for n in range(first, first + 20)))
            if first % 1500 == 0:
                seen += numbers(*drain(journals))
                journals.remove_finished()
        seen += numbers(*drain(journals))
        journals.remove_finished()
        assert seen == list(range(30_000))
        assert len(list(folder.journals.glob("*.journal"))) == 2 < journals._newest[writer.name]


def test_newest_live_writer_comes_last(folder):
    """The writer that started last comes last in the live writers."""
    with living(folder, digest="old") as old:
        old.write(transfer(1, now()))
        with living(folder, digest="new") as new:
            new.write(transfer(2, now()))
            journals = Journals(folder, {})
            take(journals)
            assert [each.digest for each in journals.live_writers()] == ["old", "new"]


def test_news_needs_writer_or_line(folder):
    """There is news if a writer lives or a line was not read yet."""
    journals = Journals(folder, {})
    take(journals)
    assert not journals.has_news()
    path = journal(folder, "1-a", transfer(1, now() - MS))
    assert journals.has_news()
    take(journals)
    assert not journals.has_news()
    with path.open("ab") as file:
        file.write(b"more")
    assert journals.has_news()
    take(journals)
    with alive(folder, "2-b"):
        assert journals.has_news()


# Other boots, other clocks, other versions.


def placed(*readings: Reading) -> list[tuple[int, int]]:
    return [(fact.at_ns, fact.event.opening.number) for each in readings for fact in each.facts]


@pytest.mark.parametrize("days", [0, 3650], ids=["this boot", "before this boot"])
def test_other_boot_uses_wall_clock(days, folder):
    """Journals of another boot are ordered by their wall clock.

    This also holds before this boot, where their time on the clock of this boot is negative.
    """
    then_ms = time.time_ns() // MS - 10_000 - days * 86_400_000
    other = [transfer(n, 10**18 - n, at_ms=then_ms + n) for n in range(3000)]
    journal(folder, "1-old", *other, boot="another")
    journal(folder, "2-new", transfer(5000, now() - MS))
    readings = drain(Journals(folder, {}))
    assert numbers(*readings) == [*range(3000), 5000]
    assert [at for at, _ in placed(*readings)] == sorted(at for at, _ in placed(*readings))


def test_clock_set_back_in_other_boot(folder):
    """A clock that was set back in another boot does not stop a backlog.

    The first line of a piece is then later than its last.
    """
    then_ms = time.time_ns() // MS - 7_200_000
    ahead = [transfer(n, n, at_ms=then_ms + 3_600_000 + n) for n in range(50)]
    back = [transfer(n, n, at_ms=then_ms + n) for n in range(50, 6000)]
    journal(folder, "1-old", *ahead, *back, boot="another")
    journals = Journals(folder, {})
    readings = []
    while not readings or readings[-1].more:
        readings.append(take(journals))
        assert len(readings) < 20
    assert sorted(numbers(*readings)) == list(range(6000))
    assert len(readings) > 3


@pytest.mark.parametrize("writer_lives", [True, False])
def test_future_time_blocks_nothing(writer_lives, folder):
    """A line with a time in the future blocks nothing."""
    journal(folder, "1-a", transfer(1, now() + 10**15), transfer(2, now() - MS))
    if writer_lives:
        with alive(folder, "1-a"):
            assert sorted(numbers(take(Journals(folder, {})))) == [1, 2]
    else:
        assert sorted(numbers(take(Journals(folder, {})))) == [1, 2]


def test_unreadable_header_means_this_boot(folder):
    """A journal without a readable header is read as one of this boot."""
    path = journal(folder, "1-a")
    path.write_bytes(b"rubbish\n" + encode(transfer(1, now() - MS)))
    reading = take(Journals(folder, {}))
    assert (numbers(reading), reading.counts) == ([1], Counter(journal_torn=1))


def test_other_format_is_left_alone(folder):
    """A journal in another format is neither read nor removed, and does not keep the relay running."""
    path = journal(folder, "1-a")
    path.write_bytes(encode(header("1-a", format=FORMAT + 1)) + b"whatever it says\n")
    journals = Journals(folder, {})
    reading = take(journals)
    assert (reading.facts, reading.offsets, +reading.counts) == ([], {}, Counter())
    assert journals.remove_finished() == []
    assert path.exists()
    assert journals.all_read()
    assert not journals.has_news()


# All at once.


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[StateFolder]:
    folder = StateFolder(tmp_path_factory.mktemp("journals") / "state")
    folder.create()
    with alive(folder, "1-alive"):
        yield folder


texts = st.one_of(
    st.integers(1, 10**6).map(lambda n: encode(transfer(n, 1 + n))),
    st.integers(1, 10**6).map(lambda n: encode(opening(n, 1 + n))),
    st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"") + b"\n"),
    st.just(b"\n"),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(texts, max_size=30),
    cuts=st.lists(st.integers(0, 5000), max_size=12),
    restarts=st.sets(st.integers(0, 12)),
)
def test_split_writes_and_restarts(shared, lines, cuts, restarts):
    """However the bytes arrive and the relay restarts, each whole line is read once."""
    path = journal(shared, "1-alive")
    data = b"".join(lines)
    journals, offsets, seen, begin = Journals(shared, {}), {}, [], 0
    for turn, end in enumerate([*sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        with path.open("ab") as file:
            file.write(data[begin:end])
        begin = end
        for reading in drain(journals):
            offsets |= reading.offsets
            seen += [fact.event for fact in reading.facts]
        assert journals.remove_finished() == []
        if turn in restarts:
            journals = Journals(shared, dict(offsets))
    assert Counter(encode(what) for what in seen) == Counter(
        line + b"\n" for line in data.split(b"\n") if line[9:15] in (b'["open', b'["clos')
    )
