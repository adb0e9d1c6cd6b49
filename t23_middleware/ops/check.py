"""``t23-middleware check``: tests whether plays would be reported. Prints one line per finding, with its remedy."""

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
from .check_proxy import proxy_findings
from .counted import counting_findings
from .item import OK, WARN, WRONG, Finding
from .owner import act_as_owner_of
from .status import EMPTY_SNAPSHOT, blocking_readers, readers_sentence, relay_description

#: Free bytes below which the operator should act, and below which SQLite and journals soon fail.
LITTLE_SPACE, NO_SPACE = 64 << 20, 8 << 20
#: Seconds by which the clock may be wrong. Beyond that, reports may get the wrong day or look like repeated ones.
CLOCK_OFF = 60.0
#: Timeout for importing the app, in seconds.
IMPORT_SECONDS = 60.0
#: Network file systems: neither SQLite's write-ahead log nor record locks are safe on them.
_NETWORK = re.compile(
    r"nfs[34]?|cifs|smb\w*|ncpfs|9p|afs|ceph|glusterfs|lustre|beegfs\w*|gfs2|ocfs2|gpfs"
    r"|fuse\.(?:sshfs|ceph\S*|glusterfs|s3\S*|gcsfuse|rclone|davfs\S*|goofys|blobfuse\S*|juicefs|lizardfs|moosefs)"
)
#: File systems whose content is lost when the machine or the container ends.
_TEMPORARY = {
    "tmpfs": "is in memory, so waiting reports are lost at a restart",
    "ramfs": "is in memory, so waiting reports are lost at a restart",
    "overlay": "belongs to this container, so waiting reports are lost with it",
}
_IMPORT = "import sys; sys.path.insert(0, ''); from t23_middleware import apps; apps.find(sys.argv[1])"


@dataclass(frozen=True)
class Trial:
    """One real report, sent to test whether the API accepts it."""

    photo_id: str
    session_id: str


def run_check(trial: Trial | None = None) -> int:
    """Print each finding. Returns 0 if plays would be reported, 1 if not, 2 if the settings are invalid."""
    try:
        settings = Settings()
        settings.refuse_without_site()
    except ConfigurationError as error:
        for problem in error.problems:
            _print(Finding(WRONG, "settings", problem))
        return 2
    act_as_owner_of(settings.state_path())
    wrong = 0
    for finding in _findings(settings, trial):
        _print(finding)
        wrong += finding.level == WRONG
    print("\n" + text.wrapped(_verdict(wrong, trial), text.width()))
    return 1 if wrong else 0


def _print(finding: Finding) -> None:
    print(
        text.wrapped(finding.text, text.width(), " " * 17, f"{finding.level:5}  {finding.name:8}  "),
        flush=True,
    )
    for line in finding.lines.splitlines():
        print(f"    {line}", flush=True)


def _verdict(wrong: int, trial: Trial | None) -> str:
    if wrong:
        return f"Plays are not reported: {wrong} line{'' if wrong == 1 else 's'} above {'is' if wrong == 1 else 'are'} WRONG."
    proof = "" if trial else " To prove it, send a real report: 'check --send --photo ID --session ID'."
    return f"Plays would be reported.{proof}"


def _findings(settings: Settings, trial: Trial | None) -> Iterator[Finding]:
    yield from _settings(settings)
    yield from _app(Settings.app_target())
    folder = StateFolder(settings.state_path())
    yield from _folder(folder)
    yield from _disk(folder.path, settings.ephemeral)
    known, findings = _outbox(folder)
    yield from findings
    yield from proxy_findings(settings, known)
    yield from counting_findings(settings, known.notes)
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


def _settings(settings: Settings) -> Iterator[Finding]:
    for warning in settings.warnings:
        yield Finding(WARN, "settings", warning)
    if not settings.enabled:
        yield Finding(WRONG, "settings", "T23_ENABLED=0: nothing is counted; remove this setting")
    else:
        yield Finding(
            OK, "settings", f"T23_API_URL={settings.api_url}, T23_REPORT_PATH={settings.report_path}"
        )


def _app(target: str | None) -> Iterator[Finding]:
    if target is None:
        yield Finding(OK, "app", "T23_APP is not set, which is right if the app's own code wraps the app")
        return
    # In a separate process: an app may do anything at import.
    command = [sys.executable, "-c", _IMPORT, target]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            WARN,
            "app",
            f"T23_APP={target}: the import takes more than {IMPORT_SECONDS:.0f} s; try to import it by hand",
        )
        return
    except OSError as error:
        yield Finding(
            WARN, "app", f"T23_APP={target} can't be tested: this user can't start Python ({error.strerror})"
        )
        return
    if done.returncode == 0:
        yield Finding(OK, "app", f"T23_APP={target} can be imported")
        return
    yield Finding(
        WRONG, "app", _import_failure(target, done.stderr.decode(errors="replace"), done.returncode)
    )


def _import_failure(target: str, stderr: str, code: int) -> str:
    """The reason: the last line of the traceback in *stderr*. Our own errors contain their remedy."""
    why = (stderr.strip().splitlines() or [f"it exits with code {code}"])[-1]
    ours = why.removeprefix("t23_middleware.errors.ConfigurationError: ")
    return (
        ours
        if ours != why
        else f"T23_APP={target} fails at import ({why}); correct that, or run this where your server starts"
    )


# The state folder and the disk under it.


def _folder(folder: StateFolder) -> Iterator[Finding]:
    if not os.path.lexists(folder.path):
        yield _missing_folder(folder.path)
        return
    mode = folder.path.lstat().st_mode & 0o777
    try:
        folder.create()
    except StateError as error:
        yield Finding(WRONG, "folder", str(error))
        return
    yield Finding(OK, "folder", f"{folder.path} belongs to user {os.geteuid()} and is closed to others")
    if mode & 0o077:
        yield Finding(
            WARN, "folder", f"other users could read it (mode was {mode:04o}); the mode is now 0700"
        )


def _missing_folder(path: Path) -> Finding:
    """The finding for a missing folder. It is not created here: a folder of root's would lock out the workers."""
    above = _nearest_existing(path)
    if os.geteuid() == 0:
        return Finding(
            WARN,
            "folder",
            f"{path} does not exist yet; run this as the workers' user to test whether it can be created",
        )
    if os.access(above, os.W_OK | os.X_OK):
        return Finding(OK, "folder", f"{path} does not exist yet; the first play creates it")
    return Finding(
        WRONG,
        "folder",
        f"{path} does not exist, and user {os.geteuid()} can't create it in {above}; create it, or set T23_STATE_DIR",
    )


def _nearest_existing(path: Path) -> Path:
    """*path*, or the nearest folder above it that exists."""
    while not os.path.exists(path) and path != path.parent:  # noqa: PTH110  # Path.exists() may raise
        path = path.parent
    return path


def _disk(path: Path, ephemeral: bool) -> Iterator[Finding]:
    there = _nearest_existing(path).resolve()
    kind = file_system(there, _mounts())
    free = shutil.disk_usage(there).free
    if _NETWORK.fullmatch(kind):
        yield Finding(
            WRONG, "disk", f"{path} is on a network file system ({kind}); set T23_STATE_DIR to a local folder"
        )
    elif kind in _TEMPORARY and not ephemeral:
        remedy = "use a volume, or T23_EPHEMERAL=1" if kind == "overlay" else "set T23_STATE_DIR to a disk"
        yield Finding(WARN, "disk", f"{path} {_TEMPORARY[kind]} ({kind}); {remedy}")
    else:
        yield Finding(OK, "disk", f"local ({kind or 'unknown'})")
    yield _space(free)


def _space(free: int) -> Finding:
    message = f"{text.size(free)} free"
    if free < NO_SPACE:
        return Finding(
            WRONG,
            "space",
            f"{message}: reports will soon be lost; delete files, or set T23_STATE_DIR to another disk",
        )
    if free < LITTLE_SPACE:
        return Finding(WARN, "space", f"{message}; delete files, or set T23_STATE_DIR to a larger disk")
    return Finding(OK, "space", message)


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(errors="surrogateescape")
    except OSError:
        return ""  # macOS has none


def file_system(path: Path, mounts: str) -> str:
    """Type of the file system of *path* (resolved), from the text of ``/proc/mounts``; ``""`` if unknown."""
    kind, depth = "", -1
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Spaces and some other characters are octal escapes there (proc(5), getmntent(3)).
        point = Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[1]))
        if path.is_relative_to(point) and len(point.parts) >= depth:  # a later mount hides an earlier one
            kind, depth = fields[2], len(point.parts)
    return kind


def _outbox(folder: StateFolder) -> tuple[Snapshot, list[Finding]]:
    """What the outbox contains, and the findings about it."""
    try:
        with OutboxView(folder.outbox) as view:
            known = view.snapshot()
    except NoOutbox:
        return EMPTY_SNAPSHOT, []
    except StateError as error:
        return EMPTY_SNAPSHOT, [Finding(WRONG, "outbox", str(error))]
    findings = [Finding(OK, "outbox", _outbox_figures(known.stats))]
    if names := blocking_readers(folder.outbox):
        findings.append(Finding(WARN, "outbox", readers_sentence(names, log_size(folder.outbox))))
    if dead := known.stats.dead:
        message = f"{text.reports(dead)} refused by the API; run 't23-middleware dead list'"
        findings.append(Finding(WARN, "outbox", message))
    return known, findings


def _outbox_figures(stats: Stats) -> str:
    return f"{stats.captured:,} captured, {stats.waiting:,} waiting, {stats.sent:,} sent, {stats.lost:,} lost"


# The relay.


def _relay(settings: Settings, folder: StateFolder) -> Finding:
    if not lock_is_held(folder.relay_lock):
        return _no_relay(settings, folder)
    holder = folder.relay_holder()
    if holder is None:
        return Finding(
            WARN, "relay", "a relay runs, but could not write its process id and version; is the disk full?"
        )
    message = relay_description(holder)
    if holder.is_stopped:
        return Finding(WRONG, "relay", message)
    if holder.version != VERSION:
        return Finding(
            WARN, "relay", f"{message}; this command is version {VERSION}: restart the app or the service"
        )
    if holder.digest != settings.relay_digest():
        remedy = "restart the app or the service, or run this command with its settings"
        return Finding(WARN, "relay", f"{message}, with settings other than these; {remedy}")
    if holder.automatic and settings.relay != "auto":
        return Finding(
            WARN,
            "relay",
            f"{message}, although T23_RELAY={settings.relay}: it stops when the workers stop; restart the app",
        )
    return Finding(OK, "relay", message)


def _no_relay(settings: Settings, folder: StateFolder) -> Finding:
    match settings.relay:
        case "external":
            remedy = f"start 't23-middleware relay' on {folder.path} as a service, or remove T23_RELAY"
            return Finding(WRONG, "relay", f"no relay runs, and T23_RELAY=external: {remedy}")
        case "off":
            return Finding(
                WRONG,
                "relay",
                "no relay runs, and T23_RELAY=off: reports are not delivered; remove T23_RELAY",
            )
    return Finding(OK, "relay", "no relay runs; the next play starts one")


# The API.


def _api(settings: Settings, client: AnalyticsClient, host: str) -> Iterator[Finding]:
    probe = client.probe(host)
    yield _answer(settings, client, host, probe)
    if probe.ahead is not None and abs(probe.ahead) > CLOCK_OFF:
        side = "ahead of" if probe.ahead > 0 else "behind"
        off = text.duration(abs(probe.ahead))
        yield Finding(WARN, "clock", f"{off} {side} the API's clock; synchronise this machine's clock (NTP)")
    elif probe.ahead is not None:
        yield Finding(OK, "clock", "agrees with the API's clock")


def _answer(settings: Settings, client: AnalyticsClient, host: str, probe: Probe) -> Finding:
    match probe.outcome:
        case Accepted():
            return Finding(OK, "API", f"{probe.url} answers 'ok', even to an empty report")
        case Unexplained() as error:
            return Finding(
                WARN,
                "API",
                f"{probe.url} answers {error}, which is not in the API's documentation; try --send",
            )
        case Refused() as error:
            return Finding(
                OK, "API", f"{probe.url} reads reports (it refused an empty one, as it should: {error.code})"
            )
        case NotAccepted() as error:
            return Finding(WRONG, "API", f"{error}{_other_path(settings, client, host, error)}")
        case Unreachable() as error:
            return Finding(WRONG, "API", f"{error}; check T23_API_URL, the network and the firewall")
        case error:
            return Finding(WRONG, "API", f"{error}; reports wait until it answers")


def _other_path(settings: Settings, client: AnalyticsClient, host: str, error: NotAccepted) -> str:
    """A sentence with the other documented path, if the method is there instead of at the path that is set."""
    if "T23_REPORT_PATH" not in str(error):
        return ""
    for path in REPORT_PATHS:
        if path != settings.report_path and _is_method(client.probe(host, path)):
            stop = "" if str(error).endswith(".") else "."
            return f"{stop} The API answers at another path: T23_REPORT_PATH={path}."
    return ""


def _is_method(probe: Probe) -> bool:
    """Whether the answer shows that the method exists, also if it denies access."""
    if isinstance(probe.outcome, NotAccepted):
        return "T23_REPORT_PATH" not in str(probe.outcome)
    return isinstance(probe.outcome, (Accepted, Refused))


def _send(settings: Settings, client: AnalyticsClient, trial: Trial) -> Iterator[Finding]:
    """Send the report to the path that is set and, if that fails, to the documented paths."""
    host = settings.hosts[0] if settings.per_host else ""
    report = Report(time.time_ns() // 1_000_000, host, trial.session_id, trial.photo_id, sent=1, skip=1)
    yield Finding(
        OK,
        "send",
        f"sends a real report of 1 byte (skip=1) for video {trial.photo_id}; TwentyThree counts it",
    )
    refused = []
    for path in dict.fromkeys((settings.report_path, *REPORT_PATHS)):
        try:
            answer = client.send(report, path)
        except DeliveryError as error:
            refused.append(f"{path}: {error}")
            continue
        yield _accepted(settings, path, answer, refused)
        return
    yield Finding(WRONG, "send", f"no path accepted the report: {'; '.join(refused)}")


def _accepted(settings: Settings, path: str, answer: Accepted, refused: list[str]) -> Finding:
    if path != settings.report_path:
        lines = f"T23_REPORT_PATH={path}"
        return Finding(
            WRONG,
            "send",
            f"{path} accepts reports; the path that is set does not ({'; '.join(refused)}). Set:",
            lines,
        )
    if answer.cached:
        return Finding(
            WARN, "send", "the answer came from the API's cache, so the report was not recorded; try again"
        )
    return Finding(
        OK, "send", f"{path} accepted it after {answer.seconds:.2f} s; the answer: {answer.message or 'ok'}"
    )
