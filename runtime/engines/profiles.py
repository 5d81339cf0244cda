"""Profiles: for which rows and tokens a graph is compiled where a compiler tunes it for a range of shapes.

A row that walks alone is what latency is about, and short texts are most of them, so both have a profile of
their own; one that spans everything would be tuned for none. The bundle says how long a row can be.
"""

from __future__ import annotations

from collections.abc import Sequence

from offramp.runtime.bundle.manifest import Manifest, Tensor, TextInput
from offramp.runtime.errors import BadSetting

Size = tuple[int, int]  # rows, tokens
Profile = tuple[Size, Size, Size]  # the least, what is tuned for, the most
Shape = tuple[int, ...]

MOST_ROWS = 32  # of one step: the largest batch size
SHORT = 64  # tokens; up to here a text is a short one
TOKENS = 16  # lengths are rounded up to multiples of this, so that rows meet and few shapes are ever seen


def profiles(manifest: Manifest) -> tuple[Profile, ...]:
    """Rows alone and together, texts short and long; images have one length, which is in their graphs."""
    reads = manifest.input
    lengths = [(1, 1, 1)]
    if isinstance(reads, TextInput):
        longest = reads.longest
        lengths = [(1, min(SHORT // 2, longest), min(SHORT, longest))]
        if longest > SHORT:
            lengths.append((SHORT + 1, min(2 * SHORT, longest), longest))
    rows = [(1, 1, 1), (2, MOST_ROWS // 4, MOST_ROWS)]
    return tuple(
        ((few[0], short[0]), (few[1], short[1]), (few[2], short[2])) for few in rows for short in lengths
    )


def choose(known: Sequence[Profile], rows: int, tokens: int) -> int:
    """Number of the profile for that many rows of that many tokens; BadSetting where there is none."""
    for number, (least, _, most) in enumerate(known):
        if least[0] <= rows <= most[0] and (most[1] == 1 or least[1] <= tokens <= most[1]):
            return number
    rows_most = max(most[0] for *_, most in known)
    raise BadSetting(
        f"{rows} rows of {tokens} tokens: engines are built for at most {rows_most} rows of "
        f"{max(most[1] for *_, most in known)} tokens; choose a batch size of {rows_most} or less"
    )


def shapes(tensor: Tensor, profile: Profile) -> tuple[Shape, Shape, Shape]:
    """The least, usual and largest shape of a graph's input."""
    least, usual, most = (shape_of(tensor, rows, tokens) for rows, tokens in profile)
    return least, usual, most


def shape_of(tensor: Tensor, rows: int, tokens: int) -> Shape:
    """Its shape at that many rows and tokens."""
    sizes = {"batch": rows, "seq": tokens}
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def rounded(tokens: int, longest: int) -> int:
    """The length that a text of so many tokens is padded to."""
    return min(-(-tokens // TOKENS) * TOKENS, longest)
