"""Policies: the learned part that gives, at an exit, the probability of leaving there; one file a kind."""

from __future__ import annotations

from collections.abc import Mapping

from offramp.models.policies import consistentee, jei, lte
from offramp.models.policies.kind import Kind

# NetworkSpec.policy is one of these names.
KINDS: Mapping[str, Kind] = {**consistentee.KINDS, "jei": jei.KIND, "lte": lte.KIND}

__all__ = ["KINDS", "Kind"]
