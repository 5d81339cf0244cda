"""Kill ee-train, ee-split and ee-calibrate at random moments and check that nothing half-written is loaded.

python tests/killed.py --moments 200 prints how many kills hit which command, and what they left. The commands
run in forks of this process, which has imported torch, so that a moment costs a second or two; needs Linux.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import tiny
import torch
from tiny_bundles import CLASSIFIER

from offramp.export import cli as split_cli
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.tuning import calibrate
from offramp.training import cli as train_cli
from offramp.training.checkpoint import BadCheckpoint, load_checkpoint

# Kills of each command among 10: a training writes most often, an export takes longest.
SHARES = {"train": 5, "split": 2, "calibrate": 3}


@dataclass(frozen=True)
class Job:
    """A command, the folder that it writes, and what must hold of the folder after every kill.

    log: where its output goes. check gives what it finds, "nothing", "whole" or "new"; it raises an error for
    anything between.
    """

    command: click.Command
    arguments: Sequence[str]
    prepare: Callable[[], object]
    check: Callable[[], str]
    log: Path


def run_killed(job: Job, seconds: float | None) -> bool:
    """Run a command in a fork and kill it after some seconds (None: never); whether it ended by itself."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            log = os.open(job.log, os.O_CREAT | os.O_TRUNC | os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(log, stream)
            job.command.main(args=list(job.arguments), standalone_mode=False)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 70
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    ends = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, -signal.SIGKILL):
                raise AssertionError(f"exit code {code}: {job.log.read_text('utf-8', 'replace')[-2000:]}")
            return code == 0
        if ends is not None and time.monotonic() >= ends:
            os.kill(child, signal.SIGKILL)
            ends = None
        time.sleep(0.002)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder).network.state_dict()


def jobs(root: Path) -> dict[str, Job]:
    """The commands with tiny models and data in a folder."""
    model = tiny.model_folder(root / "model", blocks=2)  # each takes seconds to export
    rows = [
        {"text": f"the film was {word}", "label": int(word in tiny.GOOD)} for word in tiny.GOOD + tiny.BAD
    ]
    data = root / "data"
    data.mkdir()
    for split, count in (("train", 4), ("dev", 1)):
        lines = [json.dumps(row) for row in rows * count]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    ckpt, bundle, calibrated = root / "ckpt", root / "bundle", root / "calibrated"
    train = ["--model", str(model), "--data", str(data), "--recipe", "joint", "--out", str(ckpt)]
    train += ["--save-every", "0", "--precision", "fp32"]
    log = root / "log"
    trained = Job(train_cli.train, train, lambda: None, lambda: "", log)
    run_killed(trained, None)
    expected = state_of(ckpt)
    shutil.copytree(ckpt, root / "source")

    def check_train() -> str:
        if not ckpt.exists():
            return "nothing"
        state = state_of(ckpt)
        if any(not torch.equal(value, expected[name]) for name, value in state.items()):
            raise AssertionError("the checkpoint has other weights than a training without a kill")
        return "new"

    def restart() -> None:
        """Every other training goes on from the state of the one that was killed."""
        if ckpt.exists():
            shutil.rmtree(ckpt)
        if random.random() < 0.5:
            shutil.rmtree(root / "ckpt.partial", ignore_errors=True)

    def check_bundle(folder: Path) -> str:
        if not folder.exists():
            return "nothing"
        open_bundle(folder).verify()
        return "whole"

    def restore() -> None:
        shutil.rmtree(calibrated, ignore_errors=True)
        shutil.copytree(CLASSIFIER, calibrated)

    labels = open_bundle(CLASSIFIER).manifest.labels
    labelled = root / "labelled.jsonl"
    labelled.write_text(
        "".join(json.dumps({"text": row["text"], "label": labels[row["label"]]}) + "\n" for row in rows),
        "utf-8",
    )
    split = [str(root / "source"), "--out", str(bundle), "--variants", "fp32", "--overwrite"]
    return {
        "train": Job(train_cli.train, train, restart, check_train, log),
        "split": Job(split_cli.main, split, lambda: None, lambda: check_bundle(bundle), log),
        "calibrate": Job(
            calibrate.main,
            [str(labelled), "--bundle", str(calibrated), "--threads", "1"],
            restore,
            lambda: check_bundle(calibrated),
            log,
        ),
    }


def kill_at_random(moments: int, seed: int, root: Path) -> Counter[str]:
    """Kill commands at this many random moments; counts what was left, by command.

    The moment is uniform over the time of a run that nothing interrupts. Raises AssertionError, or the error
    of whoever loads it, if anything half-written is left under a name that is loaded.
    """
    random.seed(seed)
    torch.set_num_threads(1)
    known = jobs(root)
    times = {}
    for name, job in known.items():
        job.prepare()
        began = time.monotonic()
        run_killed(job, None)
        times[name] = time.monotonic() - began
        job.check()
    order = [name for name, share in SHARES.items() for _ in range(share)]
    counts: Counter[str] = Counter()
    for number in range(moments):
        name = order[number % len(order)]
        job = known[name]
        job.prepare()
        ended = run_killed(job, random.uniform(0, times[name]))
        counts[f"{name}: {'ended' if ended else 'killed'}, left {job.check()}"] += 1
        if number % 10 == 9:
            click.echo(f"{number + 1} of {moments}", err=True)
    for job in known.values():  # nothing that a kill left stands in the way
        job.prepare()
        assert run_killed(job, None)
        job.check()
    return counts


@click.command(help=__doc__)
@click.option("--moments", default=200, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
def main(moments: int, seed: int) -> None:
    """See the docstring of this file."""
    with tempfile.TemporaryDirectory() as root:
        try:
            counts = kill_at_random(moments, seed, Path(root))
        except (AssertionError, BadCheckpoint, ValueError) as problem:
            sys.exit(f"half-written: {problem}")
    for line, count in sorted(counts.items()):
        click.echo(f"{count:5d}  {line}")


if __name__ == "__main__":
    main()
