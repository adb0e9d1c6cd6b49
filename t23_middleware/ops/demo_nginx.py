"""nginx before the demo's server: with the lines that a site's own nginx gets, and a log that the relay follows."""

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

#: Seconds that nginx may take to begin.
PATIENCE_SECONDS = 10.0
#: Where Debian and others have it: on the search path of administrators only.
PLACES = ("/usr/sbin", "/usr/local/sbin")

#: All that nginx needs to run for one user in one folder. Ours are the lines that docs/nginx.md has.
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
    """nginx's path. Raises :class:`~t23_middleware.errors.UsageError` where it is not installed."""
    found = shutil.which("nginx", path=os.pathsep.join((*os.get_exec_path(), *PLACES)))
    if found is None:
        raise UsageError("nginx is not installed; apt-get install nginx-light, or leave out --nginx")
    return found


def log_in(folder: Path) -> Path:
    """The log of plays of an nginx that runs in *folder*."""
    return folder / "t23.log"


@contextmanager
def before(upstream: int, port: int, folder: Path) -> Iterator[None]:
    """nginx on *port* of 127.0.0.1, which hands on to *upstream*; its files are in *folder*.

    Raises :class:`~t23_middleware.errors.UsageError` where it does not begin.
    """
    folder.mkdir(exist_ok=True)
    configuration = folder / "nginx.conf"
    configuration.write_text(_configured(upstream, port, folder))
    command = [program(), "-e", str(folder / "error.log"), "-c", str(configuration)]
    with running(command, stdin=subprocess.DEVNULL) as nginx:
        _wait_until_it_listens(nginx, port)
        yield


def _configured(upstream: int, port: int, folder: Path) -> str:
    # Its workers would else be another user's, who may not enter the folder.
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
    raise UsageError("nginx does not start; its own words stand above")
