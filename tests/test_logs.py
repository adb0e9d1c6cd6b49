"""What is logged: fields that operators filter by, documented and the same everywhere; and nothing secret, ever."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import t23_middleware
from t23_middleware import T23Middleware, sign_session
from t23_middleware.ops.logs import JSONFormatter
from t23_middleware.ops.standin import StandIn, StandInServer
from t23_middleware.state import lock_is_held

from .harness import COMMANDS, MEDIA, PATIENCE, ROOT, Server, running, until
from .ops.commands import Site
from .ops.pages import TOKEN

PACKAGE = Path(t23_middleware.__file__).parent
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
#: Attributes that every record has, which ``extra`` may not overwrite (logging.Logger.makeRecord).
OF_LOGGING = {*vars(logging.makeLogRecord({})), "message", "asctime"}


def logged() -> Iterator[tuple[str, ast.Call]]:
    """Each call of a module's ``log``, with where it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in [f"log.{level}" for level in LEVELS]:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def field_names(call: ast.Call) -> list[str]:
    """Every text in the ``extra`` that is the name of a field, or could be."""
    (extra,) = [word.value for word in call.keywords if word.arg == "extra"] or [ast.Dict([], [])]
    return [ast.literal_eval(key) for key in extra.keys] if isinstance(extra, ast.Dict) else []


def events() -> set[str]:
    """The events of the code: ``"t23_event": "…"``, or by delivery's own ``_log_fields("…")``."""
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    return set(re.findall(r'(?:"t23_event": |\b_log_fields\()"(\w+)"', source))


def test_log_lines_have_own_fields():
    """Each log line has a field to filter by, and its name is not one of the logging module's own."""
    lines = list(logged())
    assert len(lines) > 20
    for where, call in lines:
        assert any(word.arg == "extra" for word in call.keywords), f"{where} has no extra"
        names = field_names(call)
        assert all(name.startswith("t23_") and name not in OF_LOGGING for name in names), where
        assert not names or names[0] == "t23_event", where


def test_events_table_matches_code():
    """The table in the docs lists every event, and no other."""
    page = (ROOT / "docs" / "operating.md").read_text()
    section = page.partition("\n## Reading the logs\n")[2].partition("\n## ")[0]
    rows = [row.split(" | ")[1] for row in section.splitlines() if row.startswith("| ")]
    told = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)} - {"t23_event"}
    assert told == events()


def test_each_module_logs_under_its_own_name():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        if "log = " in source and "getLogger" in source:
            assert "log = logging.getLogger(__name__)" in source, path


def test_the_apps_own_formatter_gets_the_fields(caplog: pytest.LogCaptureFixture):
    T23Middleware(lambda environ, start_response: [], api_url="no address")
    (record,) = caplog.records
    plain = logging.Formatter("%(name)s [%(t23_event)s] %(message)s", defaults={"t23_event": "-"})
    assert plain.format(record).startswith("t23_middleware.middleware [runs_bare] t23_middleware is off")
    said = json.loads(JSONFormatter().format(record))
    assert (said["level"], said["logger"]) == ("ERROR", "t23_middleware.middleware")
    assert (said["t23_event"], said["t23_count"]) == ("runs_bare", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["time"])


def test_a_traceback_stays_on_its_line():
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.makeLogRecord({"msg": "a", "exc_info": (type(error), error, error.__traceback__)})
    line = JSONFormatter().format(record)
    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["traceback"]


@pytest.fixture
def site(state: Path) -> Iterator[Site]:
    with StandInServer(app=StandIn(unknown_photos={"404"})) as api:
        yield Site(state, api)


def test_relay_json_log_groups_refusals(site: Site):
    """``relay --json`` writes JSON lines for programs, and logs refusals of the same kind once."""
    site.prove()
    site.play(20, photo="404")
    relay = site.start("relay", "--json")
    try:
        assert until(lambda: site.status()["dead"] == 20)
        site.api.fault("deny")
        site.play(3)
        assert until(lambda: site.status()["state"] == "paused")
    finally:
        relay.terminate()
        _, said = relay.communicate(timeout=PATIENCE)
    refused, paused = [json.loads(line) for line in said.splitlines()]
    assert (refused["level"], refused["t23_event"]) == ("WARNING", "report_refused")
    assert (refused["t23_code"], refused["t23_photo_id"], refused["t23_count"]) == ("no_such_photo", "404", 1)
    assert (paused["level"], paused["t23_event"], paused["t23_host"]) == ("ERROR", "api_paused", "")
    assert "permission_denied" in paused["t23_reason"]
    assert paused["logger"] == "t23_middleware.relay.delivery"


def test_json_is_for_a_relay_that_stays(site: Site):
    done = site.run("relay", "--once", "--json")
    assert done.returncode == 2
    assert "--json is for a relay that keeps running" in done.stderr


SECRET, FLASK_SECRET = "the-key-that-signs-sessions", "the-key-of-flask-itself"
#: Parts of sessions, one for each way in which a request and a report may fail.
SESSIONS = ("well", "refused", "echoed", "denied", "torn")


def test_logs_contain_no_secrets(tmp_path: Path):
    """No log contains a session, a token or a secret.

    The test provokes all failures that have a log line of their own; sessions are in URLs, journals, outbox and API
    answers.
    """
    state = tmp_path / "state"
    secrets = {"T23_SESSION_SECRET": SECRET, "T23_FLASK_SECRET_KEY": FLASK_SECRET, "T23_STATUS_TOKEN": TOKEN}
    with (
        StandInServer(app=StandIn(unknown_photos={"404"})) as api,
        running(COMMANDS["gunicorn gthread"], state, api.url, T23_TIMOUT="1", **secrets) as server,
    ):
        play = Player(server, api)
        play("well", "1")
        play("refused", "404")
        api.fault("error", code="invalid_session", message=f"no such session: {named('echoed')}")
        play("echoed", "2")
        api.fault("deny")
        play("denied", "3")
        journal_is_torn(state, server)
        play("torn", "4")
        server.get(f"{MEDIA}?session_id={named('forged')}.f0rged-seal&photo_id=5")
        server.get("/_t23/", Authorization=f"Bearer {TOKEN}")
        server.get("/_t23/", Authorization=f"Bearer {TOKEN}-wrong")
    api.heal()
    site = Site(state, api)
    said = [server.log(), *(path.read_text() for path in state.glob("relay.log*"))]
    said += [
        site.run(*words.split()).stdout for words in ("status", "config", "dead list", "dead list --json")
    ]
    assert "T23_TIMOUT is not a setting" in said[0], "the app's log was looked at"
    assert "report_refused" not in said[1] and "was refused" in said[1], "the relay's log was looked at"
    for text in said:
        for secret in (SECRET, FLASK_SECRET, TOKEN, "f0rged-seal", *map(named, (*SESSIONS, "forged"))):
            assert secret not in text, text


def named(session: str) -> str:
    return f"viewer-{session}-5f0c7d2e"


class Player:
    """Plays that end up in the outbox, whatever becomes of them there."""

    def __init__(self, server: Server, api: StandInServer) -> None:
        self._server = server
        self._captured = 0

    def __call__(self, session: str, photo: str) -> None:
        signed = sign_session(named(session), SECRET)
        assert self._server.get(f"{MEDIA}?session_id={signed}&photo_id={photo}")[0] == 200
        self._captured += 1
        assert until(lambda: self._settled() == self._captured), self._server.log()

    def _settled(self) -> int:
        said = json.loads(self._server.get("/_t23/status.json", Authorization=f"Bearer {TOKEN}")[1])
        paused = said["waiting"] if said["state"] == "paused" else 0
        return int(said["sent"] + said["dead"] + paused)


def journal_is_torn(state: Path, server: Server) -> None:
    """Lines that nobody can read, and journals that somebody removes while the app writes them."""
    for path in (state / "journals").glob("*.journal"):
        with path.open("ab") as journal:
            journal.write(f'{{"torn": "{named("torn")}"\n'.encode())
    assert lock_is_held(server.state.relay_lock)
