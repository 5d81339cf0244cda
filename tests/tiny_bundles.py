"""Bundles that are checked in under tests/data, and texts for them; needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
CLASSIFIER, GENERATOR = DATA / "tiny_bundle", DATA / "tiny_generator"
WORDS = ["the", "a", "film", "plot", "was", "very", "not", "at", "all", "good", "warm", "bad", "poor", "cold"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Random texts of 1 to 29 words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(count)]
