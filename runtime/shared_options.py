"""Options that ee-run, ee-run --ray and ee-serve share: names, types and metavars, once for all of them.

Each function makes the decorator of an option. It takes what differs between the commands as keywords of
click.option, above all the help text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

# A test compares these with their sources, which are heavy to import.
ENGINES, DEVICES, LONG_TEXTS = ("ort", "trt"), ("cpu", "cuda"), ("cut", "windows")
STATISTICS, ON_DRIFT = ("mean", "p95"), ("warn", "full-depth")
# Rows of a batch, at most as many as an engine walks together, and of the window of a budget.
AT_LEAST_1 = click.IntRange(1, 1 << 20)


class Decorator(Protocol):
    """Adds an option to a command."""

    def __call__(self, command: F, /) -> F:
        """The command with the option."""
        ...


def _shared(*names: str, help: str = "As in ee-run.", **attributes: Any) -> Callable[..., Decorator]:
    """A function that makes the decorator of an option; see the module."""
    return partial(click.option, *names, help=help, **attributes)


engine = _shared("--engine", type=click.Choice(ENGINES), default="ort", show_default=True)
device = _shared("--device", type=click.Choice(DEVICES))
variant = _shared("--variant")
rule = _shared("--rule")
threshold = _shared("--threshold", type=float)
point = _shared("--point", metavar="NAME")
batch_size = _shared("--batch-size", type=AT_LEAST_1, show_default=True)
threads = _shared("--threads", type=click.IntRange(1, 1024))
long_texts = _shared("--long", "long_texts", type=click.Choice(LONG_TEXTS), default="cut", show_default=True)
require_signature = _shared(
    "--require-signature",
    metavar="KEY",
    help="File of the public key that must have signed the bundle; another bundle is not opened.",
)

# Budgets and audits; ee-run has no defaults of its own, so that it can refuse what no budget uses.
budget_ms = _shared("--budget-ms", type=float, metavar="MS")
budget_depth = _shared(
    "--budget-depth", type=float, metavar="SHARE", help="Hold this share of the blocks in the same way."
)
budget_of = _shared("--budget-of", type=click.Choice(STATISTICS))
budget_window = _shared("--budget-window", type=AT_LEAST_1, metavar="ROWS")
max_risk = _shared("--max-risk", type=float, metavar="SHARE")
audit = _shared("--audit", type=float, metavar="SHARE")
audit_limit = _shared(
    "--audit-limit",
    type=float,
    metavar="SHARE",
    help="Allow this disagreement in place of the point's.",
)
on_drift = _shared("--on-drift", type=click.Choice(ON_DRIFT))
