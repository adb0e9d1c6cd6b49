"""``t23-middleware run``: where a server's command gets the app exchanged, and real servers that take it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest

import t23_middleware
from t23_middleware.errors import UsageError
from t23_middleware.ops.run import OURS, place

from ..ports import free_port

PACKAGE = Path(t23_middleware.__file__).parent
BIN = Path(sys.prefix, "bin")
RUN = [sys.executable, "-m", "t23_middleware", "run"]

# Placement: pure, so the folder and the environment are passed in.


@pytest.mark.parametrize(
    ("command", "placed", "target"),
    [
        ("gunicorn video:app", f"gunicorn {OURS}", "video:app"),
        ("-- gunicorn video:app", f"gunicorn {OURS}", "video:app"),
        ("gunicorn video", f"gunicorn {OURS}", "video:application"),
        ("gunicorn video:create('a')", f"gunicorn {OURS}", "video:create('a')"),
        ("gunicorn -w 4 shop.video:app -b :80", f"gunicorn -w 4 {OURS} -b :80", "shop.video:app"),
        ("gunicorn --preload -k gevent video:app", f"gunicorn --preload -k gevent {OURS}", "video:app"),
        ("gunicorn -n video:app video:app", f"gunicorn -n video:app {OURS}", "video:app"),
        ("gunicorn video:app -n video:app", f"gunicorn {OURS} -n video:app", "video:app"),
        ("gunicorn --name=video:app -- video:app", f"gunicorn --name=video:app -- {OURS}", "video:app"),
        ("gunicorn -c named.py video:app", f"gunicorn -c named.py {OURS}", "video:app"),
        ("gunicorn --chdir sub video:app", f"gunicorn --chdir sub {OURS}", "video:app"),
        ("/venv/bin/gunicorn video:app", f"/venv/bin/gunicorn {OURS}", "video:app"),
        ("python -m gunicorn video:app", f"python -m gunicorn {OURS}", "video:app"),
        ("python3.12 -u -X dev -m gunicorn a:b", f"python3.12 -u -X dev -m gunicorn {OURS}", "a:b"),
        ("gunicorn --help", "gunicorn --help", None),
        ("gunicorn --version", "gunicorn --version", None),
        ("waitress-serve video:app", f"waitress-serve {OURS}", "video:app"),
        ("waitress-serve video.app", f"waitress-serve {OURS}", "video.app"),
        (
            "waitress-serve --listen=*:80 --listen [::]:80 video:app",
            f"waitress-serve --listen=*:80 --listen=[::]:80 {OURS}",
            "video:app",
        ),
        ("waitress-serve --port 80 --app video:app", f"waitress-serve --port=80 {OURS}", "video:app"),
        ("waitress-serve --call video:create", f"waitress-serve {OURS}", "video:create()"),
        ("waitress-serve --cal video.create", f"waitress-serve {OURS}", "video:create()"),
        ("waitress-serve --ident= --no-ipv6 v:a", f"waitress-serve --ident= --no-ipv6 {OURS}", "v:a"),
        ("python -m waitress video:app", f"python -m waitress {OURS}", "video:app"),
        ("waitress-serve --help", "waitress-serve --help", None),
        ("flask --app video run", f"flask --app video --app {OURS} run", "video"),
        (
            "flask -A video:create('a') run -p 1",
            f"flask -A video:create('a') --app {OURS} run -p 1",
            "video:create('a')",
        ),
        ("flask --app=video --debug run", f"flask --app=video --debug --app {OURS} run", "video"),
        ("flask -Avideo run --debug", f"flask -Avideo --app {OURS} run --debug", "video"),
        ("flask --app video -- run", f"flask --app video --app {OURS} -- run", "video"),
        ("python -m flask --app video run", f"python -m flask --app video --app {OURS} run", "video"),
        (
            "flask --app video routes --sort rule",
            f"flask --app video --app {OURS} routes --sort rule",
            "video",
        ),
        ("flask", "flask", None),
        ("flask --version", "flask --version", None),
        (
            "uwsgi --http :80 --module video:app",
            f"uwsgi --http :80 --module video:app --module {OURS}",
            "video:app",
        ),
        ("uwsgi -w video", f"uwsgi -w video --module {OURS}", "video:application"),
        ("uwsgi -wvideo:app", f"uwsgi -wvideo:app --module {OURS}", "video:app"),
        (
            "uwsgi --wsgi=video --callable=app",
            f"uwsgi --wsgi=video --callable=app --module {OURS}",
            "video:app",
        ),
        ("uwsgi --wsgi-file a/v.py", f"uwsgi --wsgi-file a/v.py --module {OURS}", "a/v.py:application"),
        (
            "uwsgi --file v.wsgi --callable x",
            f"uwsgi --file v.wsgi --callable x --module {OURS}",
            "./v.wsgi:x",
        ),
        (
            "uwsgi --module video:app --file v.py",
            f"uwsgi --module video:app --file v.py --module {OURS}",
            "video:app",
        ),
        ("uwsgi --ini module.ini", f"uwsgi --ini module.ini --module {OURS}", "video:app"),
        ("uwsgi --ini=file.ini", f"uwsgi --ini=file.ini --module {OURS}", "films/v.py:app"),
        ("uwsgi --ini file.ini --module v:a", f"uwsgi --ini file.ini --module v:a --module {OURS}", "v:a"),
        ("uwsgi module.ini", f"uwsgi --include module.ini --module {OURS}", "video:app"),
        (
            "uwsgi -M module.ini --http :80",
            f"uwsgi -M --http :80 --include module.ini --module {OURS}",
            "video:app",
        ),
        (
            "uwsgi module.ini --module v:a",
            f"uwsgi --module v:a --include module.ini --module {OURS}",
            "video:app",
        ),
        ("uwsgi -p 4 module.ini", f"uwsgi -p 4 --include module.ini --module {OURS}", "video:app"),
        ("uwsgi --ini many.ini:live", f"uwsgi --ini many.ini:live --module {OURS}", "live:app"),
        (
            "uwsgi --ini placeholder.ini --module v:a",
            f"uwsgi --ini placeholder.ini --module v:a --module {OURS}",
            "v:a",
        ),
        ("uwsgi_python3 -w video:app", f"uwsgi_python3 -w video:app --module {OURS}", "video:app"),
        ("uwsgi --help", "uwsgi --help", None),
    ],
)
def test_place_replaces_the_app(configured: Path, command: str, placed: str, target: str | None) -> None:
    """The app in a server's command is replaced by ours, and becomes the target."""
    placement = place(command.split(" "), {}, configured)

    assert placement.argv == placed.split(" ")
    assert placement.target == target


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "t23-middleware run gunicorn -w 4 video:app"),
        ("gunicorn", "write for example: t23-middleware run gunicorn video:app"),
        ("gunicorn -c named.py -w 2", "t23-middleware run gunicorn -c named.py -w 2 shop.video:app"),
        ("gunicorn -c file:named.py", "t23-middleware run gunicorn -c file:named.py shop.video:app"),
        ("gunicorn -c built.py", "t23-middleware run gunicorn -c built.py video:app"),
        ("gunicorn --paste site.ini", "use = egg:t23_middleware"),
        ("gunicorn -k uvicorn.workers.UvicornWorker v:a", "serves ASGI"),
        ("gunicorn --nonsense video:app", "unrecognized arguments: --nonsense"),
        ("gunicorn -w many video:app", "invalid int value"),
        (f"gunicorn {OURS}", "can't wrap itself"),
        ("waitress-serve", "t23-middleware run waitress-serve --listen=127.0.0.1:8080 video:app"),
        ("waitress-serve video:app --port=80", "needs exactly one app, after its options"),
        ("waitress-serve --nonsense video:app", "option --nonsense not recognized"),
        ("waitress-serve --call video", "--call video:create_app"),
        ("flask run --debug", "t23-middleware run flask --app video run --debug"),
        ("flask --nonsense run", "No such option"),
        ("uwsgi --http :80", "t23-middleware run uwsgi --http :80 --module video:app"),
        ("uwsgi --emperor /etc/uwsgi", "starts other instances"),
        ("uwsgi --ini emperor.ini", "starts other instances"),
        ("uwsgi --mount /=video:app", "by mount point"),
        ("uwsgi --paste config:site.ini", "PasteDeploy"),
        ("uwsgi site.yaml", "is not an ini file"),
        ("uwsgi --xml site.xml", "is not an ini file"),
        ("uwsgi --ini inherit.ini", "is read after the command line"),
        ("uwsgi --ini placeholder.ini", "placeholder that only uWSGI can replace"),
        ("uwsgi --ini conditional.ini", "depends on 'if-env'"),
        ("uwsgi --ini open.ini --module v:a", "'if-env' in open.ini has no end"),
        ("uwsgi --ini loop.ini", "include each other"),
        ("uwsgi --ini nowhere.ini", "No such file"),
        ("uwsgi --touch-reload module.ini -w v:a", "--touch-reload=module.ini"),
        ("uwsgi -w video:app -- module.ini", "write --ini FILE"),
        (
            "granian --interface wsgi video:app",
            "T23_APP=video:app granian --interface wsgi t23_middleware.wsgi:app",
        ),
        (
            "uvicorn --port 80 --host localhost:8000 site.late:app",
            f"T23_APP=site.late:app uvicorn --port 80 --host localhost:8000 --interface wsgi {OURS}",
        ),
        ("hypercorn -b :80 wsgi:shop:app", f"T23_APP=shop:app hypercorn -b :80 wsgi:{OURS}"),
        ("hypercorn shop:app -w 2", f"T23_APP=shop:app hypercorn -w 2 wsgi:{OURS}"),
        ("cheroot", f"T23_APP=video:app cheroot {OURS}"),
        (
            "mod_wsgi-express start-server shop.wsgi",
            "T23_APP=./shop.wsgi:application mod_wsgi-express start-server --application-type module t23_middleware.wsgi",
        ),
        ("python manage.py runserver", "WSGI_APPLICATION = 't23_middleware.wsgi.application'"),
        ("./manage.py runserver", "WSGI_APPLICATION = 't23_middleware.wsgi.application'"),
        ("python video.py", "app.wsgi_app = T23Middleware(app.wsgi_app)"),
        ("uv run gunicorn video:app", "directly before the server: uv … t23-middleware run gunicorn"),
        ("video:app", "t23-middleware run gunicorn video:app"),
        ("bjoern --fast 'shop:make(1)'", f"T23_APP='shop:make(1)' bjoern --fast {OURS}"),
    ],
)
def test_place_refusal_shows_the_remedy(configured: Path, command: str, words: str) -> None:
    """A command that can't be changed is refused in one line that shows what to write."""
    with pytest.raises(UsageError) as told:
        place(shlex.split(command), {}, configured)

    assert words in str(told.value)
    assert "\n" not in str(told.value)


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """A folder with configuration files of all kinds."""
    files = {
        "named.py": "workers = 2\nwsgi_app = 'shop.video:app'\n",
        "built.py": "import os\nwsgi_app = os.environ['APP']\n",
        "module.ini": "[uwsgi]\nmaster = true\nmodule = video:app\nenv = A=1\nenv = B=2\n",
        "file.ini": "# films\n[other]\nmodule = no:no\n[uwsgi]\nwsgi-file=films/v.py\n  callable =  app  \n;module = x:y\n",
        "many.ini": "[uwsgi]\nmodule = trial:app\n[common]\nmaster = 1\ncallable = app\n[live]\nini = :common\nmodule = live\n",
        "emperor.ini": "[uwsgi]\nemperor = /etc/uwsgi/vassals\n",
        "inherit.ini": "[uwsgi]\nmodule = video:app\ninherit = module.ini\n",
        "placeholder.ini": "[uwsgi]\nproject = video\nmodule = %(project).wsgi:app\n",
        "conditional.ini": "[uwsgi]\nif-env = LIVE\nmodule = live:app\nend-if =\n",
        "open.ini": "[uwsgi]\nif-env = LIVE\nmaster = true\n",
        "loop.ini": "[uwsgi]\nini = loop.ini\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_place_reads_gunicorn_conf(tmp_path: Path) -> None:
    """gunicorn.conf.py is read in the folder in which the command runs."""
    (tmp_path / "gunicorn.conf.py").write_text("wsgi_app = 'video:app'\n")

    with pytest.raises(
        UsageError, match="gunicorn.conf.py names the app .* t23-middleware run gunicorn -w 2 video:app"
    ):
        place(["gunicorn", "-w", "2"], {}, tmp_path)


def test_gunicorn_cmd_args_are_read_too(configured: Path) -> None:
    with pytest.raises(UsageError, match="named.py names the app"):
        place(["gunicorn"], {"GUNICORN_CMD_ARGS": "-c named.py"}, configured)
    with pytest.raises(UsageError, match="PasteDeploy"):
        place(["gunicorn", "video:app"], {"GUNICORN_CMD_ARGS": "--paste site.ini"}, configured)


def test_place_reads_uwsgi_variables(configured: Path) -> None:
    """uWSGI's environment variables are read before its command line."""
    environ = {
        "UWSGI_WSGI_FILE": "v.py",
        "UWSGI_INI": "module.ini",
        "UWSGI_CALLABLE": "x",
        "UWSGI_RELOADS": "1",
    }

    assert place(["uwsgi"], {"UWSGI_WSGI_FILE": "v.py", "UWSGI_CALLABLE": "x"}, configured).target == "v.py:x"
    assert place(["uwsgi"], environ, configured).target == "video:app"
    assert place(["uwsgi", "-w", "late:app"], environ, configured).target == "late:app"


def test_place_keeps_t23_app(tmp_path: Path) -> None:
    """A command that names our app already keeps its T23_APP as the target."""
    placement = place(["gunicorn", "t23_middleware.wsgi"], {"T23_APP": "video:app"}, tmp_path)

    assert (placement.argv, placement.target) == (["gunicorn", OURS], "video:app")


def test_place_flask_app_sources(tmp_path: Path) -> None:
    """Flask's app comes from the environment or the usual files. The command line comes first."""
    assert place(["flask", "run"], {"FLASK_APP": "video:site"}, tmp_path).target == "video:site"
    (tmp_path / "app.py").touch()
    assert place(["flask", "run"], {}, tmp_path).target == "app.py"
    (tmp_path / "wsgi.py").touch()
    assert place(["flask", "run"], {}, tmp_path).target == "wsgi.py"
    assert place(["flask", "--app", "late", "run"], {"FLASK_APP": "video"}, tmp_path).target == "late"


def test_place_flask_app_from_dotenv(tmp_path: Path) -> None:
    """Flask's app comes from dotenv files, in the order in which Flask reads them."""
    if "CI" not in os.environ:
        pytest.importorskip("dotenv", reason="python-dotenv is not installed")
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / ".flaskenv").write_text("FLASK_APP=from_flaskenv\n")

    def target(*options: str, **environ: str) -> str | None:
        return place(["flask", *options, "run"], environ, folder).target

    assert target() == "from_flaskenv"
    (folder / ".env").write_text("FLASK_APP=from_env\n")
    assert target() == "from_env"
    (folder / "more").write_text("FLASK_APP=from_more\n")
    assert target("--env-file", "more") == target(FLASK_ENV_FILE="more") == "from_more"
    assert target("--env-file", "more", FLASK_SKIP_DOTENV="1") == "from_more"
    assert target(FLASK_APP="set") == "set"
    with pytest.raises(UsageError, match="the flask command names no app"):
        target(FLASK_SKIP_DOTENV="1")


# Real servers.

VIDEO = """
    def _app(name):
        def app(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [f"{name} seen={'t23.seen' in environ}".encode()]
        return app

    application = _app("video.application")
    app = _app("video.app")

    def create(name="made"):
        return _app(f"video.{name}")
"""

SITE = """
    import flask

    def create_app(name="made"):
        site = flask.Flask("site")
        site.add_url_rule("/", view_func=lambda: f"{name} seen={'t23.seen' in flask.request.environ}")
        return site

    app = create_app("site.app")
    application = lambda environ, start_response: 1 / 0  # what Flask passes over
"""

Ask = Callable[..., str]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Runs a server's command in a folder with apps and answers with what its ``/`` says."""
    for name, text in {
        "video.py": VIDEO,
        "sub/films.py": VIDEO,
        "sub/late.wsgi": VIDEO,
        "site.py": SITE,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (tmp_path / "site.py").rename(tmp_path / "shop.py")
    started: list[subprocess.Popen[bytes]] = []

    def run(command: str, files: dict[str, str] | None = None, **environ: str) -> str:
        for name, text in (files or {}).items():
            (tmp_path / name).write_text(text)
        port = free_port()
        words = [word.replace("PORT", str(port)) for word in command.split(" ")]
        _need(words[0])
        log = tmp_path / "log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                [*RUN, *words],
                cwd=tmp_path,
                env=server_environment(tmp_path) | environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started.append(server)
        (tmp_path / "started.pid").write_text(str(server.pid))
        return answer(server, port, log)

    yield run
    for server in started:
        end(server)


def _need(program: str) -> None:
    if shutil.which(program, path=f"{BIN}:{os.environ['PATH']}") is None:
        assert "CI" not in os.environ, f"{program} is not installed"
        pytest.skip(f"{program} is not installed")


def server_environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(PACKAGE.parent),
        "HOME": str(folder),
        "T23_API_URL": "http://127.0.0.1:9",
        "T23_STATE_DIR": str(folder / "state"),
        "T23_RELAY": "off",
    }


def answer(server: subprocess.Popen[bytes], port: int, log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as response:
                return str(response.read().decode())
        except HTTPError as error:
            error.close()
            break
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise AssertionError(f"no answer (exit code {server.poll()}):\n{log.read_text()}")


def end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server and its workers, which are a process group of their own.

    A uWSGI that is interrupted together with its workers may wait for them for good.
    """
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(server.pid, signal.SIGINT)
        server.wait(timeout=3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(timeout=20)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("gunicorn -b 127.0.0.1:PORT -w 2 video:app", "video.app"),
        ("gunicorn -b 127.0.0.1:PORT video", "video.application"),
        ("gunicorn -b 127.0.0.1:PORT -k gthread video:create('late')", "video.late"),
        ("gunicorn -b 127.0.0.1:PORT --preload --chdir sub films:app", "video.app"),
        ("gunicorn -b 127.0.0.1:PORT --pythonpath sub films:app", "video.app"),
        ("gunicorn -b 127.0.0.1:PORT -k gevent shop:app", "site.app"),
        (f"{sys.executable} -m gunicorn -b 127.0.0.1:PORT video:app", "video.app"),
        ("waitress-serve --listen=127.0.0.1:PORT video:app", "video.app"),
        ("waitress-serve --listen 127.0.0.1:PORT --call video.create", "video.made"),
        (f"{sys.executable} -m waitress --listen=127.0.0.1:PORT video:app", "video.app"),
        ("flask --app shop run -p PORT", "site.app"),
        ("flask -A shop:create_app run -p PORT", "made"),
        ("flask -A shop:create_app('late') run -p PORT", "late"),
        ("flask --app ./shop.py run -p PORT --debug", "site.app"),
        (f"{sys.executable} -m flask --app shop run -p PORT", "site.app"),
        ("uwsgi --http-socket 127.0.0.1:PORT --module video:app", "video.app"),
        ("uwsgi --http-socket 127.0.0.1:PORT -w video --callable create()", "video.made"),
        ("uwsgi --http-socket 127.0.0.1:PORT --chdir sub --wsgi-file late.wsgi", "video.application"),
        (
            "uwsgi --http-socket 127.0.0.1:PORT --master --lazy-apps -p 2 --wsgi-file sub/films.py",
            "video.application",
        ),
    ],
)
def test_server_serves_through_middleware(ask: Ask, command: str, name: str) -> None:
    """Each real server serves the app of its command through the middleware."""
    assert ask(command) == f"{name} seen=True"


@pytest.mark.parametrize(
    ("ini", "name"),
    [
        ("module = video:app", "video.app"),
        ("module = video\ncallable = app", "video.app"),
        ("wsgi-file = video.py\ncallable = app", "video.app"),
        ("chdir = sub\nwsgi-file = films.py\ncallable = app\nmaster = true\nprocesses = 2", "video.app"),
        ("if-env = NOT_SET\nprocesses = 2\nend-if =\nmodule = shop:app\nenable-threads = true", "site.app"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        "uwsgi --http-socket 127.0.0.1:PORT --ini site.ini",
        "uwsgi site.ini --http-socket 127.0.0.1:PORT",
    ],
)
def test_uwsgi_serves_app_from_ini(ask: Ask, command: str, ini: str, name: str) -> None:
    """uWSGI serves the app that its ini file names, through the middleware."""
    assert ask(command, {"site.ini": f"[uwsgi]\n{ini}\n"}) == f"{name} seen=True"


def test_flask_finds_its_app_by_itself(ask: Ask) -> None:
    assert ask("flask run -p PORT", {"wsgi.py": "from shop import app"}) == "site.app seen=True"


def test_flask_runs_inside_a_package(ask: Ask) -> None:
    """``flask run`` works in a folder that is a Python package."""
    assert ask("flask --app shop run -p PORT", {"__init__.py": ""}) == "site.app seen=True"


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs to run in a virtual environment")
def test_server_found_without_activated_environment(ask: Ask) -> None:
    """A server in our own virtual environment is found, although the environment is not activated."""
    assert (
        ask("waitress-serve --listen=127.0.0.1:PORT video:app", PATH="/usr/bin:/bin") == "video.app seen=True"
    )


def test_server_replaces_the_command(ask: Ask, tmp_path: Path) -> None:
    """The server runs in the process of the command, with the same pid."""
    ask("gunicorn -b 127.0.0.1:PORT --pid server.pid video:app")

    assert (tmp_path / "server.pid").read_text().strip() == (tmp_path / "started.pid").read_text()


def test_disabled_serves_bare_app(ask: Ask) -> None:
    """With T23_ENABLED=0 the server serves the app without the middleware."""
    assert ask("gunicorn -b 127.0.0.1:PORT video:app", T23_ENABLED="0") == "video.app seen=False"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["gunicorn", "-w", "2"], "the gunicorn command names no app"),
        (["./gunicorn", "video:app"], "there is no program './gunicorn'"),
        ([], "run needs a server's command"),
    ],
)
def test_run_refusal_exits_with_2(tmp_path: Path, command: list[str], words: str) -> None:
    """A command that can't be changed ends with one sentence and exit code 2."""
    done = subprocess.run(
        [*RUN, *command],
        cwd=tmp_path,
        env=server_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_server_prints_own_help(tmp_path: Path) -> None:
    """A server's options that only print something, such as --version, are answered by the server itself."""
    done = subprocess.run(
        [*RUN, "gunicorn", "--version"],
        cwd=tmp_path,
        env=server_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout.startswith("gunicorn (version")
