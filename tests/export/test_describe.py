"""build_manifest(): what a bundle keeps of its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from offramp.export.describe import build_manifest


def test_samples_of_the_rows_of_the_training_are_in_provenance(exported: Callable[[str], Any]) -> None:
    samples = [{"split": "train", "data": "films", "rows": 1, "hashes": "0123456789ab"}]
    source = exported("bert").source
    checkpoint = dataclasses.replace(source.checkpoint, training={"rows_sample": samples})
    manifest = build_manifest(
        dataclasses.replace(source, checkpoint=checkpoint), source.split("each"), ["fp32"]
    )
    assert manifest.provenance["rows_sample"] == samples
