"""load(): what it opens and when, and options that it refuses."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundles import CLASSIFIER, EMBEDDING, GENERATOR, MULTI_LABEL, REGRESSION, TOKENS, texts

from offramp.runtime import (
    BadBundle,
    BadSetting,
    BundleNotFound,
    Classifier,
    Embedder,
    MultiLabelClassifier,
    Regressor,
    RuleSpec,
    TextGenerator,
    TokenClassifier,
    load,
    load_classifier,
    load_generator,
    load_row_session,
    loading,
)
from offramp.runtime.bundle.manifest import GENERATION, TASKS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))


@pytest.fixture
def generator_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GENERATOR, tmp_path / "generator"))


def test_load_opens_the_kind_of_session_that_the_bundle_is_for() -> None:
    with load(CLASSIFIER) as classifier, load(GENERATOR) as generator:
        assert isinstance(classifier, Classifier) and isinstance(generator, TextGenerator)
        assert classifier.batch_size == loading.BATCH_SIZE


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (CLASSIFIER, Classifier),
        (MULTI_LABEL, MultiLabelClassifier),
        (TOKENS, TokenClassifier),
        (REGRESSION, Regressor),
        (EMBEDDING, Embedder),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_load_row_session_opens_all_tasks_but_generation(path: Path, kind: type) -> None:
    with load_row_session(path, batch_size=3) as session:
        assert type(session) is kind and session.batch_size == 3
    if path != CLASSIFIER:
        with pytest.raises(BadSetting, match=rf"{path.name}: this bundle .*; open it with load\(\)"):
            load_classifier(path)
        with pytest.raises(BadSetting, match=rf"{path.name}: this bundle .*; open it with load\(\)"):
            load_generator(path)


def test_load_row_session_refuses_a_generator() -> None:
    with pytest.raises(BadSetting, match=r"this bundle generates text; open it with load\(\)"):
        load_row_session(GENERATOR)


def test_every_kind_of_task_has_a_session() -> None:
    kinds = {task.kind for task in TASKS.values()}
    assert {*loading.ROW_SESSIONS, GENERATION} == kinds


def test_load_classifier_and_load_generator_refuse_the_other_task() -> None:
    with load_classifier(CLASSIFIER, batch_size=3) as classifier, load_generator(GENERATOR) as generator:
        assert classifier.batch_size == 3 and isinstance(generator, TextGenerator)
    with pytest.raises(BadSetting, match=r"tiny_\w+: this bundle generates text; open it with load\(\)"):
        load_classifier(GENERATOR)
    with pytest.raises(BadSetting, match=r"tiny_bundle: this bundle classifies; open it with load\(\)"):
        load_generator(CLASSIFIER)
    with pytest.raises(BundleNotFound):
        load_classifier(CLASSIFIER / "none")
    with pytest.raises(TypeError, match="threshhold"):
        load_classifier(CLASSIFIER, threshhold=0.5)


def test_load_names_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match="no such folder; write one with"):
        load(tmp_path / "bundle")


def test_lazy_session_opens_what_is_reached(folder: Path) -> None:
    (folder / "segment_02.onnx").unlink()
    with pytest.raises(BundleNotFound, match="segment_02"):
        load(folder)
    with load_classifier(folder, lazy=True, rule="fixed", threshold=2) as session:
        answer = session("good film")
        assert answer.exit == 2
        with load_classifier(CLASSIFIER) as complete:
            assert np.isclose(answer.signals[0][0], complete("good film").signals[0][0], atol=1e-5)
        with pytest.raises(BundleNotFound, match="segment_02"):
            session.warm_up()
        assert session("good film").exit == 2, "the session is usable after the error"


def test_lazy_generator_opens_what_is_reached(generator_folder: Path) -> None:
    (generator_folder / "segment_02.onnx").unlink()
    with pytest.raises(BundleNotFound, match="segment_02"):
        load(generator_folder)
    with (
        load_generator(generator_folder, lazy=True) as session,
        pytest.raises(BundleNotFound, match="segment_02"),
    ):
        list(session.generate("good"))


def test_generator_reads_cache_fills_and_draft_head_when_first_used(generator_folder: Path) -> None:
    for pattern in ("fill_*.onnx", "draft*.onnx"):
        for path in generator_folder.glob(pattern):
            path.unlink()
    with load_generator(generator_folder, rule="gate") as session:
        assert list(session.generate("good", 5))
    with load_generator(generator_folder, rule="fixed", threshold=1, exit_kv="propagate") as session:
        assert list(session.generate("good", 5))  # no token goes deeper, so nothing is filled


def test_lazy_session_checks_what_it_reads(folder: Path) -> None:
    with load_classifier(folder, lazy=True, rule="never") as session:
        path = folder / "segment_01.onnx"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(BadBundle, match=r"segment_01\.onnx: sha256"):
            session("good film")


def test_lazy_session_opens_the_stem(folder: Path) -> None:
    (folder / "stem.onnx").unlink()
    with pytest.raises(BundleNotFound, match="stem"):
        load(folder, lazy=True)


def test_after_warm_up_no_file_is_read(folder: Path) -> None:
    with load_classifier(folder, lazy=True, variant="int8") as session:
        session.warm_up((1, 7, 1000), batch=2)
        for path in folder.iterdir():
            path.unlink()
        with load_classifier(CLASSIFIER, variant="int8") as eager:
            pairs = zip(session.map(texts(20)), eager.map(texts(20)), strict=True)
            assert all((a.label, a.steps) == (b.label, b.steps) for a, b in pairs)


@pytest.mark.parametrize("source", [CLASSIFIER, GENERATOR], ids=["classifier", "generator"])
def test_bad_tokenizer_leaves_no_engine_open(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "bundle"))
    (folder / "tokenizer.json").write_bytes(b"{}")
    began, closed, open_engine = [], [], loading.open_engine

    def opened(*args: Any) -> Any:
        began.append(1)
        engine = open_engine(*args)
        close = engine.close
        engine.close = lambda: (closed.append(1), close())  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr(loading, "open_engine", opened)
    with pytest.raises(BadBundle, match=r"tokenizer\.json"):
        load(folder)
    # The tokenizer is read beside a classifier's engine, and before a generator's.
    assert closed == began == ([1] if source == CLASSIFIER else [])
    assert not [thread for thread in threading.enumerate() if thread.name == "offramp prefetch"]


def test_point_sets_rule_and_variant() -> None:
    with load(CLASSIFIER, point="fast") as session:
        point = next(point for point in session.manifest.points if point.name == "fast")
        assert (session.rule, session.variant) == (point.rule, point.variant)


def test_threshold_alone_is_that_of_the_bundles_rule() -> None:
    with load_classifier(CLASSIFIER, threshold=2.0) as session:
        assert session.rule == RuleSpec("gate", {"threshold": 2.0})
        assert session("good film").exit == len(session.manifest.segments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"point": "fast", "rule": "never"}, "give either, not both"),
        ({"point": "fast", "threshold": 0.1}, "give either, not both"),
        ({"point": "fast", "variant": "fp32"}, "measured in variant int8"),
        ({"point": "slow"}, "it has: default, fast"),
        ({"rule": "luck"}, "choose one of: gate"),
        ({"rule": "margin"}, r"needs threshold: give a threshold \(--threshold NUMBER\)"),
        ({"rule": "never", "threshold": 0.5}, "has no threshold"),
        ({"rule": "fixed", "threshold": 9}, "exits 1 to 3"),
        ({"rule": "speculative"}, "rule speculative: it is not for text-classification"),
        ({"variant": "int4"}, "it offers: fp32, int8"),
        ({"engine": "tpu"}, "engine 'tpu' is not known; choose one of: ort, trt"),
        ({"device": "tpu"}, "device 'tpu' is not known; choose one of: cpu, cuda"),
        ({"provider": "metal"}, "provider 'metal' is not known; choose one of: cuda, tensorrt"),
        ({"provider": "cuda", "device": "cpu"}, "provider cuda is for device cuda, not cpu: leave one"),
        ({"cuda_graphs": True, "device": "cpu"}, "cuda_graphs is for device cuda, not cpu: leave one"),
        ({"threads": 0}, "threads 0: expected 1 to 1024"),
        ({"batch_size": 0}, "batch size 0: expected 1 or more"),
        ({"batch_size": 2**21}, "batch size: expected 1048576 or fewer"),
        ({"exit_kv": "propagate"}, "exit_kv propagate: a bundle of task text-classification has no cache"),
        ({"exit_kv": "deep"}, "exit_kv 'deep': choose one of deferred, propagate"),
    ],
    ids=str,
)
def test_bad_options_for_a_classifier(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        load(CLASSIFIER, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "skip", "threshold": 1}, "segments 1 is not a whole number from 2 to 3"),
        ({"rule": "quick"}, "rule 'quick' is not known; choose one of: gate, .*speculative"),
        ({"rule": "quee"}, "rule quee: it is not for text-generation"),
        ({"rule": "route", "threshold": 0.1}, r"has no router; fit one with: ee-calibrate"),
        ({"rule": "speculative", "threshold": 1}, "rule speculative has no threshold"),
        ({"exit_kv": "deep"}, "exit_kv 'deep': choose one of deferred, propagate"),
        ({"exit_kv": "propagate", "rule": "never"}, "with rule never no token exits early; leave it out"),
        ({"engine": "trt"}, "engine trt: bundles that generate text run on engine ort alone"),
        ({"device": "cuda"}, "device cuda: bundles that generate text run on device cpu alone"),
        ({"provider": "cuda"}, "device cuda: bundles that generate text run on device cpu alone"),
        ({"batch_size": 0}, "batch size 0: expected 1 or more"),
    ],
    ids=str,
)
def test_bad_options_for_a_generator(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        load(GENERATOR, **options)


def test_bad_options_are_refused_before_graphs_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("no engine should be opened")

    monkeypatch.setattr(loading, "open_engine", fail)
    for path, options in (
        (CLASSIFIER, {"rule": "fixed", "threshold": 9}),
        (GENERATOR, {"rule": "skip", "threshold": 9}),
        (GENERATOR, {"rule": "fixed", "threshold": 9}),
    ):
        with pytest.raises(BadSetting):
            load(path, **options)  # type: ignore[arg-type]
