"""Baselines: their list read strictly, single graphs against the walk, random exits, fresh processes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundles

from offramp.runtime import BadBundle, BundleNotFound, Classifier, EngineUnavailable, load_classifier
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.inputs.text import items_to_rows, open_reader
from offramp.runtime.loading import load_row_session
from offramp.runtime.rules import RowSignals
from offramp.runtime.tuning.baselines import (
    graph_script,
    nested_threshold,
    open_baseline,
    random_exits,
    read_baselines,
    time_cold_start,
    time_cold_starts,
    walk_arguments,
    walk_script,
)
from offramp.runtime.tuning.timing import AnswersAndExits, walk_candidate

DATA = Path(__file__).parents[1] / "data"
TINY, BASELINES = DATA / "tiny_bundle", DATA / "tiny_baselines"
TASKS = [tiny_bundles.MULTI_LABEL, tiny_bundles.TOKENS, tiny_bundles.REGRESSION, tiny_bundles.EMBEDDING]
TEXTS = ["good film", "the plot was very bad", "a", "not at all warm and not good", "cold cold scene"]


@pytest.fixture(scope="module")
def session() -> Iterator[Classifier]:
    with load_classifier(TINY, rule="never") as session:
        yield session


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASELINES, tmp_path / "baselines"))


def answers(
    session: Classifier, name: str, texts: list[str], threshold: float | None = None
) -> AnswersAndExits:
    """What a graph of the tiny baselines answers, text by text."""
    fact = next(g for g in read_baselines(BASELINES, session.manifest).graphs if g.name == name)
    baseline = open_baseline(BASELINES, fact, session.manifest, threads=None, threshold=threshold)
    singles = [[(np.zeros(1, np.int64), session.encode(text))] for text in texts]
    results = [baseline.run(single, 1, 1)() for single in singles]
    return np.concatenate([labels for labels, _ in results]), np.concatenate([exits for _, exits in results])


def test_the_list_is_read(session: Classifier) -> None:
    baselines = read_baselines(BASELINES, session.manifest)
    assert [graph.kind for graph in baselines.graphs] == ["monolith", "monolith", "nested", "truncated"]
    assert baselines.graphs[0].exit == len(session.manifest.segments)


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_monolith_is_the_full_walk(session: Classifier, variant: str) -> None:
    labels, exits = answers(session, "monolith" if variant == "fp32" else "monolith_int8", TEXTS)
    with load_classifier(TINY, rule="never", variant=variant) as walk:
        assert [session.labels[label] for label in labels] == [walk(text).label for text in TEXTS]
    assert exits.tolist() == [3] * len(TEXTS)


def test_a_truncated_graph_is_a_walk_to_its_exit(session: Classifier) -> None:
    labels, exits = answers(session, "truncated_01", TEXTS)
    with load_classifier(TINY, rule="fixed", threshold=1) as walk:
        assert [session.labels[label] for label in labels] == [walk(text).label for text in TEXTS]
    assert set(exits) == {1}


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.6, 2.0])
def test_a_nested_graph_leaves_where_the_gate_does(session: Classifier, threshold: float) -> None:
    labels, exits = answers(session, "nested", TEXTS, threshold)
    with load_classifier(TINY, rule="gate", threshold=threshold) as walk:
        expected = [walk(text) for text in TEXTS]
    assert exits.tolist() == [answer.exit for answer in expected]
    assert [session.labels[label] for label in labels] == [answer.label for answer in expected]


def test_a_batch_is_answered_as_its_rows_are(session: Classifier) -> None:
    manifest = session.manifest
    fact = read_baselines(BASELINES, manifest).graphs[0]
    baseline = open_baseline(BASELINES, fact, manifest, threads=None, threshold=None)
    rows = items_to_rows(open_reader(open_bundle(TINY)), TEXTS)
    labels, _ = baseline.run(list(session.batches(rows, 2)), len(rows), 2)()
    assert labels.tolist() == answers(session, "monolith", TEXTS)[0].tolist()


@pytest.mark.parametrize("bundle", TASKS, ids=lambda bundle: bundle.name)
def test_a_graph_of_another_task_is_the_walk_to_its_exit(bundle: Path) -> None:
    folder = tiny_bundles.baselines_of(bundle)
    manifest = open_bundle(bundle).manifest
    for fact in read_baselines(folder, manifest).graphs:
        if fact.kind == "nested":
            continue
        rule = RuleSpec("fixed", {"exit": float(fact.exit)})
        with load_row_session(bundle, rule=rule) as session:
            rows = items_to_rows(open_reader(open_bundle(bundle)), TEXTS)
            batches = list(session.batches(rows, 2))
            graph = open_baseline(folder, fact, manifest, threads=None, threshold=None)
            walked, walk_exits = walk_candidate(session, "walk", "walk").run(batches, len(rows), 2)()
            answers, exits = graph.run(batches, len(rows), 2)()
        assert exits.tolist() == walk_exits.tolist() == [fact.exit] * len(TEXTS)
        for own, other in zip(answers, walked, strict=True):
            assert np.asarray(own, np.float64) == pytest.approx(np.asarray(other, np.float64), abs=1e-5)


def test_a_nested_graph_of_numbers_leaves_where_the_gate_does() -> None:
    bundle, manifest = tiny_bundles.REGRESSION, open_bundle(tiny_bundles.REGRESSION).manifest
    folder = tiny_bundles.baselines_of(bundle)
    fact = next(graph for graph in read_baselines(folder, manifest).graphs if graph.kind == "nested")
    with load_row_session(bundle, rule="gate", threshold=0.7) as session:
        threshold = nested_threshold(manifest, session.rule)
        graph = open_baseline(folder, fact, manifest, threads=None, threshold=threshold)
        for text in TEXTS:
            values, exits = graph.run([(np.zeros(1, np.int64), session.encode(text))], 1, 1)()
            answer = session(text)
            assert exits[0] == answer.exit and values[0] == pytest.approx(answer.value, abs=1e-5)


def change(folder: Path, **facts: Any) -> None:
    """Other values in the first graph's entry."""
    value = json.loads((folder / "baselines.json").read_text(encoding="utf-8"))
    value["graphs"][0] |= facts
    (folder / "baselines.json").write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"kind": "duolith"}, "kind"),
        ({"name": "nested"}, "name"),
        ({"name": ""}, "name"),
        ({"file": "../monolith.onnx"}, "file"),
        ({"exit": 9}, "exit"),
        ({"exit": 1}, "exit"),
        ({"exit": "3"}, "exit"),
        ({"sha256": "XY"}, "sha256"),
        ({"bytes": 0}, "bytes"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, session: Classifier, facts: dict[str, Any], named: str) -> None:
    change(folder, **facts)
    with pytest.raises(
        BadBundle, match=rf"baselines\.json: baselines\.graphs\[\d\]\.{named}: .*ee-split --baselines"
    ):
        read_baselines(folder, session.manifest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2}', "format: 2 is not known"),
        ('{"format": 1, "labels": ["negative", "positive"], "graphs": []}', "graphs: empty"),
        ('{"format": 1, "labels": ["yes", "no"], "graphs": []}', "labels"),
        ("[", "not valid JSON"),
        ("[]", "expected an object"),
    ],
)
def test_a_bad_list_is_refused(folder: Path, session: Classifier, text: str, message: str) -> None:
    (folder / "baselines.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadBundle, match=message):
        read_baselines(folder, session.manifest)


def test_a_folder_without_a_list(tmp_path: Path, session: Classifier) -> None:
    with pytest.raises(BundleNotFound, match="ee-split --baselines"):
        read_baselines(tmp_path, session.manifest)
    with pytest.raises(BundleNotFound):
        read_baselines(tmp_path / "none", session.manifest)


def test_a_changed_graph_is_refused(folder: Path, session: Classifier) -> None:
    fact = read_baselines(folder, session.manifest).graphs[0]
    path = folder / fact.file
    for data in (path.read_bytes()[:-1], path.read_bytes() + b"x", path.read_bytes()[:-1] + b"x"):
        path.write_bytes(data)
        with pytest.raises(BadBundle, match=r"monolith\.onnx: size or sha256"):
            open_baseline(folder, fact, session.manifest, threads=None, threshold=None)
    path.unlink()
    with pytest.raises(BundleNotFound, match=r"monolith\.onnx: missing"):
        open_baseline(folder, fact, session.manifest, threads=None, threshold=None)
    path.mkdir()
    with pytest.raises(BadBundle, match="not a regular file"):
        open_baseline(folder, fact, session.manifest, threads=None, threshold=None)


@pytest.mark.parametrize("file", ["segment_00.onnx", "stem.onnx", "tokenizer.json"])
def test_another_graph_under_its_name_is_refused(folder: Path, session: Classifier, file: str) -> None:
    shutil.copy(TINY / file, folder / "monolith.onnx")
    fact = session.manifest.files[file]
    change(folder, sha256=fact.sha256, bytes=fact.bytes)
    baseline = read_baselines(folder, session.manifest).graphs[0]
    with pytest.raises(BadBundle, match=r"monolith\.onnx: (inputs|outputs|not a graph)"):
        open_baseline(folder, baseline, session.manifest, threads=None, threshold=None)


def test_a_nested_graph_needs_a_rule_that_is_its_own(session: Classifier) -> None:
    assert nested_threshold(session.manifest, RuleSpec("gate", {"threshold": 0.3})) == 0.3
    assert nested_threshold(session.manifest, RuleSpec("patience", {"patience": 1})) is None
    assert nested_threshold(session.manifest, RuleSpec("max_probability", {"threshold": 0.9})) is None
    assert nested_threshold(session.manifest, None) is None


@pytest.mark.parametrize("together", [1, 50])
def test_random_exits_follow_the_histogram(together: int) -> None:
    rule, expected = random_exits([30, 0, 50, 20]), np.array([0.3, 0, 0.5, 0.2])
    counts = np.zeros(4)
    signals, memory = RowSignals(np.zeros((together, 2), np.float32)), np.zeros((together, 0), np.float32)
    for _ in range(3000 // together):
        plan = np.zeros((together, 4), np.int8)
        for segment in range(3):
            going = plan[:, segment + 1] >= 0
            new, _ = rule(signals, memory, plan, segment)
            plan[going] = new[going]
        counts += np.bincount((plan >= 0).sum(axis=1) - 1, minlength=4)
    assert np.abs(counts / counts.sum() - expected).max() < 0.03


def test_random_exits_have_a_seed() -> None:
    signals, memory = RowSignals(np.zeros((64, 2), np.float32)), np.zeros((64, 0), np.float32)
    plans = [
        random_exits([1, 1], seed)(signals, memory, np.zeros((64, 2), np.int8), 0)[0][:, 1].tolist()
        for seed in (1, 1, 2)
    ]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.slow
def test_a_walk_and_a_graph_start_in_fresh_processes(session: Classifier) -> None:
    walk = walk_candidate(session, "walk", "walk")
    item = ["good film", "bad plot"]
    manifest, facts = session.manifest, session.manifest.input
    paths = [str(BASELINES / "monolith.onnx"), str(TINY / facts.tokenizer), facts.longest, facts.prefix]
    scripts = (
        (walk_script(manifest.kind), walk_arguments(TINY, walk, 1, item)),
        (
            graph_script(manifest),
            [*paths, session.labels, [], 1, item],
        ),
    )
    expected = repr(session(*item).label)
    for script, arguments in scripts:
        answer, seconds, peak = time_cold_start(script, arguments)
        assert answer == expected
        assert seconds > 0 and 2**20 < peak < 2**30


@pytest.mark.slow
@pytest.mark.parametrize("bundle", TASKS, ids=lambda bundle: bundle.name)
def test_other_tasks_start_in_fresh_processes_too(bundle: Path) -> None:
    with load_row_session(bundle, rule="never") as session:
        manifest, facts = session.manifest, session.manifest.input
        walk = walk_candidate(session, "walk", "walk")
    paths = [str(tiny_bundles.baselines_of(bundle) / "monolith.onnx"), str(bundle / facts.tokenizer)]
    decided = [facts.longest, facts.prefix, manifest.labels, manifest.thresholds, 1]
    item = ["a good films at paris"]
    walked, _, _ = time_cold_start(walk_script(manifest.kind), walk_arguments(bundle, walk, 1, item))
    answer, _, _ = time_cold_start(graph_script(manifest), [*paths, *decided, item])
    assert walked == answer and answer not in ("", "[]")


@pytest.mark.slow
def test_a_parents_memory_is_not_the_childs() -> None:
    ballast = np.ones(40_000_000)
    peak = time_cold_start("import sys\nprint(1, flush=True)", [])[2]
    assert peak < ballast.nbytes / 4


@pytest.mark.slow
def test_starts_take_turns() -> None:
    script = "import sys\nprint(1, flush=True)"
    figures = time_cold_starts({"a": (script, []), "b": (script, [])}, 2)
    assert [candidate["name"] for candidate in figures] == ["a", "b"]
    assert all(len(candidate["each_seconds"]) == 2 and candidate["seconds"] > 0 for candidate in figures)


def test_the_error_of_a_failed_process_is_reported() -> None:
    with pytest.raises(EngineUnavailable, match=r"exit 1.*ValueError: no luck"):
        time_cold_start("raise ValueError('no luck')", [])


def test_load_options_open_the_same_walk() -> None:
    for point in ("default", "fast"):
        with load_classifier(TINY, point=point) as first:
            _, rule, options, _ = walk_arguments(TINY, walk_candidate(first, "x", "walk"), None, ["good"])
            with load_classifier(TINY, rule=RuleSpec(**rule), **options) as second:
                assert (first.rule, first.variant) == (second.rule, second.variant)


@pytest.mark.slow
def test_a_walk_starts_with_all_of_its_rule() -> None:
    # The bundle's own rule is another one, so that a name and a threshold do not say the rest.
    rule = RuleSpec("patience_confident", {"threshold": 0.9, "patience": 2.0}, temperatures=(0.5, 1.5, 1.0))
    item = ["good film"]
    with load_classifier(TINY, rule=rule) as session:
        walk, expected = walk_candidate(session, "walk", "walk"), session(*item).label
    answer, _, _ = time_cold_start(walk_script("classification"), walk_arguments(TINY, walk, 1, item))
    assert answer == repr(expected)
