"""The graphs of a tiny bundle, run one after another by plain sessions of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tiny_bundles import CLASSIFIER

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import NEXT
from offramp.runtime.engines import threads

Arrays = dict[str, np.ndarray]


def inputs(rows: int, length: int, seed: int = 0) -> Arrays:
    """Random inputs of the stem, int64 [rows, length], whose masks end at random places."""
    random = np.random.default_rng(seed)
    ids = random.integers(4, 20, (rows, length))
    mask = (np.arange(length) < random.integers(1, length + 1, (rows, 1))).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def outputs(
    feeds: Mapping[str, Any], variants: Sequence[str] = ("fp32",) * 3, bundle: Path = CLASSIFIER
) -> list[Arrays]:
    """The outputs of every segment; variants: of each segment, "" to skip it."""
    manifest = open_bundle(bundle).manifest
    segments, tensors = list[Arrays](), dict(feeds)
    for segment, variant in zip((manifest.stem, *manifest.segments), ["fp32", *variants], strict=True):
        values: Arrays = {}
        for graph in segment.variants[variant].graphs if variant else ():
            options = onnxruntime.SessionOptions()
            threads.share_global_pool(options)
            file = str(bundle / graph.file)
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            names = [node.name for node in session.get_outputs()]
            feed = {node.name: tensors[node.name] for node in session.get_inputs()}
            values = dict(zip(names, session.run(names, feed), strict=True))
            tensors |= {name.removeprefix(NEXT): value for name, value in values.items()}
        segments.append(values)
    return segments[1:]


def assert_equal(signals: Any, expected: Mapping[str, Any], rows: Any = slice(None)) -> None:
    """Signals of an engine are these rows of a segment's outputs."""
    np.testing.assert_allclose(signals.logits, expected["logits"][rows], atol=1e-4)
    assert (signals.gate is None) == ("gate" not in expected)
    if signals.gate is not None:
        np.testing.assert_allclose(signals.gate, expected["gate"][rows], atol=1e-4)
