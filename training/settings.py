"""Recipe settings from NAME=VALUE words: a frozen dataclass a recipe, nothing hidden."""

from __future__ import annotations

import dataclasses
from typing import Any


class BadSetting(ValueError):
    """A setting that the recipe does not know or cannot take, or wishes that contradict each other."""


def settings_from(kind: Any, wishes: tuple[str, ...]) -> Any:
    """Build a recipe's frozen settings from NAME=VALUE words; raises BadSetting listing the names and
    defaults.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for word in wishes:
        name, equals, text = word.partition("=")
        if not equals or name not in fields:
            known = ", ".join(f"{field.name}={field.default}" for field in fields.values())
            raise BadSetting(f"--set {word}: {kind.__name__} knows {known}")
        target: Any = type(fields[name].default)
        try:
            values[name] = _truth(text) if target is bool else target(text)
        except ValueError as problem:
            raise BadSetting(f"--set {word}: expected {target.__name__}") from problem
    try:
        return kind(**values)
    except ValueError as problem:
        raise BadSetting(f"--set {' '.join(wishes)}: {problem}") from problem


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
