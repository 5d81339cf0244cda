"""What ee-compare compares: recipe specs, the folders of their models, and the models from which they start.

A spec is NAME[:SETTING=VALUE[,SETTING=VALUE]], such as joint or joint:distill=0.5,weights=uniform. Options of
ee-train are given with their dashes, as in joint:--pooling=attention. One setting may have several values,
consistentee:alpha=0.01|0.02|0.03: one model is trained for each, and they form one curve.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from offramp.runtime.errors import BadSetting
from offramp.training.recipes import RECIPES

SEPARATOR = "|"  # between the values of a setting for which one model each is trained
INIT = "--init="  # in a spec: the spec of the checkpoint to start from, or "none"

_CONSISTENTEE = "consistentee:alpha=0.01|0.02|0.03|0.05|0.08"


@dataclass(frozen=True)
class Preset:
    """Options of ee-compare under one name; fields are as the options, `more` the arguments after --."""

    recipes: str
    rules: str
    reference: str
    seeds: int = 3
    settings: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


PRESETS = {
    # Recipe consistentee has two epochs of warm start and two in which everything is trained: all others,
    # and the ablation without the latter, have four, and its batch, learning rates and pooling.
    "paper": Preset(
        f"joint:epochs=4 {_CONSISTENTEE} {_CONSISTENTEE},hardness=false "
        f"{_CONSISTENTEE},stage3=false,epochs=4 consistentee:actions=oracle deebert:epochs=4 berxit:epochs=4",
        "max_probability,entropy,patience",
        "joint:epochs=4 + max_probability",
        settings=("batch_size=16", "lr=2e-5", "heads_lr=2e-5", "warmup=0.0", "weight_decay=0.0"),
        more=("--pooling", "cls"),
    ),
    "exits": Preset(
        "joint joint:weights=uniform joint:weights=descending joint:weights=learned "
        "joint:gradient=equilibrium joint:gradient=next_exit joint:distill=0.5 joint:plain_epochs=2 "
        "joint:--pooling=attention joint:--head=mlp joint:--ensemble offramp deebert",
        "max_probability",
        "joint + max_probability",
    ),
}


@dataclass(frozen=True)
class ModelSpec:
    """One model: recipe, settings NAME=VALUE, options --NAME=VALUE of ee-train.

    init: the spec of the checkpoint from which it starts, "none" for the pretrained backbone, or None: where
    the recipe starts.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    init: str | None = None

    @property
    def label(self) -> str:
        """The spec as text."""
        init = () if self.init is None else (INIT + self.init,)
        words = ",".join((*self.settings, *self.options, *init))
        return f"{self.recipe}:{words}" if words else self.recipe

    def folder(self, out: Path, seed: int) -> Path:
        """The folder of the model's checkpoint."""
        return out / f"{safe_name(self.label)}_{seed}"


@dataclass(frozen=True)
class RecipeSpec:
    """One spec of --recipes: its text, and one model for each value of the setting that has several."""

    text: str
    models: tuple[ModelSpec, ...]


@dataclass(frozen=True)
class CommonWords:
    """The arguments of ee-train that all models have.

    more: those that belong to --model. options: others, without settings. settings: NAME=VALUE words.
    """

    model: str
    data: str
    more: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @cached_property
    def named(self) -> set[str]:
        """The options of ee-train in `more`, such as --pooling."""
        return {word.partition("=")[0] for word in self.more if word.startswith("--")}


def safe_name(text: str) -> str:
    """A text as the name of a file: other texts have other names.

    Letters, digits and . = _ stay, separators become dashes; where more is replaced, six hex digits of the
    text's sha256 are added.
    """
    plain = re.sub(r"[:,|]-*| \+ ", lambda match: "+" if match[0] == " + " else "-", text)
    safe = re.sub(r"[^A-Za-z0-9.=_+-]", "_", plain)
    if safe != plain or len(safe) > 120:
        return f"{safe[:110]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return safe


def parse_specs(text: str) -> list[RecipeSpec]:
    """Parse specs that are separated by blanks, or by commas before the name of a recipe.

    Raises BadSetting for an unknown recipe, a word that is no setting, or two settings with several values.
    """
    specs: list[list[str]] = []  # name, words
    for blank in text.split():
        for number, piece in enumerate(blank.split(",")):
            name, colon, word = piece.partition(":")
            if name in RECIPES and "=" not in name:
                specs.append([name, *([word] if colon else [])])
            elif number == 0 or len(specs[-1]) == 1:
                raise BadSetting(f"--recipes: {name!r} is not known; choose among {', '.join(RECIPES)}")
            elif "=" in piece or piece.startswith("--"):
                specs[-1].append(piece)
            else:  # a comma inside of a value, such as variants=fp32,int8
                specs[-1][-1] += f",{piece}"
    parsed = [_parse_spec(name, words) for name, *words in specs]
    return list({spec.text: spec for spec in parsed}.values())


def _parse_spec(name: str, words: Sequence[str]) -> RecipeSpec:
    several = [word for word in words if SEPARATOR in word]
    if len(several) > 1:
        raise BadSetting(f"--recipes {name}: two settings with several values, {' and '.join(several)}")
    for word in words:
        if "=" not in word and not word.startswith("--"):
            raise BadSetting(f"--recipes {name}: {word!r} is neither SETTING=VALUE nor --OPTION=VALUE")
    variants: list[list[str]] = [list(words)]
    for word in several:
        key, _, values = word.partition("=")
        choices = list(dict.fromkeys(values.split(SEPARATOR)))
        variants = [[f"{key}={value}" if w == word else w for w in words] for value in choices]
    models = []
    for variant in variants:
        init = next((word.removeprefix(INIT) for word in variant if word.startswith(INIT)), None)
        options = tuple(w for w in variant if w.startswith("--") and not w.startswith(INIT))
        models.append(ModelSpec(name, tuple(w for w in variant if not w.startswith("--")), options, init))
    return RecipeSpec(f"{name}:{','.join(words)}" if words else name, tuple(models))


def start_of(model: ModelSpec, common: CommonWords) -> ModelSpec | None:
    """The model from whose checkpoint this one starts; None if it starts from the pretrained backbone.

    It is the recipe's STARTS_FROM with the settings of the joint training (epochs, lr and so on) and the
    parts of exits that this model's own first phase would have, so that models with the same share it.
    Raises BadSetting for a wrong setting.
    """
    from offramp.training.options import parse_settings
    from offramp.training.recipes import load_recipe
    from offramp.training.recipes.joint import JointSettings

    recipe: Any = load_recipe(model.recipe)
    if recipe.KIND != "classifier":
        raise BadSetting(f"--recipes: {model.recipe} trains language models, which are not compared")
    model_settings = parse_settings(recipe.SETTINGS, (*common.settings, *model.settings))
    if model.init is not None:
        if model.init == "none":
            return None
        (spec,) = parse_specs(model.init)
        return spec.models[0]
    if recipe.STARTS_FROM is None:
        return None
    start: Any = load_recipe(recipe.STARTS_FROM)
    default = parse_settings(start.SETTINGS, common.settings)
    names = [field.name for field in dataclasses.fields(JointSettings) if hasattr(model_settings, field.name)]
    names = [name for name in names if hasattr(default, name)]
    settings = tuple(
        f"{name}={getattr(model_settings, name)}"
        for name in names
        if getattr(model_settings, name) != getattr(default, name)
    )
    parts = recipe.parts_of(model_settings)
    other = start.parts_of(parse_settings(start.SETTINGS, (*common.settings, *settings)))
    known = common.named | {option.partition("=")[0] for option in model.options}
    words = {name: f"--{name}={getattr(parts, name)}" for name in ("pooling", "head")}
    words["ensemble"] = "--ensemble" if parts.ensemble else "--no-ensemble"
    options = tuple(
        word
        for name, word in words.items()
        if getattr(parts, name) != getattr(other, name) and not {f"--{name}", f"--no-{name}"} & known
    )
    return ModelSpec(recipe.STARTS_FROM, settings, (*model.options, *options))
