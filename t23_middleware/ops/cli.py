"""``t23-middleware``: the commands, their arguments and their exit codes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..errors import ConfigurationError, T23Error, UsageError
from ..settings import Settings
from ..version import VERSION
from . import text
from .streams import error_location, flush_output, open_missing_streams

#: Exit codes: success; the command ran and its result is negative; wrong arguments or settings.
SUCCESS, FAILURE, MISUSE = 0, 1, 2

_EXAMPLES = """\
The commands read the app's settings from environment variables (T23_...).
Run them with the same environment as the app.

examples:
  t23-middleware demo
  export T23_API_URL=https://video.example.com
  t23-middleware run gunicorn -w 4 video:app
  t23-middleware check
  t23-middleware status --watch
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (default: the arguments of this process) and return its exit code."""
    open_missing_streams()
    try:
        arguments = _parser().parse_args(argv)
        code = _exit_code(arguments.command, arguments)
    except SystemExit as error:  # argparse has printed help or an error
        raise SystemExit(flush_output(int(error.code or SUCCESS))) from None
    return flush_output(code)


def _exit_code(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run *command* and return its exit code. Each error is printed as one sentence, never as a traceback."""
    try:
        return command(arguments)
    except ConfigurationError as error:
        for problem in error.problems:
            _print_error(problem)
        return MISUSE
    except UsageError as error:
        _print_error(error)
        return MISUSE
    except T23Error as error:
        _print_error(error)
        return FAILURE
    except BrokenPipeError:
        return SUCCESS  # the reader closed the pipe (for example `head`); this is not an error
    except OSError as error:
        _print_error(_os_error_sentence(error))
        return FAILURE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        _print_error(f"this is a bug in t23_middleware; please send us this line: {error_location(error)}")
        return FAILURE


def _os_error_sentence(error: OSError) -> str:
    why = error.strerror or str(error)
    if not error.filename:
        return f"a file can't be read or written ({why}); run 't23-middleware check'"
    file = os.fsdecode(error.filename)
    return (
        f"{file} can't be used by user {os.geteuid()} ({why}); correct that, or run this command as its owner"
    )


def _print_error(message: object) -> None:
    with contextlib.suppress(OSError):  # stderr may be closed; the exit code reports the error too
        print(
            text.error_message(str(message), text.width() if sys.stderr.isatty() else None), file=sys.stderr
        )


class _Parser(argparse.ArgumentParser):
    """Prints errors in the format of the commands, with a remedy. If the command is missing, it prints the help."""

    def error(self, message: str) -> NoReturn:
        """Print *message* and exit with code 2."""
        if message.startswith("the following arguments are required: ") and self._subparsers is not None:
            self.print_help(sys.stderr)
            self.exit(MISUSE)
        if (unknown := _UNKNOWN.match(message)) is not None:
            nearest = difflib.get_close_matches(unknown["given"], _choices(self), n=1)
            message = f"there is no {unknown['what'].lower()} {unknown['given']!r}"
            message += f"; did you mean {nearest[0]!r}?" if nearest else ""
        _print_error(f"{message}{' See' if message.endswith('?') else '; see'} '{self.prog} --help'")
        self.exit(MISUSE)


_UNKNOWN = re.compile(r"argument (?P<what>COMMAND|ACTION): invalid choice: '(?P<given>[^']*)'")


def _choices(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.choices or () if isinstance(name, str)]


def _parser() -> _Parser:
    parser = _Parser(
        prog="t23-middleware",
        description="Reports the video that a WSGI app streams to TwentyThree's analytics.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"t23-middleware {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_config(commands)
    _add_check(commands)
    _add_relay(commands)
    _add_status(commands)
    _add_ingest(commands)
    _add_dead(commands)
    _add_trial_commands(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    help: str,
    command: Callable[[argparse.Namespace], int],
    *examples: str,
) -> _Parser:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    run = _add(
        commands,
        "run",
        "start a WSGI server's own command with the app wrapped",
        _run,
        "t23-middleware run gunicorn -w 4 video:app",
        "t23-middleware run waitress-serve --listen=127.0.0.1:8000 video:app",
        "t23-middleware run uwsgi --http-socket :8000 --module video:app",
        "t23-middleware run flask --app video run",
    )
    run.usage = "%(prog)s [-h] SERVER ..."
    run.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="SERVER ...", help="gunicorn, waitress-serve, uwsgi, flask"
    )


def _add_config(commands: argparse._SubParsersAction[_Parser]) -> None:
    config = _add(
        commands,
        "config",
        "show every setting, its value and its source",
        _config,
        "t23-middleware config",
        "T23_STATE_DIR=/var/lib/t23 t23-middleware config",
    )
    config.add_argument(
        "--markdown",
        action="store_true",
        help="print the README's table: default and meaning of each setting",
    )


def _add_check(commands: argparse._SubParsersAction[_Parser]) -> None:
    check = _add(
        commands,
        "check",
        "check whether plays would be reported; if not, show how to fix it",
        _check,
        "t23-middleware check",
        "t23-middleware check --send --photo 7190971 --session me",
    )
    check.add_argument("--send", action="store_true", help="send one real report (TwentyThree counts it)")
    check.add_argument("--photo", metavar="ID", help="with --send: the video of the report")
    check.add_argument(
        "--session", metavar="ID", help="with --send: the session of the report, one that TwentyThree knows"
    )


def _add_relay(commands: argparse._SubParsersAction[_Parser]) -> None:
    relay = _add(
        commands,
        "relay",
        "run the relay, which delivers reports, in the foreground (for a service)",
        _relay,
        "t23-middleware relay",
        "t23-middleware relay --once",
    )
    relay.add_argument(
        "--once",
        action="store_true",
        help="deliver what waits now, for at most 30 s, then exit: 0 if nothing is left, else 1",
    )
    relay.add_argument("--json", action="store_true", help="write log lines as JSON, for programs")


def _add_status(commands: argparse._SubParsersAction[_Parser]) -> None:
    status = _add(
        commands,
        "status",
        "show how many reports were captured, wait, were sent or were lost, and why",
        _status,
        "t23-middleware status",
        "t23-middleware status --watch",
        "t23-middleware status --json | jq .waiting",
    )
    status.add_argument("--json", action="store_true", help="print JSON, for programs")
    status.add_argument("--watch", action="store_true", help="refresh every 2 seconds, until Ctrl-C")


def _add_ingest(commands: argparse._SubParsersAction[_Parser]) -> None:
    ingest = _add(
        commands,
        "ingest",
        "read a rotated nginx log that the relay missed",
        _ingest,
        "t23-middleware ingest /var/log/nginx/t23.log.2",
    )
    ingest.add_argument(
        "files", nargs="+", metavar="FILE", help="a rotated file of the log in T23_PROXY_LOG, not compressed"
    )


def _add_dead(commands: argparse._SubParsersAction[_Parser]) -> None:
    dead = _add(
        commands,
        "dead",
        "list, retry or purge the reports that the API refused permanently",
        _dead_list,
        "t23-middleware dead list",
        "t23-middleware dead retry 17 18",
        "t23-middleware dead purge --all",
    )
    actions = dead.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = _add(
        actions,
        "list",
        "show the refused reports with the API's answers, oldest first",
        _dead_list,
        "t23-middleware dead list",
    )
    listing.add_argument("--json", action="store_true", help="print JSON, for programs")
    retry = _add(
        actions,
        "retry",
        "send refused reports again, after the cause is fixed",
        _dead_retry,
        "t23-middleware dead retry 17 18",
    )
    purge = _add(
        actions,
        "purge",
        "delete refused reports; they count as lost",
        _dead_purge,
        "t23-middleware dead purge 17 18",
    )
    for action in (retry, purge):
        action.add_argument("ids", nargs="*", type=_id, metavar="ID", help="ids from 'dead list'")
        action.add_argument("--all", action="store_true", help="all refused reports")


def _id(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is not an id; 't23-middleware dead list' shows the ids")
    return int(word)


def _add_trial_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    standin = _add(
        commands,
        "standin",
        "run a local API that behaves as TwentyThree's documentation describes",
        _standin,
        "t23-middleware standin",
        "curl http://127.0.0.1:8023/_recorded",
    )
    standin.add_argument(
        "--port", type=int, default=None, help="port on 127.0.0.1 (default: 8023; 0: a free one)"
    )
    demo = _add(
        commands,
        "demo",
        "run a site, the relay and a stand-in API here, with a page about them",
        _demo,
        "t23-middleware demo --open",
        "t23-middleware demo --nginx",
    )
    demo.add_argument(
        "--port", type=int, default=0, help="port of the page on 127.0.0.1 (default: a free one)"
    )
    demo.add_argument("--open", action="store_true", help="open the page in the browser")
    demo.add_argument(
        "--nginx", action="store_true", help="put nginx before the site, and count from its log"
    )


def _run(arguments: argparse.Namespace) -> int:
    from .run import run

    run(arguments.words)


def _config(arguments: argparse.Namespace) -> int:
    from . import config

    if arguments.markdown:
        print(config.markdown())
        return SUCCESS
    settings = Settings()
    print("\n".join(config.lines(settings)))
    for warning in settings.warnings:
        _print_error(warning)
    return SUCCESS


def _relay(arguments: argparse.Namespace) -> int:
    from ..relay.process import AnotherRelay, run_relay
    from .logs import log_to_stderr
    from .owner import act_as_owner_of

    if arguments.once and arguments.json:
        raise UsageError("--json and --once can't be combined: --json is for a relay that keeps running")
    settings = _settings_with_site()
    act_as_owner_of(settings.state_path())
    if arguments.once:
        return _relay_once(settings)
    automatic = Settings.started_by_worker()
    log_to_stderr(machine=arguments.json)
    try:
        run_relay(settings, automatic=automatic)
    except AnotherRelay:
        if automatic:
            return SUCCESS  # another worker started a relay first
        raise UsageError(f"another relay works on {settings.state_path()}; stop it first") from None
    return SUCCESS


def _relay_once(settings: Settings) -> int:
    from .relay_once import run_once

    logging.basicConfig(level=logging.ERROR, format="t23-middleware: %(message)s")
    # The last printed line reports the state of the API, so these log lines would repeat it.
    logging.getLogger("t23_middleware.relay.delivery").setLevel(logging.CRITICAL)
    return run_once(settings)


def _check(arguments: argparse.Namespace) -> int:
    from .check import Trial, run_check

    if not arguments.send:
        if arguments.photo or arguments.session:
            raise UsageError("--photo and --session need --send, which sends a real report")
        return run_check()
    if not (arguments.photo or "").isdecimal() or not arguments.session:
        raise UsageError("--send needs a video and a session: --send --photo 7190971 --session me")
    return run_check(Trial(arguments.photo, arguments.session))


def _status(arguments: argparse.Namespace) -> int:
    from .status import run_status

    return run_status(_as_owner(), machine=arguments.json, watch=arguments.watch)


def _ingest(arguments: argparse.Namespace) -> int:
    from .ingest import run_ingest

    logging.basicConfig(level=logging.ERROR, format="t23-middleware: %(message)s")
    return run_ingest(_as_owner(), arguments.files)


def _dead_list(arguments: argparse.Namespace) -> int:
    from . import dead

    return dead.run_list(_as_owner(), machine=arguments.json)


def _dead_retry(arguments: argparse.Namespace) -> int:
    from . import dead

    ids = dead.selected_ids(arguments.ids, arguments.all, "t23-middleware dead retry 17 18")
    return dead.run_retry(_as_owner(), ids)


def _dead_purge(arguments: argparse.Namespace) -> int:
    from . import dead

    ids = dead.selected_ids(arguments.ids, arguments.all, "t23-middleware dead purge 17 18")
    return dead.run_purge(_as_owner(), ids)


def _as_owner() -> Settings:
    """Return the settings, after this process took the user id of the state folder's owner."""
    from .owner import act_as_owner_of

    settings = _settings_with_site()
    act_as_owner_of(settings.state_path())
    return settings


def _settings_with_site() -> Settings:
    """Return the settings. These commands need a site, also with ``T23_ENABLED=0``, where it may be missing."""
    settings = Settings()
    settings.refuse_without_site()
    return settings


def _standin(arguments: argparse.Namespace) -> int:
    from .standin import DEFAULT_PORT, run_standin

    return run_standin(port=DEFAULT_PORT if arguments.port is None else arguments.port)


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(port=arguments.port, open_browser=arguments.open, nginx=arguments.nginx)
