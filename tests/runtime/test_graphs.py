"""Opened graphs: shared by engines of one process, and compared with the manifest."""

import dataclasses
import gc
import hashlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from plain_sessions import assert_equal, inputs, outputs
from tiny_bundles import CLASSIFIER

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.engines import graphs, threads
from offramp.runtime.engines.base import EngineOptions, open_engine
from offramp.runtime.errors import BadBundle


def open_ort(bundle: Bundle, **options: Any) -> Any:
    return open_engine(bundle, "fp32", EngineOptions(**options))


@pytest.fixture
def engine() -> Iterator[Any]:
    engine = open_ort(open_bundle(CLASSIFIER))
    yield engine
    engine.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))


def sessions(engine: Any) -> dict[tuple[int, int], Any]:
    """ONNX Runtime's sessions by (segment, variant)."""
    return {step: graph.session for step, (graph,) in engine._open.items()}


def is_shared(left: Any, right: Any) -> bool:
    return bool(set(sessions(left).values()) & set(sessions(right).values()))


def with_file(folder: Path, name: str, data: bytes) -> Bundle:
    """A bundle in whose manifest this file has these bytes."""
    (folder / name).write_bytes(data)
    manifest = open_bundle(folder).manifest
    fact = dataclasses.replace(manifest.files[name], sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    return Bundle(folder, dataclasses.replace(manifest, files={**manifest.files, name: fact}))


def test_changed_graph_is_refused(folder: Path) -> None:
    shutil.copy(folder / "segment_01.onnx", folder / "segment_00.onnx")
    with pytest.raises(BadBundle, match=r"segment_00\.onnx"):
        open_ort(open_bundle(folder))


def test_file_that_is_no_graph_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadBundle, match=r"segment_02\.onnx: not a graph as bundles hold them"):
        open_ort(with_file(folder, "segment_02.onnx", b"no graph"))


def test_graph_with_other_inputs_than_in_the_manifest_is_refused(folder: Path) -> None:
    bundle = with_file(folder, "segment_02.onnx", (CLASSIFIER / "segment_01.onnx").read_bytes())
    with pytest.raises(BadBundle, match=r"segment_02\.onnx: inputs .* the manifest"):
        open_ort(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": ("batch", "seq", 99)}, r"is \[.*the manifest .*99"),
        ({"dtype": "float16"}, "is float, the"),
    ],
)
def test_graph_with_another_output_than_in_the_manifest_is_refused(change: Any, message: str) -> None:
    bundle = open_bundle(CLASSIFIER)
    stem = bundle.manifest.stem
    tensors = [
        dataclasses.replace(tensor, **change) if tensor.name == "hidden" else tensor
        for tensor in stem.first_graph.outputs
    ]
    graph = dataclasses.replace(stem.first_graph, outputs=tuple(tensors))
    stem = dataclasses.replace(stem, variants={"fp32": graph})
    with pytest.raises(BadBundle, match=rf"stem\.onnx: output hidden {message}"):
        open_ort(Bundle(CLASSIFIER, dataclasses.replace(bundle.manifest, stem=stem)))


def test_engines_on_one_bundle_share_graphs_but_no_memory(engine: Any) -> None:
    other = open_ort(open_bundle(CLASSIFIER))
    assert sessions(other) == sessions(engine) and len(sessions(other)) == 4
    feeds = [inputs(2, 8, seed=1), inputs(2, 8, seed=2)]  # of one shape
    states = [engine.begin(feeds[0]), other.begin(feeds[1])]
    signals = [engine.step(0, 0, states[0]), other.step(0, 0, states[1])]
    assert_equal(signals[0], outputs(feeds[0])[0])
    assert_equal(signals[1], outputs(feeds[1])[0])
    other.close()
    assert_equal(engine.step(1, 0, states[0]), outputs(feeds[0])[1])


def test_engine_without_share_has_its_own_graphs(engine: Any) -> None:
    unshared, again = (open_ort(open_bundle(CLASSIFIER), share=share) for share in (False, True))
    assert not is_shared(unshared, engine)
    assert sessions(again) == sessions(engine)


@pytest.mark.slow
def test_shared_graph_is_not_read_again(folder: Path) -> None:
    bundle = open_bundle(folder)
    first = open_ort(bundle)
    (folder / "segment_01.onnx").unlink()
    second = open_ort(bundle)
    assert sessions(first) == sessions(second)
    first.close()
    second.close()
    del first, second
    gc.collect()
    with pytest.raises(FileNotFoundError, match="segment_01"):
        open_ort(bundle)


def test_graphs_of_another_folder_manifest_or_pool_are_not_shared(engine: Any, folder: Path) -> None:
    bundle = open_bundle(folder)
    copied = open_ort(bundle)
    assert not is_shared(copied, engine)
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    (folder / "manifest.json").write_text(text.replace('"random"', '"other"'), encoding="utf-8")
    rewritten = open_bundle(folder)
    assert rewritten != bundle
    assert not is_shared(open_ort(rewritten), copied)
    pools = engine._pool, dataclasses.replace(engine._pool, kind="another")
    openers = [graphs.BundleGraphs(onnxruntime, open_bundle(CLASSIFIER), "cpu", pool, {}) for pool in pools]
    stem = bundle.manifest.stem.first_graph
    assert openers[0].read(stem)[1] is engine._open[-1, 0][0]
    assert openers[1].read(stem)[1] is not engine._open[-1, 0][0]


def test_graph_that_no_engine_runs_is_freed(folder: Path) -> None:
    bundle = open_bundle(folder)
    before = len(graphs._known)
    first, second = open_ort(bundle), open_ort(bundle)
    assert len(graphs._known) == before + 4
    first.close()
    assert len(graphs._known) == before + 4
    second.close()
    assert len(graphs._known) == before


def test_engines_that_open_at_once_open_each_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, engines, make = [], [], onnxruntime.InferenceSession

    def counted(*args: Any, **options: Any) -> Any:
        if args[0] != threads._PROBE:  # by which an engine asks for the global pool, if there is none yet
            opened.append(threading.get_ident())
        return make(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    workers = [
        threading.Thread(target=lambda: engines.append(open_ort(open_bundle(folder)))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(engines) == 4 and len(opened) == 4  # the stem and three segments
    for engine in engines:
        engine.close()


def test_engines_that_share_graphs_run_at_once(engine: Any) -> None:
    wrong = []

    def walk(seed: int) -> None:
        own_engine = open_ort(open_bundle(CLASSIFIER))
        feeds = inputs(2, 8, seed)
        expected = outputs(feeds)
        for _ in range(50):
            state = own_engine.begin(feeds)
            for segment in range(3):
                logits = own_engine.step(segment, 0, state).logits
                if not np.allclose(logits, expected[segment]["logits"], atol=1e-4):
                    wrong.append(seed)
            own_engine.drop(state)

    workers = [threading.Thread(target=walk, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_bytes_of_files_are_not_kept(engine: Any) -> None:
    for session in sessions(engine).values():
        assert not [name for name, value in vars(session).items() if isinstance(value, bytes) and value]
