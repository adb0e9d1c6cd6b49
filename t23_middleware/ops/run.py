"""``t23-middleware run COMMAND …``: starts a WSGI server's own command with the app wrapped.

The app in the command is replaced by ``t23_middleware.wsgi:application``, and ``T23_APP`` names the original app. Then
the server replaces this process (exec). The server's own argument parser finds the app, where the server has one.
"""

from __future__ import annotations

import ast
import contextlib
import getopt
import importlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .. import settings
from ..errors import UsageError
from . import uwsgi_config

#: The app that servers get instead of the original one.
OURS = "t23_middleware.wsgi:application"
_EXAMPLE = "t23-middleware run gunicorn -w 4 video:app"


@dataclass(frozen=True)
class Placement:
    """A command that starts the server with the app wrapped."""

    argv: list[str]
    #: Value for ``T23_APP``; None if the command serves no app (``gunicorn --help``).
    target: str | None


@dataclass(frozen=True)
class _Command:
    """A server's command line: the words that start the server, and its arguments."""

    start: list[str]
    arguments: list[str]
    environ: Mapping[str, str]
    cwd: Path

    def with_app(self, arguments: Sequence[str], target: str) -> Placement:
        """The command with *arguments*, which name :data:`OURS`, for the original app *target*."""
        if target.partition(":")[0] == OURS.partition(":")[0]:
            target = self.environ.get("T23_APP", "")
            if not target:
                raise UsageError(f"{OURS} can't wrap itself; name your own app, as in '{_EXAMPLE}'")
        return Placement([*self.start, *arguments], target)

    def unchanged(self) -> Placement:
        return Placement([*self.start, *self.arguments], None)

    def line(self, *more: str) -> str:
        """The command line to write instead: the user's own with *more* at its end."""
        return shlex.join(["t23-middleware", "run", *self.start, *self.arguments, *more])


def run(command: Sequence[str]) -> NoReturn:
    """Replace this process by *command* with the app wrapped.

    Raises :class:`~t23_middleware.errors.UsageError` if the app can't be replaced or the program does not exist.
    """
    environ = settings.process_environment()
    placement = place(command, environ, Path.cwd())
    if placement.target is not None:
        environ["T23_APP"] = environ[settings.NAMED_BY_RUN] = placement.target
    program = _program(placement.argv[0], environ)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, placement.argv, environ)
    except OSError as error:
        raise UsageError(
            f"{program} can't be started ({error.strerror}); write the name of a server's program"
        ) from None


def place(command: Sequence[str], environ: Mapping[str, str], cwd: Path) -> Placement:
    """*command* with the app replaced by :data:`OURS`. Reads configuration files; imports no app, starts nothing.

    Raises :class:`~t23_middleware.errors.UsageError` with the command line to write instead.
    """
    words = list(command[1:] if command[:1] == ["--"] else command)
    if not words:
        raise UsageError(f"run needs a server's command, for example: {_EXAMPLE}")
    start = _start_of(words)
    server = re.sub(r"_?(python)?[0-9.]*$", "", Path(start[-1]).name)
    if server not in _SERVERS:
        raise UsageError(_advice(words))
    return _SERVERS[server](_Command(start, words[len(start) :], environ, cwd))


def _start_of(words: list[str]) -> list[str]:
    """The words that start the server: the program, or ``python -m`` and a module."""
    if re.fullmatch(r"(python|pypy)[0-9.]*", Path(words[0]).name) and "-m" in words[1:-1]:
        flags = words[1 : words.index("-m")]
        if all(
            word.startswith("-") or before in ("-X", "-W")
            for before, word in zip(["", *flags], flags, strict=False)
        ):
            return words[: words.index("-m") + 2]
    return words[:1]


def _program(name: str, environ: Mapping[str, str]) -> str:
    """The file to execute. Our own virtual environment comes first, activated or not: its servers can import us."""
    places = [environ.get("PATH", os.defpath)]
    if sys.prefix != sys.base_prefix:
        places.insert(0, str(Path(sys.prefix, "bin")))
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise UsageError(f"there is no program {name!r}; install it, or write its path")
    return found


def _server_module(module: str) -> Any:
    """Import a server's own module, which parses the command line in the server's way."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UsageError(
            f"{package} is not installed in {sys.prefix}, where t23_middleware is; "
            f"install it there: {sys.prefix}/bin/python -m pip install {package}"
        ) from None


def _gunicorn(command: _Command) -> Placement:
    """gunicorn/app/wsgiapp.py: the first positional argument names the app and overrides the configuration file."""
    options = _gunicorn_options(command.arguments)
    if options is None:
        return command.unchanged()
    from_environment = _gunicorn_options(shlex.split(command.environ.get("GUNICORN_CMD_ARGS", "")))
    for given in (options, from_environment):
        _refuse_no_wsgi(given)
    if not options.args:
        raise UsageError(
            _gunicorn_without_app(command, options.config or getattr(from_environment, "config", None))
        )
    app = options.args[0]
    return command.with_app(
        _with_app_replaced(app, command.arguments), app if ":" in app else f"{app}:application"
    )


def _gunicorn_options(arguments: list[str]) -> Any:
    """The parsed arguments, or None if gunicorn only prints text and exits (``--help``, ``--version``)."""
    parser = _server_module("gunicorn.config").Config(prog="gunicorn").parser()
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return parser.parse_args(arguments)
    except SystemExit as stop:
        if not stop.code:
            return None
    last = output.getvalue().strip().rpartition("\n")[2]
    raise UsageError(f"{last.replace(': error:', ':')}; see 'gunicorn --help'")


def _refuse_no_wsgi(options: Any) -> None:
    if getattr(options, "paste", None):
        raise UsageError(
            "gunicorn --paste loads the app from a PasteDeploy file; write 'use = egg:t23_middleware' into a "
            "[filter:t23] section of that file, add t23 to its pipeline, and start gunicorn without 't23-middleware run'"
        )
    worker = str(getattr(options, "worker_class", None) or "")
    if re.search("uvicorn|asgi", worker, re.IGNORECASE):
        raise UsageError(
            f"gunicorn -k {worker} serves ASGI apps, which t23_middleware can't wrap; use gthread or gevent"
        )


def _gunicorn_without_app(command: _Command, config: str | None) -> str:
    file = command.cwd / (config or "gunicorn.conf.py").removeprefix("file:")
    app = _wsgi_app_in(file)
    if app is None:
        return f"the gunicorn command names no app; write for example: {command.line('video:app')}"
    return f"{file.name} names the app (wsgi_app); name it on the command line instead: {command.line(app)}"


def _wsgi_app_in(file: Path) -> str | None:
    """The value of ``wsgi_app`` in a gunicorn configuration file. The file is Python; it is parsed, not executed."""
    try:
        statements = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return None
    for statement in statements:
        if isinstance(statement, ast.Assign) and "wsgi_app" in map(ast.unparse, statement.targets):
            value = statement.value
            return (
                value.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str)
                else "video:app"
            )
    return None


def _with_app_replaced(app: str, arguments: list[str]) -> list[str]:
    """*arguments* with gunicorn's positional *app* replaced; an option's equal value (``-n video:app``) stays."""
    for index in (index for index, word in enumerate(arguments) if word == app):
        exchanged = [*arguments[:index], OURS, *arguments[index + 1 :]]
        if _gunicorn_options(exchanged).args[0] == OURS:
            return exchanged
    raise UsageError(f"gunicorn: can't find the app {app!r} in the command; write it at the end")


def _waitress(command: _Command) -> Placement:
    """waitress/runner.py: ``[--call] [options] module:app``; newer ones also take ``--app``."""
    options, apps = _waitress_options(command)
    if any(name == "--help" for name, _ in options):
        return command.unchanged()
    apps += [str(value) for name, value in options if name == "--app"]
    if len(apps) != 1:
        raise UsageError(
            f"waitress-serve needs exactly one app, after its options; write for example: {_waitress_line(command)}"
        )
    factory = any(name == "--call" for name, _ in options)
    kept = [(name, value) for name, value in options if name not in ("--call", "--app")]
    words = [name if value is None else f"{name}={value}" for name, value in kept]
    return command.with_app([*words, OURS], _factory_call(apps[0]) if factory else apps[0])


def _waitress_options(command: _Command) -> tuple[list[tuple[str, str | None]], list[str]]:
    """The options with their full names (value None for flags), and the arguments after them."""
    adjustments = _server_module("waitress.adjustments")
    # Same as its parse_args, which in newer versions also imports the app.
    params = [(name.replace("_", "-"), cast) for name, cast in adjustments.Adjustments._params]
    flags = [name for name, cast in params if cast is adjustments.asbool]
    flags += [f"no-{name}" for name in flags] + ["help", "call"]
    valued = {name for name, _ in params}.difference(flags) | {"app"}
    try:
        options, apps = getopt.getopt(command.arguments, "", [*flags, *(f"{name}=" for name in valued)])
    except getopt.GetoptError as error:
        raise UsageError(f"waitress-serve: {error.msg}; see 'waitress-serve --help'") from None
    return [(name, value if name[2:] in valued else None) for name, value in options], apps


def _waitress_line(command: _Command) -> str:
    return shlex.join(["t23-middleware", "run", *command.start, "--listen=127.0.0.1:8080", "video:app"])


def _factory_call(factory: str) -> str:
    """The call of a factory for ``T23_APP``: ``video:create()`` for ``video:create`` or ``video.create``."""
    module, _, name = factory.partition(":") if ":" in factory else factory.rpartition(".")
    if not module or not name:
        raise UsageError(
            f"waitress-serve --call {factory} names no function; write for example --call video:create_app"
        )
    return f"{module}:{name}()"


def _uwsgi(command: _Command) -> Placement:
    """uwsgi: our ``--module`` comes last. There it overrides a ``module``, and is loaded before any ``wsgi-file``."""
    if {"--help", "-h", "--version", "--usage"} & set(command.arguments):
        return command.unchanged()
    loaded = uwsgi_config.read(command.arguments, command.environ, command.cwd)
    target = loaded.target()
    if target is None:
        raise UsageError(
            f"the uwsgi command names no app; write for example: {command.line('--module', 'video:app')}"
        )
    # uWSGI reads a file without an option as --include, but after all options instead of at its place.
    files = [word for file in loaded.positional for word in ("--include", file)]
    return command.with_app([*loaded.arguments, *files, "--module", OURS], target)


def _flask(command: _Command) -> Placement:
    """flask/cli.py: the last ``--app`` before the subcommand overrides ``FLASK_APP``."""
    options, rest = _flask_options(command.arguments)
    if not rest or options.get("help") or options.get("version"):
        return command.unchanged()
    target = options.get("app") or _flask_variables(command, options.get("env_file")).get("FLASK_APP")
    at = len(command.arguments) - len(rest)
    if command.arguments[:at][-1:] == ["--"]:
        at -= 1
    ours = ["--app", _flask_import(command.cwd)]
    arguments = [*command.arguments[:at], *ours, *command.arguments[at:]]
    return command.with_app(arguments, target or _flask_default(command))


def _flask_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The options before Flask's subcommand, and the arguments from the subcommand on."""
    group, click = _server_module("flask.cli").cli, _server_module("click")
    try:
        options, rest, _ = group.make_parser(click.Context(group)).parse_args(list(arguments))
    except click.UsageError as error:
        raise UsageError(f"flask: {error.format_message().rstrip('.')}; see 'flask --help'") from None
    return options, rest


def _flask_import(cwd: Path) -> str:
    # If the folder is itself a package, Flask puts its name before the module's (prepare_import).
    if not (cwd / "__init__.py").exists():
        return OURS
    return f"{Path(__file__).parent.parent / 'wsgi.py'}:application"


def _flask_variables(command: _Command, env_file: str | None) -> dict[str, str | None]:
    """The environment that Flask uses, including the files that it reads if python-dotenv is installed."""
    environ = command.environ
    files = (
        []
        if environ.get("FLASK_SKIP_DOTENV", "0").lower() not in ("", "0", "false", "no")
        else _dotenv_files(command.cwd)
    )
    if env_file or environ.get("FLASK_ENV_FILE"):
        files.append(command.cwd / (env_file or environ["FLASK_ENV_FILE"]))
    found: dict[str, str | None] = {}
    with contextlib.suppress(ImportError):
        dotenv: Any = importlib.import_module("dotenv")
        for file in files:
            found |= dotenv.dotenv_values(file, encoding="utf-8")
    return {**found, **environ}


def _dotenv_files(cwd: Path) -> list[Path]:
    """The nearest ``.flaskenv`` and ``.env`` in *cwd* or a folder above it."""
    nearest = [
        [folder / name for folder in (cwd, *cwd.parents) if (folder / name).is_file()]
        for name in (".flaskenv", ".env")
    ]
    return [files[0] for files in nearest if files]


def _flask_default(command: _Command) -> str:
    for name in ("wsgi", "app"):
        if (command.cwd / f"{name}.py").exists() or (command.cwd / name / "__init__.py").exists():
            return f"{name}.py"
    arguments = shlex.join(["t23-middleware", "run", *command.start, "--app", "video", *command.arguments])
    raise UsageError(
        f"the flask command names no app, and this folder has no wsgi.py or app.py; write for example: {arguments}"
    )


_SERVERS: dict[str, Callable[[_Command], Placement]] = {
    "gunicorn": _gunicorn,
    "waitress-serve": _waitress,
    "waitress": _waitress,
    "uwsgi": _uwsgi,
    "flask": _flask,
}

#: Programs that start another program; 't23-middleware run' comes after them.
_LAUNCHER = re.compile(
    "env|exec|nice|nohup|sudo|setsid|uv|poetry|pipenv|pdm|hatch|rye|conda|doppler|dotenv|honcho"
)
#: Servers that accept a WSGI app: the options that they need for it, and their spelling of the app.
_OTHER_SERVERS = {
    "granian": (["--interface", "wsgi"], OURS),
    "hypercorn": ([], f"wsgi:{OURS}"),
    "uvicorn": (["--interface", "wsgi"], OURS),
    "mod_wsgi-express": (["--application-type", "module"], "t23_middleware.wsgi"),
    "cheroot": ([], OURS),
}
#: The form of an app in a command line: ``video:app``, ``site/video.py``; not ``host:port``.
_APP = re.compile(r"(wsgi:)?[A-Za-z_][\w./]*:[A-Za-z_][\w.]*(\(.*\))?|[\w./-]+\.(py|wsgi)(:[A-Za-z_][\w.]*)?")


def _advice(words: list[str]) -> str:
    """What to write instead of an unknown command."""
    name = Path(words[0]).name
    if "manage.py" in words[0] or "manage.py" in words[1:2] or name in ("django-admin", "daphne"):
        return (
            f"run does not support {name}; set WSGI_APPLICATION = 't23_middleware.wsgi.application' in Django's settings "
            "and T23_APP=mysite.wsgi:application in the environment, and start it without 't23-middleware run'"
        )
    if _LAUNCHER.fullmatch(name):
        return f"write 't23-middleware run' directly before the server: {name} … t23-middleware run gunicorn video:app"
    if name in _OTHER_SERVERS:
        return f"run does not support {name}; if the app is WSGI, write: {_line_for(words, *_OTHER_SERVERS[name])}"
    if name.startswith(("python", "pypy")) or name.endswith(".py"):
        return (
            f"run can't find out which app {shlex.join(words)!r} serves; wrap the app in its code: "
            "app.wsgi_app = T23Middleware(app.wsgi_app)"
        )
    if re.fullmatch(r"[\w.]+(:.*)", name):
        return (
            f"run needs a server's command, not an app; write for example: t23-middleware run gunicorn {name}"
        )
    return (
        f"run supports gunicorn, waitress-serve, uwsgi and flask, not {name!r}; start the server with the app "
        f"{OURS} and set T23_APP: {_line_for(words, [], OURS)}"
    )


def _line_for(words: list[str], options: list[str], ours: str) -> str:
    """The command in *words* with *ours* as its app and the original app in ``T23_APP``."""
    at = next((at for at in range(len(words) - 1, 0, -1) if _APP.fullmatch(words[at])), None)
    app = "video:app" if at is None else _as_target(words[at].removeprefix("wsgi:"))
    rest = words[1:] if at is None else [*words[1:at], *words[at + 1 :]]
    kept = [] if options[:1] and options[0] in rest else options
    return f"T23_APP={shlex.quote(app)} {shlex.join([words[0], *rest, *kept, ours])}"


def _as_target(app: str) -> str:
    """*app* in the form of ``T23_APP``, where a script ``video.wsgi`` would mean attribute ``wsgi`` of module ``video``."""
    if not app.endswith(".wsgi"):
        return app
    return f"{'' if '/' in app else './'}{app}:application"
