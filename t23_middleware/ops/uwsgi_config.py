"""Which app a uWSGI command line loads, together with the ini files that it names.

uWSGI first collects all options: ``UWSGI_…`` variables, then the command line (each ``--ini`` is read at its place),
then positional files. The last value of an option is used (``core/init.c``, ``uwsgi_commandline_config``). If two apps
have the same mount point, the one that is loaded first is used; ``module`` is loaded before ``wsgi-file``
(``plugins/python/python_plugin.c``, ``uwsgi_python_init_apps``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError

#: Options that name the app -> the common name that this module uses for them.
_APP_OPTIONS = {
    "module": "module",
    "wsgi": "module",
    "wsgi-file": "wsgi-file",
    "file": "wsgi-file",
    "callable": "callable",
}
#: Options that read an ini file at their place.
_INI_OPTIONS = ("ini", "include")
#: Options that load apps in a way that one wrapped module can't replace, or that uWSGI reads after all others.
_UNSUPPORTED = {
    **dict.fromkeys(("emperor", "zerg", "vassals-inherit"), "starts other instances"),
    **dict.fromkeys(("mount", "worker-mount"), "loads apps by mount point"),
    **dict.fromkeys(("paste", "ini-paste", "ini-paste-logged"), "loads a PasteDeploy file"),
    **dict.fromkeys(
        ("eval", "pecan", "web3", "pump", "wsgi-lite", "python-raw"), "loads an app that is not a WSGI module"
    ),
    **dict.fromkeys(("xml", "yaml", "yml", "json", "js", "config", "config-py"), "is not an ini file"),
    **dict.fromkeys(("inherit", "declare-option", "declare-option2"), "is read after the command line"),
    "python-worker-override": "replaces the worker",
}
_RELEVANT = {*_APP_OPTIONS, *_INI_OPTIONS, *_UNSUPPORTED}
_SHORT = {"w": "module", "x": "xml", "y": "yaml", "j": "json"}
_CONFIG_FILE = re.compile(r".*\.(ini|xml|ya?ml|json|js)", re.DOTALL)
#: Flags without a value that often come directly before a positional file. After any other option the file could be
#: that option's value.
_FLAG = re.compile(
    "master|enable-threads|lazy|lazy-apps|need-app|vacuum|die-on-term|single-interpreter|strict|thunder-lock|"
    "disable-logging|no-orphans|auto-procname|memory-report|http-keepalive|http-auto-chunked|enable-metrics|"
    "py-call-osafterfork|py-call-uwsgi-fork-hooks|wsgi-disable-file-wrapper|show-config|log-master|"
    "harakiri-verbose|manage-script-name|honour-stdin|skip-atexit|ignore-sigpipe|ignore-write-errors|"
    "disable-write-exception|so-keepalive|tcp-nodelay|[MCTLimacr]"
)
#: ``%d`` and ``%(…)``, ``$(…)``, ``@(…)``: uWSGI replaces these with other text.
_PLACEHOLDER = re.compile(r"%|[$@]\(")
#: Options that make others conditional (``core/uwsgi.c``, "opt logic").
_CONDITIONAL = re.compile(r"if(-.*|[a-z]*)|for(-glob|-times|-readline)?|end-?(if|for)?")


@dataclass
class Loaded:
    """What uWSGI would load according to its options."""

    #: The last value of each of ``module``, ``wsgi-file`` and ``callable``.
    options: dict[str, str] = field(default_factory=dict)
    #: Options whose last value only uWSGI can determine -> the reason.
    unknown: dict[str, str] = field(default_factory=dict)
    #: The command line without its positional configuration files.
    arguments: list[str] = field(default_factory=list)
    #: The positional configuration files. uWSGI reads them after all options.
    positional: list[str] = field(default_factory=list)

    def target(self) -> str | None:
        """The app in the form of ``T23_APP``, or None if no option names one.

        Raises :class:`~t23_middleware.errors.UsageError` if only uWSGI can determine it.
        """
        for name in self._options_that_count():
            if name in self.unknown:
                raise UsageError(
                    f"uwsgi: {self.unknown[name]}; write --ini FILE, and after it --module video:app"
                )
        attribute = self.options.get("callable", "application")
        if "module" in self.options:
            module = self.options["module"]
            return module if ":" in module else f"{module}:{attribute}"
        if "wsgi-file" in self.options:
            file = self.options["wsgi-file"]
            return f"{file}:{attribute}" if "/" in file or file.endswith(".py") else f"./{file}:{attribute}"
        return None

    def _options_that_count(self) -> tuple[str, ...]:
        if "module" in self.options:
            return ("module",) if ":" in self.options["module"] else ("module", "callable")
        return ("wsgi-file", "callable")


def read(arguments: Sequence[str], environ: Mapping[str, str], cwd: Path) -> Loaded:
    """What ``uwsgi *arguments*`` would load. Reads ini files, executes nothing.

    Raises :class:`~t23_middleware.errors.UsageError` if that can't be determined without uWSGI.
    """
    loaded = Loaded()
    for name, value in [*_from_environment(environ), *_from_command_line(arguments, loaded)]:
        _apply(loaded, name, value, cwd)
    for file in loaded.positional:
        _apply(loaded, file.rpartition(".")[2], file, cwd)
    return loaded


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for variable, value in environ.items():
        name = variable.removeprefix("UWSGI_").lower().replace("_", "-")
        if variable.startswith("UWSGI_") and name in _RELEVANT:
            yield name, value


def _from_command_line(arguments: Sequence[str], loaded: Loaded) -> list[tuple[str, str]]:
    """The options in *arguments* that can name the app. Adds each of *arguments* to the right list of *loaded*."""
    found = []
    words = iter(arguments)
    before = ""  # the option before the word, whose value the word could be
    for word in words:
        if _is_positional(word, before):
            loaded.positional.append(word)
            before = ""
            continue
        loaded.arguments.append(word)
        name, value = _as_option(word)
        before = name if value is None else ""
        if name in _RELEVANT:
            if value is None:
                value = next(words, "")
                loaded.arguments.append(value)
            found.append((name, value))
            before = ""
    return found


def _as_option(word: str) -> tuple[str, str | None]:
    """Name and value of ``--name=value``, ``--name``, ``-wvalue`` or ``-w``; ``("", None)`` for any other word."""
    if word == "--":
        raise UsageError("uwsgi reads what follows '--' after all options; write --ini FILE instead")
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        return name, value if equals else None
    if word.startswith("-") and len(word) > 1:
        return _SHORT.get(word[1], word[1:]), word[2:] or None
    return "", None


def _is_positional(word: str, before: str) -> bool:
    """Whether *word* is a positional configuration file."""
    if word.startswith("-") or not _CONFIG_FILE.fullmatch(word):
        return False
    if before and not _FLAG.fullmatch(before):
        raise UsageError(
            f"uwsgi: {word!r} may be a configuration file or the value of {before!r}; "
            f"write --ini {word}, or --{before}={word}"
        )
    return True


def _apply(loaded: Loaded, name: str, value: str, cwd: Path, *, within: str = "", depth: int = 0) -> None:
    """Add one option to *loaded*; *within* describes the condition that it depends on, if any."""
    uncertainty = f"{name} = {value} {within}" if within else _uncertainty(name, value)
    if name in _APP_OPTIONS:
        loaded.options[_APP_OPTIONS[name]] = value
        loaded.unknown.pop(_APP_OPTIONS[name], None)
        if uncertainty:
            loaded.unknown[_APP_OPTIONS[name]] = uncertainty
    elif name in _UNSUPPORTED:
        raise UsageError(_with_remedy(f"uwsgi: {name} = {value} {_UNSUPPORTED[name]}"))
    elif uncertainty:
        raise UsageError(_with_remedy(f"uwsgi: {uncertainty}"))
    else:
        _apply_ini(loaded, value, cwd, depth)


def _uncertainty(name: str, value: str) -> str:
    if _PLACEHOLDER.search(value):
        return f"{name} = {value} contains a placeholder that only uWSGI can replace"
    if name == "include" and not re.search(r"\.ini(:[^/]*)?$|^:", value):
        return f"{name} = {value} is not an ini file"
    return ""


def _with_remedy(wrong: str) -> str:
    return (
        f"{wrong}; write 'module = t23_middleware.wsgi:application' in the instance's own configuration, "
        "with 'env = T23_APP=video:app' before it, and start uwsgi without 't23-middleware run'"
    )


def _apply_ini(loaded: Loaded, spec: str, cwd: Path, depth: int) -> None:
    """Add the options of the ini file *spec*: ``path`` or ``path:section``."""
    path, section = spec.rsplit(":", 1) if ":" in spec else (spec, "")
    file = cwd / path
    if depth > 8:
        raise UsageError(
            f"uwsgi: {spec!r}: ini files include each other in a circle; name the app with --module"
        )
    for name, value, within in _ini_options(_text_of(file), section or "uwsgi", spec):
        whole = f"{path}{value}" if name in _INI_OPTIONS and value.startswith(":") else value
        _apply(loaded, name, whole, cwd, within=within, depth=depth + 1)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(errors="surrogateescape")
    except OSError as error:
        raise UsageError(
            f"uwsgi: can't read {str(file)!r} ({error.strerror}); write the path of an ini file"
        ) from None


def _ini_options(text: str, section: str, spec: str) -> Iterator[tuple[str, str, str]]:
    """Name, value and condition of one section's options that can name the app.

    Same rules as ``core/ini.c``: keys may repeat, a value ends with its line.
    """
    condition = ""
    for name, value in _ini_lines(text, section):
        if _CONDITIONAL.fullmatch(name):
            condition = "" if name.startswith("end") else name
        elif name in _RELEVANT:
            yield name, value, f"in {spec} depends on '{condition}'" if condition else ""
    if condition:
        raise UsageError(
            f"uwsgi: '{condition}' in {spec} has no end; write a line 'end =' after the options that depend on it"
        )


def _ini_lines(text: str, wanted: str) -> Iterator[tuple[str, str]]:
    section = ""
    for line in (line.strip(" \t\r") for line in text.split("\n")):
        if line.startswith("["):
            section = line[1:-1]
        elif line and line[0] not in ";#" and section == wanted:
            name, _, value = line.partition("=")
            yield name.rstrip(" \t\r"), value.strip(" \t\r")
