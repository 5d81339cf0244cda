"""Read JSON into frozen dataclasses and refuse unknown, missing and duplicate keys, wrong types and NaN.

Numbers that have no place in 64 bits, halves of surrogate pairs and values in values without end are refused,
too: what was read can be computed with, printed and written again.

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

_DEEPEST = 64  # values in values of a field of type Any
_MOST_DIGITS = 1000  # the field's own limit is lower, and its message names the field


def parse_json(text: str) -> Any:
    """Parse JSON text; raises ValueError for duplicate keys, NaN, infinities and very deep nesting."""
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except json.JSONDecodeError as problem:
        raise ValueError(f"not valid JSON: {problem}") from problem


def build_value(kind: Any, value: Any, where: str) -> Any:
    """Convert parsed JSON to a value of type `kind`: dataclass, str, int, float, tuple, dict, union or Any.

    where: path of the field for messages. Raises ValueError for a value of another type.
    """
    if kind is Any:
        _check_any(value, where)
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:  # only tuple[X, ...]
        _is(isinstance(value, (list, tuple)), where, "a list", value)
        return tuple(build_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:  # only dict[str, X]
        _is(isinstance(value, dict), where, "an object", value)
        for name in value:
            _check_text(name, where)
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
        return build_value(fits[0], value, where)
    if kind is float:
        _is(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where}: a whole number that is too large for a number") from None
    if kind is int:
        _is(isinstance(value, int) and not isinstance(value, bool), where, "a whole number", value)
        _check_int(value, where)
        return value
    _is(isinstance(value, kind), where, "a string" if kind is str else kind.__name__, value)
    if kind is str:
        _check_text(value, where)
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


def _check_int(value: int, where: str) -> None:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: a whole number of more than 64 bits")


def _check_text(value: str, where: str) -> None:
    """Raise ValueError for half of a surrogate pair: such text can be neither printed nor written."""
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{where}: half of a surrogate pair in {value!a:.60}") from None


def _check_any(value: Any, where: str) -> None:
    """Check the texts and the depth of a value of no certain type."""
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError(f"{where}: nested more than {_DEEPEST} deep")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item, where)
            elif isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, (list, tuple)):
                inner += item
        level, depth = inner, depth + 1


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


def _int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits, {digits[:20]}...")
    return int(digits)
