"""nginx before the demo's server, with the lines that docs/nginx.md gives, and a log that the relay follows."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError
from ..relay.proxy_line import NGINX_LINES
from .child import running

#: Seconds that nginx may take to start.
PATIENCE_SECONDS = 10.0
#: Folders of nginx in Debian and others, which are only on root's search path.
PLACES = ("/usr/sbin", "/usr/local/sbin")

#: All that nginx needs to run for one user in one folder. {lines} are those of docs/nginx.md.
_CONFIGURATION = """\
daemon off;
pid FOLDER/nginx.pid;
error_log FOLDER/error.log;
{user}events {{}}
http {{
{temporary}
{lines}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{upstream};
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }}
    }}
}}
"""
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def program() -> str:
    """Path of nginx. Raises :class:`~t23_middleware.errors.UsageError` if it is not installed."""
    found = shutil.which("nginx", path=os.pathsep.join((*os.get_exec_path(), *PLACES)))
    if found is None:
        raise UsageError("nginx is not installed; run apt-get install nginx-light, or omit --nginx")
    return found


def log_in(folder: Path) -> Path:
    """Path of the log of plays, for an nginx in *folder*."""
    return folder / "t23.log"


@contextmanager
def before(upstream: int, port: int, folder: Path) -> Iterator[None]:
    """Run nginx on *port* of 127.0.0.1 as a proxy to port *upstream*; its files are in *folder*.

    Raises :class:`~t23_middleware.errors.UsageError` if it does not start.
    """
    folder.mkdir(exist_ok=True)
    configuration = folder / "nginx.conf"
    configuration.write_text(_configured(upstream, port, folder))
    command = [program(), "-e", str(folder / "error.log"), "-c", str(configuration)]
    with running(command, stdin=subprocess.DEVNULL) as nginx:
        _wait_until_it_listens(nginx, port)
        yield


def _configured(upstream: int, port: int, folder: Path) -> str:
    # Otherwise its workers run as another user, who may not enter the folder.
    user = "user root;\n" if os.geteuid() == 0 else ""
    temporary = "\n".join(f"    {kind}_temp_path FOLDER/{kind};" for kind in _TEMPORARY)
    lines = NGINX_LINES.replace("{path}", str(log_in(folder)))
    text = _CONFIGURATION.format(user=user, temporary=temporary, lines=lines, port=port, upstream=upstream)
    return text.replace("FOLDER", str(folder))


def _wait_until_it_listens(nginx: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and nginx.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise UsageError("nginx does not start; its output above has the reason")
