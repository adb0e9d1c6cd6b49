"""``t23-middleware check``: would plays be reported? One line per item, and what to do about each that is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import (
    ConfigurationError,
    DeliveryError,
    NotAccepted,
    Refused,
    StateError,
    Unexplained,
    Unreachable,
)
from ..relay.answer import Accepted
from ..relay.client import AnalyticsClient, Probe
from ..relay.outbox import NoOutbox, OutboxView, Snapshot, Stats, log_size
from ..relay.report import REPORT_PATHS, Report
from ..settings import Settings
from ..state import StateFolder, lock_is_held
from ..version import VERSION
from . import text
from .check_proxy import proxy_items
from .counted import counted_items
from .item import OK, WARN, WRONG, Item
from .owner import act_as_owner_of
from .status import NOTHING, long_readers, reader_words, relay_words

#: Free bytes below which one should look, and below which SQLite and journals soon fail.
LITTLE_SPACE, NO_SPACE = 64 << 20, 8 << 20
#: Seconds by which a clock may be off before reports fall on the wrong day, or look like repeated ones.
CLOCK_OFF = 60.0
#: Seconds that importing the app may take.
IMPORT_SECONDS = 60.0
#: File systems that other machines see too: neither SQLite's write-ahead log nor record locks are safe there.
_NETWORK = re.compile(
    r"nfs[34]?|cifs|smb\w*|ncpfs|9p|afs|ceph|glusterfs|lustre|beegfs\w*|gfs2|ocfs2|gpfs"
    r"|fuse\.(?:sshfs|ceph\S*|glusterfs|s3\S*|gcsfuse|rclone|davfs\S*|goofys|blobfuse\S*|juicefs|lizardfs|moosefs)"
)
#: File systems that do not outlive the machine's or the container's end.
_FLEETING = {
    "tmpfs": "is in memory, so what waits is gone after a restart",
    "ramfs": "is in memory, so what waits is gone after a restart",
    "overlay": "belongs to this container, so what waits is gone with it",
}
_IMPORT = "import sys; sys.path.insert(0, ''); from t23_middleware import apps; apps.find(sys.argv[1])"


@dataclass(frozen=True)
class Trial:
    """One real report, sent to see whether it is taken."""

    photo_id: str
    session_id: str


def run_check(trial: Trial | None = None) -> int:
    """Print each item; 0 if plays would be reported, 1 if not, 2 if the settings are wrong."""
    try:
        settings = Settings()
        settings.refuse_without_site()
    except ConfigurationError as error:
        for problem in error.problems:
            _print(Item(WRONG, "settings", problem))
        return 2
    act_as_owner_of(settings.state_path())
    wrong = 0
    for item in _items(settings, trial):
        _print(item)
        wrong += item.level == WRONG
    print("\n" + text.wrapped(_verdict(wrong, trial), text.width()))
    return 1 if wrong else 0


def _print(item: Item) -> None:
    print(text.wrapped(item.text, text.width(), " " * 17, f"{item.level:5}  {item.name:8}  "), flush=True)
    for line in item.lines.splitlines():
        print(f"    {line}", flush=True)


def _verdict(wrong: int, trial: Trial | None) -> str:
    if wrong:
        return f"Plays are not reported: {wrong} item{'' if wrong == 1 else 's'} above {'is' if wrong == 1 else 'are'} WRONG."
    proof = "" if trial else " The proof is a real report: 'check --send --photo ID --session ID'."
    return f"Plays would be reported.{proof}"


def _items(settings: Settings, trial: Trial | None) -> Iterator[Item]:
    yield from _settings(settings)
    yield from _app(Settings.app_target())
    folder = StateFolder(settings.state_path())
    yield from _folder(folder)
    yield from _disk(folder.path, settings.ephemeral)
    known, items = _outbox(folder)
    yield from items
    yield from proxy_items(settings, known)
    yield from counted_items(settings, known.notes)
    yield _relay(settings, folder)
    client = AnalyticsClient(settings)
    try:
        for host in settings.hosts if settings.per_host else ("",):
            yield from _api(settings, client, host)
        if trial is not None:
            yield from _send(settings, client, trial)
    finally:
        client.close()


# The settings and the app.


def _settings(settings: Settings) -> Iterator[Item]:
    for warning in settings.warnings:
        yield Item(WARN, "settings", warning)
    if not settings.enabled:
        yield Item(WRONG, "settings", "T23_ENABLED=0: nothing is counted; take it away")
    else:
        yield Item(OK, "settings", f"T23_API_URL={settings.api_url}, T23_REPORT_PATH={settings.report_path}")


def _app(target: str | None) -> Iterator[Item]:
    if target is None:
        yield Item(OK, "app", "T23_APP is not set, which is right where the app's own code wraps it")
        return
    # In a process of its own: what an app does at import is its business.
    command = [sys.executable, "-c", _IMPORT, target]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield Item(
            WARN, "app", f"T23_APP={target} is not imported after {IMPORT_SECONDS:.0f} s; start it by hand"
        )
        return
    except OSError as error:
        yield Item(
            WARN, "app", f"T23_APP={target} can't be tried: this user can't start Python ({error.strerror})"
        )
        return
    if done.returncode == 0:
        yield Item(OK, "app", f"T23_APP={target} can be imported")
        return
    yield Item(WRONG, "app", _import_failure(target, done.stderr.decode(errors="replace"), done.returncode))


def _import_failure(target: str, said: str, code: int) -> str:
    """The last line of a traceback; our own errors say what to do themselves."""
    why = (said.strip().splitlines() or [f"it exits with {code}"])[-1]
    ours = why.removeprefix("t23_middleware.errors.ConfigurationError: ")
    return (
        ours
        if ours != why
        else f"T23_APP={target} fails at import ({why}); mend it, or start where your server does"
    )


# The state folder and the disk under it.


def _folder(folder: StateFolder) -> Iterator[Item]:
    if not os.path.lexists(folder.path):
        yield _missing_folder(folder.path)
        return
    mode = folder.path.lstat().st_mode & 0o777
    try:
        folder.create()
    except StateError as error:
        yield Item(WRONG, "folder", str(error))
        return
    yield Item(OK, "folder", f"{folder.path} belongs to user {os.geteuid()}, and to nobody else")
    if mode & 0o077:
        yield Item(WARN, "folder", f"others could look into it (mode {mode:04o}); it has mode 0700 now")


def _missing_folder(path: Path) -> Item:
    """Not made here: root's folder would lock the workers' user out."""
    above = _nearest(path)
    if os.geteuid() == 0:
        return Item(
            WARN,
            "folder",
            f"{path} is not there yet; run this as the workers' user to know whether it can be made",
        )
    if os.access(above, os.W_OK | os.X_OK):
        return Item(OK, "folder", f"{path} is not there yet; the first play makes it")
    return Item(
        WRONG,
        "folder",
        f"{path} is not there, and user {os.geteuid()} can't make it in {above}; make it, or set T23_STATE_DIR",
    )


def _nearest(path: Path) -> Path:
    """*path*, or the folder above it that is there."""
    while not os.path.exists(path) and path != path.parent:  # noqa: PTH110  # Path.exists() may raise
        path = path.parent
    return path


def _disk(path: Path, ephemeral: bool) -> Iterator[Item]:
    there = _nearest(path).resolve()
    kind = file_system(there, _mounts())
    free = shutil.disk_usage(there).free
    if _NETWORK.fullmatch(kind):
        yield Item(
            WRONG, "disk", f"{path} is on a network file system ({kind}); set T23_STATE_DIR to a local folder"
        )
    elif kind in _FLEETING and not ephemeral:
        remedy = "use a volume, or T23_EPHEMERAL=1" if kind == "overlay" else "set T23_STATE_DIR to a disk"
        yield Item(WARN, "disk", f"{path} {_FLEETING[kind]} ({kind}); {remedy}")
    else:
        yield Item(OK, "disk", f"local ({kind or 'unknown'})")
    yield _space(free)


def _space(free: int) -> Item:
    said = f"{text.size(free)} free"
    if free < NO_SPACE:
        return Item(
            WRONG, "space", f"{said}: reports are soon lost; make room, or set T23_STATE_DIR elsewhere"
        )
    if free < LITTLE_SPACE:
        return Item(WARN, "space", f"{said}; make room, or set T23_STATE_DIR to a larger disk")
    return Item(OK, "space", said)


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(errors="surrogateescape")
    except OSError:
        return ""  # macOS


def file_system(path: Path, mounts: str) -> str:
    """Kind of the file system that *path* (resolved) is on, by the text of ``/proc/mounts``; ``""`` if unknown."""
    kind, depth = "", -1
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Spaces and the like stand there in octal (proc(5), getmntent(3)).
        point = Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[1]))
        if path.is_relative_to(point) and len(point.parts) >= depth:  # a later mount hides an earlier one
            kind, depth = fields[2], len(point.parts)
    return kind


def _outbox(folder: StateFolder) -> tuple[Snapshot, list[Item]]:
    """What is in it, and what is to be said of that."""
    try:
        with OutboxView(folder.outbox) as view:
            known = view.snapshot()
    except NoOutbox:
        return NOTHING, []
    except StateError as error:
        return NOTHING, [Item(WRONG, "outbox", str(error))]
    items = [Item(OK, "outbox", _outbox_words(known.stats))]
    if names := long_readers(folder.outbox):
        items.append(Item(WARN, "outbox", reader_words(names, log_size(folder.outbox))))
    if dead := known.stats.dead:
        said = f"{text.reports(dead)} refused by the API; see 't23-middleware dead list'"
        items.append(Item(WARN, "outbox", said))
    return known, items


def _outbox_words(stats: Stats) -> str:
    return f"{stats.captured:,} captured, {stats.waiting:,} waiting, {stats.sent:,} sent, {stats.lost:,} lost"


# Who delivers.


def _relay(settings: Settings, folder: StateFolder) -> Item:
    if not lock_is_held(folder.relay_lock):
        return _no_relay(settings, folder)
    holder = folder.relay_holder()
    if holder is None:
        return Item(WARN, "relay", "one runs, but could not write down who it is; is the disk full?")
    said = relay_words(holder)
    if holder.version != VERSION:
        return Item(WARN, "relay", f"{said}; this is version {VERSION}: restart the app, or the service")
    if holder.digest != settings.relay_digest():
        remedy = "restart the app or the service, or run this with theirs"
        return Item(WARN, "relay", f"{said}, with other settings than these; {remedy}")
    if holder.automatic and settings.relay != "auto":
        return Item(
            WARN,
            "relay",
            f"{said}, though T23_RELAY={settings.relay}: it leaves with the workers; restart the app",
        )
    return Item(OK, "relay", said)


def _no_relay(settings: Settings, folder: StateFolder) -> Item:
    match settings.relay:
        case "external":
            remedy = f"start 't23-middleware relay' on {folder.path} as a service, or take T23_RELAY away"
            return Item(WRONG, "relay", f"none runs, and T23_RELAY=external: {remedy}")
        case "off":
            return Item(WRONG, "relay", "none runs, and T23_RELAY=off: nobody delivers; take T23_RELAY away")
    return Item(OK, "relay", "none runs; the next play starts one")


# The API.


def _api(settings: Settings, client: AnalyticsClient, host: str) -> Iterator[Item]:
    probe = client.probe(host)
    yield _answer(settings, client, host, probe)
    if probe.ahead is not None and abs(probe.ahead) > CLOCK_OFF:
        side = "ahead of" if probe.ahead > 0 else "behind"
        off = text.duration(abs(probe.ahead))
        yield Item(WARN, "clock", f"{off} {side} the API's; synchronise this machine's clock (NTP)")
    elif probe.ahead is not None:
        yield Item(OK, "clock", "agrees with the API's")


def _answer(settings: Settings, client: AnalyticsClient, host: str, probe: Probe) -> Item:
    match probe.outcome:
        case Accepted():
            return Item(OK, "API", f"{probe.url} answers 'ok', even to a report that says nothing")
        case Unexplained() as error:
            return Item(WARN, "API", f"{probe.url} answers {error}, which no documentation lists; try --send")
        case Refused() as error:
            return Item(
                OK, "API", f"{probe.url} reads reports (it misses what an empty one lacks: {error.code})"
            )
        case NotAccepted() as error:
            return Item(WRONG, "API", f"{error}{_other_path(settings, client, host, error)}")
        case Unreachable() as error:
            return Item(WRONG, "API", f"{error}; look at T23_API_URL, the network, and a firewall")
        case error:
            return Item(WRONG, "API", f"{error}; reports wait until it answers")


def _other_path(settings: Settings, client: AnalyticsClient, host: str, error: NotAccepted) -> str:
    """Where the method is not at the path that is set: whether it is at the other that the documentation names."""
    if "T23_REPORT_PATH" not in str(error):
        return ""
    for path in REPORT_PATHS:
        if path != settings.report_path and _is_method(client.probe(host, path)):
            stop = "" if str(error).endswith(".") else "."
            return f"{stop} The API answers at the other: T23_REPORT_PATH={path}."
    return ""


def _is_method(probe: Probe) -> bool:
    """Whether what answered there knows the method, be it to deny it."""
    if isinstance(probe.outcome, NotAccepted):
        return "T23_REPORT_PATH" not in str(probe.outcome)
    return isinstance(probe.outcome, (Accepted, Refused))


def _send(settings: Settings, client: AnalyticsClient, trial: Trial) -> Iterator[Item]:
    """To the path that is set and, where that takes no report, to the documented ones."""
    host = settings.hosts[0] if settings.per_host else ""
    report = Report(time.time_ns() // 1_000_000, host, trial.session_id, trial.photo_id, sent=1, skip=1)
    yield Item(
        OK, "send", f"a real report of 1 byte (skip=1) of video {trial.photo_id}; TwentyThree counts it"
    )
    refused = []
    for path in dict.fromkeys((settings.report_path, *REPORT_PATHS)):
        try:
            answer = client.send(report, path)
        except DeliveryError as error:
            refused.append(f"{path}: {error}")
            continue
        yield _taken(settings, path, answer, refused)
        return
    yield Item(WRONG, "send", f"the answers: {'; '.join(refused)}")


def _taken(settings: Settings, path: str, answer: Accepted, refused: list[str]) -> Item:
    if path != settings.report_path:
        lines = f"T23_REPORT_PATH={path}"
        return Item(WRONG, "send", f"{path} takes reports, but not {'; '.join(refused)}. Set:", lines)
    if answer.cached:
        return Item(WARN, "send", "the answer came from the API's cache, so nothing was recorded; try again")
    return Item(
        OK, "send", f"{path} took it after {answer.seconds:.2f} s; the answer: {answer.message or 'ok'}"
    )
