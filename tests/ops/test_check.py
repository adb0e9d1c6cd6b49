"""``t23-middleware check``: says what keeps plays from being reported, and exits with 0 only if nothing does."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from t23_middleware.ops import check
from t23_middleware.ops.standin import StandIn, StandInServer

from ..harness import until
from ..relay.writers import living, transfer
from .commands import Site, fits


def items(output: str) -> dict[str, tuple[str, str]]:
    """Name of each item -> its level and text, the last of a name; on one line each."""
    found: dict[str, tuple[str, str]] = {}
    name = ""
    for line in output.partition("\n\n")[0].splitlines():
        if line.startswith(" "):
            found[name] = (found[name][0], f"{found[name][1]} {line.strip()}")
        else:
            level, name, words = line.split(maxsplit=2)
            found[name] = (level, words)
    return found


def test_check_passes_before_first_play(site: Site):
    """With a stand-in as the API, nothing is wrong before the first play; no report is sent and no folder made."""
    done = site.run("check")
    assert done.returncode == 0, done.stdout
    found = items(done.stdout)
    assert {level for level, _ in found.values()} <= {"ok", "warn"}
    assert found["API"][0] == "ok"
    assert found["clock"][0] == "ok"
    assert "Plays would be reported" in done.stdout
    assert fits(done.stdout), done.stdout
    assert site.api.recorded() == [], "a check reports nothing"
    assert not site.folder.path.exists()


def test_server_not_whitelisted_is_wrong(site: Site):
    """A server that is not whitelisted is WRONG, with the remedy: ask TwentyThree to whitelist it."""
    site.api.app.whitelisted = False
    done = site.run("check")
    assert done.returncode == 1
    level, words = items(done.stdout)["API"]
    assert level == "WRONG"
    assert "ask TwentyThree to whitelist it" in words
    assert "Plays are not reported: 1 line above is WRONG." in done.stdout


def test_wrong_settings_exit_with_2(site: Site):
    """All wrong settings are named in the same run, and the exit code is 2."""
    done = site.run("check", T23_API_URL="nowhere", T23_TIMEOUT="soon")
    assert done.returncode == 2
    assert "T23_API_URL" in done.stdout
    assert "T23_TIMEOUT" in done.stdout


@pytest.mark.parametrize("path", ["/api/wrong", "/reports"])
def test_wrong_report_path_names_right_one(site: Site, path: str):
    """A report path at which the API does not answer is WRONG, and the message names the path that answers."""
    done = site.run("check", T23_REPORT_PATH=path)
    assert done.returncode == 1
    level, words = items(done.stdout)["API"]
    assert level == "WRONG"
    assert words.endswith("The API answers at another path: T23_REPORT_PATH=/api/analytics/report/play.")


def test_wrong_report_path_without_alternative(site: Site):
    """Where no path answers, the message asks to correct the path or the address, and names no other path."""
    site.api.fault("status", status=404)
    level, words = items(site.run("check").stdout)["API"]
    assert level == "WRONG"
    assert "correct T23_REPORT_PATH or T23_API_URL" in words
    assert "answers at another path" not in words


@pytest.mark.parametrize(
    ("fault", "level", "says"),
    [
        ({"kind": "status", "status": 503}, "WRONG", "HTTP 503; reports wait until it answers"),
        ({"kind": "refuse"}, "WRONG", "gave no answer"),
        ({"kind": "html"}, "WRONG", "but not in the API's format"),
        (
            {"kind": "status", "status": 302, "location": "https://elsewhere.example/x"},
            "WRONG",
            "Redirected to",
        ),
        ({"kind": "error", "code": "strange_weather"}, "warn", "strange_weather"),
        ({"kind": "cached"}, "ok", "answers 'ok', even to an empty report"),
    ],
    ids=lambda value: str(value.get("kind", "")) if isinstance(value, dict) else "",
)
def test_api_answer_decides_level(site: Site, fault: dict[str, object], level: str, says: str):
    """Each kind of API answer has its own level and text, and only a WRONG one makes the check fail."""
    site.api.fault(**fault)
    done = site.run("check")
    found = items(done.stdout)["API"]
    assert found[0] == level, done.stdout
    assert says in found[1]
    assert done.returncode == (1 if level == "WRONG" else 0)


def test_unreachable_api_shows_reason(site: Site):
    """An API that can't be reached makes the check fail, with the reason and what to check."""
    site.api.stop()
    done = site.run("check")
    assert done.returncode == 1
    assert "Connection refused; check T23_API_URL, the network" in items(done.stdout)["API"][1]


def test_a_clock_that_is_off_is_told(site: Site):
    with StandInServer(app=StandIn(clock=lambda: time.time() + 600)) as api:
        done = site.run("check", T23_API_URL=api.url)
    assert done.returncode == 0
    assert items(done.stdout)["clock"] == (
        "warn",
        "10 min behind the API's clock; synchronise this machine's clock (NTP)",
    )


def test_each_host_of_a_template_is_asked(site: Site):
    hosts = {"T23_API_URL": f"http://{{host}}:{site.api.port}", "T23_HOSTS": "localhost,127.0.0.1"}
    shown = " ".join(site.run("check", **hosts).stdout.split())
    assert f"http://localhost:{site.api.port}/api" in shown
    assert f"http://127.0.0.1:{site.api.port}/api" in shown


# The app.


def test_importable_app_is_ok(site: Site, tmp_path: Path):
    """An app that can be imported is ok. What it prints at import is not shown."""
    (tmp_path / "video.py").write_text("def app(environ, start_response): ...\nprint('noise')\n")
    done = site.run("check", T23_APP="video:app", PYTHONPATH=str(tmp_path))
    assert items(done.stdout)["app"] == ("ok", "T23_APP=video:app can be imported")
    assert "noise" not in done.stdout


@pytest.mark.parametrize(
    ("code", "target", "says"),
    [
        ("raise ValueError('no database')", "video:app", "fails at import (ValueError: no database)"),
        ("import sys; sys.exit(7)", "video:app", "it exits with code 7"),
        ("other = 1", "video:app", "T23_APP"),
        ("", "novideo:app", "cannot import 'novideo'"),
    ],
)
def test_app_import_failure_is_wrong(site: Site, tmp_path: Path, code: str, target: str, says: str):
    """An app that can't be imported is WRONG, with the reason."""
    (tmp_path / "video.py").write_text(code + "\n")
    done = site.run("check", T23_APP=target, PYTHONPATH=str(tmp_path))
    level, words = items(done.stdout)["app"]
    assert (done.returncode, level) == (1, "WRONG")
    assert says in words


def test_disabled_middleware_and_misspelt_setting(site: Site):
    """``T23_ENABLED=0`` is WRONG, and a misspelt setting is shown with the name that is probably meant."""
    done = site.run("check", T23_ENABLED="0", T23_STATEDIR="/x")
    assert done.returncode == 1
    assert "WRONG  settings  T23_ENABLED=0" in done.stdout
    assert "T23_STATE_DIR?" in done.stdout


# The folder, the disk and the relay.


def test_symlinked_state_folder_is_wrong(site: Site, tmp_path: Path):
    """A state folder that is a symbolic link is WRONG."""
    (tmp_path / "real").mkdir()
    site.folder.path.symlink_to(tmp_path / "real")
    done = site.run("check")
    assert done.returncode == 1
    assert items(done.stdout)["folder"][0] == "WRONG"


def test_readable_state_folder_is_closed(site: Site):
    """A folder that other users could read gets the mode 0700, with a warning that names the former mode."""
    site.folder.create()
    site.folder.path.chmod(0o755)
    done = site.run("check")
    assert items(done.stdout)["folder"] == (
        "warn",
        "other users could read it (mode was 0755); the mode is now 0700",
    )
    assert site.folder.path.stat().st_mode & 0o777 == 0o700


def test_corrupt_outbox_is_not_changed(site: Site):
    """A corrupt outbox is WRONG. ``check`` does not change its file, which the relay handles."""
    site.folder.create()
    site.folder.outbox.write_bytes(b"rubbish" * 1000)
    done = site.run("check")
    assert done.returncode == 1
    assert "corrupt" in items(done.stdout)["outbox"][1]
    assert site.folder.outbox.read_bytes() == b"rubbish" * 1000


def test_refused_reports_are_worth_a_look(site: Site):
    site.prove()
    site.play(2, photo="404")
    site.deliver()
    assert items(site.run("check").stdout)["outbox"] == (
        "warn",
        "2 reports refused by the API; run 't23-middleware dead list'",
    )


def test_an_external_relay_must_run(site: Site):
    site.folder.create()
    done = site.run("check", T23_RELAY="external")
    assert done.returncode == 1
    assert (
        "no relay runs, and T23_RELAY=external: start 't23-middleware relay'"
        in items(done.stdout)["relay"][1]
    )
    with site.relay() as relay:
        done = site.run("check", T23_RELAY="external")
    assert done.returncode == 0
    assert items(done.stdout)["relay"] == ("ok", f"process {relay.pid}, version 0.1.0, run as a service")


def test_a_relay_that_is_off_delivers_nothing(site: Site):
    done = site.run("check", T23_RELAY="off")
    assert done.returncode == 1
    assert "reports are not delivered" in items(done.stdout)["relay"][1]


@pytest.mark.parametrize("automatic", [False, True])
def test_stopped_relay_is_named(site: Site, automatic: bool):
    """A relay that is stopped by a signal keeps its lock and delivers nothing: check and status name the remedy."""
    with living(site.folder, digest=site.digest()) as writer, site.relay(automatic) as relay:
        writer.write(transfer(1, 1))
        assert until(
            site.folder.unfinished.exists
        )  # it has opened the outbox; before that nothing else can read it
        relay.send_signal(signal.SIGSTOP)
        try:
            done = site.run("check")
            assert done.returncode == 1
            level, words = items(done.stdout)["relay"]
            assert (level, f"'kill -CONT {relay.pid}' continues it" in words) == ("WRONG", True)
            assert f"'kill -CONT {relay.pid}'" in " ".join(site.run("status").stdout.split())
        finally:
            relay.send_signal(signal.SIGCONT)
        assert items(site.run("check").stdout)["relay"][0] == "ok"


def test_relay_with_other_settings_warns(site: Site):
    """A relay with other settings is a warning; so is a worker's relay where ``T23_RELAY=external``."""
    with site.relay():
        level, words = items(site.run("check", T23_TIMEOUT="7").stdout)["relay"]
        assert (level, "with settings other than these" in words) == ("warn", True)
    with living(site.folder, digest=site.digest()) as writer, site.relay(automatic=True):
        writer.write(transfer(1, 1))
        assert items(site.run("check").stdout)["relay"][0] == "ok"
        level, words = items(site.run("check", T23_RELAY="external").stdout)["relay"]
        assert (level, "started by a worker, although T23_RELAY=external" in words) == ("warn", True)


MOUNTS = r"""
/dev/sda1 / ext4 rw 0 0
nas:/export /srv nfs4 rw 0 0
/dev/sdb1 /srv/local\040disk xfs rw 0 0
tmpfs /run tmpfs rw 0 0
tmpfs /srv/local\040disk/over tmpfs rw 0 0
/dev/sdc1 /srv/local\040disk/over ext4 rw 0 0
garbage
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/t23", "ext4"),
        ("/srv/t23", "nfs4"),
        ("/srvx/t23", "ext4"),
        ("/srv/local disk/t23", "xfs"),
        ("/srv/local disk/over/t23", "ext4"),
        ("/run/t23", "tmpfs"),
    ],
)
def test_file_system_of_nearest_mount(path: str, kind: str):
    """A path's file system is that of its nearest mount; of two mounts at one place, that of the later."""
    assert check.file_system(Path(path), MOUNTS) == kind
    assert check.file_system(Path(path), "") == ""


@pytest.mark.parametrize(
    ("kind", "ephemeral", "level"),
    [
        ("nfs4", False, "WRONG"),
        ("nfs", False, "WRONG"),
        ("cifs", False, "WRONG"),
        ("9p", False, "WRONG"),
        ("fuse.sshfs", False, "WRONG"),
        ("fuse.s3fs", True, "WRONG"),
        ("tmpfs", False, "warn"),
        ("overlay", False, "warn"),
        ("overlay", True, "ok"),
        ("fuse.mergerfs", False, "ok"),
        ("btrfs", False, "ok"),
    ],
)
def test_disk_level_by_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, ephemeral: bool, level: str
):
    """A network file system is WRONG. One that a restart may empty is a warning; with T23_EPHEMERAL=1 overlay is ok."""
    monkeypatch.setattr(check, "_mounts", lambda: f"x / {kind} rw 0 0\n")
    item = next(check._disk(tmp_path / "none" / "yet", ephemeral))
    assert (item.name, item.level) == ("disk", level)


@pytest.mark.parametrize(("free", "level"), [(1 << 40, "ok"), (32 << 20, "warn"), (1 << 20, "WRONG")])
def test_disk_space_levels(free: int, level: str):
    """Little free space is a warning, and almost no free space is WRONG."""
    assert check._space(free).level == level


# A real report.


def test_check_send_sends_one_report(site: Site):
    """``check --send`` sends exactly one real report and shows the API's answer, but never the session."""
    done = site.run("check", "--send", "--photo", "7", "--session", "alice-secret")
    assert done.returncode == 0, done.stdout
    (report,) = site.api.recorded()
    assert (report["photo_id"], report["session_id"]) == ("7", "alice-secret")
    assert (report["bytes_total"], report["skip"]) == ("1", "1")
    assert "TwentyThree counts it" in " ".join(done.stdout.split())
    assert "the answer: The download was reported" in items(done.stdout)["send"][1]
    assert "alice-secret" not in done.stdout


@pytest.mark.parametrize(
    ("set_to", "right"), [("play", "download"), ("download", "play"), ("old", "download")]
)
def test_send_finds_the_path_that_works(site: Site, set_to: str, right: str):
    """Whatever the other documented path says of a real report, the line to set is printed."""
    prefix = "/api/analytics/report/"
    site.api.app.methods = {prefix + right}
    done = site.run(
        "check", "--send", "--photo", "7", "--session", "alice-secret", T23_REPORT_PATH=prefix + set_to
    )
    assert done.returncode == 1
    level, words = items(done.stdout)["send"]
    assert (level, "invalid_method" in words) == ("WRONG", True)
    assert f"    T23_REPORT_PATH={prefix}{right}\n" in done.stdout
    assert [report["path"] for report in site.api.recorded()] == [prefix + right]
    right_now = site.run(
        "check", "--send", "--photo", "7", "--session", "alice-secret", T23_REPORT_PATH=prefix + right
    )
    assert right_now.returncode == 0
    assert f"{prefix}{right} accepted it" in items(right_now.stdout)["send"][1]


def test_send_tells_of_every_path(site: Site):
    """Where no path takes the report, each answer is shown with its path."""
    site.api.app.methods = set()
    done = site.run("check", "--send", "--photo", "7", "--session", "alice-secret")
    words = items(done.stdout)["send"][1]
    assert "/api/analytics/report/play: There is no report method" in words
    assert "/api/analytics/report/download: There is no report method" in words


def test_check_send_refused_is_wrong(site: Site):
    """A real report that the API refuses is WRONG, with the API's error code."""
    done = site.run("check", "--send", "--photo", "404", "--session", "alice-secret")
    assert done.returncode == 1
    level, words = items(done.stdout)["send"]
    assert (level, "no_such_photo" in words) == ("WRONG", True)


@pytest.mark.parametrize(
    "words",
    [
        ["--send"],
        ["--send", "--photo", "7"],
        ["--send", "--session", "me"],
        ["--send", "--photo", "film", "--session", "me"],
        ["--photo", "7", "--session", "me"],
    ],
)
def test_check_send_needs_video_and_session(site: Site, words: list[str]):
    """A real report needs a video's number, a session and ``--send``; without one of them nothing is sent."""
    done = site.run("check", *words)
    assert done.returncode == 2
    assert "--send" in done.stderr
    assert site.api.recorded() == []
