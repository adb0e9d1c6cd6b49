"""One film, one browser, and one site for each way of reporting, shared by all players."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.transfer import Opening, Transfer

from ..conftest import Journals
from ..harness import MEDIA, Server, need, running, until
from .chromium import Chromium, Page
from .film import Film

_COMMAND = "gunicorn -w 2 -k gthread --threads 8 -b 127.0.0.1:PORT tests.players.site:app"
#: Seconds after which a stream counts as concluded, and what a report may take beyond them on a busy machine.
_IDLE = "2"
_CONCLUDED = 30.0


class Site:
    """The site, what it handed over, and what was told of that."""

    def __init__(self, server: Server, api: StandInServer, per: str) -> None:
        self.per = per
        self.address = f"http://127.0.0.1:{server.port}"
        self._api = api
        self._journals = Journals(server.state.path)

    @property
    def is_per_stream(self) -> bool:
        return self.per == "stream"

    def url(self, session: str, rate: int | None = None) -> str:
        """The film for *session*, at *rate* bytes a second."""
        return f"{self.address}{MEDIA}?session_id={session}" + ("" if rate is None else f"&rate={rate}")

    def handed_over(self, session: str) -> list[int]:
        """Bytes of each response of *session* that got any, in the order of their ends."""
        return [transfer.sent for transfer in self._closed(session) if transfer.sent]

    def reports(self, session: str) -> list[tuple[int, int]]:
        """Skip and bytes of each report of *session*, by their time, once all that it was handed was told.

        No byte of it is told twice; per response each is a report of its own.
        """
        assert until(lambda: self._is_told(session), _CONCLUDED), self._story(session)
        reports, handed = self._told(session), self.handed_over(session)
        assert sum(sent for _, sent in reports) == sum(handed), self._story(session)
        if not self.is_per_stream:
            assert sorted(sent for _, sent in reports) == sorted(handed)
        return reports

    def handed_over_to_all(self) -> Counter[str]:
        """Bytes by session."""
        total: Counter[str] = Counter()
        for transfer in self._journals.closed():
            total[transfer.opening.play.session_id] += transfer.sent
        return total

    def told_of_all(self) -> Counter[str]:
        """Bytes by session."""
        total: Counter[str] = Counter()
        for report in self._api.recorded():
            total[report["session_id"]] += int(report["bytes_total"])
        return total

    def _is_told(self, session: str) -> bool:
        is_over = 0 < len(self._closed(session)) == len(self._opened(session))
        return is_over and sum(sent for _, sent in self._told(session)) >= sum(self.handed_over(session))

    def _told(self, session: str) -> list[tuple[int, int]]:
        mine = [report for report in self._api.recorded() if report["session_id"] == session]
        mine.sort(key=lambda report: int(report["time"]))  # several are delivered at a time
        return [(int(report["skip"]), int(report["bytes_total"])) for report in mine]

    def _opened(self, session: str) -> list[Opening]:
        return [opening for opening in self._journals.opened() if opening.play.session_id == session]

    def _closed(self, session: str) -> list[Transfer]:
        return [each for each in self._journals.closed() if each.opening.play.session_id == session]

    def _story(self, session: str) -> str:
        """What happened, for who has to find out why it was not told."""
        lines = [f"open  {opening.started_ns / 1e9:.2f} {opening.part}" for opening in self._opened(session)]
        lines += [
            f"close {each.opening.started_ns / 1e9:.2f}-{each.ended_ns / 1e9:.2f} {each.opening.part} {each.sent}"
            for each in self._closed(session)
        ]
        return "\n".join([f"told {self._told(session)} of", *lines])


@pytest.fixture(scope="package")
def environment() -> Iterator[None]:
    """No settings and no proxy from outside, for what lives longer than one test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("T23_")]:
            patch.delenv(name)
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="package")
def film(tmp_path_factory: pytest.TempPathFactory) -> Film:
    need("gunicorn")
    return Film.made_in(tmp_path_factory.mktemp("film"))


@pytest.fixture(scope="package", params=["stream", "response"])
def site(
    request: pytest.FixtureRequest,
    environment: None,
    film: Film,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    state = tmp_path_factory.mktemp(request.param) / "state"
    environ = {"FILM": str(film.path), "T23_REPORT_PER": request.param, "T23_STREAM_IDLE": _IDLE}
    with StandInServer() as api:
        with running(_COMMAND, state, api.url, **environ) as server:
            there = Site(server, api, request.param)
            yield there
            handed = there.handed_over_to_all()
        assert there.told_of_all() == handed, (
            "what was handed over was told in full, and not once more at the end"
        )


@pytest.fixture(scope="package")
def chromium(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture
def page(chromium: Chromium, site: Site) -> Iterator[Page]:
    """A window in which nothing of an earlier test is left."""
    page = chromium.blank_page(site.address)
    yield page
    page.leave()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a tool saves what it downloads."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    return folder
