"""The settings in text form: with values for the terminal, with their meaning for the README."""

from __future__ import annotations

from collections.abc import Iterator

from ..settings import Settings, as_text, setting_fields, variable
from ..state import StateFolder


def lines(settings: Settings) -> Iterator[str]:
    """Each setting with its value and source, then the state folder."""
    width = max(len(variable(setting)) for setting in setting_fields())
    for setting in setting_fields():
        source = settings.sources[setting.name]
        shown = as_text(getattr(settings, setting.name))
        if setting.metadata["secret"] and shown:
            shown = "(set, not shown)"
        yield f"{variable(setting):{width}}  {shown or '(none)'}  [{source}]"
    if not settings.enabled:
        yield "\nT23_ENABLED=0: nothing is counted."
    yield f"\n{_place(settings)}"


def _place(settings: Settings) -> str:
    if settings.api_url is None and settings.state_dir is None:
        return "The state folder is named after the site in T23_API_URL, which is not set."
    return f"The state folder for this user is {StateFolder(settings.state_path()).path}"


def markdown() -> str:
    """The README's table: variable, default and meaning."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for setting in setting_fields():
        default = f"`{as_text(setting.default)}`" if as_text(setting.default) else "none"
        if setting.name == "api_url":
            default = "required"
        rows.append(f"| `{variable(setting)}` | {default} | {setting.metadata['help']} |")
    return "\n".join(rows)
