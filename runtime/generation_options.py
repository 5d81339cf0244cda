"""Options of ee-run for bundles that generate text: length, choice of tokens, and cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

# A test compares these with their source.
EXIT_KV = ("deferred", "propagate")

F = TypeVar("F", bound=Callable[..., Any])

_MAX_NEW_TOKENS = click.option(
    "--max-new-tokens",
    type=click.IntRange(1, 1 << 20),
    default=64,
    show_default=True,
    help="Tokens of a generated text at most.",
)
_EXIT_KV = click.option(
    "--exit-kv",
    type=click.Choice(EXIT_KV),
    default="deferred",
    show_default=True,
    help="For generated text, the cache of a token behind its exit: deferred, the token waits and runs the "
    "segments when a later token goes deeper; propagate, keys and values made from the hidden state of its "
    "exit.",
)
# The fields of sampling.Sampling that are options; it checks their ranges.
_SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (
        float,
        "Draw tokens at random: 1 by the probabilities of the model, less for likelier ones, 0 for the most "
        "probable one at each position.  [default: 0]",
    ),
    "top_k": (int, "Draw only from this many most probable tokens; 0 is all.  [default: 0]"),
    "top_p": (
        float,
        "Draw only from the most probable tokens that together have this probability.  [default: 1]",
    ),
    "min_p": (
        float,
        "Draw only tokens with this share of the probability of the most probable one.  [default: 0]",
    ),
    "repetition_penalty": (
        float,
        "Above 1, tokens that the prompt or the answer has become less probable.  [default: 1]",
    ),
    "seed": (
        int,
        "Draw the first line's tokens with this seed, each further line's with the next one: the same texts "
        "each time.  [default: from the system]",
    ),
    "logprobs": (
        int,
        "Add the log-probability of each token, and of this many most probable ones, to the answers.",
    ),
}


def generation_options(command: F) -> F:
    """Add the options to a command, in order; each is a keyword of its function."""
    command = _EXIT_KV(command)
    for name, (kind, text) in reversed(_SAMPLING.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, type=kind, help=text)(command)
    return _MAX_NEW_TOKENS(command)


def take_sampling(keywords: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of sampling from a command's keywords; returns those that were given."""
    values = {name: keywords.pop(name) for name in _SAMPLING}
    return {name: value for name, value in values.items() if value is not None}
