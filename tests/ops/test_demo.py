"""The demo, as a newcomer starts it: from any folder, also from a clone of this project."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import t23_middleware

from ..harness import CLIP_BYTES, MEDIA, PATIENCE, need, until


def test_the_demo_runs_from_a_clone_shows_a_report_and_leaves_nothing_behind(tmp_path: Path):
    """gunicorn looks first into the folder it is started in; a clone has the package there, but not its example."""
    need("gunicorn")
    clone, temporary = tmp_path / "clone", tmp_path / "tmp"
    (clone / "t23_middleware").mkdir(parents=True)
    (clone / "t23_middleware" / "__init__.py").write_text("raise ImportError('this is the clone')\n")
    temporary.mkdir()
    script = tmp_path / "demo.py"
    script.write_text("from t23_middleware.ops.cli import main\nraise SystemExit(main(['demo']))\n")
    environ = os.environ | {
        "PYTHONPATH": str(Path(t23_middleware.__file__).parents[1]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(temporary),
    }
    output = tmp_path / "output"
    with output.open("wb") as file:
        demo = subprocess.Popen([sys.executable, script], cwd=clone, env=environ, stdout=file, stderr=file)
    try:
        assert until(lambda: "Each report appears" in output.read_text()), output.read_text()
        port = int(re.search(r"running at http://127.0.0.1:(\d+)/", output.read_text())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", f"{MEDIA}?session_id=newcomer&photo_id=7")
        assert len(connection.getresponse().read()) == CLIP_BYTES
        connection.close()
        assert until(lambda: f"{CLIP_BYTES:,} bytes, skip 0" in output.read_text()), output.read_text()
    finally:
        demo.send_signal(signal.SIGINT)
        assert demo.wait(PATIENCE) == 0, output.read_text()
    assert list(temporary.iterdir()) == []
