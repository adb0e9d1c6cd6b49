"""nginx and Apache as processes: the distribution's configuration on free ports, and the lines that the package gives."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t23_middleware.relay.proxy_line import APACHE_LINES, NGINX_LINES

from ..chaos.load import workers_of
from ..harness import PATIENCE, lacking, need, until
from ..ports import free_port

DISTRIBUTED = Path("/etc/nginx/nginx.conf")

#: What another place and another port than the distribution's need; each is there once.
PLACES = {
    r"pid /run/nginx.pid;": "pid FOLDER/nginx.pid;",
    r"error_log /var/log/nginx/error.log;": "error_log FOLDER/error.log;",
    r"access_log /var/log/nginx/access.log;": "access_log FOLDER/access.log;",
    r"include /etc/nginx/conf.d/*.conf;": "include FOLDER/conf.d/*.conf;",
    r"include /etc/nginx/sites-enabled/*;": "include FOLDER/sites-enabled/*;",
}
#: Only root can use the folders that nginx was built with.
TEMPORARY = "".join(
    f"{kind}_temp_path FOLDER/temporary/{kind};\n"
    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
)

#: One site in all the ways in which it may be listened to; {more} stands in each.
SITE = """
proxy_cache_path FOLDER/cache keys_zone=films:1m;
server {{
    listen 127.0.0.1:{plain};
    listen 127.0.0.1:{small} sndbuf=256k;
    listen 127.0.0.1:{http2} http2;
    listen 127.0.0.1:{tls} ssl;
    listen 127.0.0.1:{tls_http2} ssl http2;
    ssl_certificate FOLDER/cert.pem;
    ssl_certificate_key FOLDER/key.pem;
{locations}}}
server {{
    listen 127.0.0.1:{impatient};
    send_timeout 3s;
{locations}}}
server {{
    listen 127.0.0.1:{cached};
    proxy_cache films;
    proxy_cache_valid 200 1m;
    proxy_cache_key $uri;
{locations}}}
"""
LOCATIONS = """
    location /protected/ {{ internal; alias {films}/; }}
    location /gunicorn/ {{
        proxy_pass http://127.0.0.1:{gunicorn};
        proxy_set_header Host $host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    }}
    location /uwsgi/ {{ include /etc/nginx/uwsgi_params; uwsgi_pass 127.0.0.1:{uwsgi}; }}
"""
PORTS = ("plain", "small", "http2", "tls", "tls_http2", "impatient", "cached")


class Nginx:
    """nginx in *folder*, in front of apps that listen on the ports *gunicorn* and *uwsgi*.

    *counts*: whether it has the lines that let the relay count, which name the log :attr:`log`.
    """

    def __init__(
        self, folder: Path, films: Path, *, gunicorn: int = 9, uwsgi: int = 9, counts: bool = True
    ) -> None:
        self.folder = folder
        self.log = folder / "t23.log"
        self.ports = {name: free_port() for name in PORTS}
        self._apps = {"films": films, "gunicorn": gunicorn, "uwsgi": uwsgi}
        self._counts = counts
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Nginx:
        program = need_nginx()
        self._configure()
        with (self.folder / "nginx.out").open("ab") as out:
            self._process = subprocess.Popen(
                [
                    program, "-e", str(self.folder / "error.log"),
                    "-c", str(self.folder / "nginx.conf"), "-g", "daemon off;",
                ],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        assert until(self._answers), self.said()
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it, with its workers."""
        if self._process is not None:
            end(self._process, number)

    def reload(self) -> None:
        """Workers with the configuration as it is now; the former ones go on with what they have in hand."""
        before = set(self.workers())
        self._signal(signal.SIGHUP)
        assert until(lambda: len(set(self.workers()) - before) >= len(before)), self.said()

    def rotate(self) -> None:
        """As logrotate does."""
        self.rename()
        self.reopen()

    def rename(self) -> None:
        """The log becomes 1, 1 becomes 2, and so on; nginx writes on to what it has open."""
        olds = sorted(self.folder.glob("t23.log.*"), key=lambda path: int(path.suffix[1:]), reverse=True)
        for old in olds:
            old.rename(old.with_suffix(f".{int(old.suffix[1:]) + 1}"))
        self.log.rename(self.folder / "t23.log.1")

    def reopen(self) -> None:
        """USR1, and wait for the new log."""
        self._signal(signal.SIGUSR1)
        assert until(self.log.exists), self.said()

    def kill_workers(self) -> None:
        """SIGKILL, as the kernel does where memory is short."""
        for worker in self.workers():
            os.kill(worker, signal.SIGKILL)

    def workers(self) -> list[int]:
        assert self._process is not None
        return workers_of(self._process.pid)

    def said(self) -> str:
        """Its own complaints, for a failing test."""
        files = (self.folder / "nginx.out", self.folder / "error.log")
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def lines(self) -> list[str]:
        """What the log has, without what lies rotated beside it."""
        return self.log.read_text().splitlines()

    def _configure(self) -> None:
        for name in ("conf.d", "sites-enabled", "temporary"):
            (self.folder / name).mkdir(exist_ok=True)
        self._write("nginx.conf", adapted(DISTRIBUTED.read_text()))
        self._write("conf.d/temporary.conf", TEMPORARY)
        if self._counts:
            self._write("conf.d/t23.conf", NGINX_LINES.replace("{path}", str(self.log)))
        self._write(
            "sites-enabled/films", SITE.format(locations=LOCATIONS.format(**self._apps), **self.ports)
        )
        if not (self.folder / "cert.pem").exists():
            make_certificate(self.folder)

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text.replace("FOLDER", str(self.folder)))

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.said()
        return accepts(self.ports["plain"])

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class Apache:
    """Apache in *folder*, in front of the app that listens on the port *gunicorn*; it sends files by X-Sendfile."""

    MODULES = ("mpm_event", "authz_core", "mime", "headers", "proxy", "proxy_http", "xsendfile")

    def __init__(self, folder: Path, films: Path, *, gunicorn: int) -> None:
        self.folder = folder
        self.log = folder / "t23.log"
        self.port = free_port()
        self._films, self._gunicorn = films, gunicorn
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Apache:
        program = need("apache2")
        (self.folder / "apache.conf").write_text(self._configuration())
        with (self.folder / "apache.out").open("ab") as out:
            self._process = subprocess.Popen(
                [program, "-D", "FOREGROUND", "-f", str(self.folder / "apache.conf")],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        assert until(self._answers), self.said()
        return self

    def stop(self) -> None:
        if self._process is not None:
            end(self._process, signal.SIGTERM)

    def said(self) -> str:
        files = (self.folder / "apache.out", self.folder / "error.log")
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def _configuration(self) -> str:
        modules = Path("/usr/lib/apache2/modules")
        missing = [name for name in self.MODULES if not (modules / f"mod_{name}.so").exists()]
        if missing:
            lacking(f"Apache's mod_{missing[0]} is not installed")
        loads = "".join(f"LoadModule {name}_module {modules}/mod_{name}.so\n" for name in self.MODULES)
        user = "User www-data\nGroup www-data\n" if os.geteuid() == 0 else ""
        return (
            f"ServerRoot {self.folder}\nServerName films\nPidFile {self.folder}/apache.pid\n{loads}{user}"
            f"DefaultRuntimeDir {self.folder}\nMutex sem\nErrorLog {self.folder}/error.log\nTypesConfig /etc/mime.types\n"
            + APACHE_LINES.replace("{path}", str(self.log))
            # As Debian's sites have it: a host of its own, with a log of its own.
            + f'Listen 127.0.0.1:{self.port}\n<VirtualHost *>\nCustomLog {self.folder}/access.log "%h %r %>s"\n'
            f"XSendFile on\nXSendFilePath {self._films}\n"
            f"ProxyPass /gunicorn/ http://127.0.0.1:{self._gunicorn}/gunicorn/\n</VirtualHost>\n"
        )

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.said()
        return accepts(self.port)


@contextmanager
def ended(proxy: Nginx | Apache) -> Iterator[None]:
    try:
        yield
    finally:
        proxy.stop()


def need_nginx() -> str:
    """nginx's path; without it, or without the distribution's configuration, the test is skipped, or fails in CI."""
    if not DISTRIBUTED.exists():
        lacking(f"there is no {DISTRIBUTED} of Debian's nginx")
    return need("nginx")


def adapted(text: str) -> str:
    """The distribution's configuration with our folder for its places, and nothing else changed."""
    for theirs, ours in PLACES.items():
        assert text.count(theirs) == 1, f"{DISTRIBUTED} has no {theirs}"
        text = text.replace(theirs, ours)
    return text if os.geteuid() == 0 else re.sub(r"^user .*;\n", "", text)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """Tell a master to end, and see to it that its workers have."""
    if process.poll() is not None:
        return
    workers = workers_of(process.pid)
    process.send_signal(number)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while workers and time.monotonic() < deadline:
        workers = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        time.sleep(0.02)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


def make_certificate(folder: Path) -> None:
    subprocess.run(
        [
            need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-days", "1", "-subj", "/CN=127.0.0.1", "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
