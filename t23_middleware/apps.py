"""Loads the WSGI app that a string such as ``video:app`` or ``video:create_app()`` names.

The forms are those of gunicorn (``gunicorn/util.py``, ``import_app``), waitress (``pkgutil.resolve_name``), uWSGI
(``wsgi-file``) and Flask (``flask/cli.py``, ``locate_app``), so that a server's own argument can be used.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from .errors import ConfigurationError
from .settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

FORMS = "write for example T23_APP=video:app, T23_APP='video:create_app()' or T23_APP=site/video.py:app"
#: The same for an app in a command of ``t23-middleware run``.
_RUN_FORMS = "write for example video:app, 'video:create_app()' or site/video.py:app"

#: Module or file, then the object in it; a path may contain colons and parentheses before its ``.py``.
_TARGET = re.compile(r"(?P<where>[^:(]*/.*?\.py|[^:(]+)(?::(?P<what>.+))?", re.DOTALL)

#: Default names of a module's app: that of WSGI servers first, then that of Flask.
_USUAL_NAMES = ("application", "app")
_FACTORY_NAMES = ("create_app", "make_app")


def find(target: str) -> WSGIApplication:
    """Return the app that *target* names: import its module, and call it if it is a factory.

    Raises :class:`~t23_middleware.errors.ConfigurationError` if there is no callable. Exceptions of the app's own module
    pass through.
    """
    where, what = _split(target)
    if _runs_in_flask_command():
        return _locate_with_flask(where, what)
    place = _load_file(where, target) if _is_file(where) else _import(where, what, target)
    found = _default_app(place, target) if what is None else _Expression(what, target).value_in(place)
    if not callable(found):
        _refuse(
            target,
            f"is {type(found).__name__!r} and can't be called",
            "write a WSGI application, or a call of its factory",
        )
    return cast("WSGIApplication", found)


def _split(target: str) -> tuple[str, str | None]:
    match = _TARGET.fullmatch(target.strip())
    if match is None:
        _refuse(target, "names no module", FORMS)
    where, what = match["where"].strip(), match["what"]
    if where == "t23_middleware.wsgi":
        _refuse(
            target,
            "names t23_middleware.wsgi itself",
            "write the app to wrap, for example video:app",
        )
    return where, what


def _refuse(target: str, wrong: str, remedy: str) -> NoReturn:
    # A factory's arguments may contain a password.
    shown = re.sub(r"\(.+", "(…)", target, flags=re.DOTALL)
    if target == Settings.named_by_run():
        remedy = _RUN_FORMS if remedy == FORMS else remedy.replace("T23_APP=", "")
        raise ConfigurationError([f"the app {shown} {wrong}; {remedy}"]) from None
    raise ConfigurationError([f"T23_APP={shown} {wrong}; {remedy}"]) from None


def _runs_in_flask_command() -> bool:
    """Whether this runs in ``flask run`` or another of Flask's commands, which accept only a Flask app."""
    click, cli = sys.modules.get("click"), sys.modules.get("flask.cli")
    if click is None or cli is None:
        return False
    context = click.get_current_context(silent=True)
    return context is not None and context.find_object(cli.ScriptInfo) is not None


def _locate_with_flask(where: str, what: str | None) -> WSGIApplication:
    from flask import cli

    return cli.locate_app(cli.prepare_import(where), what)


def _import(name: str, what: str | None, target: str) -> Any:
    """The module *name*; or, without a part after a colon, the object of ``video.app`` (waitress accepts this form)."""
    if not all(name.split(".")):  # '.video', 'video..app'
        _refuse(target, "names no module", FORMS)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # an import of the app's own module failed
        missing = error.name
    module, _, attribute = missing.rpartition(".")
    if what is None and hasattr(sys.modules.get(module), attribute):
        return _Expression(name[len(module) + 1 :], target).value_in(sys.modules[module])
    _refuse(
        target, f"can't be found: cannot import {missing!r}", "start in its folder or add that to PYTHONPATH"
    )


def _is_file(where: str) -> bool:
    return "/" in where or where.endswith(".py")


def _load_file(where: str, target: str) -> ModuleType:
    """The module in the file *where*, imported by its name with its folder on the search path, as in Flask."""
    path = _existing(Path(where), target)
    folder, name = _folder_and_name(path)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    if path.suffix == ".py":
        module = sys.modules.get(name) or (importlib.import_module(name) if _leads_to(name, path) else None)
        if module is not None and _same_file(getattr(module, "__file__", None), path):
            return module
    return _load_as(f"t23_file_{re.sub(r'[^0-9A-Za-z]', '_', str(path))}", path)


def _existing(path: Path, target: str) -> Path:
    for candidate in (path, Path(f"{path}.py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate.resolve()
    _refuse(
        target, f"can't be found: there is no file {str(path)!r} in {str(Path.cwd())!r}", "write its path"
    )


def _folder_and_name(path: Path) -> tuple[Path, str]:
    names = [] if path.name == "__init__.py" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").exists() and folder != folder.parent:
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(names)


def _leads_to(name: str, path: Path) -> bool:
    """Whether importing *name* loads *path*, and not for example the standard library's ``code``."""
    if not all(word.isidentifier() for word in name.split(".")):
        return False
    top = importlib.util.find_spec(name.partition(".")[0])
    return top is not None and top.origin is not None and Path(top.origin).resolve().parent in path.parents


def _same_file(file: str | None, path: Path) -> bool:
    return file is not None and Path(file).resolve() == path


def _load_as(name: str, path: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    loader = SourceFileLoader(name, str(path))  # for any suffix: mod_wsgi's and uWSGI's files end in .wsgi
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _default_app(place: Any, target: str) -> object:
    """The app of a module without a named attribute."""
    if not isinstance(place, ModuleType):
        return place
    for name in _USUAL_NAMES:
        if callable(getattr(place, name, None)):
            return getattr(place, name)
    return _flask_app_of(place, target)


def _flask_app_of(module: ModuleType, target: str) -> object:
    """The only Flask app in *module*, or the result of its ``create_app``."""
    wrong, remedy = (
        "names a module that has no 'application' and no 'app'",
        f"add the attribute: T23_APP={target}:NAME",
    )
    if "flask" not in sys.modules and not any(hasattr(module, name) for name in _FACTORY_NAMES):
        _refuse(target, wrong, remedy)
    try:
        from flask import cli
    except ImportError:
        _refuse(target, wrong, remedy)
    try:
        return cli.find_best_app(module)
    except cli.NoAppException:
        _refuse(target, wrong, remedy)


class _Expression:
    """The part after the colon: a dotted name, or a call of one with literal arguments."""

    def __init__(self, text: str, target: str) -> None:
        self._target = target
        try:
            body = ast.parse(text.strip(), mode="eval").body
            self._is_call = isinstance(body, ast.Call)
            self._names = _dotted(body.func if isinstance(body, ast.Call) else body)
            self._args, self._kwargs = _literals(body) if isinstance(body, ast.Call) else ([], {})
        except (SyntaxError, ValueError):
            _refuse(target, "is not an attribute, and not a call with literal arguments", FORMS)

    def value_in(self, place: Any) -> object:
        """The object in *place*, called if it is a factory."""
        found = place
        for name in self._names:
            found = self._attribute(found, name)
        if self._is_call or _is_factory(found):
            return self._call(found)
        return found

    def _attribute(self, place: object, name: str) -> Any:
        try:
            return getattr(place, name)
        except AttributeError:
            where = getattr(place, "__name__", type(place).__name__)
            _refuse(self._target, f"can't be found: {where!r} has no attribute {name!r}", "correct the name")

    def _call(self, factory: Any) -> object:
        if not callable(factory):
            _refuse(
                self._target,
                f"calls {'.'.join(self._names)!r}, which can't be called",
                "leave out the parentheses",
            )
        if not _takes(factory, *self._args, **self._kwargs):
            _refuse(self._target, "passes arguments that the factory does not accept", "correct them")
        return factory(*self._args, **self._kwargs)


def _dotted(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    if isinstance(node, ast.Name):
        return [node.id]
    raise ValueError("not a dotted name")


def _literals(call: ast.Call) -> tuple[list[Any], dict[str, Any]]:
    if any(word.arg is None for word in call.keywords):
        raise ValueError("**arguments are not literals")
    args = [ast.literal_eval(arg) for arg in call.args]
    return args, {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


def _is_factory(found: object) -> bool:
    """Whether *found* is a function that returns an app: ``video:create_app``, a form of ``flask --app``."""
    if not inspect.isfunction(found) or not _takes(found):
        return False
    return found.__name__ in _FACTORY_NAMES or not _takes(found, {}, None)


def _takes(function: Any, *args: object, **kwargs: object) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True
