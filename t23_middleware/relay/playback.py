"""Turns transfers into reports. This is the only place that decides ``skip``.

A pure, ordered state machine without a clock and without I/O. Facts come in the order of their time, in ns of
CLOCK_MONOTONIC; a fact that comes late is judged when it comes and counted as ``late``. How often the caller calls
:meth:`Playback.advance` does not change the reports. The state is returned as text, so that the caller can store it in
the same transaction as the facts' offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..transfer import APP, OFFLOADED, Opening, Progress, Transfer, decode, encode
from .axis import NO_CLOCK, BootClock
from .drains import Drain
from .given_out import IssuedIds
from .playback_draining import BEFORE_ALL_TIME_NS, DrainingPlayback
from .proxy_line import ProxyLine
from .report import Report
from .segments import player_of
from .viewer import CLOCK_SET_BACK_NS, Key, SessionState, key_of
from .viewing import MOST_OPEN, PROBE, OpenResponse, Viewing, is_probe

#: A viewing is dropped after this time without a request or an open response. A longer pause starts a new viewing.
DROP_VIEWING_NS = 30 * 60 * 1_000_000_000
#: A response is dropped after this time: no viewing lasts as long, and its close line may be lost.
LONGEST_OPEN_NS = 24 * 3600 * 1_000_000_000
#: Most session states in memory, at 1 to 2 KB each; beyond this, the one without a fact for longest is dropped.
MOST_SESSIONS = 200_000
#: The proxy's clock is ignored if it differs from the app's by more than this, in ms. Apache logs whole seconds.
CLOCK_OFF_MS = 2000

#: Writer and number of a response.
_Id = tuple[str, int]


class Playback(DrainingPlayback):
    """Turns openings and transfers into reports.

    With *per* ``"response"``, each counted response is a report when it closes. With ``"stream"``, a viewing is one
    report, plus one per scrub. *idle_s* is the time in seconds without a request or an open response after which a
    stream is concluded. With ``"stream"``, a viewing that handed over less than *min_bytes* bytes makes no report
    (``None``: the smaller of 512 KiB and an eighth of the file).

    A response that a proxy counts stays open until its line in the proxy's log, for at most *proxy_wait_s* seconds
    after the app ended it; *counts_type* decides which content types of that log are media. A response that the
    client's kernel has not acknowledged in full makes its report when it has, when the connection is closed, or
    *drain_wait_s* seconds after its end.
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
        #: Responses that the app ended and that wait for the proxy's line -> since when, in ms since the epoch.
        self._awaiting_line: dict[_Id, int] = {}
        #: The play ids that were issued to proxies.
        self.issued_ids = IssuedIds()
        # Events in self.counts: ``late``, ``repeated``, ``below_minimum``, ``interrupted``, ``interrupted_unknown``,
        # ``ignored_empty``, ``ignored_probe``, ``responses_given_up``, ``viewings_dropped``, ``state_unreadable``; for
        # draining responses ``unknown_end``, ``drain_wait_over``; for responses that a proxy counts ``unconfirmed``,
        # ``no_proxy_line`` (plays that are lost), ``proxy_cached``, ``proxy_not_played``, ``proxy_clock_differs``.

    # Facts.

    def opened(self, writer: str, opening: Opening) -> list[Report]:
        """A counted response started."""
        self._advance_clock(opening.started_ns)
        if opening.counted_by != APP:
            self.issued_ids.note(writer, opening.number)
        return [] if is_probe(opening) else self._open_response(writer, opening)

    def closed(self, writer: str, transfer: Transfer) -> list[Report]:
        """A counted response ended; its start may be unknown here."""
        self._advance_clock(transfer.ended_ns)
        opening = transfer.opening
        if opening.counted_by == OFFLOADED or (opening.counted_by != APP and transfer.sent > 0):
            return self._app_finished(writer, transfer)
        key = key_of(opening.play)
        if self._open.get((writer, opening.number)) != key:
            return self._close_unopened(writer, transfer)
        session, reports = self._session_at(key, transfer.ended_ns)
        return reports + self._close(session, writer, transfer)

    def progressed(self, writer: str, progress: Progress) -> None:
        """An open response made progress."""
        session, found = self._find(writer, progress.opening.number)
        if session is not None and found is not None:
            found[1].last_line = encode(progress).decode().rstrip()
            self._changed[session.key] = None

    def writer_died(self, writer: str, number: int, at_ns: int, at_ms: int) -> list[Report]:
        """The writer of an open response died: end it with its connection, or with its latest known count."""
        session, found = self._find(writer, number)
        if session is None or found is None:
            return []
        if found[1].counted_by != APP:
            return self._await_line(session, *found, at_ms)
        return self._add_orphan(session, *found, at_ns, at_ms)

    def logged(self, line: ProxyLine, at_ns: int) -> list[Report] | None:
        """A proxy logged what it sent. Returns ``None`` if no open response has the line's id."""
        session, found = self._find(*line.writer_and_number)
        if session is None or found is None or found[1].counted_by == APP:
            return None
        self._advance_clock(at_ns)
        response = found[1]
        if response.awaiting_line_since_ms is not None:
            return self._end_by_line(session, *found, line, at_ns)
        if response.proxy_line is not None:
            self.counts["proxy_cached"] += 1
            return []
        # Wait for the app's own count too: it is smaller if framing was added to the body, and an app whose client
        # disconnected ends the response at its next chunk.
        response.proxy_line = line.to_text()
        self._changed[session.key] = None
        return []

    def advance(self, now_ns: int, now_ms: int) -> list[Report]:
        """Time passed: conclude idle streams, drop old viewings, and end responses whose proxy line is overdue."""
        if self._clock_ns - now_ns > CLOCK_SET_BACK_NS:
            self._clock_ns = now_ns
        self._clock_ns = max(self._clock_ns, now_ns)
        reports = self._end_overdue_lines(now_ms) + self._end_overdue_drains(now_ms)
        for session in self._sessions.fall_idle(now_ns, min(self._idle_ns, DROP_VIEWING_NS)):
            reports += self._apply_time(session, now_ns)
        for session in self._sessions.silent(now_ns, DROP_VIEWING_NS):
            reports += self._apply_time(session, now_ns)
        return reports

    def conclude(self, now_ms: int) -> list[Report]:
        """The relay stops: report every stream that can be reported."""
        reports = self.end_draining()
        for session in self._sessions:
            for viewing in session.viewings:
                reports += self._report_runs(session, viewing, over=True)
        return reports

    # State.

    def changed(self, clock: BootClock = NO_CLOCK) -> Iterator[tuple[Key, str | None]]:
        """Key and state of the sessions that changed since the last call; the state is ``None`` if one was dropped.

        *clock* is the boot that the facts' times belong to.
        """
        changed, self._changed = self._changed, {}
        for key in changed:
            session = self._sessions.get(key)
            yield key, None if session is None else session.dump(clock)

    def restore(self, rows: Iterable[tuple[Key, str]], clock: BootClock = NO_CLOCK, now_ns: int = 0) -> None:
        """Load the *rows* that :meth:`changed` returned before; a row that can't be read is skipped and counted.

        *clock* is the boot of the facts to come. Times of another boot are converted by the wall clock.
        """
        sessions = []
        for key, text in rows:
            try:
                session = SessionState.load(key, text)
                _check_lines(session)
            except (ValueError, TypeError, RecursionError):
                self.counts["state_unreadable"] += 1
                continue
            session.rebase(clock, now_ns)
            sessions.append(session)
        for session in sorted(sessions, key=lambda session: session.last_ns):
            self._sessions.touch(session)
            for viewing in session.viewings:
                self._open.update({(each.writer, each.number): session.key for each in viewing.open})
        self._restore_awaiting_line()
        self._restore_draining()

    def _restore_awaiting_line(self) -> None:
        open_now = [found for id in self._open if (found := self._find(*id)[1]) is not None]
        since = {
            (each.writer, each.number): each.awaiting_line_since_ms
            for _, each in open_now
            if each.awaiting_line_since_ms is not None
        }
        self._awaiting_line = dict(sorted(since.items(), key=lambda item: item[1]))

    def open_responses(self) -> Iterable[_Id]:
        """Writer and number of the responses that the app has open."""
        return self._open.keys() - self._awaiting_line.keys() - set(self.drains.ids())

    @property
    def latest_ns(self) -> int:
        """Time of the latest fact of all sessions, or ``BEFORE_ALL_TIME_NS`` without one."""
        return max((session.last_ns for session in self._sessions), default=BEFORE_ALL_TIME_NS)

    @property
    def awaiting_line(self) -> int:
        """Number of responses that wait for the proxy's line."""
        return len(self._awaiting_line)

    @property
    def awaiting_line_since_ms(self) -> int | None:
        """Since when the oldest of them waits, in ms since the epoch."""
        return next(iter(self._awaiting_line.values()), None)

    def find_open(self, writer: str, number: int) -> tuple[Viewing, OpenResponse] | None:
        """The open response with this writer and number, and its viewing."""
        return self._find(writer, number)[1]

    # Open and close.

    def _find(
        self, writer: str, number: int
    ) -> tuple[SessionState | None, tuple[Viewing, OpenResponse] | None]:
        key = self._open.get((writer, number))
        session = None if key is None else self._sessions.get(key)
        return session, None if session is None else session.find(writer, number)

    def _advance_clock(self, time_ns: int) -> None:
        if time_ns < self._clock_ns:
            self.counts["late"] += 1
        self._clock_ns = max(self._clock_ns, time_ns)

    def _session_at(self, key: Key, at_ns: int) -> tuple[SessionState, list[Report]]:
        """The session of *key*, new if necessary, and the reports that are due by *at_ns*."""
        session = self._sessions.get(key)
        reports = [] if session is None else self._apply_time(session, at_ns)
        if session is None:
            reports += self._make_room()
            session = SessionState(key, at_ns)
        session.last_ns = max(session.last_ns, at_ns)
        self._sessions.touch(session)
        return session, reports

    def _open_response(self, writer: str, opening: Opening) -> list[Report]:
        session, reports = self._session_at(key_of(opening.play), opening.started_ns)
        if (writer, opening.number) in self._open or session.has_ended(writer, opening.number):
            self.counts["repeated"] += 1
            return reports
        reports += self._add_open(session, writer, opening)
        return reports + self._finish_fact(session)

    def _add_open(self, session: SessionState, writer: str, opening: Opening) -> list[Report]:
        response = OpenResponse.of(writer, opening)
        if opening.counted_by != APP:
            response.last_line = encode(opening).decode().rstrip()
        else:
            self._watch(response, opening)
        viewing = session.add(response, opening.play.skip)
        self._open[writer, opening.number] = session.key
        if len(viewing.open) <= MOST_OPEN:
            return []
        oldest = viewing.open[0]
        if oldest.awaiting_line_since_ms is not None:
            return self._end_without_line(session, viewing, oldest)
        if oldest.orphaned_since_ms is not None:
            return self._end_orphan(session, viewing, oldest)
        self._drop_open(viewing, oldest, opening.started_ns)
        return []

    def _close_unopened(self, writer: str, transfer: Transfer) -> list[Report]:
        if self._is_not_played(transfer):
            return []
        opening = transfer.opening
        session, reports = self._session_at(key_of(opening.play), opening.started_ns)
        if session.has_ended(writer, opening.number):
            self.counts["repeated"] += 1
            return reports
        reports += self._add_open(session, writer, opening)
        return reports + self._close(session, writer, transfer)

    def _is_not_played(self, transfer: Transfer) -> bool:
        """Whether it is empty or a probe, and so not played."""
        if transfer.sent <= 0:
            self.counts["ignored_empty"] += 1
            return True
        if is_probe(transfer.opening) and transfer.sent <= PROBE:
            self.counts["ignored_probe"] += 1
            return True
        return False

    def _close(self, session: SessionState, writer: str, transfer: Transfer) -> list[Report]:
        number = transfer.opening.number
        found = session.find(writer, number)
        self._forget_id((writer, number))
        if found is None:
            return []
        if self._is_not_played(transfer):
            session.drop_unplayed(*found, transfer.ended_ns)
            return self._finish_fact(session)
        session.note_ended(writer, number)
        return self._count_closed(session, *found, transfer) + self._finish_fact(session)

    def _count_closed(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, transfer: Transfer
    ) -> list[Report]:
        first = viewing.is_first_response(response)
        scrub = viewing.close(response, transfer)
        drain = Drain.of(response.writer, transfer)
        if self._per_stream:
            counted = transfer if drain is None else transfer._replace(sent=0)
            run = viewing.assign_bytes(response, counted, scrub=scrub)
            if drain is None:
                return []
            drain.run_ns = None if run is None else run.started_ns
            return self._drain(session, viewing, response, drain)
        app_skip = transfer.opening.play.skip
        skip = app_skip if app_skip in (0, 1) else int(not first)
        viewing.play_reported = viewing.play_reported or first or skip == 0
        report = session.report(transfer.ended_ms, transfer.sent, skip, player_of(transfer.opening.play))
        if drain is None:
            return [report]
        drain.keep_report(report)
        return self._drain(session, viewing, response, drain)

    def _close_uncounted(self, viewing: Viewing, response: OpenResponse, at_ns: int) -> None:
        self._forget_open(response)
        # Per response, its report would have had skip=0, and is never made. A stream is reported without it.
        if not self._per_stream and viewing.is_first_response(response):
            viewing.play_reported = True
        viewing.close_uncounted(response, at_ns)

    def _drop_open(self, viewing: Viewing, response: OpenResponse, at_ns: int) -> None:
        self._close_uncounted(viewing, response, at_ns)
        self.counts["responses_given_up"] += 1

    def _end_uncounted(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, at_ns: int
    ) -> list[Report]:
        self._close_uncounted(viewing, response, at_ns)
        return self._finish_fact(session)

    def _forget_open(self, response: OpenResponse) -> None:
        self._forget_id((response.writer, response.number))

    def _forget_id(self, id: _Id) -> None:
        self._open.pop(id, None)
        self._awaiting_line.pop(id, None)
        self.drains.forget(id)

    # Responses that a proxy counts.

    def _app_finished(self, writer: str, transfer: Transfer) -> list[Report]:
        """The app ended a response that the proxy still sends; its start may be unknown here."""
        opening, reports = transfer.opening, []
        if self._open.get((writer, opening.number)) != key_of(opening.play):
            if is_probe(opening):
                self.counts["ignored_probe"] += 1
                return []
            self.issued_ids.note(writer, opening.number)
            reports = self._open_response(writer, opening)
        session, found = self._find(writer, opening.number)
        if session is None or found is None:
            return reports
        found[1].last_line = encode(transfer).decode().rstrip()
        return reports + self._await_line(session, *found, transfer.ended_ms)

    def _await_line(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, since_ms: int
    ) -> list[Report]:
        """The app sends no more of *response*: end it by the proxy's line, or wait for that."""
        if response.proxy_line is not None:
            line = ProxyLine.from_text(response.proxy_line)
            ago_ns = max(since_ms - line.ended_ms, 0) * 1_000_000
            return self._end_by_line(session, viewing, response, line, self._clock_ns - ago_ns)
        if response.awaiting_line_since_ms is None:
            response.awaiting_line_since_ms = since_ms
            self._awaiting_line[response.writer, response.number] = since_ms
            self._changed[session.key] = None
        return []

    def _end_by_line(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, line: ProxyLine, at_ns: int
    ) -> list[Report]:
        """End *response* with the count and the time in the proxy's *line*."""
        last = _last_event(response)
        opening = last if isinstance(last, Opening) else last.opening
        if response.counted_by == OFFLOADED:
            wanted = opening.part.first if line.status == 200 else None
            opening = opening._replace(
                status=line.status, part=line.part, length=line.length, asked_first=wanted
            )
            response.set_part(opening)
        ended_ns, ended_ms = self._end_time(opening, line, at_ns)
        sent = line.body
        if isinstance(last, Transfer) and response.counted_by != OFFLOADED:
            sent = min(sent, last.sent)
        if not line.is_ok or (response.counted_by == OFFLOADED and not self._counts_type(line.content_type)):
            self.counts["proxy_not_played"] += 1
            return self._drop_unplayed(session, viewing, response, ended_ns)
        session, reports = self._session_at(session.key, ended_ns)
        return reports + self._close(session, response.writer, Transfer(opening, ended_ns, ended_ms, sent))

    def _drop_unplayed(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, ended_ns: int
    ) -> list[Report]:
        self._forget_open(response)
        session.drop_unplayed(viewing, response, ended_ns)
        return self._finish_fact(session)

    def _end_time(self, opening: Opening, line: ProxyLine, at_ns: int) -> tuple[int, int]:
        """Its end in monotonic ns and in ms since the epoch: by the proxy's clock, unless that differs from ours."""
        took_ms = round(line.seconds * 1000)
        before_ms = opening.started_ms - line.ended_ms
        after_ms = line.ended_ms - took_ms - opening.started_ms
        if max(before_ms, after_ms) > CLOCK_OFF_MS:
            self.counts["proxy_clock_differs"] += 1
            return opening.started_ns + took_ms * 1_000_000, opening.started_ms + took_ms
        if 0 < opening.started_ns - at_ns < CLOCK_SET_BACK_NS:
            return opening.started_ns, max(line.ended_ms, opening.started_ms)
        return at_ns, line.ended_ms

    def _end_overdue_lines(self, now_ms: int) -> list[Report]:
        """End what waited too long, the oldest first. A start in the future was taken before the clock was set back."""
        reports: list[Report] = []
        while self._awaiting_line:
            id, since_ms = next(iter(self._awaiting_line.items()))
            if since_ms - now_ms > CLOCK_SET_BACK_NS // 1_000_000:
                del self._awaiting_line[id]
                self._awaiting_line[id] = now_ms
            elif now_ms - since_ms < self._proxy_wait_ms:
                break
            else:
                session, found = self._find(*id)
                del self._awaiting_line[id]
                reports += [] if session is None or found is None else self._end_without_line(session, *found)
        return reports

    def _end_without_line(
        self, session: SessionState, viewing: Viewing, response: OpenResponse
    ) -> list[Report]:
        """No line came: end *response* with the app's count, if there is one."""
        last = _last_event(response)
        if response.counted_by == OFFLOADED:
            self.counts["no_proxy_line"] += 1
            return self._end_uncounted(session, viewing, response, viewing.last_ns)
        if isinstance(last, Opening):
            self.counts["interrupted_unknown"] += 1
            return self._end_uncounted(session, viewing, response, viewing.last_ns)
        self.counts["unconfirmed"] += 1
        if isinstance(last, Progress):
            self.counts["interrupted"] += 1
            last = Transfer(last.opening, last.at_ns, last.at_ms, last.sent)
        return self._close(session, response.writer, last)

    # After each fact.

    def _finish_fact(self, session: SessionState) -> list[Report]:
        """After a fact of *session*: report the runs that are concluded, and mark it as changed."""
        reports: list[Report] = []
        for viewing in session.viewings:
            current = session.viewings[-1]
            former = viewing is not current and current.sent > 0
            reports += self._report_runs(session, viewing, over=former or viewing.is_complete)
            if former and not viewing.is_busy:
                reports += self._drop_viewing(session, viewing)
        self._changed[session.key] = None
        if not session.viewings:
            self._remove_session(session)
        return reports

    # Reports per stream.

    def _report_runs(self, session: SessionState, viewing: Viewing, *, over: bool) -> Iterator[Report]:
        runs = viewing.runs
        if runs is None or not viewing.has_enough(self._min_bytes):
            return
        for run in list(runs.concluded(viewing.oldest_open_ns, over=over)):
            skip = run.skip if viewing.beginning_counted and not viewing.play_reported else 1
            viewing.play_reported = viewing.play_reported or skip == 0
            self._changed[session.key] = None
            ended_ms, sent = run.ended_ms, runs.take_unreported(run)
            if sent > 0:  # else the client acknowledged nothing of it
                yield session.report(ended_ms, sent, skip, run.player)

    def _report_late(self, session: SessionState, viewing: Viewing) -> Iterator[Report]:
        """The viewing ends: report the bytes that came after their run was reported."""
        runs = viewing.runs
        if runs is not None and runs.late:
            self.counts["late"] += 1
            run = runs.all[-1]
            yield session.report(run.ended_ms, runs.take_unreported(run), 1, run.player)

    # Time.

    def _apply_time(self, session: SessionState, now_ns: int) -> list[Report]:
        """Drop and report what is due in *session* by *now_ns*."""
        reports: list[Report] = []
        for viewing in session.viewings:
            for response in [each for each in viewing.open if _is_expired(each, now_ns)]:
                self._drop_open(viewing, response, response.started_ns + LONGEST_OPEN_NS)
                self._changed[session.key] = None
            if not viewing.is_busy and now_ns - viewing.quiet_since_ns >= self._idle_ns:
                reports += self._report_runs(session, viewing, over=True)
            if not viewing.open and now_ns - viewing.last_ns >= DROP_VIEWING_NS:
                reports += self._drop_viewing(session, viewing)
        if not session.viewings:
            self._remove_session(session)
        return reports

    def _drop_viewing(self, session: SessionState, viewing: Viewing) -> list[Report]:
        reports = self._end_drains_of(session, viewing)
        for response in viewing.open:
            self._forget_open(response)
        viewing.open = ()
        session.remove(viewing)
        reports += [*self._report_runs(session, viewing, over=True), *self._report_late(session, viewing)]
        if viewing.runs is not None and viewing.runs.unreported:
            self.counts["below_minimum"] += 1
        return reports

    def _remove_session(self, session: SessionState) -> None:
        self._sessions.remove(session)
        self._changed[session.key] = None

    def _make_room(self) -> list[Report]:
        if len(self._sessions) < MOST_SESSIONS:
            return []
        session = self._sessions.oldest()
        self.counts["viewings_dropped"] += len(session.viewings)
        reports: list[Report] = []
        for viewing in session.viewings:
            for response in [each for each in viewing.open if each.awaiting_line_since_ms is not None]:
                reports += self._end_without_line(session, viewing, response)
            for response in [each for each in viewing.open if each.orphaned_since_ms is not None]:
                reports += self._end_orphan(session, viewing, response)
        reports += [report for viewing in session.viewings for report in self._drop_viewing(session, viewing)]
        self._remove_session(session)
        return reports


def _last_event(response: OpenResponse) -> Opening | Progress | Transfer:
    """The event in the latest journal line of *response*. Raises ValueError if that is another line."""
    last = decode((response.last_line or "").encode())
    if not isinstance(last, (Opening, Progress, Transfer)):
        raise ValueError("not the line of a response")
    return last


def _check_lines(session: SessionState) -> None:
    """Raises ValueError if a line in the state of *session* can't be read."""
    for response in [each for viewing in session.viewings for each in viewing.open]:
        if response.counted_by != APP or response.last_line is not None:
            _last_event(response)
        if response.proxy_line is not None:
            ProxyLine.from_text(response.proxy_line)


def _is_expired(response: OpenResponse, now_ns: int) -> bool:
    """Whether its close line must be lost. A response that waits for a proxy or a kernel has a limit of its own."""
    if response.awaiting_line_since_ms is not None or response.orphaned_since_ms is not None:
        return False
    return now_ns - response.started_ns > LONGEST_OPEN_NS
