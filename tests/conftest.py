"""Shared by all tests: what runs in one process, garbage collection, an exported decoder of each family."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported. The networks of the tests are tiny, and a second thread only waits for the first:
# tests/models took five times as much CPU time with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Files of this folder share the classifiers that are exported once a session; these export decoders.
SHARING = "tests/export"
SLOW_COUNTS = 30  # seconds of a slow test over those of another, about: 15 to 90 over a half
EXPORTING_DECODERS = ("test_generation.py", "test_decoder_exits.py", "test_controllers.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Collect tests without collecting garbage, which then leaves out what the imports made.

    torch, transformers and the tests are over a million objects that stay until the process ends. Visiting
    them again and again took 5 of 13 seconds of the imports, and time of every test that makes many objects.
    Afterwards garbage is collected less often than by default, which took a tenth of an export.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        gc.enable()


def unit_of(nodeid: str) -> str:
    """What runs in one process: a test's file, or all files that share exported classifiers."""
    file = Path(nodeid.partition("::")[0])
    shares = file.parent.as_posix() == SHARING and file.name not in EXPORTING_DECODERS
    return SHARING if shares else file.as_posix()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest -n, begin with what takes longest, or one process has it alone at the end.

    Units are given out in the order of the tests. A slow test counts as many.
    """
    if not hasattr(config, "workerinput"):  # no process of xdist
        return
    cost: Counter[str] = Counter()
    for item in items:
        cost[unit_of(item.nodeid)] += SLOW_COUNTS if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: (-cost[unit_of(item.nodeid)], unit_of(item.nodeid)))  # stable in a unit


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest -n, run a unit in one process."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False  # it would order them by the number of tests
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def decoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """By family: a model of three blocks without stop tokens, and its bundle in fp32, a segment a block, with
    a draft head of the first 20 of 60 ids. Beside it, folder `model` is the model as transformers saves it.
    "wide FAMILY": with heads of 16 numbers, so that the cache grows in place.
    """

    @cache
    def export(family: str) -> tuple[Any, Path]:
        import tiny  # here, since tests/runtime must do without torch

        from offramp.export.bundle import write_bundle
        from offramp.export.decoder import ExportableDecoder
        from offramp.export.options import ExportOptions
        from offramp.models.decoder import DecoderNetwork

        folder = tmp_path_factory.mktemp(family.replace(" ", "_"))
        model = tiny.decoder(family.removeprefix("wide "), wide=family.startswith("wide "))
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        tiny.tokenizer().save(str(folder / "tokenizer.json"))
        model.save_pretrained(folder / "model")
        source = ExportableDecoder(DecoderNetwork(model), folder, draft_ids=20)
        write_bundle(source, source.split("each"), folder / "bundle", ExportOptions(("fp32",)))
        return model, folder / "bundle"

    return export
