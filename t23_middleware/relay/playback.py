"""Transfers of one session and video in, reports out: the only place that decides ``skip``.

A pure, ordered state machine: no clock, no I/O. Facts come in the order of their time, on one axis in ns; what
comes later than that is judged as it comes and counted ``late``. When the caller lets time pass changes nothing in
what is told. The state is handed out as text, for the transaction that takes the facts in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..transfer import APP, OFFLOADED, Opening, Progress, Transfer, decode, encode
from .axis import NO_AXIS, Axis
from .drains import Drain
from .given_out import GivenOut
from .playback_draining import BEFORE_ALL_NS, DrainingPlayback
from .proxy_line import ProxyLine
from .report import Report
from .segments import player_of
from .viewer import CLOCK_FELL_NS, Key, Viewer, key_of
from .viewing import MOST_OPEN, PROBE, Response, Viewing, is_probe

#: A viewing is dropped after this time without a request or an open response: longer than a pause worth joining.
FORGET_NS = 30 * 60 * 1_000_000_000
#: A response is given up after this time: no viewing lasts as long, but its close line may have been lost.
OPEN_MOST_NS = 24 * 3600 * 1_000_000_000
#: Sessions at a video that are kept, at 1 to 2 KB each; the one that was silent longest makes room.
MOST_VIEWERS = 200_000
#: How far the proxy's clock may be off before the app's is believed instead, in ms. Apache tells whole seconds.
CLOCK_OFF_MS = 2000

#: Writer and number of a response.
_Id = tuple[str, int]


class Playback(DrainingPlayback):
    """Turns openings and transfers into reports.

    *per* is ``"response"``: each counted response is a report as it closes, or ``"stream"``: one report per
    viewing and one per scrub. *idle_s* is the time in seconds without a request or an open response after which
    a stream counts as concluded; in ``"stream"`` a viewing that handed over less than *min_bytes* bytes makes no
    report (``None``: the smaller of 512 KiB and an eighth of the file).

    A response that a proxy counts stays open until the line of the proxy's log, for *proxy_wait_s* seconds after the
    app is done with it; *counts_type* tells which content types of that log are media. One that the client's kernel
    has not all of makes its report when that has it or is gone, *drain_wait_s* seconds after its end at the latest.
    """

    def __init__(
        self,
        *,
        per: str = "response",
        idle_s: float = 30.0,
        min_bytes: int | None = None,
        proxy_wait_s: float = 21600.0,
        counts_type: Callable[[str], bool] = lambda content_type: True,
        drain_wait_s: float = 600.0,
    ) -> None:
        super().__init__(drain_wait_s)
        self._per_stream = per == "stream"
        self._idle_ns = int(idle_s * 1e9)
        self._min_bytes = min_bytes
        self._open: dict[_Id, Key] = {}
        self._proxy_wait_ms = int(proxy_wait_s * 1000)
        self._counts_type = counts_type
        #: Those that the app is done with and the proxy is not; since when, in ms since the epoch.
        self._awaited: dict[_Id, int] = {}
        #: The ids that proxies may tell of.
        self.given_out = GivenOut()
        # Named events in self.counts: ``late``, ``repeated``, ``below_minimum``,
        # ``interrupted``, ``interrupted_unknown``, ``ignored_empty``, ``ignored_probe``, ``responses_given_up``,
        # ``viewings_dropped``, ``state_unreadable``; of what drains ``unknown_end``, ``drain_wait_over``; of what a
        # proxy counts ``unconfirmed``, ``no_proxy_line`` (plays that are lost), ``proxy_cached``,
        # ``proxy_not_played``, ``proxy_clock_differs``.

    # Facts.

    def opened(self, writer: str, opening: Opening) -> list[Report]:
        """A counted response started."""
        self._pass(opening.started_ns)
        if opening.counted_by != APP:
            self.given_out.note(writer, opening.number)
        return [] if is_probe(opening) else self._admit(writer, opening)

    def closed(self, writer: str, transfer: Transfer) -> list[Report]:
        """A counted response is over, whether its start was seen or not."""
        self._pass(transfer.ended_ns)
        opening = transfer.opening
        if opening.counted_by == OFFLOADED or (opening.counted_by != APP and transfer.sent > 0):
            return self._done_by_app(writer, transfer)
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
        """The writer of an open response died: it ends with its connection, or with what is known of it."""
        viewer, found = self._find(writer, number)
        if viewer is None or found is None:
            return []
        if found[1].counted_by != APP:
            return self._await_line(viewer, *found, at_ms)
        return self._orphan(viewer, *found, at_ns, at_ms)

    def logged(self, line: ProxyLine, at_ns: int) -> list[Report] | None:
        """A proxy's log says what it sent; ``None`` where no response is open that has the line's id."""
        viewer, found = self._find(*line.writer_and_number)
        if viewer is None or found is None or found[1].counted_by == APP:
            return None
        self._pass(at_ns)
        response = found[1]
        if response.awaited_since_ms is not None:
            return self._decide(viewer, *found, line, at_ns)
        if response.line is not None:
            self.counts["proxy_cached"] += 1
            return []
        # The app's own count is less where framing was added to the body, and an app that lost its client says it at
        # the next chunk.
        response.line = line.to_text()
        self._changed[viewer.key] = None
        return []

    def advance(self, now_ns: int, now_ms: int) -> list[Report]:
        """Time passed: streams that are idle conclude, old viewings are dropped, and a proxy's line may be overdue."""
        if self._clock_ns - now_ns > CLOCK_FELL_NS:
            self._clock_ns = now_ns
        self._clock_ns = max(self._clock_ns, now_ns)
        reports = self._give_up_lines(now_ms) + self._end_overdue(now_ms)
        for viewer in self._viewers.fall_idle(now_ns, min(self._idle_ns, FORGET_NS)):
            reports += self._age(viewer, now_ns)
        for viewer in self._viewers.silent(now_ns, FORGET_NS):
            reports += self._age(viewer, now_ns)
        return reports

    def conclude(self, now_ms: int) -> list[Report]:
        """The relay shuts down: every stream that can be told is told."""
        reports = self.end_draining()
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
                _check(viewer)
            except (ValueError, TypeError, RecursionError):
                self.counts["state_unreadable"] += 1
                continue
            viewer.move_to(axis, now_ns)
            viewers.append(viewer)
        for viewer in sorted(viewers, key=lambda viewer: viewer.last_ns):
            self._viewers.touch(viewer)
            for viewing in viewer.viewings:
                self._open.update({(each.writer, each.number): viewer.key for each in viewing.open})
        self._restore_awaited()
        self._restore_draining()

    def _restore_awaited(self) -> None:
        open_now = [found for id in self._open if (found := self._find(*id)[1]) is not None]
        since = {
            (each.writer, each.number): each.awaited_since_ms
            for _, each in open_now
            if each.awaited_since_ms is not None
        }
        self._awaited = dict(sorted(since.items(), key=lambda item: item[1]))

    def open_responses(self) -> Iterable[_Id]:
        """Writer and number of what the app has open now."""
        return self._open.keys() - self._awaited.keys() - set(self.drains.ids())

    @property
    def latest_ns(self) -> int:
        """Time of the latest fact of all that are kept; before any time where there is none."""
        return max((viewer.last_ns for viewer in self._viewers), default=BEFORE_ALL_NS)

    @property
    def awaited(self) -> int:
        """Responses that only the proxy's line is missing of."""
        return len(self._awaited)

    @property
    def awaited_since_ms(self) -> int | None:
        """Since when the oldest of them is, in ms since the epoch."""
        return next(iter(self._awaited.values()), None)

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
            viewer = Viewer(key, at_ns)
        viewer.last_ns = max(viewer.last_ns, at_ns)
        self._viewers.touch(viewer)
        return viewer, reports

    def _admit(self, writer: str, opening: Opening) -> list[Report]:
        viewer, reports = self._viewer(key_of(opening.play), opening.started_ns)
        if (writer, opening.number) in self._open or viewer.has_ended(writer, opening.number):
            self.counts["repeated"] += 1
            return reports
        reports += self._place(viewer, writer, opening)
        return reports + self._settle(viewer)

    def _place(self, viewer: Viewer, writer: str, opening: Opening) -> list[Report]:
        response = Response.of(writer, opening)
        if opening.counted_by != APP:
            response.known = encode(opening).decode().rstrip()
        else:
            self._watch(response, opening)
        viewing = viewer.place(response, opening.play.skip)
        self._open[writer, opening.number] = viewer.key
        if len(viewing.open) <= MOST_OPEN:
            return []
        oldest = viewing.open[0]
        if oldest.awaited_since_ms is not None:
            return self._give_up_line(viewer, viewing, oldest)
        if oldest.draining_since_ms is not None:
            return self._give_up_orphan(viewer, viewing, oldest)
        self._give_up(viewing, oldest, opening.started_ns)
        return []

    def _closed_unseen(self, writer: str, transfer: Transfer) -> list[Report]:
        if self._is_nothing(transfer):
            return []
        opening = transfer.opening
        viewer, reports = self._viewer(key_of(opening.play), opening.started_ns)
        if viewer.has_ended(writer, opening.number):
            self.counts["repeated"] += 1
            return reports
        reports += self._place(viewer, writer, opening)
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
        found = viewer.find(writer, number)
        self._forget_id((writer, number))
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
        drain = Drain.of(response.writer, transfer)
        if self._per_stream:
            known = transfer if drain is None else transfer._replace(sent=0)
            segment = viewing.assign(response, known, scrub=scrub)
            if drain is None:
                return []
            drain.segment_ns = None if segment is None else segment.started_ns
            return self._drain(viewer, viewing, response, drain)
        said = transfer.opening.play.skip
        skip = said if said in (0, 1) else int(not first)
        viewing.claimed = viewing.claimed or first or skip == 0
        report = viewer.report(transfer.ended_ms, transfer.sent, skip, player_of(transfer.opening.play))
        if drain is None:
            return [report]
        drain.hold(report)
        return self._drain(viewer, viewing, response, drain)

    def _lose(self, viewing: Viewing, response: Response, at_ns: int) -> None:
        self._forget_response(response)
        # Per response its report is the one with skip=0, and there is none; a stream's report is told without it.
        if not self._per_stream and viewing.is_first(response):
            viewing.claimed = True
        viewing.lose(response, at_ns)

    def _give_up(self, viewing: Viewing, response: Response, at_ns: int) -> None:
        self._lose(viewing, response, at_ns)
        self.counts["responses_given_up"] += 1

    def _lose_unknown(self, viewer: Viewer, viewing: Viewing, response: Response, at_ns: int) -> list[Report]:
        self._lose(viewing, response, at_ns)
        return self._settle(viewer)

    def _forget_response(self, response: Response) -> None:
        self._forget_id((response.writer, response.number))

    def _forget_id(self, id: _Id) -> None:
        self._open.pop(id, None)
        self._awaited.pop(id, None)
        self.drains.forget(id)

    # What a proxy counts.

    def _done_by_app(self, writer: str, transfer: Transfer) -> list[Report]:
        """The app is done with a response that the proxy goes on to send, whether its start was seen or not."""
        opening, reports = transfer.opening, []
        if self._open.get((writer, opening.number)) != key_of(opening.play):
            if is_probe(opening):
                self.counts["ignored_probe"] += 1
                return []
            self.given_out.note(writer, opening.number)
            reports = self._admit(writer, opening)
        viewer, found = self._find(writer, opening.number)
        if viewer is None or found is None:
            return reports
        found[1].known = encode(transfer).decode().rstrip()
        return reports + self._await_line(viewer, *found, transfer.ended_ms)

    def _await_line(
        self, viewer: Viewer, viewing: Viewing, response: Response, since_ms: int
    ) -> list[Report]:
        """Nothing more comes from the app: decide by the proxy's line, or wait for it."""
        if response.line is not None:
            line = ProxyLine.from_text(response.line)
            ago_ns = max(since_ms - line.ended_ms, 0) * 1_000_000
            return self._decide(viewer, viewing, response, line, self._clock_ns - ago_ns)
        if response.awaited_since_ms is None:
            response.awaited_since_ms = since_ms
            self._awaited[response.writer, response.number] = since_ms
            self._changed[viewer.key] = None
        return []

    def _decide(
        self, viewer: Viewer, viewing: Viewing, response: Response, line: ProxyLine, at_ns: int
    ) -> list[Report]:
        """*response* ends as the proxy's *line* tells."""
        known = _known(response)
        opening = known if isinstance(known, Opening) else known.opening
        if response.counted_by == OFFLOADED:
            wanted = opening.part.first if line.status == 200 else None
            opening = opening._replace(
                status=line.status, part=line.part, length=line.length, asked_first=wanted
            )
            response.learn(opening)
        ended_ns, ended_ms = self._end_of(opening, line, at_ns)
        sent = line.body
        if isinstance(known, Transfer) and response.counted_by != OFFLOADED:
            sent = min(sent, known.sent)
        if not line.is_ok or (response.counted_by == OFFLOADED and not self._counts_type(line.content_type)):
            self.counts["proxy_not_played"] += 1
            return self._take_back(viewer, viewing, response, ended_ns)
        viewer, reports = self._viewer(viewer.key, ended_ns)
        return reports + self._close(viewer, response.writer, Transfer(opening, ended_ns, ended_ms, sent))

    def _take_back(self, viewer: Viewer, viewing: Viewing, response: Response, ended_ns: int) -> list[Report]:
        self._forget_response(response)
        viewer.take_back(viewing, response, ended_ns)
        return self._settle(viewer)

    def _end_of(self, opening: Opening, line: ProxyLine, at_ns: int) -> tuple[int, int]:
        """When it ended, on the axis and in ms since the epoch: by the proxy's clock, unless that differs from ours."""
        took_ms = round(line.seconds * 1000)
        before_ms = opening.started_ms - line.ended_ms
        after_ms = line.ended_ms - took_ms - opening.started_ms
        if max(before_ms, after_ms) > CLOCK_OFF_MS:
            self.counts["proxy_clock_differs"] += 1
            return opening.started_ns + took_ms * 1_000_000, opening.started_ms + took_ms
        if 0 < opening.started_ns - at_ns < CLOCK_FELL_NS:
            return opening.started_ns, max(line.ended_ms, opening.started_ms)
        return at_ns, line.ended_ms

    def _give_up_lines(self, now_ms: int) -> list[Report]:
        """The oldest first; what was awaited from a time that has not come yet is from before the clock was set back."""
        reports: list[Report] = []
        while self._awaited:
            id, since_ms = next(iter(self._awaited.items()))
            if since_ms - now_ms > CLOCK_FELL_NS // 1_000_000:
                del self._awaited[id]
                self._awaited[id] = now_ms
            elif now_ms - since_ms < self._proxy_wait_ms:
                break
            else:
                viewer, found = self._find(*id)
                del self._awaited[id]
                reports += [] if viewer is None or found is None else self._give_up_line(viewer, *found)
        return reports

    def _give_up_line(self, viewer: Viewer, viewing: Viewing, response: Response) -> list[Report]:
        """No line came: the app's count has to do, if it has one."""
        known = _known(response)
        if response.counted_by == OFFLOADED:
            self.counts["no_proxy_line"] += 1
            return self._lose_unknown(viewer, viewing, response, viewing.last_ns)
        if isinstance(known, Opening):
            self.counts["interrupted_unknown"] += 1
            return self._lose_unknown(viewer, viewing, response, viewing.last_ns)
        self.counts["unconfirmed"] += 1
        if isinstance(known, Progress):
            self.counts["interrupted"] += 1
            known = Transfer(known.opening, known.at_ns, known.at_ms, known.sent)
        return self._close(viewer, response.writer, known)

    # After each fact.

    def _settle(self, viewer: Viewer) -> list[Report]:
        """After a fact of *viewer*: tell what is over, and note that it changed."""
        reports: list[Report] = []
        for viewing in viewer.viewings:
            current = viewer.viewings[-1]
            former = viewing is not current and current.sent > 0
            reports += self._tell(viewer, viewing, over=former or viewing.is_complete)
            if former and not viewing.is_busy:
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
            ended_ms, sent = segment.ended_ms, segments.take(segment)
            if sent > 0:  # else all of it drained to nothing
                yield viewer.report(ended_ms, sent, skip, segment.player)

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
            for response in [each for each in viewing.open if _is_forgotten(each, now_ns)]:
                self._give_up(viewing, response, response.started_ns + OPEN_MOST_NS)
                self._changed[viewer.key] = None
            if not viewing.is_busy and now_ns - viewing.quiet_since_ns >= self._idle_ns:
                reports += self._tell(viewer, viewing, over=True)
            if not viewing.open and now_ns - viewing.last_ns >= FORGET_NS:
                reports += self._drop(viewer, viewing)
        if not viewer.viewings:
            self._forget(viewer)
        return reports

    def _drop(self, viewer: Viewer, viewing: Viewing) -> list[Report]:
        reports = self._end_drains_of(viewer, viewing)
        for response in viewing.open:
            self._forget_response(response)
        viewing.open = ()
        viewer.remove(viewing)
        reports += [*self._tell(viewer, viewing, over=True), *self._tell_late(viewer, viewing)]
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
        reports: list[Report] = []
        for viewing in viewer.viewings:
            for response in [each for each in viewing.open if each.awaited_since_ms is not None]:
                reports += self._give_up_line(viewer, viewing, response)
            for response in [each for each in viewing.open if each.draining_since_ms is not None]:
                reports += self._give_up_orphan(viewer, viewing, response)
        reports += [report for viewing in viewer.viewings for report in self._drop(viewer, viewing)]
        self._forget(viewer)
        return reports


def _known(response: Response) -> Opening | Progress | Transfer:
    """The latest that is known of *response*; raises ValueError where that is not its line."""
    known = decode((response.known or "").encode())
    if not isinstance(known, (Opening, Progress, Transfer)):
        raise ValueError("not the line of a response")
    return known


def _check(viewer: Viewer) -> None:
    """Raises ValueError where a line in the state of *viewer* can't be read."""
    for response in [each for viewing in viewer.viewings for each in viewing.open]:
        if response.counted_by != APP or response.known is not None:
            _known(response)
        if response.line is not None:
            ProxyLine.from_text(response.line)


def _is_forgotten(response: Response, now_ns: int) -> bool:
    """Whether nobody will close it any more; what waits for a proxy has a bound of its own."""
    if response.awaited_since_ms is not None or response.draining_since_ms is not None:
        return False
    return now_ns - response.started_ns > OPEN_MOST_NS
