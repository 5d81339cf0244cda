"""Recipes: one file for each published training system, each a list of phases for the one loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # it imports torch, which ee-train --help does without
    from offramp.training.recipes.base import Recipe

# The register of ee-train --recipe; docs/add-a-method.md shows how to add a line.
RECIPES: dict[str, str] = {
    "offramp": "offramp.training.recipes.offramp",
    "attach": "offramp.training.recipes.attach",
    "joint": "offramp.training.recipes.joint",
    "consistentee": "offramp.training.recipes.consistentee",
    "consistentee_plus": "offramp.training.recipes.consistentee_plus",
    "jei_dnn": "offramp.training.recipes.jei_dnn",
    "quee": "offramp.training.recipes.quee",
    "branchynet": "offramp.training.recipes.branchynet",
    "deebert": "offramp.training.recipes.deebert",
    "pabee": "offramp.training.recipes.pabee",
    "berxit": "offramp.training.recipes.berxit",
    "fastbert": "offramp.training.recipes.fastbert",
    "pcee_bert": "offramp.training.recipes.pcee_bert",
    "cosee": "offramp.training.recipes.cosee",
    "l2w_den": "offramp.training.recipes.l2w_den",
    "layerskip": "offramp.training.recipes.layerskip",
    "layer_selection": "offramp.training.recipes.layer_selection",
    "draft_head": "offramp.training.recipes.draft_head",
    "consistentee_lm": "offramp.training.recipes.consistentee_lm",
}

# Recipes for other tasks than one label a row; all others are for that alone.
FOR_EVERY_TASK = ("offramp", "joint", "attach")


def load_recipe(name: str) -> Recipe:
    """Import a recipe's module by its name; KeyError if the register has no such name."""
    return cast("Recipe", importlib.import_module(RECIPES[name]))
