"""``t23-middleware``: the commands, their arguments and their exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from ..errors import ConfigurationError, T23Error, UsageError
from ..settings import Settings
from ..version import VERSION

#: Exit codes: done; the thing asked about is not so; used or configured wrongly.
DONE, NOT_SO, WRONG = 0, 1, 2

_EXAMPLES = """\
examples:
  t23-middleware demo
  T23_API_URL=https://video.example.com t23-middleware run gunicorn -w 4 video:app
  T23_API_URL=https://video.example.com t23-middleware config
  t23-middleware check
  t23-middleware status --watch
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (default: the process's own arguments); its exit code."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except ConfigurationError as error:
        for problem in error.problems:
            print(f"t23-middleware: {problem}", file=sys.stderr)
        return WRONG
    except UsageError as error:
        print(f"t23-middleware: {error}", file=sys.stderr)
        return WRONG
    except T23Error as error:
        print(f"t23-middleware: {error}", file=sys.stderr)
        return NOT_SO
    except BrokenPipeError:
        return DONE  # whoever read the output has seen enough
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="t23-middleware",
        description="Reports the video that a WSGI app streams to TwentyThree's analytics.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"t23-middleware {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    config = _add(commands, "config", "show every setting, its value and where it came from", _config)
    config.add_argument(
        "--markdown", action="store_true", help="the settings' meaning, as the README's table"
    )
    _add_check(commands)
    relay = _add(commands, "relay", "deliver reports in the foreground, as a service does", _relay)
    relay.add_argument(
        "--once",
        action="store_true",
        help="deliver what waits now, within 30 s, and end: 0 if nothing is left, 1 if the API refuses",
    )
    _add_status(commands)
    _add_dead(commands)
    standin = _add(commands, "standin", "a local API that behaves as the documentation says", _standin)
    standin.add_argument(
        "--port", type=int, default=None, help="port on 127.0.0.1 (default: 8023; 0: a free one)"
    )
    demo = _add(commands, "demo", "everything on this machine: play, and watch the reports arrive", _demo)
    demo.add_argument(
        "--port", type=int, default=0, help="port of the page on 127.0.0.1 (default: a free one)"
    )
    demo.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help: str,
    command: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = _add(commands, "run", "start a WSGI server's own command with the app wrapped", _run)
    run.epilog = "example: t23-middleware run gunicorn -w 4 video:app"
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND …", help="the server's command")


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = _add(commands, "check", "would plays be reported? what is wrong, and how to mend it", _check)
    check.add_argument("--send", action="store_true", help="send one real report, which TwentyThree counts")
    check.add_argument("--photo", metavar="ID", help="with --send: the video that it is of")
    check.add_argument("--session", metavar="ID", help="with --send: a session that TwentyThree knows")
    check.epilog = "example: t23-middleware check --send --photo 7190971 --session me"


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = _add(commands, "status", "what was captured, waits, was sent, was lost, and why", _status)
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--watch", action="store_true", help="again each 2 seconds, until Ctrl-C")


def _add_dead(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    dead = _add(commands, "dead", "the reports that the API refused for good, with its answer", _dead_list)
    dead.epilog = "example: t23-middleware dead retry 17 18"
    actions = dead.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = _add(actions, "list", "show them", _dead_list)
    listing.add_argument("--json", action="store_true", help="for programs")
    retry = _add(actions, "retry", "send them again, once what was refused is mended", _dead_retry)
    purge = _add(actions, "purge", "throw them away; they count as lost", _dead_purge)
    for action in (retry, purge):
        action.add_argument("ids", nargs="*", type=int, metavar="ID", help="as 'dead list' shows them")
        action.add_argument("--all", action="store_true", help="all of them")


def _run(arguments: argparse.Namespace) -> int:
    from .run import run

    run(arguments.words)


def _config(arguments: argparse.Namespace) -> int:
    from . import config

    if arguments.markdown:
        print(config.markdown())
        return DONE
    settings = Settings()
    print("\n".join(config.lines(settings)))
    for warning in settings.warnings:
        print(f"t23-middleware: {warning}", file=sys.stderr)
    return DONE


def _relay(arguments: argparse.Namespace) -> int:
    from ..relay.process import AnotherRelay, run_relay
    from .owner import act_as_owner_of

    settings = Settings()
    act_as_owner_of(settings.state_path())
    if arguments.once:
        return _relay_once(settings)
    automatic = Settings.started_by_worker()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run_relay(settings, automatic=automatic)
    except AnotherRelay:
        if automatic:
            return DONE  # a sibling of the worker that started us was faster
        raise UsageError(f"another relay works on {settings.state_path()}; stop it first") from None
    return DONE


def _relay_once(settings: Settings) -> int:
    from .relay_once import run_once

    logging.basicConfig(level=logging.ERROR, format="t23-middleware: %(message)s")
    # What it says of the API is for a relay that stays; here the last line says it.
    logging.getLogger("t23_middleware.relay.delivery").setLevel(logging.CRITICAL)
    return run_once(settings)


def _check(arguments: argparse.Namespace) -> int:
    from .check import Trial, run_check

    if not arguments.send:
        if arguments.photo or arguments.session:
            raise UsageError("--photo and --session go with --send, which sends a real report")
        return run_check()
    if not (arguments.photo or "").isdecimal() or not arguments.session:
        raise UsageError("--send needs a video and a session: --send --photo 7190971 --session me")
    return run_check(Trial(arguments.photo, arguments.session))


def _status(arguments: argparse.Namespace) -> int:
    from .status import run_status

    return run_status(_as_owner(), machine=arguments.json, watch=arguments.watch)


def _dead_list(arguments: argparse.Namespace) -> int:
    from . import dead

    return dead.run_list(_as_owner(), machine=arguments.json)


def _dead_retry(arguments: argparse.Namespace) -> int:
    from . import dead

    ids = dead.chosen(arguments.ids, arguments.all, "t23-middleware dead retry 17 18")
    return dead.run_retry(_as_owner(), ids)


def _dead_purge(arguments: argparse.Namespace) -> int:
    from . import dead

    ids = dead.chosen(arguments.ids, arguments.all, "t23-middleware dead purge 17 18")
    return dead.run_purge(_as_owner(), ids)


def _as_owner() -> Settings:
    """The settings, and this process as the owner of their state folder."""
    from .owner import act_as_owner_of

    settings = Settings()
    act_as_owner_of(settings.state_path())
    return settings


def _standin(arguments: argparse.Namespace) -> int:
    from .standin import DEFAULT_PORT, run_standin

    return run_standin(port=DEFAULT_PORT if arguments.port is None else arguments.port)


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(port=arguments.port, open_browser=arguments.open)
