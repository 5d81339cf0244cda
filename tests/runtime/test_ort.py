"""The ONNX Runtime engine against the same graphs run by hand, and everything that it refuses."""

import dataclasses
import gc
import hashlib
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.engines import buffers, graphs, threads
from offramp.runtime.engines.base import open_engine
from offramp.runtime.engines.ort import OrtEngine
from offramp.runtime.errors import BadBundle, EngineUnavailable

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
NEXT = "next_"


@pytest.fixture
def engine():
    engine = open_engine("ort", open_bundle(TINY))
    yield engine
    engine.close()


def inputs(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    ids = random.integers(4, 20, (rows, length))
    mask = (np.arange(length) < random.integers(1, length + 1, (rows, 1))).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def by_hand(feeds: dict[str, np.ndarray], variants: list[str]) -> list[dict[str, np.ndarray]]:
    """Every segment's outputs, run with plain sessions; variants: of each segment, "" to skip it."""
    manifest = open_bundle(TINY).manifest
    said, tensors = [], dict(feeds)
    for stage, variant in zip((manifest.stem, *manifest.segments), ["fp32", *variants], strict=True):
        if not variant:
            said.append({})
            continue
        options = onnxruntime.SessionOptions()
        threads.fit(options)
        session = onnxruntime.InferenceSession(
            str(TINY / stage.variants[variant].file), options, providers=["CPUExecutionProvider"]
        )
        names = [node.name for node in session.get_outputs()]
        found = session.run(names, {node.name: tensors[node.name] for node in session.get_inputs()})
        out = dict(zip(names, found, strict=True))
        tensors |= {name.removeprefix(NEXT): value for name, value in out.items()}
        said.append(out)
    return said[1:]


def agree(signals, expected: dict[str, np.ndarray], rows=slice(None)) -> None:
    np.testing.assert_allclose(signals.logits, expected["logits"][rows], atol=1e-4)
    assert (signals.gate is None) == ("gate" not in expected)
    if signals.gate is not None:
        np.testing.assert_allclose(signals.gate, expected["gate"][rows], atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 8), (3, 48)])
def test_a_walk_is_the_graphs_one_after_another(engine: OrtEngine, shape: tuple[int, int]) -> None:
    feeds = inputs(*shape)
    for _ in range(2):  # the second time on buffers that are used again
        state = engine.begin(feeds)
        assert (state.rows, state.length) == shape
        for segment, expected in enumerate(by_hand(feeds, ["fp32"] * 3)):
            agree(engine.step(segment, 0, state), expected)
        engine.drop(state)


def test_segments_can_be_skipped_and_change_precision(engine: OrtEngine) -> None:
    feeds = inputs(4, 9)
    state = engine.begin(feeds)
    expected = by_hand(feeds, ["int8", "", "fp32"])
    agree(engine.step(0, 1, state), expected[0])
    agree(engine.step(2, 0, state), expected[2])


def test_rows_that_are_taken_go_on_as_they_were(engine: OrtEngine) -> None:
    feeds, rows = inputs(6, 8), np.array([0, 3, 5])
    expected = by_hand(feeds, ["fp32"] * 3)
    state = engine.begin(feeds)
    engine.step(0, 0, state)
    fewer = engine.take(state, rows)
    engine.drop(state)
    assert fewer.rows == 3
    agree(engine.step(1, 0, fewer), expected[1], rows)
    agree(engine.step(2, 0, fewer), expected[2], rows)


def test_rows_that_are_joined_go_on_as_they_were(engine: OrtEngine) -> None:
    one, other = inputs(2, 8, seed=1), inputs(3, 8, seed=2)
    expected = [
        {name: np.concatenate([a[name], b[name]]) for name in a}
        for a, b in zip(by_hand(one, ["fp32"] * 3), by_hand(other, ["fp32"] * 3), strict=True)
    ]
    states = [engine.begin(one), engine.begin(other)]
    for state in states:
        engine.step(0, 0, state)
    joined = engine.join(states)
    for state in states:
        engine.drop(state)
    assert joined.rows == 5
    agree(engine.step(1, 0, joined), expected[1])
    agree(engine.step(2, 0, joined), expected[2])


def test_states_of_one_shape_do_not_share_memory(engine: OrtEngine) -> None:
    one, other = inputs(2, 8, seed=1), inputs(2, 8, seed=2)
    states = [engine.begin(one), engine.begin(other)]
    first = [engine.step(0, 0, state) for state in states]
    second = [engine.step(1, 0, state) for state in states]
    for feeds, a, b in zip((one, other), first, second, strict=True):
        expected = by_hand(feeds, ["fp32"] * 3)
        agree(a, expected[0])
        agree(b, expected[1])


def test_buffers_are_used_again_and_never_more_than_allowed(
    engine: OrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = engine.begin(inputs(1, 5))
    kept = state.buffers
    engine.drop(state)
    assert engine.begin(inputs(1, 5)).buffers is kept
    monkeypatch.setattr(buffers, "_IDLE_COUNT", 3)
    for length in range(1, 20):
        engine.drop(engine.begin(inputs(1, length)))
    assert len(engine._shelf._idle) == 3
    monkeypatch.setattr(buffers, "_IDLE_BYTES", 1)
    engine.drop(engine.begin(inputs(1, 20)))
    assert len(engine._shelf._idle) == 1


def test_files_of_other_variants_are_not_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    for path in folder.glob("*_int8.onnx"):
        path.unlink()
    engine = open_engine("ort", open_bundle(folder), variant="fp32")
    engine.step(0, 0, engine.begin(inputs(1, 4)))
    with pytest.raises(FileNotFoundError, match=r"segment_01_int8\.onnx"):
        engine.step(1, 1, engine.begin(inputs(1, 4)))
    with pytest.raises(FileNotFoundError):
        open_engine("ort", open_bundle(folder), variant="int8")


def test_a_changed_graph_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    shutil.copy(folder / "segment_01.onnx", folder / "segment_00.onnx")
    with pytest.raises(BadBundle, match=r"segment_00\.onnx"):
        open_engine("ort", open_bundle(folder))


def with_file(folder: Path, name: str, data: bytes) -> Bundle:
    """A bundle whose manifest vouches for these bytes."""
    (folder / name).write_bytes(data)
    manifest = open_bundle(folder).manifest
    fact = dataclasses.replace(manifest.files[name], sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    return Bundle(folder, dataclasses.replace(manifest, files={**manifest.files, name: fact}))


def test_a_file_that_is_no_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    with pytest.raises(BadBundle, match=r"segment_02\.onnx: ONNX Runtime cannot open it"):
        open_engine("ort", with_file(folder, "segment_02.onnx", b"no graph"))


def test_a_graph_with_other_inputs_than_the_manifest_says(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    bundle = with_file(folder, "segment_02.onnx", (TINY / "segment_01.onnx").read_bytes())
    with pytest.raises(BadBundle, match=r"segment_02\.onnx: inputs .* the manifest says"):
        open_engine("ort", bundle)


def test_a_graph_of_another_width_than_the_manifest_says() -> None:
    bundle = open_bundle(TINY)

    def wider(variant):
        tensors = [
            dataclasses.replace(t, shape=(*t.shape[:-1], 99)) if t.name.endswith("hidden") else t
            for t in variant.outputs
        ]
        return dataclasses.replace(variant, outputs=tuple(tensors))

    stem = dataclasses.replace(
        bundle.manifest.stem, variants={"fp32": wider(bundle.manifest.stem.variants["fp32"])}
    )
    with pytest.raises(BadBundle, match=r"stem\.onnx: output hidden is .*the manifest says .*99"):
        open_engine("ort", Bundle(TINY, dataclasses.replace(bundle.manifest, stem=stem)))


def test_a_graph_that_fails_names_its_file(engine: OrtEngine) -> None:
    feeds = inputs(1, 4)
    feeds["input_ids"][0, 0] = 10**6
    with pytest.raises(BadBundle, match=r"stem\.onnx: ONNX Runtime cannot run it"):
        engine.begin(feeds)


def sessions(engine: OrtEngine) -> dict:
    return {step: graph.session for step, graph in engine._open.items()}


def test_engines_on_one_bundle_share_what_is_open(engine: OrtEngine) -> None:
    other = open_engine("ort", open_bundle(TINY))
    assert sessions(other) == sessions(engine) and len(sessions(other)) == 4
    one, two = inputs(2, 8, seed=1), inputs(2, 8, seed=2)  # of one shape: buffers must not be shared
    states = [engine.begin(one), other.begin(two)]
    first = [engine.step(0, 0, states[0]), other.step(0, 0, states[1])]
    agree(first[0], by_hand(one, ["fp32"] * 3)[0])
    agree(first[1], by_hand(two, ["fp32"] * 3)[0])
    other.close()
    agree(engine.step(1, 0, states[0]), by_hand(one, ["fp32"] * 3)[1])


def test_sharing_can_be_declined(engine: OrtEngine) -> None:
    alone = open_engine("ort", open_bundle(TINY), share=False)
    again = open_engine("ort", open_bundle(TINY))
    assert not set(sessions(alone).values()) & set(sessions(engine).values())
    assert sessions(again) == sessions(engine)


def test_a_shared_graph_is_not_read_again(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    bundle = open_bundle(folder)
    one = open_engine("ort", bundle)
    (folder / "segment_01.onnx").unlink()
    two = open_engine("ort", bundle)
    assert sessions(one) == sessions(two)
    one.close()
    two.close()
    del one, two
    gc.collect()
    with pytest.raises(FileNotFoundError, match="segment_01"):
        open_engine("ort", bundle)


def test_another_folder_or_manifest_or_pool_is_not_shared(engine: OrtEngine, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    bundle = open_bundle(folder)
    copied = open_engine("ort", bundle)
    assert not set(sessions(copied).values()) & set(sessions(engine).values())
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    (folder / "manifest.json").write_text(text.replace('"random"', '"other"'), encoding="utf-8")
    written_anew = open_bundle(folder)
    assert written_anew != bundle
    changed = open_engine("ort", written_anew)
    assert not set(sessions(changed).values()) & set(sessions(copied).values())
    alike = dataclasses.replace(engine._pool, kind="another")
    slots = [graphs.Graphs(onnxruntime, open_bundle(TINY), "cpu", p, {}) for p in (engine._pool, alike)]
    facts = bundle.manifest.stem.variants["fp32"]
    assert slots[0].read(facts)[1] is engine._open[-1, 0]
    assert slots[1].read(facts)[1] is not engine._open[-1, 0]


def test_what_nobody_runs_is_let_go(tmp_path: Path) -> None:
    bundle = open_bundle(Path(shutil.copytree(TINY, tmp_path / "bundle")))
    before = len(graphs._known)
    one, two = open_engine("ort", bundle), open_engine("ort", bundle)
    assert len(graphs._known) == before + 4
    one.close()
    assert len(graphs._known) == before + 4
    two.close()
    assert len(graphs._known) == before


def test_engines_that_open_at_once_open_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    opened, made = [], onnxruntime.InferenceSession

    def count(*args, **options):
        opened.append(threading.get_ident())
        return made(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", count)
    engines = []
    work = [
        threading.Thread(target=lambda: engines.append(open_engine("ort", open_bundle(folder))))
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(engines) == 4 and len(opened) == 4  # the stem and three segments
    for engine in engines:
        engine.close()


def test_engines_that_share_run_at_once(engine: OrtEngine) -> None:
    wrong = []

    def walk(seed: int) -> None:
        own = open_engine("ort", open_bundle(TINY))
        feeds = inputs(2, 8, seed)
        expected = by_hand(feeds, ["fp32"] * 3)
        for _ in range(50):
            state = own.begin(feeds)
            for segment in range(3):
                if not np.allclose(
                    own.step(segment, 0, state).logits, expected[segment]["logits"], atol=1e-4
                ):
                    wrong.append(seed)
            own.drop(state)

    work = [threading.Thread(target=walk, args=(seed,)) for seed in range(3)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert not wrong


def test_the_bytes_of_files_are_not_kept(engine: OrtEngine) -> None:
    for session in sessions(engine).values():
        assert not [name for name, value in vars(session).items() if isinstance(value, bytes) and value]


def test_a_lazy_engine_opens_a_segment_when_a_row_gets_there() -> None:
    bundle = open_bundle(TINY)
    engine = open_engine("ort", bundle, threads=None, lazy=True)
    assert set(sessions(engine)) == {(-1, 0)}
    feeds = inputs(2, 5)
    state = engine.begin(feeds)
    agree(engine.step(0, 0, state), by_hand(feeds, ["fp32"] * 3)[0])
    assert set(sessions(engine)) == {(-1, 0), (0, 0)}
    engine.prepare(1, range(3))
    assert set(sessions(engine)) == {(-1, 0), (0, 0), (0, 1), (1, 1), (2, 1)}
    engine.close()


def test_what_really_runs_is_said(engine: OrtEngine) -> None:
    assert (engine.name, engine.device) == ("ort", "cpu")
    assert engine.facts["onnxruntime"] == onnxruntime.__version__
    assert set(engine.facts) == {"onnxruntime", "threads", "pool"}


def test_cuda_that_is_not_there_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineUnavailable, match=r"has no CUDAExecutionProvider.*offramp\[gpu\]"):
        open_engine("ort", open_bundle(TINY), device="cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_start_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a CUDA build here")
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    with pytest.raises(EngineUnavailable, match="cuda"):
        open_engine("ort", open_bundle(TINY), device="cuda")


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'offramp\[cpu\]'"):
        open_engine("ort", open_bundle(TINY))
    with pytest.raises(EngineUnavailable, match=r"pip install 'offramp\[gpu\]'"):
        open_engine("ort", open_bundle(TINY), device="cuda")


def fresh(code: str) -> str:
    """What code prints in a process of its own: the thread pool is made once a process."""
    before = f"TINY = {str(TINY)!r}\nfrom offramp.runtime import *\nimport onnxruntime as ort\n"
    done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


OTHER = """
def other(*options):
    ort.InferenceSession(TINY + "/stem.onnx", *options, providers=["CPUExecutionProvider"])
"""
GLOBAL = pytest.mark.skipif(
    not hasattr(onnxruntime, "set_global_thread_pool_sizes"), reason="this onnxruntime has no global pool"
)


@GLOBAL
def test_the_first_session_makes_the_global_pool() -> None:
    assert fresh("f = load(TINY, threads=2).engine.facts; print(f['pool'], f['threads'])") == "global 2"


@GLOBAL
def test_another_number_of_threads_in_one_process_is_refused() -> None:
    code = """
load(TINY, threads=2)
print(load(TINY, threads=2).engine.facts['threads'], load(TINY).engine.facts['threads'])
try:
    load(TINY, threads=1)
except EngineUnavailable as problem:
    print(problem)
"""
    said = fresh(code).splitlines()
    assert said[0] == "2 2" and "already walks on a global pool of 2 threads" in said[1]


@GLOBAL
def test_sessions_that_the_application_opened_before_do_no_harm() -> None:
    code = (
        OTHER
        + """
other()
session = load(TINY, threads=2)
print(session.engine.facts["pool"], session("good film").exit > 0)
"""
    )
    assert fresh(code) == "global True"


@GLOBAL
def test_a_session_of_the_application_fits_in_beside_a_walk() -> None:
    code = (
        OTHER
        + """
from offramp.runtime.engines import threads
session = load(TINY, threads=2)
options = ort.SessionOptions()
threads.fit(options)
other(options)
print("both")
"""
    )
    assert fresh(code) == "both"


def test_the_process_can_be_left_alone() -> None:
    code = (
        OTHER
        + """
for wishes in ({"global_pool": False}, {"threads": 1}):
    session = load(TINY, **wishes)
    print(session.engine.facts["pool"], session("good film").exit > 0)
    other()
"""
    )
    assert fresh(code).splitlines() == ["one a session, not spinning True", "none, one thread True"]


@GLOBAL
def test_a_pool_of_the_application_is_used_and_said() -> None:
    code = (
        OTHER
        + """
ort.set_global_thread_pool_sizes(2, 1)
options = ort.SessionOptions()
options.use_per_session_threads = False
other(options)
for wishes in ({"threads": 2}, {"threads": 1}, {"global_pool": False}, {}):
    try:
        session = load(TINY, **wishes)
        print(session.engine.facts, session("good film").exit > 0)
    except EngineUnavailable as problem:
        print("refused", problem)
"""
    )
    said = fresh(code).splitlines()
    assert all(line.startswith("refused") and "leave threads" in line for line in said[:3])
    assert "'threads': \"the application's\"" in said[3] and said[3].endswith("True")


def test_without_a_global_pool_sessions_do_not_spin() -> None:
    code = """
if hasattr(ort, "set_global_thread_pool_sizes"):
    del ort.set_global_thread_pool_sizes
session = load(TINY, threads=2)
print(session.engine.facts["pool"], session("good film").exit > 0)
"""
    assert re.fullmatch(
        r"one a session, not spinning \(onnxruntime .* has no global pool\) True", fresh(code)
    )


def test_cores_are_at_least_one() -> None:
    assert threads.usable_cores() >= 1
