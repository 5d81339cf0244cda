"""Retrieval by sentence embeddings of early exits: how many of full depth's nearest neighbours they find.

    ee-train --model MODEL --task sentence-embedding --data TEXTS --out ckpt/
    ee-split ckpt/ --out bundle/
    python benchmarks/retrieval.py bundle/ DATA --json OUT

TEXTS holds lines of text. DATA has train, dev and test as JSON lines with text and label: train is the
corpus, test the queries; a setting of rule settled has the best cosine on dev among those that save as much
as it names. recall: the share of the 10 nearest texts by full depth's embeddings that are among the 10
nearest of early ones. same label: the share of the 10 whose label is that of the query. The corpus has
embeddings of full depth, or of the same setting as the queries ("both"). Beside rule settled: all texts at
one exit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.loading import load_row_session
from offramp.runtime.row_session import RowSession
from offramp.runtime.rules.quality import embedding_quality
from offramp.runtime.rules.sweep import ExitMacs, ExitTable, settings_to_try, sweep
from offramp.runtime.tuning.exit_tables import macs_to_exits

NEAREST = 10
SAVINGS = (30.0, 40.0, 50.0, 60.0, 70.0)  # percent of multiply-accumulates, at least

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Embedded:
    """Texts with their embeddings at every exit [rows, exits, size], labels [rows], and costs."""

    embeddings: Floats
    labels: Ids
    costs: ExitMacs

    @property
    def table(self) -> ExitTable:
        """The table from which rules choose exits."""
        rows, exits, _ = self.embeddings.shape
        quality = embedding_quality(self.embeddings, self.embeddings[:, -1])
        logits = np.zeros((rows, exits, 0), np.float32)
        return ExitTable(logits, None, np.full(rows, -1), self.embeddings, quality)

    def at(self, exits: Ids) -> Floats:
        """The embeddings at each row's exit [rows, size]."""
        return self.embeddings[np.arange(len(exits)), exits]

    def saved(self, exits: Ids) -> float:
        """The share of multiply-accumulates that these exits save, percent."""
        spent = self.costs.to_exit[np.arange(len(exits)), exits].sum()
        return 100 * float(1 - spent / self.costs.full.sum())


def embed(session: RowSession[Any], file: Path) -> Embedded:
    """Embed the texts of a file of JSON lines at every exit."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    trace, lengths = session.at_full_depth([row["text"] for row in rows])
    assert trace.answers is not None
    embeddings = np.array(trace.answers.tolist(), np.float32)
    costs = macs_to_exits(session.manifest, lengths)
    return Embedded(embeddings, np.array([row["label"] for row in rows]), costs)


def nearest(queries: Floats, corpus: Floats) -> Ids:
    """Numbers of the NEAREST texts of the corpus for each query [queries, NEAREST]."""
    neighbours = [
        np.argpartition(-(part @ corpus.T), NEAREST, axis=1)[:, :NEAREST]
        for part in np.array_split(queries, max(1, len(queries) // 500))
    ]
    return np.concatenate(neighbours)


def recall(neighbours: Ids, right: Ids) -> float:
    """The mean share of the right neighbours that are among these, percent; both [queries, NEAREST]."""
    shares = [
        len(set(a) & set(b)) / NEAREST for a, b in zip(neighbours.tolist(), right.tolist(), strict=True)
    ]
    return 100 * float(np.mean(shares))


def fixed(rows: Embedded, exit: int) -> Ids:
    """The same exit (0-based) for all rows."""
    return np.full(len(rows.labels), exit)


def settings(dev: Embedded, last: int) -> list[tuple[str, RuleSpec | int]]:
    """Settings of rule settled with at least each saving on dev, and all exits but the last."""
    table = dev.table
    points = sweep("settled", settings_to_try("settled", table), table, dev.costs)
    chosen: list[tuple[str, RuleSpec | int]] = []
    for saving in SAVINGS:
        enough = [point for point in points if point.macs_saved >= saving]
        if enough:
            best = max(enough, key=lambda point: point.accuracy)
            chosen.append((f"settled, saves {saving:.0f} on dev", best.rule))
    return chosen + [(f"exit {exit + 1}", exit) for exit in range(last)]


def exits_of(rows: Embedded, setting: RuleSpec | int) -> Ids:
    """The exits of rows at a setting: a rule, or a number of an exit."""
    return fixed(rows, setting) if isinstance(setting, int) else rows.table.exits(setting)


def measure(corpus: Embedded, dev: Embedded, test: Embedded) -> list[dict[str, Any]]:
    """The figures of each setting, and of full depth."""
    last = test.embeddings.shape[1] - 1
    full = corpus.at(fixed(corpus, last))
    right = nearest(test.at(fixed(test, last)), full)

    def line(name: str, query_exits: Ids, corpus_exits: Ids) -> dict[str, Any]:
        queries = test.at(query_exits)
        to_full = nearest(queries, full)
        both = nearest(queries, corpus.at(corpus_exits))
        same = [100 * float((corpus.labels[ids] == test.labels[:, None]).mean()) for ids in (to_full, both)]
        figures = {
            "saved": test.saved(query_exits),
            "cosine": test.table.score(query_exits),
            "recall": recall(to_full, right),
            "recall_both": recall(both, right),
            "same_label": same[0],
            "same_label_both": same[1],
        }
        return {"setting": name} | {key: round(value, 2) for key, value in figures.items()}

    lines = [line("full depth", fixed(test, last), fixed(corpus, last))]
    for name, setting in settings(dev, last):
        lines.append(line(name, exits_of(test, setting), exits_of(corpus, setting)))
    return lines


def table_of(lines: Sequence[dict[str, Any]]) -> str:
    """The figures as a table of text."""
    names = [name for name in lines[0] if name != "setting"]
    rows = [f"{'setting':26}" + "".join(f"{name:>17}" for name in names)]
    rows += [f"{row['setting']:26}" + "".join(f"{row[name]:17.2f}" for name in names) for row in lines]
    return "\n".join(rows)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for the figures.")
def main(bundle: Path, data: Path, json_file: Path | None) -> None:
    """Measure retrieval at every setting and print a table."""
    with load_row_session(bundle, rule="never", global_pool=True) as session:
        corpus, dev, test = (embed(session, data / f"{name}.jsonl") for name in ("train", "dev", "test"))
    lines = measure(corpus, dev, test)
    click.echo(table_of(lines))
    if json_file is not None:
        command = f"benchmarks/retrieval.py {bundle.name} {data.name}"
        sizes = {"corpus": len(corpus.labels), "queries": len(test.labels)}
        json_file.write_text(json.dumps({"command": command} | sizes | {"settings": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
