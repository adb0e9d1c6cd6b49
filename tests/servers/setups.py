"""The servers of the matrix: the command of each, what it needs, and what it is known to do differently."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

BIN = Path(sys.executable).parent


class Setup(NamedTuple):
    """One server as it is started; in *command* PORT and FOLDER stand for its port and a folder of its own."""

    command: str
    #: Module that has to be installed.
    module: str
    #: Program that has to be installed, beside the first word of the command.
    program: str = ""
    environ: Mapping[str, str] = MappingProxyType({})
    tls: bool = False
    #: PEP 3333's ``write()`` exists.
    has_write: bool = True
    #: It learns that a client has left, and stops asking the app for more.
    notices_leaving: bool = True
    #: After an app's exception it may reset the connection, and with it throw away what the client had not read.
    resets: bool = False
    #: The response's socket can be reached, so that the kernel is asked what the client took.
    asks_kernel: bool = True
    #: It answers 500 where the app's body has no byte.
    fails_on_empty: bool = False
    #: Cases in which it garbles the bare app's answer, but not ours: it does not get the file into its hands then.
    garbles: tuple[str, ...] = ()
    #: It sends a chunk that is a number as so many zeros: ``bytes(number)``.
    expands_numbers: bool = False
    #: Odd answers that it never gives: its client waits for ever.
    hangs: tuple[str, ...] = ()
    #: Its process may run only as another user than root.
    not_root: bool = False


APP = "tests.servers.app:application"
GUNICORN = f"gunicorn -w 1 -b 127.0.0.1:PORT {APP}"
UWSGI = "uwsgi --master --processes 1 --die-on-term --need-app --module tests.servers.app:application"
UWSGI_SOCKET = f"{UWSGI} --http-socket 127.0.0.1:PORT"
MOD_WSGI = (
    "mod_wsgi-express start-server --application-type module tests.servers.app --host 127.0.0.1 --port PORT"
    " --server-root FOLDER --log-to-terminal --locale C.UTF-8 --processes 1 --threads 4"
)
SERVE = f"{sys.executable} -m tests.servers.serve"

SETUPS = {
    "gunicorn sync": Setup(GUNICORN, "gunicorn"),
    "gunicorn gthread": Setup(f"{GUNICORN} -k gthread --threads 4", "gunicorn"),
    "gunicorn gevent": Setup(f"{GUNICORN} -k gevent", "gevent"),
    "gunicorn TLS": Setup(
        f"{GUNICORN} -k gthread --threads 4 --certfile FOLDER/cert.pem --keyfile FOLDER/key.pem",
        "gunicorn",
        program="openssl",
        tls=True,
    ),
    "gunicorn no-sendfile": Setup(f"{GUNICORN} -k gthread --threads 4 --no-sendfile", "gunicorn"),
    "waitress": Setup(f"waitress-serve --listen=127.0.0.1:PORT {APP}", "waitress"),
    "uwsgi http-socket": Setup(UWSGI_SOCKET, "", program="uwsgi"),
    "uwsgi threads": Setup(f"{UWSGI_SOCKET} --threads 4", "", program="uwsgi"),
    # The router's own buffers lie between the app's process and the client.
    "uwsgi http": Setup(f"{UWSGI} --http 127.0.0.1:PORT", "", program="uwsgi", asks_kernel=False),
    "uwsgi offload": Setup(
        f"{UWSGI_SOCKET} --offload-threads 2",
        "",
        program="uwsgi",
        garbles=("a file that the app has positioned",),
    ),
    "mod_wsgi daemon": Setup(MOD_WSGI, "mod_wsgi", program="apache2", not_root=True, asks_kernel=False),
    "mod_wsgi embedded": Setup(
        f"{MOD_WSGI} --embedded-mode", "mod_wsgi", program="apache2", not_root=True, asks_kernel=False
    ),
    "mod_wsgi sendfile": Setup(
        f"{MOD_WSGI} --embedded-mode --enable-sendfile",
        "mod_wsgi",
        program="apache2",
        not_root=True,
        asks_kernel=False,
    ),
    "bjoern": Setup(
        f"{SERVE} bjoern PORT",
        "bjoern",
        has_write=False,
        asks_kernel=False,
        garbles=("a file by file_wrapper without a length",),
    ),
    "wsgiref": Setup(f"{SERVE} wsgiref PORT", "wsgiref"),
    "werkzeug": Setup(f"{SERVE} werkzeug PORT", "werkzeug"),
    "cheroot": Setup(f"cheroot {APP} --bind 127.0.0.1:PORT", "cheroot"),
    "gevent pywsgi": Setup(f"{SERVE} pywsgi PORT", "gevent"),
    "granian": Setup(
        f"granian --interface wsgi --host 127.0.0.1 --port PORT {APP}",
        "granian",
        has_write=False,
        asks_kernel=False,
        resets=True,
    ),
    "uvicorn a2wsgi": Setup(
        "uvicorn --host 127.0.0.1 --port PORT tests.servers.asgi:application",
        "a2wsgi",
        hangs=("/odd-body/bytes", "/odd-body/bytes-subclass", "/odd-body/bytearray", "/odd-body/str"),
    ),
    "hypercorn": Setup(
        f"hypercorn -b 127.0.0.1:PORT wsgi:{APP}",
        "hypercorn",
        has_write=False,
        asks_kernel=False,
        notices_leaving=False,
        fails_on_empty=True,
        expands_numbers=True,
    ),
}

#: Where exactness costs sendfile, the operator may have it the other way round.
DECLARED = MappingProxyType({"T23_COUNT": "declared"})
SETUPS |= {
    f"{name} declared": SETUPS[name]._replace(environ=DECLARED, notices_leaving=False, garbles=garbles)
    for name, garbles in {
        "uwsgi offload": (),
        "mod_wsgi sendfile": (),
        "bjoern": SETUPS["bjoern"].garbles,
    }.items()
}


def program(name: str) -> str | None:
    """The path of a program: beside our Python, or on the search path with its administrator's folders."""
    places = os.pathsep.join((str(BIN), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    return shutil.which(name, path=places)


def missing(setup: Setup) -> str | None:
    """Why *setup* can't run here, or ``None``."""
    for module in filter(None, (setup.module, "django", "flask")):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    for name in (setup.command.split()[0], setup.program):
        if name and program(name) is None:
            return f"{name} is not installed"
    if setup.not_root and os.geteuid() == 0 and not _can_leave_root():
        return "Apache does not serve as root, and no user namespace can be made here"
    return None


#: Runs what follows as another user in its own eyes, who to the kernel is still the one that owns the files.
AS_ANOTHER = ("unshare", "--user", "--map-user=33", "--map-group=33", "--")


def _can_leave_root() -> bool:
    try:
        return subprocess.run([*AS_ANOTHER, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def words(setup: Setup, port: int, folder: Path) -> list[str]:
    """The command, as ``exec`` takes it."""
    command = setup.command.replace("PORT", str(port)).replace("FOLDER", str(folder)).split()
    found = program(command[0]) or command[0]
    before = AS_ANOTHER if setup.not_root and os.geteuid() == 0 else ()
    return [*before, found, *command[1:]]
