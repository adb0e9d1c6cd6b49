"""State as compact JSON text: a dataclass is written as the list of its fields, and read back."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def _fields(value: Any) -> list[Any]:
    return [getattr(value, name) for name in value.__slots__]


dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_fields).encode


def loads(kind: type[T], text: str) -> T:
    """The dataclass *kind* that was written as *text*. Raises ValueError or TypeError for any other text."""
    value: T = _parsed(kind, json.loads(text))
    return value


def shift_times(state: Any, by_ns: int, latest_ns: int) -> None:
    """Add *by_ns* to each time in *state* (a field named ``…_ns``), up to *latest_ns*."""
    if isinstance(state, tuple):
        for each in state:
            shift_times(each, by_ns, latest_ns)
    elif is_dataclass(state):
        for field in fields(state):
            value = getattr(state, field.name)
            if not field.name.endswith("_ns"):
                shift_times(value, by_ns, latest_ns)
            elif value is not None:
                setattr(state, field.name, min(value + by_ns, latest_ns))


def _parsed(kind: Any, value: Any) -> Any:
    """*value* as the annotation *kind* wants it. Checked, since another version or damage may have changed the text."""
    if isinstance(kind, type) and is_dataclass(kind):
        # A field that an older version did not write gets its default, if it has one.
        kinds = _kinds(kind)
        return kind(*_each(kinds[: len(value)] if isinstance(value, list) else kinds, value))
    if isinstance(kind, UnionType):
        return None if value is None else _parsed(get_args(kind)[0], value)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return tuple(_each(kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds, value))
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} for {kind.__name__}")
    return value


def _each(kinds: tuple[Any, ...], values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError("not a list")
    return [_parsed(kind, value) for kind, value in zip(kinds, values, strict=True)]


@cache
def _kinds(kind: type) -> tuple[Any, ...]:
    return tuple(get_type_hints(kind).values())
