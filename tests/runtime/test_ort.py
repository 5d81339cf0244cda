"""The ONNX Runtime engine against the same graphs in plain sessions."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from plain_sessions import assert_equal, inputs, outputs
from tiny_bundles import CLASSIFIER

from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines.base import EngineOptions, open_engine
from offramp.runtime.errors import BadBundle, BadSetting, EngineUnavailable


def open_ort(folder: Path = CLASSIFIER, variant: str = "fp32", **options: Any) -> Any:
    return open_engine(open_bundle(folder), variant, EngineOptions(**options))


@pytest.fixture
def engine() -> Iterator[Any]:
    engine = open_ort()
    yield engine
    engine.close()


def opened_steps(engine: Any) -> set[tuple[int, int]]:
    return set(engine._open)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 8), (3, 48)])
def test_steps_equal_the_graphs_one_after_another(engine: Any, shape: tuple[int, int]) -> None:
    feeds = inputs(*shape)
    for _ in range(2):  # the second time on buffers that are used again
        state = engine.begin(feeds)
        assert (state.rows, state.length) == shape
        for segment, expected in enumerate(outputs(feeds)):
            assert_equal(engine.step(segment, 0, state), expected)
        engine.drop(state)


def test_skipped_segments_and_another_variant(engine: Any) -> None:
    feeds = inputs(4, 9)
    state = engine.begin(feeds)
    expected = outputs(feeds, ["int8", "", "fp32"])
    assert_equal(engine.step(0, 1, state), expected[0])
    engine.skip(1, state)
    assert_equal(engine.step(2, 0, state), expected[2])


def test_rows_that_are_taken_go_on_as_before(engine: Any) -> None:
    feeds, rows = inputs(6, 8), np.array([0, 3, 5])
    expected = outputs(feeds)
    state = engine.begin(feeds)
    engine.step(0, 0, state)
    fewer = engine.take(state, rows)
    engine.drop(state)
    assert fewer.rows == 3
    assert_equal(engine.step(1, 0, fewer), expected[1], rows)
    assert_equal(engine.step(2, 0, fewer), expected[2], rows)


def test_state_that_rows_were_taken_from_goes_on_as_before(engine: Any) -> None:
    feeds = inputs(6, 8)
    state = engine.begin(feeds)
    engine.step(0, 0, state)
    fewer = engine.take(state, np.array([1]))
    engine.step(1, 0, fewer)
    assert_equal(engine.step(1, 0, state), outputs(feeds)[1])


def test_rows_that_are_joined_go_on_as_before(engine: Any) -> None:
    feeds = [inputs(2, 8, seed=1), inputs(3, 8, seed=2)]
    expected = [
        {name: np.concatenate([left[name], right[name]]) for name in left}
        for left, right in zip(*map(outputs, feeds), strict=True)
    ]
    states = [engine.begin(feed) for feed in feeds]
    for state in states:
        engine.step(0, 0, state)
    joined = engine.join(states)
    for state in states:
        engine.drop(state)
    assert joined.rows == 5
    assert_equal(engine.step(1, 0, joined), expected[1])
    assert_equal(engine.step(2, 0, joined), expected[2])


def test_states_of_one_shape_do_not_share_memory(engine: Any) -> None:
    feeds = [inputs(2, 8, seed=1), inputs(2, 8, seed=2)]
    states = [engine.begin(feed) for feed in feeds]
    signals = [[engine.step(segment, 0, state) for state in states] for segment in (0, 1)]
    for number, feed in enumerate(feeds):
        expected = outputs(feed)
        assert_equal(signals[0][number], expected[0])
        assert_equal(signals[1][number], expected[1])


def test_files_of_other_variants_are_not_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    for path in folder.glob("*_int8.onnx"):
        path.unlink()
    engine = open_ort(folder)
    engine.step(0, 0, engine.begin(inputs(1, 4)))
    with pytest.raises(FileNotFoundError, match=r"segment_01_int8\.onnx"):
        engine.step(1, 1, engine.begin(inputs(1, 4)))
    with pytest.raises(FileNotFoundError):
        open_ort(folder, "int8")


def test_variant_that_the_bundle_lacks_is_refused() -> None:
    with pytest.raises(BadSetting, match=r"variant 'int4' is not in .*tiny_bundle; it offers: fp32, int8"):
        open_ort(variant="int4")


def test_graph_that_fails_names_its_file(engine: Any) -> None:
    feeds = inputs(1, 4)
    feeds["input_ids"][0, 0] = 10**6
    with pytest.raises(BadBundle, match=r"stem\.onnx: ONNX Runtime cannot run it \(stem\)"):
        engine.begin(feeds)
    assert engine.begin(inputs(1, 4)).rows == 1, "the engine is usable after the error"


def test_lazy_engine_opens_a_segment_when_a_row_reaches_it() -> None:
    engine = open_ort(lazy=True)
    assert opened_steps(engine) == {(-1, 0)}
    feeds = inputs(2, 5)
    state = engine.begin(feeds)
    assert_equal(engine.step(0, 0, state), outputs(feeds)[0])
    assert opened_steps(engine) == {(-1, 0), (0, 0)}
    engine.prepare(1, range(3))
    assert opened_steps(engine) == {(-1, 0), (0, 0), (0, 1), (1, 1), (2, 1)}
    engine.close()
    assert not opened_steps(engine)


def test_name_device_and_facts(engine: Any) -> None:
    assert (engine.name, engine.device) == ("ort", "cpu")
    assert engine.facts["onnxruntime"] == onnxruntime.__version__
    assert set(engine.facts) == {"onnxruntime", "threads", "pool"}


def test_missing_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineUnavailable, match=r"has no CUDAExecutionProvider.*offramp\[gpu\]"):
        open_ort(device="cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is a CUDA build")
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    with pytest.raises(EngineUnavailable, match="cuda"):
        open_ort(device="cuda")


def test_missing_onnxruntime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'offramp\[cpu\]'"):
        open_ort()
    with pytest.raises(EngineUnavailable, match=r"pip install 'offramp\[gpu\]'"):
        open_ort(device="cuda")
