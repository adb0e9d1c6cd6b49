"""The README keeps its word."""

from __future__ import annotations

from t23_middleware.ops.config import markdown

from .harness import ROOT


def test_the_settings_table_is_what_the_settings_say():
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("<!-- settings -->\n")[2].partition("\n<!-- /settings -->")[0]
    assert table == markdown(), "write it anew: t23-middleware config --markdown"
