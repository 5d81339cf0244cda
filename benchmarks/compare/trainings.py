"""Train the models of a comparison that do not exist yet, one after another or several at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock

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
            is_finished = (folder / "training.json").is_file()
            begin = ["--model", self.common.model, *self.common.more, *model.options]
            if start is not None:  # a finished model needs it no more
                init = start.folder(self.out, seed) if is_finished else self.train_once(start, seed)
                begin = ["--init", str(init)]
            settings = (*self.common.settings, *model.settings)
            words = ["--recipe", model.recipe, "--seed", str(seed), "--out", str(folder), *begin]
            words += ["--data", self.common.data, *self.common.options]
            words += [word for setting in settings for word in ("--set", setting)]
            if is_finished:
                _check_command(folder, words)
            else:
                self._run([str(Path(sys.executable).parent / "ee-train"), *words], folder)
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


def _check_command(folder: Path, words: list[str]) -> None:
    """Raise BadSetting unless the checkpoint in `folder` is that of ee-train with these arguments.

    Settings are compared by value: one that was left out has its default. Of the places of models, data and
    checkpoints the last names are compared, since a comparison may be repeated in another folder.
    """
    from offramp.training.cli import train
    from offramp.training.options import parse_settings
    from offramp.training.recipes import load_recipe

    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    wanted = dict(train.make_context("ee-train", list(words)).params)
    settings = parse_settings(load_recipe(wanted["recipe"]).SETTINGS, wanted.pop("settings"))
    pairs = {name: (value, wanted.get(name)) for name, value in training.get("command", {}).items()}
    free = ("out", "settings", "save_every", *(("precision",) if wanted["precision"] == "auto" else ()))
    for name in free:
        pairs.pop(name, None)
    for name in ("model", "init", "data"):
        if name in pairs:
            stored, value = pairs[name]
            pairs[name] = (stored and Path(stored).name, value and Path(value).name)
    of_settings = training.get("settings", {})
    pairs |= {
        name: (of_settings[name], value) for name, value in asdict(settings).items() if name in of_settings
    }
    for name, (stored, value) in pairs.items():
        if stored != json.loads(json.dumps(value)):
            raise BadSetting(f"{folder} has {name}={stored}, not {value}: choose another --out")
