"""The README keeps its word."""

from __future__ import annotations

from t23_middleware.ops.config import markdown

from .harness import ROOT


def test_settings_table_matches_settings():
    """The settings table in the README is the one that the settings generate."""
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("<!-- settings -->\n")[2].partition("\n<!-- /settings -->")[0]
    assert table == markdown(), "write it anew: t23-middleware config --markdown"
