"""Transfers of one session and video in, reports out: the only place that decides ``skip``.

A pure, ordered state machine: no clock, no I/O. Facts come in the order of their time, on one axis in ns; what
comes later than that is judged as it comes and counted ``late``. When the caller lets time pass changes nothing in
what is told. The state is handed out as text, for the transaction that takes the facts in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from ..transfer import Opening, Progress, Transfer, decode, encode
from .report import Report
from .segments import player_of
from .stored import NO_AXIS, Axis
from .viewer import CLOCK_FELL_NS, Key, Viewer, Viewers, key_of
from .viewing import MOST_OPEN, PROBE, Response, Viewing, is_probe

#: A viewing is dropped after this time without a request or an open response: longer than a pause worth joining.
FORGET_NS = 30 * 60 * 1_000_000_000
#: A response is given up after this time: no viewing lasts as long, but its close line may have been lost.
OPEN_MOST_NS = 24 * 3600 * 1_000_000_000
#: Before any time: those of another boot lie before this one's beginning.
BEFORE_ALL_NS = -(1 << 63)
#: Sessions at a video that are kept, at 1 to 2 KB each; the one that was silent longest makes room.
MOST_VIEWERS = 200_000


class Playback:
    """Turns openings and transfers into reports.

    *per* is ``"response"``: each counted response is a report as it closes, or ``"stream"``: one report per
    viewing and one per scrub. *idle_s* is the time in seconds without a request or an open response after which
    a stream counts as concluded; in ``"stream"`` a viewing that handed over less than *min_bytes* bytes makes no
    report (``None``: the smaller of 512 KiB and an eighth of the file).
    """

    def __init__(self, *, per: str = "response", idle_s: float = 30.0, min_bytes: int | None = None) -> None:
        self._per_stream = per == "stream"
        self._idle_ns = int(idle_s * 1e9)
        self._min_bytes = min_bytes
        self._viewers = Viewers()
        self._open: dict[tuple[str, int], Key] = {}
        self._changed: dict[Key, None] = {}
        self._clock_ns = BEFORE_ALL_NS
        #: Named events since the caller last took them: ``late``, ``repeated``, ``below_minimum``,
        #: ``interrupted``, ``interrupted_unknown``, ``ignored_empty``, ``ignored_probe``, ``responses_given_up``,
        #: ``viewings_dropped``, ``state_unreadable``.
        self.counts: Counter[str] = Counter()

    # Facts.

    def opened(self, writer: str, opening: Opening) -> list[Report]:
        """A counted response started."""
        self._pass(opening.started_ns)
        if is_probe(opening):
            return []
        viewer, reports = self._viewer(key_of(opening.play), opening.started_ns)
        if (writer, opening.number) in self._open or viewer.has_ended(writer, opening.number):
            self.counts["repeated"] += 1
            return reports
        self._place(viewer, writer, opening)
        return reports + self._settle(viewer)

    def closed(self, writer: str, transfer: Transfer) -> list[Report]:
        """A counted response is over, whether its start was seen or not."""
        self._pass(transfer.ended_ns)
        opening = transfer.opening
        key = key_of(opening.play)
        if self._open.get((writer, opening.number)) != key:
            return self._closed_unseen(writer, transfer)
        viewer, reports = self._viewer(key, transfer.ended_ns)
        return reports + self._close(viewer, writer, transfer)

    def progressed(self, writer: str, progress: Progress) -> None:
        """An open response has handed over so much."""
        viewer, found = self._find(writer, progress.opening.number)
        if viewer is not None and found is not None:
            found[1].known = encode(progress).decode().rstrip()
            self._changed[viewer.key] = None

    def lost(self, writer: str, number: int, at_ns: int, at_ms: int) -> list[Report]:
        """The writer of an open response died: it ends with what is known of it.

        Where nothing is known it makes no report, and what follows of its viewing is ``skip=1``.
        """
        viewer, found = self._find(writer, number)
        if viewer is None or found is None:
            return []
        known = None if found[1].known is None else decode(found[1].known.encode())
        if isinstance(known, Progress):
            self.counts["interrupted"] += 1
            return self.closed(writer, Transfer(known.opening, at_ns, known.at_ms, known.sent))
        self._lose(*found, at_ns)
        self.counts["interrupted_unknown"] += 1
        viewer.last_ns = max(viewer.last_ns, at_ns)
        self._viewers.touch(viewer)
        return self._settle(viewer)

    def advance(self, now_ns: int, now_ms: int) -> list[Report]:
        """Time passed: streams that are idle conclude, and old viewings are dropped."""
        if self._clock_ns - now_ns > CLOCK_FELL_NS:
            self._clock_ns = now_ns
        self._clock_ns = max(self._clock_ns, now_ns)
        reports: list[Report] = []
        for viewer in self._viewers.fall_idle(now_ns, min(self._idle_ns, FORGET_NS)):
            reports += self._age(viewer, now_ns)
        for viewer in self._viewers.silent(now_ns, FORGET_NS):
            reports += self._age(viewer, now_ns)
        return reports

    def conclude(self, now_ms: int) -> list[Report]:
        """The relay shuts down: every stream that can be told is told."""
        reports: list[Report] = []
        for viewer in self._viewers:
            for viewing in viewer.viewings:
                reports += self._tell(viewer, viewing, over=True)
        return reports

    # State.

    def changed(self, axis: Axis = NO_AXIS) -> Iterator[tuple[Key, str | None]]:
        """The viewings that changed since the last call: their key and state, ``None`` for those dropped.

        *axis* is that of the facts' times.
        """
        changed, self._changed = self._changed, {}
        for key in changed:
            viewer = self._viewers.get(key)
            yield key, None if viewer is None else viewer.dump(axis)

    def restore(self, rows: Iterable[tuple[Key, str]], axis: Axis = NO_AXIS, now_ns: int = 0) -> None:
        """Take in what :meth:`changed` gave before; a row that can't be read is left out and counted.

        *axis* is that of the facts to come; what another boot left is placed on it by the wall clock.
        """
        viewers = []
        for key, text in rows:
            try:
                viewer = Viewer.load(key, text)
            except (ValueError, TypeError, RecursionError):
                self.counts["state_unreadable"] += 1
                continue
            viewer.move_to(axis, now_ns)
            viewers.append(viewer)
        for viewer in sorted(viewers, key=lambda viewer: viewer.last_ns):
            self._viewers.touch(viewer)
            for viewing in viewer.viewings:
                self._open.update({(each.writer, each.number): viewer.key for each in viewing.open})

    def open_responses(self) -> Iterable[tuple[str, int]]:
        """Writer and number of what is open now."""
        return self._open.keys()

    def at_open(self, writer: str, number: int) -> tuple[Viewing, Response] | None:
        """The open response of that name, and the viewing that it belongs to."""
        return self._find(writer, number)[1]

    # A response's way through.

    def _find(self, writer: str, number: int) -> tuple[Viewer | None, tuple[Viewing, Response] | None]:
        key = self._open.get((writer, number))
        viewer = None if key is None else self._viewers.get(key)
        return viewer, None if viewer is None else viewer.find(writer, number)

    def _pass(self, time_ns: int) -> None:
        if time_ns < self._clock_ns:
            self.counts["late"] += 1
        self._clock_ns = max(self._clock_ns, time_ns)

    def _viewer(self, key: Key, at_ns: int) -> tuple[Viewer, list[Report]]:
        """The viewer of *key*, and what the time up to *at_ns* made of it."""
        viewer = self._viewers.get(key)
        reports = [] if viewer is None else self._age(viewer, at_ns)
        if viewer is None:
            reports += self._make_room()
            viewer = Viewer(key)
        viewer.last_ns = max(viewer.last_ns, at_ns)
        self._viewers.touch(viewer)
        return viewer, reports

    def _place(self, viewer: Viewer, writer: str, opening: Opening) -> None:
        viewing = viewer.place(Response.of(writer, opening), opening.play.skip)
        self._open[writer, opening.number] = viewer.key
        if len(viewing.open) > MOST_OPEN:
            self._give_up(viewing, viewing.open[0], opening.started_ns)

    def _closed_unseen(self, writer: str, transfer: Transfer) -> list[Report]:
        if self._is_nothing(transfer):
            return []
        opening = transfer.opening
        viewer, reports = self._viewer(key_of(opening.play), opening.started_ns)
        if viewer.has_ended(writer, opening.number):
            self.counts["repeated"] += 1
            return reports
        self._place(viewer, writer, opening)
        return reports + self._close(viewer, writer, transfer)

    def _is_nothing(self, transfer: Transfer) -> bool:
        """Whether nobody played it."""
        if transfer.sent <= 0:
            self.counts["ignored_empty"] += 1
            return True
        if is_probe(transfer.opening) and transfer.sent <= PROBE:
            self.counts["ignored_probe"] += 1
            return True
        return False

    def _close(self, viewer: Viewer, writer: str, transfer: Transfer) -> list[Report]:
        number = transfer.opening.number
        del self._open[writer, number]
        found = viewer.find(writer, number)
        if found is None:
            return []
        if self._is_nothing(transfer):
            viewer.take_back(*found, transfer.ended_ns)
            return self._settle(viewer)
        viewer.remember(writer, number)
        return self._count(viewer, *found, transfer) + self._settle(viewer)

    def _count(
        self, viewer: Viewer, viewing: Viewing, response: Response, transfer: Transfer
    ) -> list[Report]:
        first = viewing.is_first(response)
        scrub = viewing.end(response, transfer)
        if self._per_stream:
            viewing.assign(response, transfer, scrub=scrub)
            return []
        said = transfer.opening.play.skip
        skip = said if said in (0, 1) else int(not first)
        viewing.claimed = viewing.claimed or first or skip == 0
        return [viewer.report(transfer.ended_ms, transfer.sent, skip, player_of(transfer.opening.play))]

    def _lose(self, viewing: Viewing, response: Response, at_ns: int) -> None:
        self._open.pop((response.writer, response.number), None)
        # Per response its report is the one with skip=0, and there is none; a stream's report is told without it.
        if not self._per_stream and viewing.is_first(response):
            viewing.claimed = True
        viewing.lose(response, at_ns)

    def _give_up(self, viewing: Viewing, response: Response, at_ns: int) -> None:
        self._lose(viewing, response, at_ns)
        self.counts["responses_given_up"] += 1

    def _settle(self, viewer: Viewer) -> list[Report]:
        """After a fact of *viewer*: tell what is over, and note that it changed."""
        reports: list[Report] = []
        for viewing in viewer.viewings:
            current = viewer.viewings[-1]
            former = viewing is not current and current.sent > 0
            reports += self._tell(viewer, viewing, over=former or viewing.is_complete)
            if former and not viewing.open:
                reports += self._drop(viewer, viewing)
        self._changed[viewer.key] = None
        if not viewer.viewings:
            self._forget(viewer)
        return reports

    # What is told per stream.

    def _tell(self, viewer: Viewer, viewing: Viewing, *, over: bool) -> Iterator[Report]:
        segments = viewing.segments
        if segments is None or not viewing.is_enough(self._min_bytes):
            return
        for segment in list(segments.concluded(viewing.oldest_open_ns, over=over)):
            skip = segment.skip if viewing.begun and not viewing.claimed else 1
            viewing.claimed = viewing.claimed or skip == 0
            self._changed[viewer.key] = None
            yield viewer.report(segment.ended_ms, segments.take(segment), skip, segment.player)

    def _tell_late(self, viewer: Viewer, viewing: Viewing) -> Iterator[Report]:
        """The viewing ends: what came after its segment was told rides on nothing any more."""
        segments = viewing.segments
        if segments is not None and segments.late:
            self.counts["late"] += 1
            segment = segments.all[-1]
            yield viewer.report(segment.ended_ms, segments.take(segment), 1, segment.player)

    # What time does.

    def _age(self, viewer: Viewer, now_ns: int) -> list[Report]:
        """What happened to *viewer* by *now_ns*."""
        reports: list[Report] = []
        for viewing in viewer.viewings:
            for response in [each for each in viewing.open if now_ns - each.started_ns > OPEN_MOST_NS]:
                self._give_up(viewing, response, response.started_ns + OPEN_MOST_NS)
                self._changed[viewer.key] = None
            idle_ns = -1 if viewing.open else now_ns - viewing.last_ns
            if idle_ns >= self._idle_ns:
                reports += self._tell(viewer, viewing, over=True)
            if idle_ns >= FORGET_NS:
                reports += self._drop(viewer, viewing)
        if not viewer.viewings:
            self._forget(viewer)
        return reports

    def _drop(self, viewer: Viewer, viewing: Viewing) -> list[Report]:
        for response in viewing.open:
            self._open.pop((response.writer, response.number), None)
        viewing.open = ()
        viewer.remove(viewing)
        reports = [*self._tell(viewer, viewing, over=True), *self._tell_late(viewer, viewing)]
        if viewing.segments is not None and viewing.segments.untold:
            self.counts["below_minimum"] += 1
        return reports

    def _forget(self, viewer: Viewer) -> None:
        self._viewers.remove(viewer)
        self._changed[viewer.key] = None

    def _make_room(self) -> list[Report]:
        if len(self._viewers) < MOST_VIEWERS:
            return []
        viewer = self._viewers.oldest()
        self.counts["viewings_dropped"] += len(viewer.viewings)
        reports = [report for viewing in viewer.viewings for report in self._drop(viewer, viewing)]
        self._forget(viewer)
        return reports
