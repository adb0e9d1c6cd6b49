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


def test_the_lines_of_two_writers_are_merged_in_the_order_of_their_time(folder):
    start = now() - 10**9
    journal(folder, "1-a", *[transfer(n, start + n * MS) for n in (0, 2, 4)])
    journal(folder, "2-b", *[transfer(n, start + n * MS) for n in (1, 3, 5)])
    assert numbers(take(Journals(folder, {}))) == [0, 1, 2, 3, 4, 5]


def test_lines_of_threads_that_overtook_each_other_are_judged_in_the_order_of_their_time(folder):
    start = now() - 10**9
    journal(folder, "1-a", *[transfer(n, start + n * MS) for n in (1, 0, 3, 2)])
    assert numbers(take(Journals(folder, {}))) == [0, 1, 2, 3]


def test_a_line_younger_than_the_limit_waits_so_that_a_late_one_of_another_writer_still_comes_before_it(
    folder,
):
    limit = now() - 10**9
    with living(folder) as first, living(folder) as second:
        first.write(transfer(1, limit - MS), transfer(3, limit + 2 * MS))
        journals = Journals(folder, {})
        assert numbers(take(journals, limit)) == [1]
        assert not journals.all_read()
        second.write(transfer(2, limit + MS))
        assert numbers(take(journals, limit + 5 * MS)) == [2, 3]
        assert journals.all_read()


def test_what_a_dead_writer_wrote_a_moment_ago_waits_for_its_turn_too(folder):
    limit = now() - 10**9
    journal(folder, "1-a", transfer(2, limit + 2 * MS))
    journal(folder, "2-b", transfer(1, limit + MS))
    journals = Journals(folder, {})
    assert numbers(take(journals, limit)) == []
    assert journals.remove_finished() == []
    assert numbers(take(journals, limit + 5 * MS)) == [1, 2]


def test_a_backlog_of_several_mb_from_four_writers_comes_in_pieces_in_order_and_each_line_once(folder):
    """Four with rotated files, of which one is ten times as busy and one wrote only at the end."""
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


def test_of_a_backlog_no_more_is_decoded_than_can_be_judged(folder, monkeypatch):
    """Else a night without a relay costs the square of what was written, and all of it in memory at once."""
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


def test_a_reading_says_up_to_when_it_tells_all(folder):
    start = now() - 3600 * 10**9
    journal(folder, "1-a", *[transfer(n, start + n * MS) for n in range(3000)])
    journal(folder, "2-b", transfer(10_000, start + 2_999_500_000))
    journals = Journals(folder, {})
    first = take(journals)
    assert first.more
    assert max(fact.at_ns for fact in first.facts) == first.until_ns < start + 2_999 * MS
    assert numbers(first, *drain(journals)) == [*range(3000), 10_000]


# Half lines, torn lines, and what is no line.


def test_a_half_line_of_a_living_writer_waits_for_its_end(folder):
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


def test_a_half_line_of_a_dead_writer_is_torn_and_keeps_nothing(folder):
    path = journal(folder, "1-a", transfer(1, now() - MS), encode(transfer(2, now()))[:50])
    journals = Journals(folder, {})
    reading = take(journals)
    assert (numbers(reading), reading.counts) == ([1], Counter(journal_torn=1))
    assert journals.remove_finished() == [path.name]
    assert not path.exists()


def test_a_half_header_of_a_dead_writer_is_torn_and_keeps_nothing(folder):
    path = journal(folder, "1-a")
    path.write_bytes(path.read_bytes()[:20])
    journals = Journals(folder, {})
    assert take(journals).counts == Counter(journal_torn=1)
    assert journals.remove_finished() == [path.name]


def test_an_empty_journal_is_kept_while_its_writer_lives(folder):
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
def test_a_line_that_is_none_is_counted_and_stops_nothing(bad, counter, folder):
    start = now() - 10**9
    journal(folder, "1-a", transfer(1, start), bad, transfer(2, start + MS))
    reading = take(Journals(folder, {}))
    assert (numbers(reading), reading.counts) == ([1, 2], Counter({counter: 1}))


def test_the_newline_that_keeps_a_torn_line_apart_is_no_event(folder):
    start = now() - 10**9
    journal(folder, "1-a", b"\n", transfer(1, start), b"\n\n", transfer(2, start + MS))
    reading = take(Journals(folder, {}))
    assert numbers(reading) == [1, 2]
    assert +reading.counts == Counter()


@pytest.mark.parametrize("writer_lives", [True, False])
def test_a_mb_of_rubbish_without_a_newline_is_passed_over(writer_lives, folder):
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


def test_another_relay_goes_on_where_the_last_one_was(folder):
    start = now() - 10**9
    path = journal(folder, "1-a", transfer(1, start))
    first = take(Journals(folder, {}))
    with path.open("ab") as file:
        file.write(encode(transfer(2, start + MS)))
    assert numbers(take(Journals(folder, first.offsets))) == [2]


def test_a_reading_that_was_not_kept_is_read_again(folder):
    path = journal(folder, "1-a", transfer(1, now() - MS))
    lost = Journals(folder, {}).read(now())
    again = Journals(folder, {}).read(now())
    assert numbers(lost) == numbers(again) == [1]
    assert path.exists()


def test_after_a_kill_between_keeping_and_unlinking_the_journal_goes_unread(folder):
    path = journal(folder, "1-a", transfer(1, now() - MS))
    kept = take(Journals(folder, {}))
    journals = Journals(folder, kept.offsets)
    reading = take(journals)
    assert (reading.facts, reading.offsets) == ([], {})
    assert journals.remove_finished() == [path.name]
    assert not path.exists()


def test_after_a_kill_between_unlinking_and_forgetting_the_place_is_named_again(folder):
    journals = Journals(folder, {"1-gone.000000.journal": 500})
    take(journals)
    assert journals.remove_finished() == ["1-gone.000000.journal"]
    assert journals.remove_finished() == []


def test_a_place_beyond_the_end_is_what_a_power_cut_leaves(folder):
    path = journal(folder, "1-a", transfer(1, now() - MS))
    journals = Journals(folder, {path.name: path.stat().st_size + 4096})
    assert numbers(take(journals)) == []
    assert journals.remove_finished() == [path.name]


def test_a_journal_that_somebody_removed_is_no_error(folder):
    path = journal(folder, "1-a", transfer(1, now() - MS))
    journals = Journals(folder, {})
    take(journals)
    path.unlink()
    assert take(journals).facts == []
    assert journals.remove_finished() == [path.name]


def test_what_is_no_journal_of_ours_is_left_alone(folder):
    strangers = ["notes.txt", "a.b.journal", "a.journal", "a.000000.more.journal"]
    for name in strangers:
        (folder.journals / name).write_text("hello\n")
    journals = Journals(folder, {})
    reading = take(journals)
    assert (reading.facts, reading.offsets, reading.counts) == ([], {}, Counter())
    assert journals.remove_finished() == []
    assert sorted(path.name for path in folder.journals.iterdir()) == sorted(strangers)


def test_a_journal_that_cannot_be_read_is_told_once_kept_and_holds_up_nobody(folder, caplog):
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


def test_a_journal_is_removed_only_when_its_writer_is_dead_and_then_with_its_lock(folder):
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


def test_a_lock_stays_as_long_as_a_journal_of_its_writer(folder):
    path = journal(folder, "1-a")
    path.write_bytes(encode(header("1-a", format=FORMAT + 1)))
    lock = folder.journals / "1-a.lock"
    lock.touch()
    journals = Journals(folder, {})
    take(journals)
    assert journals.remove_finished() == []
    assert lock.exists()


def test_a_writer_that_begins_between_the_two_looks_is_not_taken_for_dead(folder, monkeypatch):
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


def test_a_writer_that_begins_right_after_the_look_at_who_lives_is_seen_at_the_next(folder):
    journals = Journals(folder, {})
    take(journals)
    with living(folder) as writer:
        writer.write(transfer(1, now()))
        assert numbers(take(journals)) == [1]
        assert journals.has_live_writer()
        assert journals.remove_finished() == []


def test_a_writer_is_dead_only_when_all_its_journals_are_read(folder, monkeypatch):
    """One that began its next file after the look for files, and died before the look at who lives."""
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


def test_a_journal_is_kept_until_its_living_writer_is_two_rotations_on(folder):
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


def test_a_rotation_that_is_only_found_while_the_dead_are_counted_ends_no_file_unread(folder):
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


def test_a_real_writer_rotates_under_a_reader_and_nothing_is_lost_or_left(folder):
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


def test_the_writer_that_began_last_comes_last_among_the_living(folder):
    with living(folder, digest="old") as old:
        old.write(transfer(1, now()))
        with living(folder, digest="new") as new:
            new.write(transfer(2, now()))
            journals = Journals(folder, {})
            take(journals)
            assert [each.digest for each in journals.live_writers()] == ["old", "new"]


def test_news_is_a_living_writer_or_a_line_that_was_not_taken(folder):
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
def test_journals_of_another_boot_are_placed_by_their_wall_clock(days, folder):
    """Even where that was before this boot, so that their time on its axis is negative."""
    then_ms = time.time_ns() // MS - 10_000 - days * 86_400_000
    other = [transfer(n, 10**18 - n, at_ms=then_ms + n) for n in range(3000)]
    journal(folder, "1-old", *other, boot="another")
    journal(folder, "2-new", transfer(5000, now() - MS))
    readings = drain(Journals(folder, {}))
    assert numbers(*readings) == [*range(3000), 5000]
    assert [at for at, _ in placed(*readings)] == sorted(at for at, _ in placed(*readings))


def test_a_clock_that_was_set_back_in_another_boot_stops_no_backlog(folder):
    """The first line of a piece is then later than its last."""
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
def test_a_time_that_has_not_come_yet_holds_up_nothing(writer_lives, folder):
    journal(folder, "1-a", transfer(1, now() + 10**15), transfer(2, now() - MS))
    if writer_lives:
        with alive(folder, "1-a"):
            assert sorted(numbers(take(Journals(folder, {})))) == [1, 2]
    else:
        assert sorted(numbers(take(Journals(folder, {})))) == [1, 2]


def test_a_journal_without_a_readable_header_is_read_as_one_of_this_boot(folder):
    path = journal(folder, "1-a")
    path.write_bytes(b"rubbish\n" + encode(transfer(1, now() - MS)))
    reading = take(Journals(folder, {}))
    assert (numbers(reading), reading.counts) == ([1], Counter(journal_torn=1))


def test_a_journal_in_another_format_is_not_read_not_removed_and_keeps_no_relay(folder):
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
def test_however_the_bytes_arrive_and_the_relay_restarts_each_whole_line_is_read_once(
    shared, lines, cuts, restarts
):
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
