"""Which exits to keep: from measured times and from where rows of a dev set would leave.

An exit costs every row that comes by: its operators, its policy's and the seam between two graphs. It saves
time for the rows that leave there. Without it they leave at the next exit that is kept.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from offramp.export.bundle import finish
from offramp.export.describe import describe
from offramp.export.split import split
from offramp.export.to_onnx import to_onnx
from offramp.export.verify import file_name
from offramp.runtime.classifier import Session
from offramp.runtime.loading import load
from offramp.runtime.rules import bind, simulate
from offramp.runtime.rules.sweep import choose_points
from offramp.runtime.tuning.calibrate import costs_of, exit_table
from offramp.runtime.tuning.labelled import read_labelled
from offramp.training.checkpoint import TOKENIZER, Checkpoint

SAMPLE = 100  # rows that are timed


@dataclass(frozen=True)
class Choice:
    """What was measured and what follows: leaves [exits] is the share of rows that wish to leave there, times
    are milliseconds at batch 1; kept holds 0-based exits, the last among them.
    """

    blocks: tuple[int, ...]
    leaves: NDArray[np.float64]
    block_ms: NDArray[np.float64]
    exit_ms: float
    stem_ms: float
    kept: tuple[int, ...]

    def expected_ms(self, kept: Sequence[int]) -> float:
        """Mean milliseconds a row where only these exits are there."""
        return self.stem_ms + _expected(self.leaves, self.block_ms, self.exit_ms, kept)

    def table(self) -> str:
        """The figures behind the choice, a line an exit."""
        every = tuple(range(len(self.blocks)))
        lines = ["exit after   rows leaving   blocks ms   exit ms   ms a row without it   kept"]
        for at, block in enumerate(self.blocks):
            last = at == every[-1]
            without = "" if last else f"{self.expected_ms([k for k in every if k != at]):.3f}"
            lines.append(
                f"{block:10d}{self.leaves[at]:15.1%}{self.block_ms[at]:12.3f}{self.exit_ms:10.3f}"
                f"{without:>22}{'yes' if at in self.kept else 'no':>7}"
            )
        lines.append(
            f"expected ms a row: {self.expected_ms(every):.3f} with every exit, "
            f"{self.expected_ms(self.kept):.3f} with {len(self.kept)} of {len(every)}"
        )
        return "\n".join(lines)


def by_cost(checkpoint: Checkpoint, dev: Path, engine: str = "ort", device: str | None = None) -> Choice:
    """Split with every exit in a temporary folder, walk the dev set on an engine, time it, and choose.

    Rows leave as the point "default" of the bundle has them, calibrated on the very rows. Raises BadInput for
    the file, and what load() raises.
    """
    with tempfile.TemporaryDirectory(prefix="offramp-") as scratch:
        every, none = Path(scratch) / "every", Path(scratch) / "none"
        _write(checkpoint, None, every)
        _write(checkpoint, checkpoint.network.spec.exits[-1:], none)
        with (
            load(every, rule="never", engine=engine, device=device) as session,
            load(none, rule="never", engine=engine, device=device) as whole,
        ):
            images = checkpoint.network.family.vision is not None
            rows = read_labelled(dev, session.labels, images=images)
            table, lengths = exit_table(session, rows, "fp32")
            rule = "max_probability" if table.gates is None else "gate"
            point = choose_points(rule, table, costs_of(session.manifest, lengths))["default"]
            count = table.logits.shape[1]
            exits = simulate(bind(point.rule, count), table.logits, table.gates)
            leaves = np.bincount(exits, minlength=count) / len(exits)
            return measure(session, whole, rows.items, leaves)


def _write(checkpoint: Checkpoint, exits: Sequence[int] | None, folder: Path) -> None:
    folder.mkdir()
    parts = split(checkpoint.network, exits, variants=("fp32",))
    for part in track(parts, f"exporting {len(parts) - 1} segments to time", console=Console(stderr=True)):
        to_onnx(part, folder / file_name(part.name, "fp32"))
    if checkpoint.tokenizer is not None:
        shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)
    finish(folder, describe(checkpoint, parts, ("fp32",)))


def keep_exits(leaves: NDArray[np.float64], block_ms: NDArray[np.float64], exit_ms: float) -> tuple[int, ...]:
    """The exits (0-based) that make the expected time least; of equals, the fewest.

    Exact, by dynamic programming over the kept exit before: time to exit j through exit i is the time to i
    plus what the rows still walking after i pay for the blocks between and for exit j.
    """
    count = len(leaves)
    walking = np.concatenate([[1.0], 1.0 - np.cumsum(leaves)]).clip(0.0)  # after exit i - 1
    ran = np.concatenate([[0.0], np.cumsum(block_ms)])
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # by number of blocks passed
    for end in range(1, count + 1):
        ways = [
            (
                best[begin][0] + walking[begin] * (ran[end] - ran[begin] + exit_ms),
                len(best[begin][1]),
                (*best[begin][1], end - 1),
            )
            for begin in range(end)
        ]
        cost, _, kept = min(ways)
        best.append((float(cost), kept))
    return best[count][1]


def measure(
    session: Session, whole: Session, texts: Sequence[str | tuple[str, str]], leaves: NDArray[np.float64]
) -> Choice:
    """Time the session's segments and the same network in one segment, in turn, row by row, and choose.

    What an exit costs is what the full walk takes more than that one segment, shared out evenly.
    """
    manifest = session.manifest
    count = len(manifest.segments)
    spent: list[NDArray[np.float64]] = []
    single: list[NDArray[np.float64]] = []
    for turn, text in enumerate([*texts[:3], *texts[:SAMPLE]]):  # the first three are for warming up
        given = session.encode(*((text,) if isinstance(text, str) else text))
        for times, engine, steps in ((spent, session.engine, count), (single, whole.engine, 1)):
            clock = [time.perf_counter()]
            state = engine.begin(given)
            clock.append(time.perf_counter())
            for segment in range(steps):
                engine.step(segment, 0, state)
                clock.append(time.perf_counter())
            engine.drop(state)
            if turn >= 3:
                times.append(np.diff(clock))
    each = 1e3 * np.median(spent, axis=0)  # [1 + segments]
    least = 1e3 * float(np.median(np.sum(single, axis=1)))
    exit_ms = max(0.0, (float(each.sum()) - least) / max(1, count - 1))
    block_ms = np.maximum(each[1:] - exit_ms, 0.0)
    kept = keep_exits(leaves, block_ms, exit_ms)
    blocks = tuple(stage.blocks[-1] for stage in manifest.segments)
    return Choice(blocks, leaves, block_ms, exit_ms, float(each[0]), kept)


def _expected(
    leaves: NDArray[np.float64], block_ms: NDArray[np.float64], exit_ms: float, kept: Sequence[int]
) -> float:
    walking, total, begin = 1.0, 0.0, 0
    for exit_at in kept:
        total += walking * (float(block_ms[begin : exit_at + 1].sum()) + exit_ms)
        walking, begin = max(0.0, 1.0 - float(leaves[: exit_at + 1].sum())), exit_at + 1
    return total
