"""--segments auto of a language model: as fine as it can be cut for a given part of its speed.

A token takes what the blocks take and, for every segment but one, what a seam takes: a call, and the hidden
state and a few masks once more through memory. Both are measured on the finest cut and on the coarsest.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console
from rich.progress import track

from offramp.export.bundle import finish
from offramp.export.decoder import DecoderParts, split_decoder
from offramp.export.decoder_bundle import describe, variants_of, write_part
from offramp.export.verify import file_name
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.bundle import open_bundle
from offramp.runtime.engines.decoder import DecoderEngine
from offramp.runtime.engines.threads import claim
from offramp.runtime.generate import through
from offramp.runtime.lane import Lane
from offramp.training.checkpoint import TOKENIZER

LOSS = 0.02  # of the speed of one segment that seams may take
PROMPT, STEPS = 32, 60  # tokens; timed steps behind them


@dataclass(frozen=True)
class Grouping:
    """What was measured: seconds of a token through one segment and of a seam; and what was chosen, cuts."""

    blocks: int
    one: float
    seam: float
    variant: str
    cuts: tuple[int, ...]

    def seconds(self, segments: int) -> float:
        """Of a token that goes through so many segments."""
        return self.one + self.seam * (segments - 1)

    def table(self) -> str:
        """The trade-off, a line a grouping."""
        lines = ["segments   blocks in one   ms a token   speed of one segment   kept"]
        for count in groupings(self.blocks):
            ends = even_cuts(self.blocks, count)
            sizes = sorted({end - begin for begin, end in zip((0, *ends), ends, strict=False)})
            ms, share = 1e3 * self.seconds(count), self.one / self.seconds(count)
            kept = "yes" if ends == self.cuts else ""
            sizes_ = "-".join(map(str, sizes))
            lines.append(f"{count:8d}{sizes_:>16}{ms:13.3f}{share:23.3f}{kept:>7}".rstrip())
        lines.append(f"of {self.variant}; a seam takes {1e6 * self.seam:.0f} us")
        return "\n".join(lines)


def groupings(blocks: int) -> list[int]:
    """Numbers of segments worth a look, the most first: each makes the longest segment shorter."""
    return sorted({-(-blocks // size) for size in range(1, blocks + 1)}, reverse=True)


def even_cuts(blocks: int, segments: int) -> tuple[int, ...]:
    """Ends of segments as even as can be."""
    return tuple(round((number + 1) * blocks / segments) for number in range(segments))


def choose_cuts(network: DecoderNetwork, folder: Path, variant: str = "fp32") -> Grouping:
    """Write the finest and the coarsest cut to a temporary folder, time one-token steps of both in turns, and
    choose the most segments that keep the speed of one but for LOSS.
    """
    blocks = network.block_count
    with tempfile.TemporaryDirectory(prefix="offramp-") as scratch:
        bundles = [Path(scratch) / "one", Path(scratch) / "each"]
        for bundle, count in zip(bundles, (1, blocks), strict=True):
            _write(network, even_cuts(blocks, count), folder, bundle, variant, bundles[0])
        one, each = _steps(bundles, variant)
    seam = max(0.0, float(np.median(each) - np.median(one)) / max(1, blocks - 1))
    taken = float(np.median(one))
    fine = [n for n in groupings(blocks) if taken / (taken + seam * (n - 1)) >= 1 - LOSS]
    return Grouping(blocks, taken, seam, variant, even_cuts(blocks, fine[0]))


def _write(
    network: DecoderNetwork, cuts: Sequence[int], folder: Path, bundle: Path, variant: str, other: Path
) -> None:
    """A bundle of stem, segments and head alone; what both have in common is written once."""
    whole = split_decoder(network, cuts)
    parts = DecoderParts(whole.stem, whole.segments, (), whole.head, None)
    variants = ("fp32",) if variant == "fp32" else ("fp32", variant)
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


def _steps(bundles: Sequence[Path], variant: str) -> list[list[float]]:
    """Seconds of one-token steps, head included, of each bundle in turns."""
    pool = claim(onnxruntime, None, True)
    engines = [DecoderEngine(onnxruntime, open_bundle(b), variant, pool, share=False) for b in bundles]
    lanes = [Lane(engine) for engine in engines]
    prompt = min(PROMPT, lanes[0].cache.longest // 2)
    for lane in lanes:
        lane.feed([0] * prompt)
        through(lane, most=prompt)
    seconds: list[list[float]] = [[] for _ in lanes]
    for step in range(min(STEPS, lanes[0].cache.longest - prompt)):
        for at in (0, 1) if step % 2 else (1, 0):
            started = time.perf_counter()
            lanes[at].feed([0])
            lanes[at].cache.logits(through(lanes[at]).hidden)
            if step > 4:  # the first ones bind memory
                seconds[at].append(time.perf_counter() - started)
    return seconds
