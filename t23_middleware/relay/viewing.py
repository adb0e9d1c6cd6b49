"""One viewing of a file, and what a response is to it: its start, what belongs to it, or a scrub.

A viewing is many responses: players probe, read indexes, drop their buffers and ask again. What decides nothing is
folded into the run before it, so that doubt never makes a scrub. Times are ns on one axis, offsets and sizes
are bytes. The measurements behind the constants: 420 scripted viewings with ten players, 3772 requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..transfer import APP, Opening, Part, Transfer, decode, encode
from .axis import BootClock, Step, rebased_by_wall_clock, without_connection
from .drains import GONE_COOKIE, Drain
from .segments import Run, Runs

#: A viewing starts at most this far into the file: the container's header is there, in every player that was
#: measured, also where it goes on to play from the middle.
BEGINNING = 256 << 10
#: Ranges of at most so many bytes ask whether ranges work (Safari's ``bytes=0-1``) and play nothing.
PROBE = 2
#: What plays hands over at least this much, or this share of a smaller file; what looks for an index does not.
PLAYABLE_BYTES = 512 << 10
PLAYABLE_SHARE = 8
#: What was cut off before this age was given up, however much the buffers had taken (up to 6 MB on a loopback).
#: What is open at this age stands for what plays, since its bytes are not known yet.
BRIEF_NS = 1_500_000_000
#: Overlap of two responses after which they are a parallel download: a player that seeks hangs up at once.
BESIDE_NS = 2_000_000_000
#: Between a player's request and the end of the response that it replaces: 20 ms measured, networks add to it.
REPLACED_NS = 300_000_000
#: The same where only a seek is as quick: a page that is reloaded asks 34 ms to 0.8 s after its video was closed.
AT_ONCE_NS = 30_000_000
#: A player that starts in the middle (``#t=60``) takes less than so many times what plays before it goes there.
STARTUP_FACTOR = 1.5
#: How far ahead of what was counted a player may go on after a pause or reload: as much may lie in buffers.
BUFFERED = 4 << 20
#: An index (moov, cues) lies in the last half of the file, reaches to its end, and is at most this share of it.
INDEX_SHARE = 20
#: A continuation starts this share of the file from an end of what was handed over, within these bounds: players
#: ask again for what their buffer could not take_unreported.
NEAR_SHARE = 64
NEAR_LEAST = 64 << 10
NEAR_MOST = 1 << 20
#: Runs that are kept apart, and responses that are open at a time; more of them are no player's.
MOST_SPANS = 64
MOST_OPEN = 64


def sane(part: Part) -> Part:
    """*part* without what can't be: an end before its start, a file that ends before it."""
    first, last, total = part
    if first is not None and first < 0:
        first = None
    if last is not None and (first is None or last < first):
        last = None
    if total is not None and total <= max(first or 0, last or 0):
        total = None
    return Part(first, last, total)


def is_probe(opening: Opening) -> bool:
    """Whether it is a range that plays nothing."""
    size = sane(opening.part).size
    return opening.status == 206 and size is not None and size <= PROBE


@dataclass(slots=True, eq=False)
class OpenResponse:
    """A response that is open: its place in the file, and what its neighbours tell of it."""

    writer: str
    number: int
    started_ns: int
    first: int | None
    #: The file's size.
    total: int | None
    #: Reaches to the end of the file if nobody cuts it off.
    reaches_end: bool
    #: Bytes that it has if nobody cuts it off.
    expected: int | None
    #: Started before the player had beginning_counted to play.
    in_startup: bool = False
    #: Responses that ran beside it and were not cut off for it.
    neighbours: int = 0
    #: Runs beside others, as in a download over several connections.
    parallel: bool = False
    #: Took the place of one that played and was cut off.
    replacing: bool = False
    #: The latest that is known of it, as its journal's line: all that is left if its writer dies.
    last_line: str | None = None
    #: Who counts its bytes, see :class:`~t23_middleware.transfer.Opening`.
    counted_by: str = APP
    #: Since when the app is done with it and the proxy's line is missing, in ms since the epoch.
    awaited_since_ms: int | None = None
    #: The proxy's line, where that came before the app was done.
    proxy_line: str | None = None
    #: Since when its writer is dead and its connection is not, in ms since the epoch.
    orphaned_since_ms: int | None = None
    #: Whether its connection is gone, and what the client's kernel had acknowledged of that, where it is known.
    connection_gone: bool = False
    acked: int | None = None
    #: As ``replacing``, but within :data:`AT_ONCE_NS`.
    replacing_at_once: bool = False
    #: For more than :data:`AT_ONCE_NS` before it nothing was open.
    after_silence: bool = False

    @classmethod
    def of(cls, writer: str, opening: Opening) -> OpenResponse:
        """The response that *opening* tells of."""
        counted_by = opening.counted_by
        response = cls(
            writer, opening.number, opening.started_ns, None, None, False, None, counted_by=counted_by
        )
        response.set_part(opening)
        return response

    def set_part(self, opening: Opening) -> None:
        """Its place in the file is what *opening* says."""
        self.first, last, self.total = sane(opening.part)
        self.expected = opening.length
        if self.expected is None or self.expected < 0:
            end = self.total if last is None else last + 1
            self.expected = None if self.first is None or end is None else end - self.first
        self.reaches_end = last is None or (self.total is not None and last + 1 >= self.total)
        if opening.asked_first:
            self.first = max(opening.asked_first, 0)  # judged as if the app had answered the Range

    def rebase(self, clock: BootClock) -> None:
        """Its line is of another boot: place what that tells by the wall clock."""
        if self.last_line is not None:
            what = decode(self.last_line.encode())
            if isinstance(what, Step):
                placed = rebased_by_wall_clock(without_connection(what), clock[1])
                self.last_line = encode(placed).decode().rstrip()
        self.orphaned_since_ms = None

    @property
    def ignores_range(self) -> bool:
        """Whether it has all of the file although the request asked for another place than the start."""
        return bool(self.first) and self.total is not None and self.expected == self.total

    @property
    def starts_at_beginning(self) -> bool:
        """Whether a viewing may start with it."""
        return self.first is not None and self.first <= BEGINNING

    def is_index(self, total: int | None, handed: int) -> bool:
        """Whether *handed* bytes of it look like the index of a file of *total* bytes."""
        if self.first is None or total is None or self.first * 2 < total:
            return False
        return self.reaches_end and handed * INDEX_SHARE < total

    def is_whole(self, sent: int) -> bool:
        """Whether *sent* bytes are all of it."""
        return self.expected is None or sent >= self.expected


@dataclass(slots=True, eq=False)
class Viewing:
    """From its first response until it is dropped or another one starts."""

    started_ns: int
    #: The latest request or end.
    last_ns: int
    #: Whether it started in the file's beginning; else it is the middle of something.
    starts_at_beginning: bool
    #: Whether a response of the beginning was counted.
    beginning_counted: bool = False
    #: Whether what was handed over is not known for all of it.
    has_unknown_bytes: bool = False
    #: Whether its ``skip=0`` is given away.
    play_reported: bool = False
    #: Since when the player plays.
    playing_since_ns: int | None = None
    #: When the last response that played was cut off.
    cut_ns: int | None = None
    #: End of the latest response with which a seek began, where they have not led to a place yet.
    seeking_ns: int | None = None
    #: The file's size.
    total: int | None = None
    #: Bytes of all that was counted.
    sent: int = 0
    #: Small whole responses laid end to end, as from a server that caps spans: ``(first, end)``.
    chain: tuple[int, int] | None = None
    #: What was handed over to be played, as merged ``(first, end)``.
    handed_over: tuple[tuple[int, int], ...] = ()
    #: In the order of their start.
    open: tuple[OpenResponse, ...] = ()
    #: What is reported per stream.
    runs: Runs | None = None
    #: Those that only the client's kernel is not done with; they decide nothing any more.
    draining: tuple[Drain, ...] = ()
    #: When the last of them was.
    drained_ns: int | None = None
    #: Whether a response from byte 0 on came that ends before the file does.
    has_first_piece: bool = False

    # What a new response finds.

    def is_first_piece(self, response: OpenResponse) -> bool:
        """Whether *response*, from byte 0 on, is the first piece of a download that fetches its pieces in any order.

        Such a piece ends before the file does, and comes once. A player that starts again was handed it before.
        """
        reported = self.runs is not None and any(run.reported for run in self.runs.all)
        if response.reaches_end or self.has_first_piece or (reported and not self.starts_at_beginning):
            return False
        brief = response.started_ns - self.started_ns < BRIEF_NS
        beside = any(not other.reaches_end for other in self.open)
        return brief or beside or not any(first <= 0 for first, _ in self.handed_over)

    def is_playing(self, at_ns: int) -> bool:
        """Whether its startup is over: a response played, or has been open for so long that it does."""
        if not self.starts_at_beginning or (
            self.playing_since_ns is not None and at_ns >= self.playing_since_ns
        ):
            return True
        return any(at_ns - other.started_ns >= BRIEF_NS and self._may_play(other) for other in self.open)

    def add(self, response: OpenResponse) -> None:
        """*response* opens."""
        response.after_silence = not self.open and response.started_ns - self.last_ns > AT_ONCE_NS
        self.last_ns = max(self.last_ns, response.started_ns)
        self.total = response.total or self.total
        brief = response.started_ns - self.started_ns < BRIEF_NS
        response.in_startup = brief or not self.is_playing(response.started_ns)
        if self.cut_ns is not None:
            response.replacing = response.started_ns - self.cut_ns <= REPLACED_NS
            response.replacing_at_once = response.started_ns - self.cut_ns <= AT_ONCE_NS
        self.open = (*self.open, response)
        if response.first == 0 and not response.reaches_end:
            self.has_first_piece = response.in_startup = True
            self._mark_beginning()

    def _mark_beginning(self) -> None:
        """The piece at byte 0 came after others: it was the beginning of a download, not the middle of something."""
        if not self.starts_at_beginning and self.runs is not None and self.runs.all:
            self.runs.all[0].skip = 0
        self.starts_at_beginning = True

    def is_first_response(self, response: OpenResponse) -> bool:
        """Whether *response*, which is open, is the one that the viewing starts with."""
        if self.play_reported or not self.starts_at_beginning or not response.starts_at_beginning:
            return False
        return next(other for other in self.open if other.starts_at_beginning) is response

    @property
    def playable_bytes(self) -> int:
        """Bytes from which a response plays."""
        return PLAYABLE_BYTES if self.total is None else min(PLAYABLE_BYTES, self.total // PLAYABLE_SHARE)

    def _may_play(self, other: OpenResponse) -> bool:
        handed = self.playable_bytes if other.expected is None else other.expected
        return handed >= self.playable_bytes and not other.is_index(self.total, handed)

    # What a response that ends was.

    def close(self, response: OpenResponse, transfer: Transfer) -> bool:
        """Count *response*, which leaves; whether it is a scrub."""
        self.remove_open(response, transfer.ended_ns)
        self.sent += transfer.sent
        self.beginning_counted = self.beginning_counted or response.starts_at_beginning
        self._mark_parallel(response, transfer)
        span = self._playable_span(response, transfer)
        if span is None:
            return self._is_tail_seek(response, transfer)
        scrub = self._is_elsewhere(response, span[0]) and not self._completes_seek(response)
        self.seeking_ns = None
        self._add_handed_over(response, span, transfer)
        return scrub

    def close_uncounted(self, response: OpenResponse, at_ns: int) -> None:
        """*response* leaves, and nobody knows how much of it was handed over: it may have been all."""
        self.remove_open(response, at_ns)
        self.beginning_counted = self.beginning_counted or response.starts_at_beginning
        self.has_unknown_bytes = True
        if self._may_play(response) and at_ns - response.started_ns >= BRIEF_NS:
            self._set_playing_since(response.started_ns + BRIEF_NS)
        if response.first is not None and response.expected:
            self._merge(response.first, response.first + response.expected)

    def remove_open(self, response: OpenResponse, at_ns: int) -> None:
        """*response* is open no longer."""
        self.open = tuple(other for other in self.open if other is not response)
        self.last_ns = max(self.last_ns, at_ns)

    def _mark_parallel(self, response: OpenResponse, transfer: Transfer) -> None:
        """Two that run beside each other, and neither is cut off for the other, are a parallel download."""
        for other in self.open:
            later = other if other.started_ns > response.started_ns else response
            beside_ns = transfer.ended_ns - later.started_ns
            whole = response.is_whole(transfer.sent)
            later.neighbours += (later is other and whole) or beside_ns > REPLACED_NS
            later.parallel = later.parallel or beside_ns > BESIDE_NS or later.neighbours >= 2
            # Pieces of a download run beside each other for long; those of a player that asks one by one hardly overlap.
            pieces = whole and not response.reaches_end and not other.reaches_end
            if pieces and 2 * beside_ns >= transfer.ended_ns - response.started_ns:
                response.parallel = other.parallel = True

    def _playable_span(self, response: OpenResponse, transfer: Transfer) -> tuple[int, int] | None:
        """What was handed over up to the end of *response* without a gap, where that plays.

        A gap as small as a fragment's header is none: who reads a fragmented file hop by hop has that already.
        """
        if response.first is None:
            return None
        whole = response.is_whole(transfer.sent)
        end = response.first + transfer.sent
        if transfer.sent >= self.playable_bytes:
            brief = transfer.ended_ns - response.started_ns < BRIEF_NS
            return None if brief and not whole else (response.first, end)
        if not whole:
            return None
        joins = self.chain is not None and 0 <= response.first - self.chain[1] <= NEAR_LEAST
        self.chain = (self.chain[0] if self.chain and joins else response.first, end)
        return self.chain if end - self.chain[0] >= self.playable_bytes else None

    def _is_elsewhere(self, response: OpenResponse, start: int) -> bool:
        """Whether a span from *start* is away from all that the player has."""
        if response.in_startup or response.parallel or not (self.starts_at_beginning or self.handed_over):
            return False
        if (
            self.starts_at_beginning
            and sum(end - first for first, end in self.handed_over) < self.playable_bytes * STARTUP_FACTOR
        ):
            return False
        ahead = self.reach
        if response.after_silence:
            ahead = max(ahead, min((self.total or 0) // PLAYABLE_SHARE, BUFFERED))
        if any(-self.reach <= start - end <= ahead for _, end in self.handed_over):
            return False
        inside = [first for first, end in self.handed_over if first <= start < end]
        if not inside:
            return True
        # A player that asks for what it was just handed did not have it, unless it looks at the header once more. A
        # reload soon after goes on as deep inside as its buffers were full, but not where a span began.
        from_first = response.replacing and start - inside[0] <= self.reach
        return not response.starts_at_beginning and (
            response.replacing_at_once or from_first or response.ignores_range
        )

    @property
    def reach(self) -> int:
        """How far from an end of what was handed over a continuation may start."""
        return max(NEAR_LEAST, min((self.total or 0) // NEAR_SHARE, NEAR_MOST))

    def _is_tail_seek(self, response: OpenResponse, transfer: Transfer) -> bool:
        """Whether a small *response* is how a seek begins: the tail of the file, in place of what was playing.

        It is the place that was sought, or the index, which leads to it; until it has, nothing else is a scrub.
        """
        completes = self._completes_seek(response)
        tail = response.is_whole(transfer.sent) and response.is_index(self.total, transfer.sent)
        seeks = (
            tail
            and response.replacing
            and not completes
            and self._is_elsewhere(response, response.first or 0)
        )
        if seeks or completes:
            self.seeking_ns = transfer.ended_ns
        return seeks

    def _completes_seek(self, response: OpenResponse) -> bool:
        return self.seeking_ns is not None and abs(response.started_ns - self.seeking_ns) <= BRIEF_NS

    def _add_handed_over(self, response: OpenResponse, span: tuple[int, int], transfer: Transfer) -> None:
        if response.is_index(self.total, transfer.sent):
            return
        self._set_playing_since(min(transfer.ended_ns, response.started_ns + BRIEF_NS))
        self._merge(*span)
        if not response.is_whole(transfer.sent):
            self.cut_ns = transfer.ended_ns
            for other in self.open:
                other.replacing |= transfer.ended_ns - other.started_ns <= REPLACED_NS
                other.replacing_at_once |= transfer.ended_ns - other.started_ns <= REPLACED_NS

    def _set_playing_since(self, since_ns: int) -> None:
        self.playing_since_ns = (
            since_ns if self.playing_since_ns is None else min(since_ns, self.playing_since_ns)
        )

    def _merge(self, first: int, end: int) -> None:
        apart = []
        for span in self.handed_over:
            if span[1] < first or span[0] > end:
                apart.append(span)
            else:
                first, end = min(first, span[0]), max(end, span[1])
        spans = sorted([*apart, (first, end)])
        if len(spans) > MOST_SPANS:
            _close_smallest_gap(spans)
        self.handed_over = tuple(spans)

    # What is reported per stream.

    def assign_bytes(self, response: OpenResponse, transfer: Transfer, *, scrub: bool) -> Run | None:
        """Give the bytes of *response* to the run that it opens or belongs to; the app's own word beats ours.

        The run, or ``None`` where it is reported or forgotten.
        """
        self.runs = self.runs or Runs()
        said = transfer.opening.play.skip
        if said == 0:
            run: Run | None = self._first_run(transfer)
        elif scrub:
            run = self.runs.open(1, response.started_ns, transfer)
        else:
            run = self.runs.at(response.started_ns) if self.runs.all else self._first_run(transfer)
            if said == 1 and run is not None and run.skip == 0:
                run = self.runs.open(1, response.started_ns, transfer)
        self.runs.add(run, transfer.sent, transfer.ended_ms)
        return None if run is None or run.reported else run

    def add_drained(self, drain: Drain, count: int) -> None:
        """Give the run of *drain* its bytes, which are known now."""
        self.runs = self.runs or Runs()
        run = None if drain.run_ns is None else self.runs.at(drain.run_ns)
        self.runs.add(run, count, drain.ended_ms)

    def _first_run(self, transfer: Transfer) -> Run | None:
        assert self.runs is not None
        self.starts_at_beginning = self.starts_at_beginning or transfer.opening.play.skip == 0
        self.beginning_counted = self.beginning_counted or transfer.opening.play.skip == 0
        if not self.runs.all:
            skip = 0 if self.starts_at_beginning and transfer.opening.play.skip != 1 else 1
            return self.runs.open(skip, self.started_ns, transfer)
        return self.runs.at(self.started_ns)

    def has_enough(self, min_bytes: int | None) -> bool:
        """Whether so much was handed over that it is reported: *min_bytes*, or as much as plays.

        The latter not where all of it was cut off at an age at which a response was given up: that was a preload
        of the metadata, whatever a fast network had taken by then.
        """
        if min_bytes is not None:
            return self.sent >= min_bytes
        abandoned = (
            self.starts_at_beginning
            and self.playing_since_ns is None
            and self.last_ns - self.started_ns < BRIEF_NS
        )
        whole = self.total is not None and self.sent >= self.total
        return self.sent >= self.playable_bytes and (whole or not abandoned)

    @property
    def is_complete(self) -> bool:
        """Whether the file was handed over from its start to its end."""
        if self.total is None or self.open or self.has_unknown_bytes or len(self.handed_over) != 1:
            return False
        return self.handed_over[0][0] == 0 and self.handed_over[0][1] >= self.total

    @property
    def oldest_open_ns(self) -> int | None:
        """Start of the oldest response that is open, or of the oldest run whose bytes are not known yet."""
        drains = [drain.run_ns for drain in self.draining if drain.run_ns is not None]
        return min([*drains, *(response.started_ns for response in self.open)], default=None)

    @property
    def is_busy(self) -> bool:
        """Whether a response of it is open, or drains."""
        return bool(self.open or self.draining)

    @property
    def quiet_since_ns(self) -> int:
        """The latest request or end, or when a response had drained."""
        return self.last_ns if self.drained_ns is None else max(self.last_ns, self.drained_ns)

    def rebase(self, clock: BootClock) -> None:
        """It is of another boot, whose connections are gone."""
        for response in self.open:
            response.rebase(clock)
        for drain in self.draining:
            drain.cookie = GONE_COOKIE


def _close_smallest_gap(spans: list[tuple[int, int]]) -> None:
    gaps = [after[0] - before[1] for before, after in zip(spans, spans[1:], strict=False)]
    at = gaps.index(min(gaps))
    spans[at : at + 2] = [(spans[at][0], spans[at + 1][1])]
