"""``t23-middleware relay --once``: what waits gets a try now, and the exit code says how it went."""

from __future__ import annotations

import os
import signal

from t23_middleware.state import hold_lock, lock_is_held, lock_owner
from t23_middleware.transfer import Transfer

from ..harness import PATIENCE, end_relay, until
from ..relay.writers import journal, living, transfer
from .commands import Site


def test_once_sends_all_waiting(site: Site):
    """All waiting reports are sent, and then nothing is left."""
    site.play(40)
    done = site.deliver()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Sent 40 reports.\nNothing is left.\n"
    assert len(site.api.recorded()) == 40
    assert site.deliver().stdout == "Sent 0 reports.\nNothing is left.\n"


def test_once_without_captures(site: Site):
    """Where nothing was ever captured, the command succeeds, nothing is left, and no folder is made."""
    done = site.deliver()
    assert done.returncode == 0
    assert "Nothing is left" in done.stdout
    assert not site.folder.path.exists()


def test_once_api_denies(site: Site):
    """An API that denies the server makes the command fail, with one line that names the remedy."""
    site.play(3)
    site.api.fault("deny")
    done = site.deliver()
    assert done.returncode == 1
    assert done.stdout == "Sent 0 reports.\n"
    assert "3 reports left" in done.stderr
    assert "ask TwentyThree to whitelist it" in done.stderr
    assert len(done.stderr.splitlines()) == 1, "the reason once, and no log beside it"


def test_once_ignores_breaker_and_pause(site: Site):
    """The breaker and a pause are ignored for one try."""
    site.play(8)
    site.api.fault("deny")
    with site.relay():
        assert until(lambda: site.status()["state"] == "paused")
    site.api.fault("status", status=503, retry_after="3600")
    assert site.deliver().returncode == 1
    assert site.status()["waiting"] == 8
    site.api.heal()
    assert site.deliver().returncode == 0
    assert len(site.api.recorded()) == 8


def test_once_retries_delayed_report(site: Site):
    """A report whose retry would be due only later is retried now."""
    site.prove()
    site.play()
    site.api.fault("error", code="strange_weather")
    done = site.deliver()
    assert done.returncode == 1
    assert "1 report left: strange_weather" in done.stderr
    assert "retried later" in done.stderr
    site.api.heal()
    assert site.deliver().returncode == 0


def test_first_refusals_are_left_with_the_remedy(site: Site):
    """An API that took nothing yet makes no dead letters, by hand neither."""
    site.play(3, photo="404")
    done = site.deliver()
    assert done.returncode == 1
    assert "3 reports left" in done.stderr
    assert "no_such_photo" in done.stderr
    assert "check --send" in done.stderr
    assert site.status()["dead"] == 0


def test_once_refused_reports(site: Site):
    """Reports that the API refuses permanently are printed as refused, and do not count as left."""
    site.prove()
    site.play(2, photo="404")
    site.play(1)
    done = site.deliver()
    assert done.returncode == 0
    assert (
        "Sent 1 report.\nThe API refused 2 reports permanently; run 't23-middleware dead list'.\n"
        in done.stdout
    )


def test_once_unreachable_api(site: Site):
    """An API that can't be reached makes the command fail, with its name and the reason."""
    site.play(6)
    site.api.stop()
    done = site.deliver()
    assert done.returncode == 1
    assert "can't be reached: Connection refused" in done.stderr


def test_once_time_limit(site: Site):
    """The command ends at its time limit although the API hangs. The reports still wait."""
    site.play(3)
    site.api.fault("hang")
    done = site.python(
        "import sys\n"
        "from t23_middleware.ops import cli, relay_once\n"
        "relay_once.LIMIT_SECONDS = 4.0\n"
        "sys.exit(cli.main(['relay', '--once']))",
        T23_TIMEOUT="600",
    )
    assert done.returncode == 1
    assert "3 reports left: the time is up" in done.stderr
    assert site.status()["waiting"] == 3
    site.api.heal()


def test_once_takes_over_automatic_relay(site: Site):
    """The command takes over from the workers' relay, and a relay of the workers runs again afterwards."""
    site.api.fault("deny")
    with living(site.folder, digest=site.digest()) as writer, site.relay(automatic=True) as relay:
        writer.write(transfer(1, 0)._replace(ended_ns=1))
        assert until(lambda: site.status()["state"] == "paused")
        site.api.heal()
        done = site.deliver()
        try:
            assert done.returncode == 0, done.stderr
            assert relay.wait(PATIENCE) == 0
            assert len(site.api.recorded()) == 1
            assert until(lambda: lock_is_held(site.folder.relay_lock)), site.folder.relay_log.read_text()
            assert until(lambda: site.holder_pid() == lock_owner(site.folder.relay_lock))
            assert site.folder.relay_holder().automatic
        finally:
            end_relay(site.folder)


def test_once_leaves_service_relay_running(site: Site):
    """A relay that runs as a service is not stopped. The command fails and names the relay's process."""
    site.play()
    with site.relay() as relay:
        done = site.deliver()
        assert done.returncode == 2
        assert f"a relay that runs as a service (process {relay.pid})" in done.stderr
        assert relay.poll() is None


def test_once_ignores_stale_lock_pid(site: Site):
    """A pid in the lock file's text that is not the kernel's lock owner is left alone.

    The text may name a process of another container; here it names the test itself.
    """
    site.folder.create()
    site.folder.relay_lock.write_text(
        f'{{"pid": {os.getpid()}, "version": "0.1.0", "digest": "", "automatic": true}}'
    )
    site.play()
    assert site.deliver().returncode == 0


def test_once_handover_time_limit(site: Site):
    """The command fails at the time limit if the lock's owner, which wrote no pid, does not stop."""
    site.folder.create()
    descriptor = hold_lock(site.folder.relay_lock)
    try:
        done = site.python(
            "import sys\n"
            "from t23_middleware.ops import cli, handover\n"
            "handover.HANDOVER_SECONDS = 0.5\n"
            "sys.exit(cli.main(['relay', '--once']))"
        )
    finally:
        os.close(descriptor)
    assert done.returncode == 1
    assert "does not stop" in done.stderr


def test_once_unwritable_outbox_fails(site: Site):
    """An outbox that can't be written makes the command fail with exit code 1."""
    site.play()
    site.folder.outbox.mkdir()
    done = site.deliver()
    assert done.returncode == 1
    assert "can't be opened" in done.stderr


def test_once_ctrl_c(site: Site):
    """Ctrl-C ends the command, which prints how many reports are left."""
    site.play(2)
    site.api.fault("hang")
    process = site.start("relay", "--once", T23_TIMEOUT="600", T23_EXIT_SECONDS="0.1")
    try:
        assert until(lambda: site.status()["waiting"] == 2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
        site.api.heal()
    assert process.returncode == 1
    assert "2 reports left: it was stopped" in errors


def test_once_progress_bar(site: Site):
    """On a terminal, a progress bar shows how many reports are sent."""
    site.play(30)
    with site.on_terminal("relay", "--once") as (process, terminal):
        seen = ""
        while "Nothing is left." not in seen:
            seen += os.read(terminal, 4096).decode()
        assert process.wait(PATIENCE) == 0
    assert "] 0 of 30" in seen
    assert f"[{'#' * 30}] 30 of 30" in seen


def test_once_one_unreachable_site(site: Site):
    """A site that can't be reached does not block the reports of another.

    Two hosts behind {host}: the reports of the reachable one are sent, and the other one is named.
    """

    def play(number: int, host: str) -> Transfer:
        told = transfer(number, number + 1, f"s{number}")
        return told._replace(opening=told.opening._replace(play=told.opening.play._replace(host=host)))

    journal(site.folder, "hosts", play(1, "localhost"), play(2, "nowhere.invalid"))
    url = f"http://{{host}}:{site.api.port}"
    done = site.run("relay", "--once", T23_API_URL=url, T23_HOSTS="localhost,nowhere.invalid")
    assert done.returncode == 1
    assert done.stdout == "Sent 1 report.\n"
    assert "1 report left: http://nowhere.invalid" in done.stderr
