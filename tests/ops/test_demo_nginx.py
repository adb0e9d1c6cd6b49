"""``demo --nginx``: the site behind nginx, whose log says what it sent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..harness import CLIP_BYTES, MEDIA, PATIENCE, ROOT, need, until
from .demos import demo


def test_demo_nginx_reports_log_bytes(tmp_path: Path):
    """Behind nginx, a report has the bytes of nginx's log line. The demo leaves no file behind."""
    need("nginx")
    with demo(tmp_path / "demo", "--nginx") as running:
        assert "nginx runs before it" in running.output
        answer, body = running.ask(f"{MEDIA}?session_id=newcomer&photo_id=7")
        assert (answer.getheader("Server") or "").startswith("nginx")
        assert answer.getheader("X-T23-Play") is None
        assert len(body) == CLIP_BYTES
        assert until(lambda: f"{CLIP_BYTES:,} bytes, skip 0" in running.output), running.output
        (log,) = running.temporary.glob("*/nginx/t23.log")
        (line,) = log.read_text().splitlines()
        assert f'"body":{CLIP_BYTES},' in line
        shown = running.state()
        assert shown["figures"]["waiting"] == 0
        ((bar,),) = [viewing["bars"] for viewing in shown["viewings"]]
        assert (bar["sent"], bar["skip"], bar["open"]) == (CLIP_BYTES, 0, False)
    assert running.process.returncode == 0, running.output
    assert list(running.temporary.iterdir()) == []


def test_demo_nginx_not_installed(tmp_path: Path):
    """Where nginx is not installed, one sentence shows how to install it."""
    need("gunicorn")
    script = (
        "import sys\n"
        "from t23_middleware.ops import cli, demo_nginx\n"
        "demo_nginx.PLACES = ()\n"
        "sys.exit(cli.main(['demo', '--nginx']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={"PATH": str(tmp_path)},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "t23-middleware: nginx is not installed; run apt-get install nginx-light, or omit --nginx\n"
    )
