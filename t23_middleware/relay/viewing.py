"""One viewing of a file. Decides for each response whether it starts the viewing, continues a run, or is a scrub.

A viewing has many responses: players probe, read indexes, drop their buffers and ask again. A response that is
clearly neither a start nor a scrub is added to the current run, so an ambiguous one never counts as a scrub.
Times are ns of CLOCK_MONOTONIC, offsets and sizes are bytes. The constants were measured: 420 scripted viewings with
ten players, 3772 requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..transfer import APP, Opening, Part, Transfer, decode, encode
from .axis import BootClock, ResponseEvent, rebased_by_wall_clock, without_connection
from .drains import GONE_COOKIE, Drain
from .segments import Run, Runs

#: A viewing starts at most this far into the file. Every measured player reads the container's header there, also
#: one that then plays from the middle.
BEGINNING = 256 << 10
#: Ranges of at most this many bytes only test whether the server supports ranges (Safari's ``bytes=0-1``).
PROBE = 2
#: A response that plays hands over at least this many bytes, or this share of a smaller file. A response that only
#: reads an index hands over less.
PLAYABLE_BYTES = 512 << 10
PLAYABLE_SHARE = 8
#: A response that is cut off before this age did not play, however much the buffers took (up to 6 MB on a loopback).
#: One that is still open at this age counts as playing, since its bytes are not known yet.
BRIEF_NS = 1_500_000_000
#: Overlap of two responses after which they are a parallel download: a player that seeks disconnects at once.
BESIDE_NS = 2_000_000_000
#: Longest time between a player's request and the end of the response that it replaces: measured 20 ms, plus the
#: network's delay.
REPLACED_NS = 300_000_000
#: The same for a seek only: a page that is reloaded sends its request 34 ms to 0.8 s after its video was closed.
AT_ONCE_NS = 30_000_000
#: A player that starts in the middle (``#t=60``) first reads less than this many times ``playable_bytes``.
STARTUP_FACTOR = 1.5
#: How far ahead of the counted bytes a player may continue after a pause or reload: buffers may hold as much.
BUFFERED = 4 << 20
#: An index (moov, cues) is in the last half of the file, reaches to its end, and is at most this share of it.
INDEX_SHARE = 20
#: A continuation starts at most this share of the file away from the end of a span that was handed over, within
#: these bounds: players request again what their buffer could not take.
NEAR_SHARE = 64
NEAR_LEAST = 64 << 10
NEAR_MOST = 1 << 20
#: Most spans and most open responses that a viewing keeps; no player has more.
MOST_SPANS = 64
MOST_OPEN = 64


def plausible(part: Part) -> Part:
    """*part* without impossible values: an end before its start, a file size before its end."""
    first, last, total = part
    if first is not None and first < 0:
        first = None
    if last is not None and (first is None or last < first):
        last = None
    if total is not None and total <= max(first or 0, last or 0):
        total = None
    return Part(first, last, total)


def is_probe(opening: Opening) -> bool:
    """Whether the response is a range that is too small to play."""
    size = plausible(opening.part).size
    return opening.status == 206 and size is not None and size <= PROBE


@dataclass(slots=True, eq=False)
class OpenResponse:
    """A response that has not ended: its part of the file, and how it relates to the responses beside it."""

    writer: str
    number: int
    started_ns: int
    first: int | None
    #: The file's size.
    total: int | None
    #: Whether it reaches the end of the file, unless it is cut off.
    reaches_end: bool
    #: Its bytes, unless it is cut off.
    expected: int | None
    #: It started before the player began to play.
    in_startup: bool = False
    #: Number of responses that ran beside it and were not cut off because of it.
    neighbours: int = 0
    #: It runs beside others, as in a download over several connections.
    parallel: bool = False
    #: It replaced one that played and was cut off.
    replacing: bool = False
    #: Its latest journal line, which is used if its writer dies.
    last_line: str | None = None
    #: Where its bytes are counted, see :class:`~t23_middleware.transfer.Opening`.
    counted_by: str = APP
    #: Since when it waits for the proxy's log line, because the app has ended it, in ms since the epoch.
    awaiting_line_since_ms: int | None = None
    #: The proxy's log line, if that came before the app ended the response.
    proxy_line: str | None = None
    #: Since when its writer is dead while its connection is still open, in ms since the epoch.
    orphaned_since_ms: int | None = None
    #: Whether its connection is closed, and how many bytes of it the client's kernel acknowledged, if known.
    connection_gone: bool = False
    acked: int | None = None
    #: Like ``replacing``, but within :data:`AT_ONCE_NS`.
    replacing_at_once: bool = False
    #: No response was open for more than :data:`AT_ONCE_NS` before it.
    after_silence: bool = False

    @classmethod
    def of(cls, writer: str, opening: Opening) -> OpenResponse:
        """The response that *opening* describes."""
        counted_by = opening.counted_by
        response = cls(
            writer, opening.number, opening.started_ns, None, None, False, None, counted_by=counted_by
        )
        response.set_part(opening)
        return response

    def set_part(self, opening: Opening) -> None:
        """Take its part of the file from *opening*."""
        self.first, last, self.total = plausible(opening.part)
        self.expected = opening.length
        if self.expected is None or self.expected < 0:
            end = self.total if last is None else last + 1
            self.expected = None if self.first is None or end is None else end - self.first
        self.reaches_end = last is None or (self.total is not None and last + 1 >= self.total)
        if opening.asked_first:
            self.first = max(opening.asked_first, 0)  # judged like an answer to the Range

    def rebase(self, clock: BootClock) -> None:
        """Its line is from another boot: convert the line's times by the wall clock."""
        if self.last_line is not None:
            what = decode(self.last_line.encode())
            if isinstance(what, ResponseEvent):
                placed = rebased_by_wall_clock(without_connection(what), clock[1])
                self.last_line = encode(placed).decode().rstrip()
        self.orphaned_since_ms = None

    @property
    def ignores_range(self) -> bool:
        """Whether it has the whole file although the request asked for a range that does not start at 0."""
        return bool(self.first) and self.total is not None and self.expected == self.total

    @property
    def starts_at_beginning(self) -> bool:
        """Whether a viewing may start with it, by its position in the file."""
        return self.first is not None and self.first <= BEGINNING

    def is_index(self, total: int | None, handed: int) -> bool:
        """Whether *handed* bytes of it look like the index of a file of *total* bytes."""
        if self.first is None or total is None or self.first * 2 < total:
            return False
        return self.reaches_end and handed * INDEX_SHARE < total

    def is_whole(self, sent: int) -> bool:
        """Whether *sent* bytes are the whole response."""
        return self.expected is None or sent >= self.expected


@dataclass(slots=True, eq=False)
class Viewing:
    """One session's viewing of a video, from its first response until it is dropped or another viewing starts."""

    started_ns: int
    #: The latest request or end.
    last_ns: int
    #: Whether it started at the beginning of the file; else its start was not seen.
    starts_at_beginning: bool
    #: Whether a response at the beginning of the file was counted.
    beginning_counted: bool = False
    #: Whether a response ended whose bytes are unknown.
    has_unknown_bytes: bool = False
    #: Whether its report with ``skip=0`` was made, or can't be made any more.
    play_reported: bool = False
    #: Since when the player plays.
    playing_since_ns: int | None = None
    #: When the last response that played was cut off.
    cut_ns: int | None = None
    #: End of the latest response that began a seek whose target is not known yet.
    seeking_ns: int | None = None
    #: The file's size.
    total: int | None = None
    #: Bytes of all counted responses.
    sent: int = 0
    #: Span of adjacent small responses, as from a server that limits the size of ranges: ``(first, end)``.
    chain: tuple[int, int] | None = None
    #: Merged spans that were handed over to be played: ``(first, end)``.
    handed_over: tuple[tuple[int, int], ...] = ()
    #: Its open responses, in the order of their start.
    open: tuple[OpenResponse, ...] = ()
    #: Its runs, each of which is one report per stream.
    runs: Runs | None = None
    #: Its responses that wait for the client's kernel to acknowledge them; they no longer affect any decision.
    draining: tuple[Drain, ...] = ()
    #: When the last of them was acknowledged.
    drained_ns: int | None = None
    #: Whether it has a response from byte 0 that ends before the file does.
    has_first_piece: bool = False

    # When a response opens.

    def is_first_piece(self, response: OpenResponse) -> bool:
        """Whether *response*, from byte 0 on, is the first piece of a download that fetches pieces in any order.

        Such a piece ends before the file does, and is requested once. A player that starts again received it before.
        """
        reported = self.runs is not None and any(run.reported for run in self.runs.all)
        if response.reaches_end or self.has_first_piece or (reported and not self.starts_at_beginning):
            return False
        brief = response.started_ns - self.started_ns < BRIEF_NS
        beside = any(not other.reaches_end for other in self.open)
        return brief or beside or not any(first <= 0 for first, _ in self.handed_over)

    def is_playing(self, at_ns: int) -> bool:
        """Whether its startup is over: a response played, or has been open for so long that it counts as playing."""
        if not self.starts_at_beginning or (
            self.playing_since_ns is not None and at_ns >= self.playing_since_ns
        ):
            return True
        return any(at_ns - other.started_ns >= BRIEF_NS and self._may_play(other) for other in self.open)

    def add(self, response: OpenResponse) -> None:
        """Add *response*, which opens."""
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
        """The piece at byte 0 came after others: the viewing is a download from the beginning of the file."""
        if not self.starts_at_beginning and self.runs is not None and self.runs.all:
            self.runs.all[0].skip = 0
        self.starts_at_beginning = True

    def is_first_response(self, response: OpenResponse) -> bool:
        """Whether *response*, which is open, starts the viewing."""
        if self.play_reported or not self.starts_at_beginning or not response.starts_at_beginning:
            return False
        return next(other for other in self.open if other.starts_at_beginning) is response

    @property
    def playable_bytes(self) -> int:
        """Bytes from which on a response counts as playing."""
        return PLAYABLE_BYTES if self.total is None else min(PLAYABLE_BYTES, self.total // PLAYABLE_SHARE)

    def _may_play(self, other: OpenResponse) -> bool:
        handed = self.playable_bytes if other.expected is None else other.expected
        return handed >= self.playable_bytes and not other.is_index(self.total, handed)

    # When a response ends.

    def close(self, response: OpenResponse, transfer: Transfer) -> bool:
        """Remove *response* and count its bytes. Returns whether it is a scrub."""
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
        """Remove *response*, whose bytes are unknown: all of it may have been handed over."""
        self.remove_open(response, at_ns)
        self.beginning_counted = self.beginning_counted or response.starts_at_beginning
        self.has_unknown_bytes = True
        if self._may_play(response) and at_ns - response.started_ns >= BRIEF_NS:
            self._set_playing_since(response.started_ns + BRIEF_NS)
        if response.first is not None and response.expected:
            self._merge(response.first, response.first + response.expected)

    def remove_open(self, response: OpenResponse, at_ns: int) -> None:
        """Remove *response* from the open ones."""
        self.open = tuple(other for other in self.open if other is not response)
        self.last_ns = max(self.last_ns, at_ns)

    def _mark_parallel(self, response: OpenResponse, transfer: Transfer) -> None:
        """Responses that overlap without one being cut off because of the other are a parallel download."""
        for other in self.open:
            later = other if other.started_ns > response.started_ns else response
            beside_ns = transfer.ended_ns - later.started_ns
            whole = response.is_whole(transfer.sent)
            later.neighbours += (later is other and whole) or beside_ns > REPLACED_NS
            later.parallel = later.parallel or beside_ns > BESIDE_NS or later.neighbours >= 2
            # Pieces of a download overlap for long; a player that requests one piece after the other hardly overlaps.
            pieces = whole and not response.reaches_end and not other.reaches_end
            if pieces and 2 * beside_ns >= transfer.ended_ns - response.started_ns:
                response.parallel = other.parallel = True

    def _playable_span(self, response: OpenResponse, transfer: Transfer) -> tuple[int, int] | None:
        """The span without a gap that ends with *response*, or ``None`` if it is too small to play.

        A gap as small as a fragment's header is ignored: a player that reads a fragmented file fragment by fragment
        has the header already.
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
        """Whether a span from *start* is away from everything that was handed over to the player."""
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
        # A player that requests what it just received did not have it, unless it reads the header again. A reload
        # soon after continues where its buffers ended, inside a span, but not where a span began.
        from_first = response.replacing and start - inside[0] <= self.reach
        return not response.starts_at_beginning and (
            response.replacing_at_once or from_first or response.ignores_range
        )

    @property
    def reach(self) -> int:
        """How far from the end of a span that was handed over a continuation may start, in bytes."""
        return max(NEAR_LEAST, min((self.total or 0) // NEAR_SHARE, NEAR_MOST))

    def _is_tail_seek(self, response: OpenResponse, transfer: Transfer) -> bool:
        """Whether a small *response* begins a seek: it is the tail of the file and replaces the response that played.

        The tail is the seek's target, or the index that the player needs to find it. Until the target is found,
        nothing else is a scrub.
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

    # Reports per stream.

    def assign_bytes(self, response: OpenResponse, transfer: Transfer, *, scrub: bool) -> Run | None:
        """Add the bytes of *response* to the run that it opens or belongs to; the app's own ``skip`` has priority.

        Returns the run, or ``None`` if that was reported already.
        """
        self.runs = self.runs or Runs()
        app_skip = transfer.opening.play.skip
        if app_skip == 0:
            run: Run | None = self._first_run(transfer)
        elif scrub:
            run = self.runs.open(1, response.started_ns, transfer)
        else:
            run = self.runs.at(response.started_ns) if self.runs.all else self._first_run(transfer)
            if app_skip == 1 and run is not None and run.skip == 0:
                run = self.runs.open(1, response.started_ns, transfer)
        self.runs.add(run, transfer.sent, transfer.ended_ms)
        return None if run is None or run.reported else run

    def add_drained(self, drain: Drain, count: int) -> None:
        """Add *count*, the final bytes of *drain*, to its run."""
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
        """Whether it has enough bytes to be reported: *min_bytes*, or, for ``None``, enough to play.

        With ``None``, responses that were all cut off at an early age are not enough: they were a preload of the
        metadata, however much a fast network took in that time.
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
        """Start of its oldest open response, or of the oldest run that waits for a final count."""
        drains = [drain.run_ns for drain in self.draining if drain.run_ns is not None]
        return min([*drains, *(response.started_ns for response in self.open)], default=None)

    @property
    def is_busy(self) -> bool:
        """Whether one of its responses is open or waits for its final count."""
        return bool(self.open or self.draining)

    @property
    def quiet_since_ns(self) -> int:
        """Time of its latest request, end or final count."""
        return self.last_ns if self.drained_ns is None else max(self.last_ns, self.drained_ns)

    def rebase(self, clock: BootClock) -> None:
        """Convert it from another boot, whose connections are closed."""
        for response in self.open:
            response.rebase(clock)
        for drain in self.draining:
            drain.cookie = GONE_COOKIE


def _close_smallest_gap(spans: list[tuple[int, int]]) -> None:
    gaps = [after[0] - before[1] for before, after in zip(spans, spans[1:], strict=False)]
    at = gaps.index(min(gaps))
    spans[at : at + 2] = [(spans[at][0], spans[at + 1][1])]
