"""What early exits saved: blocks and time that full depth in the default variant would have taken besides."""

from __future__ import annotations

from offramp.runtime.bundle.manifest import Manifest
from offramp.runtime.row_session import RowAnswer


class Savings:
    """Sums over the answers of one bundle, counted in one thread.

    blocks: those that rows did not run. milliseconds: by the step costs of the manifest, which were measured
    for one row of median length; None for a bundle without them. Of a long text, its deepest window counts.
    """

    def __init__(self, manifest: Manifest) -> None:
        costs = manifest.costs.get("ms")
        self._depth = manifest.blocks
        self._steps = {} if costs is None else costs.steps
        self._full = sum(self._steps[manifest.variants[0]]) if self._steps else 0.0
        self.blocks = 0
        self.milliseconds: float | None = 0.0 if self._steps else None

    def add(self, answer: RowAnswer) -> None:
        """Count an answer; a walk that takes longer than full depth saves nothing."""
        self.blocks += self._depth - answer.depth
        if self.milliseconds is not None:
            taken = sum(self._steps[variant][segment - 1] for segment, variant in answer.steps)
            self.milliseconds += max(0.0, self._full - taken)
