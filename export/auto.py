"""Option --segments auto: choose where to cut a network from times that are measured on this machine.

A classifier is cut at exits. An exit costs time for every row that reaches it: its operators, the operators
of its policy and the seam between two graphs. It saves time for the rows that exit there, which otherwise go
to the next exit.

A decoder is cut as finely as a share of one graph's speed allows. A token costs the time of the blocks and,
for every seam, a call, and the hidden state and a few masks once more through memory. Both are measured on
one segment and on a few segments. The finest cut is not used, because its seams are too cheap: they follow so
closely that the code of one seam is still in the processor's caches at the next. With a few segments, the
weights that are read in between have displaced that code (90 us and 32 us a seam, SmolLM2-135M in fp32,
trial). A split into one segment has two seams already, to the stem and to the head; a single graph of the
whole network has none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from offramp.export.bundle import write_files, write_graphs, write_manifest
from offramp.export.classifier import ExportableClassifier
from offramp.export.decoder import ExportableDecoder
from offramp.export.describe import build_manifest
from offramp.export.options import ExportOptions
from offramp.export.segments import Exportable, SplitNetwork, file_name, variants_of
from offramp.export.table import aligned
from offramp.runtime.loading import load_row_session
from offramp.runtime.progress import track
from offramp.runtime.row_session import RowSession
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.rules.sweep import choose_points
from offramp.runtime.tuning.exit_tables import macs_to_exits, measure_exit_table, usual_rule
from offramp.runtime.tuning.labelled import read_perhaps_labelled
from offramp.runtime.tuning.right_answers import right_answers
from offramp.runtime.walker import Inputs, walk_one

ROWS = 100  # rows of a classifier that are timed
WARM_UP = 3  # rows before them
LOSS = 0.015  # share of one graph's speed that seams may cost: the aim is 0.02, and a measurement errs
FEW = 5  # segments on which a seam is timed
PAIRS = 3  # times that both bundles are opened in either order


@dataclass(frozen=True)
class ExitTimes:
    """Times of a classifier's stem, blocks and exits in milliseconds a row at batch 1, and where rows exit.

    leaves [exits]: share of rows that exit there. block_ms [exits]: time of the blocks before each exit.
    exit_ms: time of one exit. stem_ms: time of the stem.
    """

    leaves: NDArray[np.float64]
    block_ms: NDArray[np.float64]
    exit_ms: float
    stem_ms: float

    def expected_ms(self, kept: Sequence[int]) -> float:
        """Expected mean time of a row in milliseconds if only these exits (0-based) are kept."""
        walking, total, begin = 1.0, self.stem_ms, 0
        for exit in kept:
            total += walking * (float(self.block_ms[begin : exit + 1].sum()) + self.exit_ms)
            walking, begin = max(0.0, 1.0 - float(self.leaves[: exit + 1].sum())), exit + 1
        return total


class SeamTimes(NamedTuple):
    """Measured times of a decoder: seconds a token in one segment, and further seconds a token for a seam."""

    one_segment: float
    seam: float

    def token_seconds(self, segments: int) -> float:
        """Expected seconds a token if the network is cut into this many segments."""
        return self.one_segment + self.seam * (segments - 1)

    def relative_speed(self, segments: int) -> float:
        """Speed with this many segments, divided by the speed of a single graph, which has no seam."""
        return self.token_seconds(-1) / self.token_seconds(segments)


Times = TypeVar("Times")


@dataclass(frozen=True)
class CutChoice(Generic[Times]):
    """The chosen ends of segments (1-based blocks), the times they were chosen from, and a table of both."""

    cuts: tuple[int, ...]
    times: Times
    table: str


def choose_exits(
    source: ExportableClassifier, dev: Path, engine: str = "ort", device: str | None = None
) -> CutChoice[ExitTimes]:
    """Choose which exits of a classifier to keep: those that save more time than they cost on the dev set.

    The network is split at every exit into a temporary folder; rows of the dev set are walked and timed on
    the engine. Rows exit as at the point "default" of that bundle, calibrated on the same rows: by their
    labels or, if they have none, by agreement with full depth. Raises BadInput for the file, and what load()
    raises.
    """
    with tempfile.TemporaryDirectory(prefix="offramp-") as scratch:
        folders = [Path(scratch) / "every", Path(scratch) / "one"]
        for folder, cuts in zip(folders, ("each", str(source.network.block_count)), strict=True):
            _write_to_time(source, source.split(cuts, ("fp32",)), folder, ("fp32",), None)
        with (
            load_row_session(
                folders[0], rule="never", engine=engine, device=device, global_pool=True
            ) as every,
            load_row_session(folders[1], rule="never", engine=engine, device=device, global_pool=True) as one,
        ):
            images, kind = source.network.family.vision is not None, every.manifest.kind
            rows, labelled = read_perhaps_labelled(dev, every.labels, images=images, kind=kind)
            right = right_answers(every, rows, agreement=not labelled)
            table, lengths = measure_exit_table(every, rows, "fp32", right)
            rule = usual_rule(every.manifest, table)
            point = choose_points(rule, table, macs_to_exits(every.manifest, lengths))["default"]
            exits = table.exits(point.rule)
            leaves = np.bincount(exits, minlength=table.logits.shape[1]) / len(exits)
            items = [*rows.items[:WARM_UP], *rows.items[:ROWS]]
            inputs = [every.encode(*(item if isinstance(item, tuple) else (item,))) for item in items]
            times = _time_exits(every, one, inputs, leaves)
            blocks = [segment.blocks[-1] for segment in every.manifest.segments]
    kept = fastest_exits(times)
    return CutChoice(tuple(blocks[exit] for exit in kept), times, exits_table(blocks, times, kept))


def fastest_exits(times: ExitTimes) -> tuple[int, ...]:
    """Find the exits (0-based) with the least expected time; if several choices are equal, the fewest exits.

    The search is exact, by dynamic programming over the kept exit before: time to exit j through exit i is
    the time to i plus what the rows still walking after i pay for the blocks between and for exit j.
    """
    count = len(times.leaves)
    walking = np.concatenate([[1.0], 1.0 - np.cumsum(times.leaves)]).clip(0.0)  # after exit i - 1
    blocks_ms = np.concatenate([[0.0], np.cumsum(times.block_ms)])
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # by number of exits passed
    for end in range(1, count + 1):
        options = [
            (
                best[begin][0] + walking[begin] * (blocks_ms[end] - blocks_ms[begin] + times.exit_ms),
                len(best[begin][1]),
                (*best[begin][1], end - 1),
            )
            for begin in range(end)
        ]
        cost, _, kept = min(options)
        best.append((float(cost), kept))
    return best[count][1]


def exits_table(blocks: Sequence[int], times: ExitTimes, kept: Sequence[int]) -> str:
    """Table of the times behind a choice of exits, one line for each exit."""
    every = range(len(blocks))
    rows = [["exit after", "rows leaving", "blocks ms", "exit ms", "ms a row without it", "kept"]]
    for exit, block in enumerate(blocks):
        others = [number for number in every if number != exit]
        without = "" if exit == every[-1] else f"{times.expected_ms(others):.3f}"
        cells = [f"{times.leaves[exit]:.1%}", f"{times.block_ms[exit]:.3f}", f"{times.exit_ms:.3f}", without]
        rows.append([str(block), *cells, "yes" if exit in kept else "no"])
    return (
        f"{aligned(rows)}\nexpected ms a row: {times.expected_ms(every):.3f} with every exit, "
        f"{times.expected_ms(kept):.3f} with {len(kept)} of {len(blocks)}"
    )


def _time_exits(
    every: RowSession[Any], one: RowSession[Any], inputs: Sequence[Inputs], leaves: NDArray[np.float64]
) -> ExitTimes:
    """Time a bundle with every exit and the same network in one segment, in turn, row by row.

    An exit costs what the full walk takes longer than that one segment, divided evenly.
    """
    walks = [(_step_seconds(every, row), _step_seconds(one, row)) for row in inputs][WARM_UP:]
    step_ms = 1e3 * np.median([steps for steps, _ in walks], axis=0)  # [1 + segments]
    one_ms = 1e3 * float(np.median([steps.sum() for _, steps in walks]))
    exit_ms = max(0.0, (float(step_ms.sum()) - one_ms) / max(1, len(step_ms) - 2))
    return ExitTimes(leaves, np.maximum(step_ms[1:] - exit_ms, 0.0), exit_ms, float(step_ms[0]))


def _step_seconds(session: RowSession[Any], inputs: Inputs) -> NDArray[np.float64]:
    """Seconds of the stem and of every segment for one row [1 + segments]."""
    segments = len(session.manifest.segments)
    never, engine = bind(RuleSpec("never", {}), segments), session.engine
    started = time.perf_counter()
    state = engine.begin(inputs)
    begun = time.perf_counter()
    steps = walk_one(engine, never, state, [0] * segments)
    engine.drop(state)
    return np.diff([started, begun, *(step.ended for step in steps)])


def choose_segment_count(
    source: ExportableDecoder, variants: Sequence[str] = ("fp32",)
) -> CutChoice[Mapping[str, SeamTimes]]:
    """Choose into how many segments to cut a decoder: the most that cost at most LOSS of one graph's speed.

    The network is written to a temporary folder as one segment and as FEW segments, and tokens of both are
    timed in turn. The limit holds in every variant, because all variants of a bundle have the same cut and
    seams are a larger share where arithmetic takes less time. The seam of `times` is the same in all. If no
    cut keeps the limit, one segment is chosen.
    """
    blocks = source.network.block_count
    few = min(FEW, blocks)
    with tempfile.TemporaryDirectory(prefix="offramp-") as scratch:
        folders = [Path(scratch) / "one", Path(scratch) / "few"]
        for folder, count in zip(folders, (1, few), strict=True):
            whole = source.split(even_cuts(blocks, count))
            split = replace(whole, cache_fills=(), draft=None, draft_block=None)
            _write_to_time(source, split, folder, variants, folders[0])
        openings = [(variant, order) for variant in variants for order in (1, -1) * PAIRS]
        seconds: dict[str, list[list[float]]] = {variant: [] for variant in variants}
        for variant, order in track(openings, "timing seams", unit="opening"):
            # The bundle that is opened first gets worse memory and is several percent slower: each bundle is
            # opened first equally often.
            seconds[variant].append(_token_seconds(folders[::order], variant)[::order])
    means = {variant: np.exp(np.log(pairs).mean(axis=0)).tolist() for variant, pairs in seconds.items()}
    # A seam is a call and a hidden state, which cost the same in every variant, and a measurement errs by as
    # much as that: with the largest of them the limit holds in all.
    seams = [(seconds_few - seconds_whole) / max(1, few - 1) for seconds_whole, seconds_few in means.values()]
    times = {variant: SeamTimes(whole, max(0.0, *seams)) for variant, (whole, _) in means.items()}
    fine = [n for n in segment_counts(blocks) if all(t.relative_speed(n) >= 1 - LOSS for t in times.values())]
    cuts = even_cuts(blocks, fine[0] if fine else 1)
    return CutChoice(cuts, times, segment_counts_table(blocks, times, cuts))


def segment_counts(blocks: int) -> list[int]:
    """Numbers of segments to compare, the largest first: each makes the longest segment shorter."""
    return sorted({-(-blocks // size) for size in range(1, blocks + 1)}, reverse=True)


def even_cuts(blocks: int, segments: int) -> tuple[int, ...]:
    """Last blocks (1-based) of segments whose lengths are as even as possible."""
    return tuple(round((number + 1) * blocks / segments) for number in range(segments))


def segment_counts_table(blocks: int, times: Mapping[str, SeamTimes], cuts: Sequence[int]) -> str:
    """Table of the times behind a choice of segments, one line for each number of segments.

    Columns for each variant: milliseconds a token, and the speed divided by that of one graph.
    """
    rows = [
        ["segments", "blocks in one", *(cell for name in times for cell in (f"{name} ms", "speed")), "kept"]
    ]
    for count in segment_counts(blocks):
        ends = even_cuts(blocks, count)
        sizes = sorted({end - begin for begin, end in zip((0, *ends), ends, strict=False)})
        cells = [
            cell
            for t in times.values()
            for cell in (f"{1e3 * t.token_seconds(count):.3f}", f"{t.relative_speed(count):.3f}")
        ]
        kept = "yes" if ends == tuple(cuts) else "no"
        rows.append([str(count), "-".join(map(str, sizes)), *cells, kept])
    seam = max(t.seam for t in times.values())
    return f"{aligned(rows)}\na seam takes {1e6 * seam:.0f} us; speed: divided by that of one graph"


def _write_to_time(
    source: Exportable, split: SplitNetwork, folder: Path, variants: Sequence[str], other: Path | None
) -> None:
    """Write a bundle of the segments that are timed.

    Stem and heads are copied from `other`, another bundle of the same network, if it is given.
    """
    options = ExportOptions(("fp32", *(name for name in variants if name != "fp32")))
    folder.mkdir()
    label = f"exporting {len(split.segments)} segments to time"
    for segment in track(list(split), label, unit="graph"):
        if segment.blocks or other in (None, folder):
            write_graphs(segment, folder, options, weights_only=source.weights_only)
        else:
            for name in variants_of(segment, options.variants):
                for file in other.glob(file_name(segment.name, name) + "*"):  # with its file of weights
                    shutil.copyfile(file, folder / file.name)
    write_files(source, folder)
    write_manifest(folder, build_manifest(source, split, options.variants))


def _token_seconds(bundles: Sequence[Path], variant: str) -> list[float]:
    """Seconds a token of each bundle, opened in this order in a fresh process.

    In a process that opened other bundles before, memory is fragmented, which slows bundles of many small
    files more. Raises ChildProcessError.
    """
    command = [sys.executable, "-m", "offramp.export.time_tokens", variant, *map(str, bundles)]
    # Safe path: modules in the current folder do not belong to offramp (Python 3.11).
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        cure = "its messages are above; cut without timing: --segments 'every N'"
        raise ChildProcessError(f"timing seams in {variant} ended with code {done.returncode}; {cure}")
    seconds: list[float] = json.loads(done.stdout)
    return seconds
