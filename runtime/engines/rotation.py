"""Tables of the cosines and sines by which decoders rotate queries and keys, one row for each position.

Segments whose cache grows in place read them, so that no graph holds them. They are made from the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from offramp.runtime.bundle.manifest import RotationFacts, table_names
from offramp.runtime.rules.base import Floats


def rotation_tables(rotations: Mapping[str, RotationFacts], places: int) -> dict[str, Floats]:
    """Tables of the positions before `places`, by the names of the tensors.

    Each is float32 [places, frequencies]. Angles are products in float32, as transformers computes them;
    cosine and sine are rounded once, from float64, so that every machine makes the same numbers.
    """
    tables: dict[str, Floats] = {}
    positions = np.arange(places, dtype=np.float32)[:, None]
    for rotation, facts in rotations.items():
        angles = (positions * np.asarray(facts.frequencies, np.float32)).astype(np.float64)
        for name, function in zip(table_names(rotation), (np.cos, np.sin), strict=True):
            tables[name] = (function(angles) * facts.factor).astype(np.float32)
    return tables
