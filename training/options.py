"""The options of ee-train as TrainConfig, and a recipe's settings from NAME=VALUE words."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from offramp.runtime.errors import BadSetting

S = TypeVar("S")


class BadModel(ValueError):
    """Error for a model that cannot be loaded or has no adapter; the message names it and the cure."""


@dataclass(frozen=True)
class TrainConfig:
    """The options of ee-train, as training.json holds them; ee-train --help describes each.

    recipe: None for the default, which depends on the model. task: None for that of the model's head or, if
    it has none, of the data. settings: NAME=VALUE words of --set. Raises
    BadSetting unless exactly one of model and init is set.
    """

    model: str | None
    init: str | None
    data: str
    recipe: str | None
    out: Path
    exits: str
    pooling: str | None
    prefix: str
    max_length: int
    seed: int
    precision: str
    settings: tuple[str, ...]
    save_every: float
    text_column: str
    text_b_column: str
    label_column: str
    image_column: str = "image"
    image_size: int | None = None
    no_crop: bool = False
    augment: str = "none"
    head: str | None = None
    ensemble: bool | None = None
    balance: bool = False
    task: str | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.init is None):
            raise BadSetting("give one of --model (a backbone) and --init (a checkpoint to go on from)")

    @property
    def partial(self) -> Path:
        """The folder of the unfinished run, beside `out`."""
        return self.out.with_name(self.out.name + ".partial")

    def as_json(self) -> dict[str, Any]:
        """The options as a dictionary of JSON values."""
        # Through JSON and back, so that tuples compare equal with the lists that are read from a file.
        values: dict[str, Any] = json.loads(json.dumps({**dataclasses.asdict(self), "out": str(self.out)}))
        return values


def parse_settings(kind: type[S], words: tuple[str, ...]) -> S:
    """Parse NAME=VALUE words into a recipe's frozen settings, an instance of `kind`.

    Raises BadSetting that lists names and defaults.
    """
    assert dataclasses.is_dataclass(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in fields:
            known = ", ".join(f"{field.name}={field.default}" for field in fields.values())
            raise BadSetting(f"--set {word}: the recipe's settings are {known}")
        target: Any = type(fields[name].default)
        try:
            values[name] = _parse_bool(text) if target is bool else target(text)
        except ValueError as problem:
            raise BadSetting(f"--set {word}: expected {target.__name__}") from problem
    try:
        return kind(**values)
    except ValueError as problem:
        raise BadSetting(f"--set {' '.join(words)}: {problem}") from problem


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
