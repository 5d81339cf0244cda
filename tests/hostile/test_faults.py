"""A write that fails, at any place: what was there before stays whole, or what is new is whole."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER

from offramp.export.bundle import replace_folder, write_manifest
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.tuning import calibrate
from offramp.training import checkpoint as checkpoints
from offramp.training import loop
from offramp.training.checkpoint import Checkpoint, TextFacts, load_checkpoint, save_checkpoint
from offramp.training.loop import Run

LIMIT = 100


class HalfWritten:
    """A file whose first write stores half of the data and then fails, as a full disk does."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")  # copies by the system would go past write()

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Faults:
    """Counts what a piece of code writes, opens for writing, renames or makes, and lets the n-th fail."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int) -> None:
        self.count, self.number = 0, number
        real_open = io.open

        def open_(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            opened = real_open(file, mode, *rest, **more)
            if not set(mode) & set("wax+"):
                return opened
            return HalfWritten(opened) if self.is_due() else opened

        patch.setattr(builtins, "open", open_)
        patch.setattr(io, "open", open_)
        for name in ("replace", "rename", "mkdir"):
            patch.setattr(os, name, self.failing(getattr(os, name)))
        for module in (checkpoints, loop):
            patch.setattr(module, "save_file", self.half_saving(module.save_file))

    def is_due(self) -> bool:
        self.count += 1
        return self.count == self.number

    def failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            if self.is_due():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **more)

        return wrapped

    def half_saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Tensors are written by other code than Python's: half a file, and an error."""

        def wrapped(tensors: Any, file: Path) -> None:
            save(tensors, file)
            if self.is_due():
                os.truncate(file, file.stat().st_size // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return wrapped


def fail_everywhere(
    prepare: Callable[[], object], write: Callable[[], object], check: Callable[[bool], None]
) -> int:
    """Let every write of `write` fail in turn, and check what is left; gives the number of writes.

    check is called with whether the write went through.
    """
    for number in range(1, LIMIT):
        prepare()
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, number)
            try:
                write()
            except Exception as problem:
                assert faults.count >= number, problem
        through = faults.count < number
        check(through)
        if through:
            return number - 1
    raise AssertionError("it never went through")


def saved(folder: Path, seed: int) -> Checkpoint:
    network = tiny.network("bert", seed=seed)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        tiny.tokenizer().save(str(tokenizer))
    return Checkpoint(network, TextFacts("", 0, 64), tokenizer, {"seed": seed})


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaced"])
def test_write_that_fails_leaves_a_whole_checkpoint_or_none(replaces: bool, tmp_path: Path) -> None:
    old, new = saved(tmp_path, 1), saved(tmp_path, 2)
    folder = tmp_path / "ckpt"

    def prepare() -> None:
        for entry in tmp_path.glob("*ckpt*"):
            shutil.rmtree(entry)
        if replaces:
            save_checkpoint(old, folder)

    def check(through: bool) -> None:
        if not through and not replaces and not folder.exists():
            return
        loaded = load_checkpoint(folder)
        assert loaded.training["seed"] in ((2,) if through or not replaces else (1, 2))
        expected = (old if loaded.training["seed"] == 1 else new).network.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.network.state_dict().items())

    assert fail_everywhere(prepare, lambda: save_checkpoint(new, folder), check) >= 8


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaced"])
def test_write_that_fails_leaves_a_whole_bundle_or_none(replaces: bool, tmp_path: Path) -> None:
    folder, manifest = tmp_path / "bundle", open_bundle(CLASSIFIER).manifest
    marked = manifest.provenance | {"recipe": "marked"}

    def prepare() -> None:
        for entry in tmp_path.glob("*bundle*"):
            shutil.rmtree(entry)
        if replaces:
            shutil.copytree(CLASSIFIER, folder)

    def write() -> None:
        with replace_folder(folder, overwrite=True) as beside:
            for name in manifest.files:
                shutil.copyfile(CLASSIFIER / name, beside / name)
            write_manifest(beside, dataclasses.replace(manifest, provenance=marked))

    def check(through: bool) -> None:
        if not folder.exists():
            assert not through and not replaces
            return
        bundle = open_bundle(folder)
        bundle.verify()
        assert not through or bundle.manifest.provenance == marked

    assert fail_everywhere(prepare, write, check) >= 10


@pytest.mark.slow
def test_write_that_fails_leaves_a_calibrated_bundle_as_it_was_or_calibrated(tmp_path: Path) -> None:
    folder, dev = tmp_path / "bundle", tmp_path / "dev.jsonl"
    labels = open_bundle(CLASSIFIER).manifest.labels
    rows = [
        {"text": "good film" if n % 2 else "bad plot", "label": labels[n % len(labels)]} for n in range(12)
    ]
    dev.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (CLASSIFIER / "manifest.json").read_bytes()

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(CLASSIFIER, folder)

    def write() -> None:
        result = CliRunner().invoke(calibrate.main, [str(dev), "--bundle", str(folder)])
        assert result.exit_code == 0, result.output

    def check(through: bool) -> None:
        open_bundle(folder).verify()
        is_old = (folder / "manifest.json").read_bytes() == before
        assert not (through and is_old)

    assert fail_everywhere(prepare, write, check) >= 2


def test_write_that_fails_leaves_a_state_that_a_training_goes_on_from(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)

    def prepare() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = Run(network, tmp_path / "run", seed=0)
        run.position = {"phase": 0, "step": 1}
        run._write_state(None, [])

    def write() -> None:
        run = Run(network, tmp_path / "run", seed=0)
        run.position = {"phase": 0, "step": 2}
        run._write_state(None, [])

    def check(through: bool) -> None:
        step = Run(network, tmp_path / "run", seed=0).position["step"]
        assert step == 2 if through else step in (1, 2)

    assert fail_everywhere(prepare, write, check) >= 4
