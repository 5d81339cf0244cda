"""Rule select: controllers choose for each token which segments it runs (recipe layer_selection).

After a segment its controllers give P(run) of every segment ahead but the last, all from the same hidden
state. A token skips the segments before the first whose P(run) is above the threshold and runs that one,
whose controllers then decide again. Skipping changes no hidden state, so each decision is the one that the
segment's controller was trained to make. The last segment always runs. A token leaves keys and values in the
segments that it skips, computed from its hidden state, as later tokens may run them (TokenSequence.skip).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.base import Floats, Plan, Signals, full_plan


@dataclass(frozen=True)
class SelectRule:
    """Rule select: a token runs the segments whose controllers give P(run) above the threshold."""

    spec: RuleSpec
    threshold: float
    width: int = field(default=0, init=False)
    exit_test: None = field(default=None, init=False)  # the rest of the plan is rewritten, not only cut

    def first_plan(self, segments: int, variant: int, hidden: Floats | None = None) -> Plan:
        """The plan that runs every segment; see Rule.first_plan."""
        return full_plan(segments, variant)

    def __call__(self, signals: Signals, memory: Floats, plan: Plan, segment: int) -> tuple[Plan, Floats]:
        ahead = plan.shape[1] - 2 - segment  # segments that have a decision: all after this one but the last
        if ahead < 1:
            return plan, memory
        if (controller := signals.controller) is None:
            raise BadSetting(
                f"rule select: segment {segment + 1} has no controllers in this bundle; choose another rule"
            )
        runs = controller > self.threshold  # [rows, ahead]
        if runs[:, 0].all():  # the usual case: every row runs the next segment
            return plan, memory
        first = np.where(runs.any(1), runs.argmax(1), ahead)
        new_plan = plan.copy()
        new_plan[:, segment + 1 : -1][np.arange(ahead) < first[:, None]] = -1
        return new_plan, memory
