"""--segments auto of a language model: as fine as it can be cut for a given part of one graph's speed.

A token takes what the blocks take and, for every seam, a call, and the hidden state and a few masks once more
through memory. Both are measured on one segment and on a few. Not on the finest cut, whose seams are cheap:
they follow so closely that the code of one still lies in the processor's caches at the next, where with a few
segments the weights that stream by have displaced it (90 us and 32 us a seam, SmolLM2-135M in fp32, trial).
One segment has two seams already, to the stem and to the head, that one graph of all has not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from offramp.export.bundle import finish
from offramp.export.decoder import DecoderParts, split_decoder
from offramp.export.decoder_bundle import describe, variants_of, write_part
from offramp.export.verify import file_name
from offramp.models.decoder import DecoderNetwork
from offramp.training.checkpoint import TOKENIZER

LOSS = 0.02  # of the speed of one graph that seams may take
FEW = 5  # segments on which a seam is timed
PAIRS = 3  # of openings in either order


class Timed(NamedTuple):
    """Seconds of a token through one segment, and of a seam."""

    one: float
    seam: float

    def seconds(self, segments: int) -> float:
        """Of a token that goes through so many segments."""
        return self.one + self.seam * (segments - 1)

    def speed(self, segments: int) -> float:
        """By that of one graph, which has no seam."""
        return self.seconds(-1) / self.seconds(segments)


@dataclass(frozen=True)
class Grouping:
    """What was measured of each variant; and what was chosen, cuts."""

    blocks: int
    timed: Mapping[str, Timed]
    cuts: tuple[int, ...]

    def table(self) -> str:
        """The trade-off, a line a grouping: milliseconds a token and the speed by that of one graph."""
        heads = "".join(f"{name + ' ms':>11}{'speed':>8}" for name in self.timed)
        lines = [f"segments   blocks in one{heads}   kept"]
        for count in groupings(self.blocks):
            ends = even_cuts(self.blocks, count)
            sizes = sorted({end - begin for begin, end in zip((0, *ends), ends, strict=False)})
            cells = "".join(
                f"{1e3 * t.seconds(count):11.3f}{t.speed(count):8.3f}" for t in self.timed.values()
            )
            kept = "yes" if ends == self.cuts else ""
            lines.append(f"{count:8d}{'-'.join(map(str, sizes)):>16}{cells}{kept:>7}".rstrip())
        seams = ", ".join(f"{1e6 * timed.seam:.0f} us in {name}" for name, timed in self.timed.items())
        lines.append(f"a seam takes {seams}; speed: by that of one graph")
        return "\n".join(lines)


def groupings(blocks: int) -> list[int]:
    """Numbers of segments worth a look, the most first: each makes the longest segment shorter."""
    return sorted({-(-blocks // size) for size in range(1, blocks + 1)}, reverse=True)


def even_cuts(blocks: int, segments: int) -> tuple[int, ...]:
    """Ends of segments as even as can be."""
    return tuple(round((number + 1) * blocks / segments) for number in range(segments))


def choose_cuts(network: DecoderNetwork, folder: Path, variants: Sequence[str] = ("fp32",)) -> Grouping:
    """Write one segment and FEW to a temporary folder, time one-token steps of both in turns, and choose the
    most segments that keep the speed of one graph but for LOSS, in every variant, or one where none do: a
    bundle has one cut, and where arithmetic takes less time seams are more of it.
    """
    blocks, timed, few = network.block_count, dict[str, Timed](), min(FEW, network.block_count)
    with tempfile.TemporaryDirectory(prefix="offramp-") as scratch:
        bundles = [Path(scratch) / "one", Path(scratch) / "few"]
        for bundle, count in zip(bundles, (1, few), strict=True):
            _write(network, even_cuts(blocks, count), folder, bundle, variants, bundles[0])
        turns = [(variant, order) for variant in variants for order in (1, -1) * PAIRS]
        found: dict[str, list[list[float]]] = {variant: [] for variant in variants}
        for variant, order in track(turns, "timing seams", console=Console(stderr=True)):
            # What is opened first gets the worse memory and is several percent slower: each is as often.
            found[variant].append(_steps(bundles[::order], variant)[::order])
    for variant, times in found.items():
        one, cut = (float(seconds) for seconds in np.exp(np.log(times).mean(axis=0)))
        timed[variant] = Timed(one, max(0.0, (cut - one) / max(1, few - 1)))
    fine = [n for n in groupings(blocks) if all(t.speed(n) >= 1 - LOSS for t in timed.values())]
    return Grouping(blocks, timed, even_cuts(blocks, fine[0] if fine else 1))


def _write(
    network: DecoderNetwork,
    cuts: Sequence[int],
    folder: Path,
    bundle: Path,
    variants: Sequence[str],
    other: Path,
) -> None:
    """A bundle of stem, segments and head alone; what both have in common is written once."""
    whole = split_decoder(network, cuts)
    parts = DecoderParts(whole.stem, whole.segments, (), whole.head, None)
    variants = ("fp32", *(name for name in variants if name != "fp32"))  # the others are made from it
    bundle.mkdir()
    console = Console(stderr=True)
    for part in track(list(parts), f"exporting {len(cuts)} segments to time", console=console):
        if part.blocks or bundle == other:
            write_part(part, bundle, variants)
            continue
        for name in variants_of(part, variants):
            shutil.copyfile(other / file_name(part.name, name), bundle / file_name(part.name, name))
    shutil.copyfile(folder / TOKENIZER, bundle / TOKENIZER)
    finish(bundle, describe(network, parts, variants, {}))


def _steps(bundles: Sequence[Path], variant: str) -> list[float]:
    """Seconds of a token of each bundle, opened in this order in a fresh process: where others were open
    before, memory is scattered, and what has many small files gets the worse of it. Raises ChildProcessError.
    """
    words = [sys.executable, "-m", "offramp.export.decoder_steps", variant, *map(str, bundles)]
    # Safe: what lies in the folder where the command was given is no module of ours (Python 3.11).
    surroundings = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True, env=surroundings)
    if done.returncode:
        cure = "what it said stands above; cut without timing: --segments 'every N'"
        raise ChildProcessError(f"timing seams in {variant} ended with code {done.returncode}; {cure}")
    seconds: list[float] = json.loads(done.stdout)
    return seconds
