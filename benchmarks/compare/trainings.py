"""Train the models of a comparison that do not exist yet, one after another or several at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from offramp.benchmarks.compare.specs import CommonWords, ModelSpec, start_of
from offramp.runtime.errors import BadSetting


@dataclass(frozen=True)
class Trainer:
    """Trains models into folders under `out`; several threads may call it.

    workers: trainings at once; with several, each gets its share of the cores, and writes its progress into
    FOLDER.log instead of stderr. Small networks use two cores better by two trainings than by one.
    """

    out: Path
    common: CommonWords
    workers: int = 1
    _locks: dict[Path, Lock] = field(default_factory=dict, repr=False)

    def train_all(self, models: Sequence[tuple[ModelSpec, int]]) -> None:
        """Train models with their seeds, and those from which they start, unless their checkpoints exist.

        Raises the first error, once the trainings that run have ended; the others are not begun.
        """
        if self.workers == 1:
            for model, seed in models:
                self.train_once(model, seed)
            return
        pool = ThreadPoolExecutor(self.workers)
        try:
            futures = [pool.submit(self.train_once, model, seed) for model, seed in models]
            for number, future in enumerate(as_completed(futures), 1):
                print(f"{future.result()}: {number} of {len(futures)} models", file=sys.stderr)
        finally:
            pool.shutdown(cancel_futures=True)

    def train_once(self, model: ModelSpec, seed: int) -> Path:
        """Train a model and the one that it starts from, unless their checkpoints exist; give its folder.

        Raises BadSetting if the checkpoint that exists has other settings.
        """
        folder, start = model.folder(self.out, seed), start_of(model, self.common)
        with self._locks.setdefault(folder, Lock()):  # models that start from the same one wait for it here
            if (folder / "training.json").is_file():
                _check_settings(folder, model, self.common)
                return folder
            begin = ["--model", self.common.model, *self.common.more, *model.options]
            if start is not None:
                begin = ["--init", str(self.train_once(start, seed))]
            settings = (*self.common.settings, *model.settings)
            words = [word for setting in settings for word in ("--set", setting)]
            command = [str(Path(sys.executable).parent / "ee-train"), "--recipe", model.recipe]
            command += ["--seed", str(seed), "--out", str(folder), *begin, "--data", self.common.data]
            self._run([*command, *self.common.options, *words], folder)
        return folder

    def _run(self, command: list[str], folder: Path) -> None:
        """Run a command; raises CalledProcessError."""
        if self.workers == 1:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.log").open("ab") as log:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=log, env=environment)


def _check_settings(folder: Path, model: ModelSpec, common: CommonWords) -> None:
    """Raise BadSetting unless the checkpoint was trained with the settings that the command names."""
    from offramp.training.options import parse_settings
    from offramp.training.recipes import load_recipe

    recipe: Any = load_recipe(model.recipe)
    words = (*common.settings, *model.settings)
    wanted = parse_settings(recipe.SETTINGS, words)
    stored = json.loads((folder / "training.json").read_text(encoding="utf-8")).get("settings", {})
    for name in (word.partition("=")[0] for word in words):
        value = getattr(wanted, name)
        if name in stored and stored[name] != value:
            raise BadSetting(f"{folder} has {name}={stored[name]}, not {value}: choose another --out")
