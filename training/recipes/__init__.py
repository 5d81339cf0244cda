"""One file a published training system; each is a list of stages for the one loop."""

from __future__ import annotations

import importlib
from typing import Any

# The register: what ee-train --recipe knows. docs/add-a-method.md shows how to add a line.
RECIPES: dict[str, str] = {
    "joint": "offramp.training.recipes.joint",
    "consistentee": "offramp.training.recipes.consistentee",
    "jei_dnn": "offramp.training.recipes.jei_dnn",
    "quee": "offramp.training.recipes.quee",
    "branchynet": "offramp.training.recipes.branchynet",
    "deebert": "offramp.training.recipes.deebert",
    "pabee": "offramp.training.recipes.pabee",
    "berxit": "offramp.training.recipes.berxit",
    "fastbert": "offramp.training.recipes.fastbert",
    "pcee_bert": "offramp.training.recipes.pcee_bert",
    "layerskip": "offramp.training.recipes.layerskip",
    "layer_selection": "offramp.training.recipes.layer_selection",
    "consistentee_lm": "offramp.training.recipes.consistentee_lm",
}


def load_recipe(name: str) -> Any:
    """The recipe's module; KeyError where the register has no such name.

    It has SETTINGS, a frozen dataclass of numbers and words; policy_of(settings), the kind of policy that its
    network carries, or None; train(run, train, dev, settings, *, skip_warm_start), which runs its stages and
    gives what training.json is to hold; and STARTS_FROM, the recipe whose checkpoint, given as --init, spares
    it the first stage, or None where it begins with the pretrained backbone.

    A recipe for language models says GENERATES = True in place of policy_of, and its train is
    train(run, texts, exits, settings): see training.decoders.
    """
    return importlib.import_module(RECIPES[name])
