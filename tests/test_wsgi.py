"""The entrance without code, ``t23_middleware.wsgi``, and the forms that ``T23_APP`` takes."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from wsgiref.util import setup_testing_defaults

import flask
import pytest

from t23_middleware import ConfigurationError, T23Middleware

VIDEO = """
    def _app(name):
        def app(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [f"{name} seen={'t23.seen' in environ}".encode()]
        return app

    application = _app("application")
    other = _app("other")

    class site:
        wsgi = staticmethod(_app("site.wsgi"))

        @staticmethod
        def create(*args, **kwargs):
            return _app(f"site.create{args}{kwargs}")

    def create(*args, **kwargs):
        return _app(f"created{args}{kwargs}")

    def create_app(config=None, debug=False):
        return _app("create_app")

    def strict(one):
        return _app(one)

    def broken():
        raise TypeError("the factory's own")

    number = 7
"""

FLASK_VIDEO = """
    import flask

    def create_app(name="made"):
        site = flask.Flask(name)

        @site.get("/")
        def home():
            return f"{name} seen={'t23.seen' in flask.request.environ}"

        return site
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module into a folder on the search path; it and its kind are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return path

    yield write_file
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("T23_API_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("T23_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("T23_RELAY", "off")
    monkeypatch.delenv("T23_APP", raising=False)
    monkeypatch.delenv("T23_ENABLED", raising=False)


@pytest.fixture
def entrance(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Imports ``t23_middleware.wsgi`` anew, with ``T23_APP`` set where one is given."""

    def import_it(app: str | None = None) -> ModuleType:
        if app is not None:
            monkeypatch.setenv("T23_APP", app)
        monkeypatch.delitem(sys.modules, "t23_middleware.wsgi", raising=False)
        return importlib.import_module("t23_middleware.wsgi")

    return import_it


def ask(app: Any) -> str:
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    body = app(environ, lambda status, headers, exc_info=None: lambda data: None)
    try:
        return b"".join(body).decode()
    finally:
        if hasattr(body, "close"):
            body.close()


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ("video:application", "application"),
        ("video:other", "other"),
        (" video:other ", "other"),
        ("video:site.wsgi", "site.wsgi"),
        ("video:create()", "created(){}"),
        ("video:create('a:b', key=1)", "created('a:b',){'key': 1}"),
        ('video:site.create("x.py:y")', "site.create('x.py:y',){}"),
        ("video:create_app", "create_app"),
        ("video", "application"),
        ("video.other", "other"),
        ("video.site.wsgi", "site.wsgi"),
        ("video.py", "application"),
        ("video.py:other", "other"),
        ("./video:other", "other"),
        ("films/late.wsgi:application", "late"),
        ("films/code.py:application", "code"),
        ("./a:b(c)/odd.py:other", "other"),
        ("shop/site/wsgi.py:name", "shop.site.wsgi"),
        ("shop/site/:application", "shop.site"),
    ],
)
def test_t23_app_forms_are_wrapped(
    write: Write, entrance: Callable[..., ModuleType], target: str, answer: str
) -> None:
    """Every form of T23_APP finds its app and wraps it."""
    write("video.py", VIDEO)
    write("films/late.wsgi", VIDEO + "\n    application = _app('late')")
    write("films/code.py", VIDEO + "\n    application = _app('code')")
    write("a:b(c)/odd.py", VIDEO)
    write("shop/__init__.py", "")
    write("shop/site/__init__.py", VIDEO + "\n    application = _app(__name__)")
    write("shop/site/wsgi.py", VIDEO + "\n    name = _app(__name__)")

    module = entrance(target)

    assert ask(vars(module)["application"]) == f"{answer} seen=True"
    assert isinstance(module.application, T23Middleware)
    assert ask(module.load(target)) == f"{answer} seen=True"


def test_file_imports_neighbouring_modules(write: Write, entrance: Callable[..., ModuleType]) -> None:
    """An app given as a file can import the modules in the same folder."""
    write("films/neighbour_of_late.py", VIDEO)
    path = write("films/late_too.py", "from neighbour_of_late import other as app")

    assert ask(entrance(f"{path}:app").application) == "other seen=True"


def test_app_attribute_without_application(write: Write, entrance: Callable[..., ModuleType]) -> None:
    """The attribute ``app`` is taken if the module has no ``application``."""
    write("plain.py", VIDEO.replace("application =", "app ="))

    assert ask(entrance("plain").application) == "application seen=True"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere:app", "cannot import 'nowhere'"),
        ("video.nowhere:app", "cannot import 'video.nowhere'"),
        ("video.nowhere", "cannot import 'video.nowhere'"),
        ("nowhere.py:app", "no file 'nowhere.py'"),
        ("films/nowhere:app", "no file 'films/nowhere'"),
        ("video:nothing", "'video' has no attribute 'nothing'"),
        ("video:site.nothing", "'site' has no attribute 'nothing'"),
        ("video:nothing()", "'video' has no attribute 'nothing'"),
        ("video:number", "'int' and can't be called"),
        ("video:number()", "can't be called"),
        ("video:strict()", "arguments that the factory does not accept"),
        ("video:create(open('x'))", "not a call with literal arguments"),
        ("video:create(**{'key': 1})", "not a call with literal arguments"),
        ("video:create(", "not a call with literal arguments"),
        ("video:1 + 1", "not a call with literal arguments"),
        (":app", "names no module"),
        ("video..other", "names no module"),
        (".video:other", "names no module"),
        ("t23_middleware.wsgi:application", "names t23_middleware.wsgi itself"),
        ("empty", "no 'application' and no 'app'"),
        ("empty_factory", "no 'application' and no 'app'"),
    ],
)
def test_app_not_found_error(
    write: Write, entrance: Callable[..., ModuleType], target: str, words: str
) -> None:
    """An app that can't be found is reported in one sentence with its remedy."""
    write("video.py", VIDEO)
    write("empty.py", "")
    write("empty_factory.py", "def create_app(): return None")

    with pytest.raises(ConfigurationError) as told:
        entrance(target)

    (problem,) = told.value.problems
    assert problem.startswith("T23_APP=")
    assert words in problem
    assert "; " in problem


@pytest.mark.parametrize("target", ["nowhere:app", "video:nothing", "video..other", "empty"])
def test_run_error_does_not_name_t23_app(
    write: Write, entrance: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """If the app of the ``run`` command is not found, the error does not name T23_APP, which the user did not set."""
    write("video.py", VIDEO)
    write("empty.py", "")
    monkeypatch.setenv("_T23_NAMED_BY_RUN", target)

    with pytest.raises(ConfigurationError) as told:
        entrance(target)

    (problem,) = told.value.problems
    assert problem.startswith(f"the app {target} ")
    assert "T23_APP" not in problem


def test_a_factorys_arguments_are_not_told(write: Write, entrance: Callable[..., ModuleType]) -> None:
    write("video.py", VIDEO)

    with pytest.raises(ConfigurationError) as told:
        entrance("video:strict('hunter2', 2)")

    assert "hunter2" not in str(told.value)


def test_apps_import_error_passes_through(write: Write, entrance: Callable[..., ModuleType]) -> None:
    """The import error of a module that the app itself misses passes through with its own traceback."""
    path = write("lacking.py", "import not_installed_anywhere")

    for target in ("lacking:app", "lacking.py:app", "lacking"):
        with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere") as told:
            entrance(target)
        assert any(frame.filename == str(path) for frame in traceback.extract_tb(told.value.__traceback__))


def test_an_error_inside_a_factory_comes_through(write: Write, entrance: Callable[..., ModuleType]) -> None:
    write("video.py", VIDEO)

    with pytest.raises(TypeError, match="the factory's own"):
        entrance("video:broken()")


def test_import_without_t23_app(
    entrance: Callable[..., ModuleType],
) -> None:
    """Without T23_APP, the module imports without an error; only access to ``application`` fails."""
    module = entrance()

    assert "application" not in vars(module)
    with pytest.raises(ConfigurationError, match="T23_APP is not set; write for example T23_APP=video:app"):
        _ = module.application
    with pytest.raises(ConfigurationError, match="T23_APP is not set"):
        module.load()
    with pytest.raises(AttributeError, match="no attribute 'app'"):
        _ = module.app


def test_t23_app_set_after_import(
    write: Write, entrance: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T23_APP is found even if it is set after the import."""
    write("video.py", VIDEO)
    module = entrance()
    monkeypatch.setenv("T23_APP", "video:other")

    assert ask(module.application) == "other seen=True"
    assert module.application is module.application


def test_disabled_returns_bare_app(
    write: Write, entrance: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With T23_ENABLED=0, the app comes back unwrapped."""
    write("video.py", VIDEO)
    monkeypatch.setenv("T23_ENABLED", "0")

    assert ask(entrance("video:other").application) == "other seen=False"


def test_wrong_settings_leave_app_running(
    write: Write,
    entrance: Callable[..., ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With wrong settings, the app runs unwrapped and one error is logged."""
    write("video.py", VIDEO)
    monkeypatch.setenv("T23_API_URL", "no address")

    assert ask(entrance("video:other").application) == "other seen=False"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("target", ["films:site", "films:create_app()", "films:create_app", "films"])
def test_flask_app_keeps_its_type(write: Write, entrance: Callable[..., ModuleType], target: str) -> None:
    """A Flask app comes back as itself, with its ``wsgi_app`` wrapped."""
    write("films.py", FLASK_VIDEO + ("\n    site = create_app()" if target == "films:site" else ""))

    application = entrance(target).application

    assert isinstance(application, flask.Flask)
    assert isinstance(application.wsgi_app, T23Middleware)
    assert application.test_client().get("/").text == "made seen=True"


def test_wrapping_twice_changes_nothing(write: Write, entrance: Callable[..., ModuleType]) -> None:
    write("films.py", FLASK_VIDEO + "\n    site = create_app()")
    write("video.py", VIDEO)
    load = entrance().load

    flask_app, plain = load("films:site"), load("video:other")

    inner = flask_app.wsgi_app
    assert load(flask_app) is flask_app
    assert flask_app.wsgi_app is inner
    assert load(plain) is plain


def test_plain_app_imports_no_flask(write: Write) -> None:
    """An app that is not a Flask app never makes the middleware import Flask."""
    write("video.py", VIDEO)
    code = "import sys; from t23_middleware.wsgi import application; sys.exit('flask' in sys.modules)"  # 1 if it was

    for target in ("video", "video:other", "video:create()"):
        package = str(Path(importlib.import_module("t23_middleware").__path__[0]).parent)
        environ = {"T23_APP": target, "PYTHONPATH": package, "T23_API_URL": "http://127.0.0.1:9"}
        assert (
            subprocess.run([sys.executable, "-c", code], env=environ, timeout=60, check=False).returncode == 0
        )


def test_pastedeploy_uses_file_settings(
    write: Write, entrance: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PasteDeploy wraps the app with the settings in its own file."""
    loadwsgi = pytest.importorskip("paste.deploy.loadwsgi")
    monkeypatch.delenv("T23_API_URL")
    entrance()
    write("video.py", VIDEO + "\n    def paste_app(global_conf, **local_conf):\n        return other")
    ini = write(
        "site.ini",
        """
        [pipeline:main]
        pipeline = t23 app

        [filter:t23]
        paste.filter_app_factory = t23_middleware.wsgi:filter_app_factory
        api_url = http://127.0.0.1:9
        relay = off

        [app:app]
        paste.app_factory = video:paste_app
        """,
    )

    assert ask(loadwsgi.loadapp(f"config:{ini}")) == "other seen=True"
