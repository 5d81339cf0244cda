"""Threads use one session for a long time: resident memory, and answers that differ from the first ones.

    soak.py BUNDLE [--threads 8] [--minutes 30] [--json FILE]

BUNDLE classifies texts. Each thread asks for random texts of 1 to 120 words: one by one, by map in batches of
4, and now and then in a session that it opens and closes itself. Every answer is compared with that of a
session that walks row by row with one thread of its own. Prints resident memory each 10 seconds; exit code 1
for a wrong answer, or if memory after minute 5 (or after the first sixth, if that is earlier) grows by 2 % or
more.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from pathlib import Path

import click

from offramp.runtime import Classifier, load_classifier

WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "was",
    "very",
    "not",
    "at",
    "all",
    "good",
    "warm",
    "bad",
    "poor",
    "cold",
    "story",
    "actor",
    "scene",
    "music",
]
TEXTS = 400  # different texts
SETTLED = 300.0  # seconds after which memory should grow no more
GROWTH = 0.02
CLOSE = 1e-3  # scores of a batch differ from those of a row in rounding


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """Threads that ask one session, and what they count: answers, and those that are wrong."""

    def __init__(self, bundle: Path, threads: int) -> None:
        chance = random.Random(0)
        self.texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 120))) for _ in range(TEXTS)]
        self.bundle = bundle
        with load_classifier(bundle, share=False) as plain:
            self.expected = [(answer.label, answer.exit, answer.score) for answer in map(plain, self.texts)]
        self.session = load_classifier(bundle)
        self.over = threading.Event()
        self.counts = [0] * threads
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(threads)]

    def start(self) -> None:
        """Start all threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait until all threads have ended."""
        self.over.set()
        for thread in self._threads:
            thread.join()
        self.session.close()

    def _ask(self, number: int) -> None:
        chance = random.Random(number + 1)
        try:
            while not self.over.is_set():
                kind = chance.random()
                if kind < 0.002:
                    with load_classifier(self.bundle, lazy=True) as session:
                        self._compare(session, number, [chance.randrange(TEXTS)], 1)
                else:
                    ids = chance.choices(range(TEXTS), k=1 if kind < 0.8 else 20)
                    self._compare(self.session, number, ids, 1 if len(ids) == 1 else 4)
        except Exception as problem:  # reported by the main thread
            self.wrong.append(f"thread {number}: {type(problem).__name__}: {problem}")

    def _compare(self, session: Classifier, number: int, ids: list[int], size: int) -> None:
        for id, answer in zip(ids, session.map([self.texts[id] for id in ids], size), strict=True):
            label, exit, score = self.expected[id]
            if (answer.label, answer.exit) != (label, exit) or abs(answer.score - score) > CLOSE:
                self.wrong.append(f"{self.texts[id]!r}: {answer}, expected {label} {score} at exit {exit}")
            self.counts[number] += 1


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option("--minutes", type=float, default=30.0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what was measured.")
def main(bundle: Path, threads: int, minutes: float, json_file: Path | None) -> None:
    """Command soak.py; its help is the module's docstring."""
    soak = Soak(bundle, threads)
    started, memory = time.monotonic(), list[tuple[float, int]]()
    soak.start()
    while (seconds := time.monotonic() - started) < 60 * minutes and not soak.wrong:
        memory.append((seconds, resident_bytes()))
        print(f"{seconds:7.0f} s {memory[-1][1] / 1e6:9.1f} MB {sum(soak.counts):9d} answers", flush=True)
        time.sleep(min(10.0, 6 * minutes))
    soak.stop()
    settled = min(SETTLED, 10 * minutes)
    first = next((size for at, size in memory if at >= settled), memory[-1][1])
    growth = memory[-1][1] / first - 1
    facts = {
        "threads": threads,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "answers": sum(soak.counts),
        "wrong": soak.wrong[:10],
        "growth": round(growth, 5),
        "memory": [[round(at), size] for at, size in memory],
    }
    print(f"{facts['answers']} answers, {len(soak.wrong)} wrong; memory {growth:+.2%} after {settled:.0f} s")
    for line in soak.wrong[:10]:
        print(line)
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=1) + "\n")
    raise SystemExit(1 if soak.wrong or growth >= GROWTH else 0)


if __name__ == "__main__":
    main()
