"""``demo --nginx``: the site behind nginx, whose log says what it sent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..harness import CLIP_BYTES, MEDIA, PATIENCE, ROOT, need, until
from .demos import demo


def test_behind_nginx_a_report_is_what_its_log_tells_and_nothing_is_left(tmp_path: Path):
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


def test_where_there_is_no_nginx_one_sentence_says_how_to_get_it(tmp_path: Path):
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
