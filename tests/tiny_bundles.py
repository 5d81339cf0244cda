"""Bundles that are checked in under tests/data, and texts for them; needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
CLASSIFIER, GENERATOR = DATA / "tiny_bundle", DATA / "tiny_generator"
# Of the other tasks, each folder named by what it answers.
MULTI_LABEL, TOKENS, REGRESSION, EMBEDDING = (
    DATA / "tiny_tasks" / name for name in ("multi_label", "tokens", "regression", "embedding")
)
WORDS = ["the", "a", "film", "plot", "was", "very", "not", "at", "all", "good", "warm", "bad", "poor", "cold"]


def baselines_of(bundle: Path) -> Path:
    """The folder of single graphs of a bundle of tiny_tasks."""
    return bundle.with_name(f"{bundle.name}_baselines")


def texts(count: int, seed: int = 0) -> list[str]:
    """Random texts of 1 to 29 words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(count)]
