"""What a kind of policy has to say: how its modules are made, and what travels between exits for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


def nothing_travels(classes: int) -> int:
    """For policies that look at one exit alone."""
    return 0


@dataclass(frozen=True)
class Kind:
    """A kind of policy.

    make: (hidden size, count) -> that many modules, one for each exit but the last, which may share parts. A
    module is called with pooled [batch, hidden], logits [batch, classes] and evidence [batch, numbers] (None:
    nothing travels) of its exit, and gives the logit of P(exit) [batch] and the evidence for the next exit
    (or None). Its folded(classes) is a module of the same signature, in evaluation mode and as a graph should
    carry it: in as few operators as will do.
    evidence: classes -> numbers a row that travel from exit to exit, zeros before the first; 0: none.
    """

    make: Callable[[int, int], nn.ModuleList]
    evidence: Callable[[int], int] = nothing_travels
