"""Samples of rows by hash. Provenance has them, so that rows that were used before are recognised.

A sample is the smallest hashes of all rows of a split, whatever their order. Rows of a file whose hash is
larger than all of a sample cannot be compared with it. Every other row is in the split if its hash is in the
sample, and is not if it is not. Hashes are as good as random, so the share of these rows that is in the split
estimates the share of the whole file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = str | tuple[str, str] | bytes | Path  # a text, a pair of texts, the bytes of an image file, or its path

ROWS_SAMPLE = "rows_sample"  # the key in training.json, in provenance, and in its "calibrated"
TRAIN, DEV, CALIBRATED = "train", "dev", "calibrated"  # uses of rows
SAMPLE = 1024  # hashes: 12 KB of JSON
DIGITS = 12  # of a hash
_HASHES = re.compile(f"(?:[0-9a-f]{{{DIGITS}}})*")


@dataclass(frozen=True)
class RowSample:
    """A sample of rows; use: TRAIN, DEV or CALIBRATED. data: the name of their data set, or empty."""

    use: str
    data: str
    hashes: frozenset[str]

    def compare(self, hashes: Iterable[str]) -> tuple[int, int]:
        """How many of some rows, given by their hashes, are in the sample, and how many can be compared."""
        last = max(self.hashes)
        compared = {each for each in hashes if each <= last}
        return len(compared & self.hashes), len(compared)


def row_hashes(rows: Iterable[Row]) -> set[str]:
    """Short hashes of rows as ee-calibrate reads them; of an image file those of its bytes.

    Raises OSError for an image file that cannot be read.
    """
    return {hashlib.sha256(_bytes_of(row)).hexdigest()[:DIGITS] for row in rows}


def row_sample(hashes: Iterable[str]) -> str:
    """The sample of rows with these hashes: the smallest, at most SAMPLE, one after another."""
    return "".join(sorted(set(hashes))[:SAMPLE])


def samples_of(provenance: Mapping[str, Any]) -> list[RowSample]:
    """The samples in a provenance, of trainings and of the last calibration.

    Entries that are no sample are left out: a provenance may hold any JSON.
    """
    trainings, calibrated = provenance.get(ROWS_SAMPLE), provenance.get(CALIBRATED)
    entries = [entry for entry in trainings if isinstance(entry, dict)] if isinstance(trainings, list) else []
    samples = [
        RowSample(entry["split"], str(entry.get("data", "")), _hashes_of(entry.get("hashes")))
        for entry in entries
        if entry.get("split") in (TRAIN, DEV)
    ]
    if isinstance(calibrated, dict):
        samples.append(RowSample(CALIBRATED, "", _hashes_of(calibrated.get(ROWS_SAMPLE))))
    return [sample for sample in samples if sample.hashes]


def _hashes_of(sample: object) -> frozenset[str]:
    """The hashes of a sample; older bundles have them as a list."""
    if isinstance(sample, list):
        sample = "".join(str(entry) for entry in sample)
    if not (isinstance(sample, str) and _HASHES.fullmatch(sample)):
        return frozenset()
    return frozenset(sample[start : start + DIGITS] for start in range(0, len(sample), DIGITS))


def _bytes_of(row: Row) -> bytes:
    if isinstance(row, Path):
        return row.read_bytes()
    if isinstance(row, bytes):
        return row
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
