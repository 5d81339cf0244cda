"""Read JSON into frozen dataclasses and refuse unknown, missing and duplicate keys, wrong types and NaN.

Every ValueError names the field by its path, e.g. `manifest.segments[2].macs.token: expected a whole number,
found '7'`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any


def parse_json(text: str) -> Any:
    """Parse JSON text; raises ValueError for duplicate keys, NaN, infinities and very deep nesting."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except json.JSONDecodeError as problem:
        raise ValueError(f"not valid JSON: {problem}") from problem


def build_value(kind: Any, value: Any, where: str) -> Any:
    """Convert parsed JSON to a value of type `kind`: dataclass, str, int, float, tuple, dict, union or Any.

    where: path of the field for messages. Raises ValueError for a value of another type.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:  # only tuple[X, ...]
        _is(isinstance(value, (list, tuple)), where, "a list", value)
        return tuple(build_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:  # only dict[str, X]
        _is(isinstance(value, dict), where, "an object", value)
        return {name: build_value(arguments[1], item, f"{where}[{name!r}]") for name, item in value.items()}
    if origin in (types.UnionType, typing.Union) and type(None) in arguments:  # only X | None
        return None if value is None else build_value(arguments[0], value, where)
    if origin in (types.UnionType, typing.Union) and all(map(dataclasses.is_dataclass, arguments)):
        # The type that shares most keys with the value is used, and all of its keys are required.
        keys = set(value) if isinstance(value, dict) else set()
        shared = [len(keys & {field.name for field in dataclasses.fields(member)}) for member in arguments]
        return _record(arguments[shared.index(max(shared))], value, where)
    if origin in (types.UnionType, typing.Union):
        fits = [member for member in arguments if isinstance(value, member) and not isinstance(value, bool)]
        _is(bool(fits), where, " or ".join(member.__name__ for member in arguments), value)
        return value
    if kind is float:
        _is(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        return float(value)
    if kind is int:
        _is(isinstance(value, int) and not isinstance(value, bool), where, "a whole number", value)
        return value
    _is(isinstance(value, kind), where, "a string" if kind is str else kind.__name__, value)
    return value


def _record(kind: Any, value: Any, where: str) -> Any:
    _is(isinstance(value, dict), where, "an object", value)
    fields = _fields(kind)
    unknown = [name for name in value if name not in fields]
    if unknown:
        raise ValueError(f"{where}.{unknown[0]}: unknown key; known: {', '.join(fields)}")
    nothing = dataclasses.MISSING
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in value and field.default is nothing and field.default_factory is nothing
    ]
    if missing:
        raise ValueError(f"{where}.{missing[0]}: missing")
    present = {name: hint for name, hint in fields.items() if name in value}
    return kind(**{name: build_value(hint, value[name], f"{where}.{name}") for name, hint in present.items()})


@functools.cache  # a manifest has hundreds of objects of nine classes, and type hints are slow to get
def _fields(kind: Any) -> dict[str, Any]:
    """A dataclass's fields in order, with their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is(right: bool, where: str, expected: str, value: Any) -> None:
    if not right:
        raise ValueError(f"{where}: expected {expected}, found {str(value)[:60]!r}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name}: the key is there twice")
        result[name] = value
    return result


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that can be used")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large for a number")
    return value
