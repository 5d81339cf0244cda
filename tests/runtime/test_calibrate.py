"""Calibration: points hold what walks at them give, by variant; routers; the manifest is written whole."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundles
from click.testing import CliRunner
from doubles import gpu

from offramp.runtime import BadSetting, RuleSpec, load_classifier, load_generator
from offramp.runtime.bundle.checks import read_manifest
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import Macs, OperatingPoint
from offramp.runtime.errors import BadManifest, EngineUnavailable
from offramp.runtime.loading import load_row_session
from offramp.runtime.rules import softmax
from offramp.runtime.rules.quee import walk_limits
from offramp.runtime.rules.route import ROUTER_FILE, list_routes
from offramp.runtime.tuning import exit_tables, measure_points
from offramp.runtime.tuning.calibrate import main
from offramp.runtime.tuning.completions import score_walk
from offramp.runtime.tuning.exit_tables import macs_to_exits
from offramp.runtime.tuning.labelled import read_labelled, read_pairs
from offramp.runtime.tuning.measure_points import exit_points

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent.parent / "data"
TINY, GENERATOR = DATA / "tiny_bundle", DATA / "tiny_generator"
TEXTS = ("good film", "bad film", "a good good plot", "dull", "film plot bad", "good", "so dull and bad")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "bundle"))


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    names = open_bundle(TINY).manifest.labels
    rows = [{"text": text, "label": names[at % len(names)]} for at, text in enumerate(TEXTS)]
    file = tmp_path / "dev.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("form", ["plain", "json", "agreement"])
def test_rows_without_labels_are_compared_with_full_depth(bundle: Path, dev: Path, form: str) -> None:
    words = ["--agreement"] if form == "agreement" else []
    if form == "plain":
        dev.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    elif form == "json":
        dev.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), *words])
    assert done.exit_code == 0, done.output
    assert "agreement %" in done.stdout
    assert ("points are chosen by agreement with full depth" in done.stderr) == (form != "agreement")
    points = {point.name: point for point in open_bundle(bundle).manifest.points}
    assert points["full"].measured["agreement"] == 100
    with load_classifier(bundle, point="full") as full, load_classifier(bundle, point="int8-default") as walk:
        same = [full(text).label == walk(text).label for text in TEXTS]
    assert 100 * np.mean(same) == pytest.approx(points["int8-default"].measured["agreement"], abs=1e-3)
    assert all("accuracy" not in point.measured for point in points.values())


def test_a_point_holds_what_a_walk_at_it_gives(bundle: Path, dev: Path) -> None:
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(bundle).manifest
    names = {point.name for point in manifest.points}
    assert {"default", "full", "int8-default", "int8-full"} <= names
    rows = read_labelled(dev, manifest.labels)
    for point in manifest.points:
        with load_classifier(bundle, point=point.name) as session:
            assert session.variant == point.variant
            answers = [session(str(item)) for item in rows.items]
        right = [a.label == manifest.labels[n] for a, n in zip(answers, rows.labels, strict=True)]
        assert 100 * np.mean(right) == pytest.approx(point.measured["accuracy"], abs=1e-3)
        assert np.mean([a.depth for a in answers]) == pytest.approx(point.measured["mean_exit"], abs=1e-3)
        assert (point.data, point.split) == ("dev.jsonl", "dev")
    facts = manifest.provenance["calibrated"]
    assert facts["rows"] == len(TEXTS) and facts["engine"] == "ort"
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "dev.jsonl"}


def test_the_rule_can_be_chosen_and_becomes_the_bundles_own(bundle: Path, dev: Path) -> None:
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--rule", "patience"])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(bundle).manifest
    assert {p.rule.name for p in manifest.points} <= {"patience", "never"}
    assert manifest.rule == next(p for p in manifest.points if p.name == "default").rule


def test_a_bundle_keeps_its_own_rule_though_it_has_policies(bundle: Path, dev: Path) -> None:
    words = [str(dev), "--bundle", str(bundle)]
    assert CliRunner().invoke(main, [*words, "--rule", "patience_confident"]).exit_code == 0
    assert CliRunner().invoke(main, words).exit_code == 0
    points = open_bundle(bundle).manifest.points
    assert {p.rule.name for p in points} <= {"patience_confident", "never"}
    counted = next(p for p in points if p.rule.name == "patience_confident")
    assert set(counted.rule.parameters) == {"threshold", "patience"}
    with load_classifier(bundle, point=counted.name) as session:  # two parameters walk
        assert session("good film").depth >= 1


def test_other_variants_are_compared_with_full_depth_of_the_default(dev: Path) -> None:
    with load_classifier(TINY, rule="never") as session:
        points = exit_points(session, read_labelled(dev, session.labels))
    by_name = {point.name: point.measured["accuracy"] for point in points.points}
    for name, accuracy in by_name.items():
        if "dev-" in name:
            assert accuracy >= by_name["full"] - float(name.rpartition("-")[2]) - 1e-3


def test_variants_that_tensorrt_does_not_walk_keep_their_points(
    bundle: Path, dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def points() -> dict[str, OperatingPoint]:
        return {point.name: point for point in open_bundle(bundle).manifest.points}

    assert CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)]).exit_code == 0
    before = points()
    gpu.machine(monkeypatch, tmp_path / "cache")
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--engine", "trt"])
    assert done.exit_code == 0 and "int8 is not measured, its points stay" in done.output
    assert points()["int8-full"] == before["int8-full"]
    assert points()["full"].measured["accuracy"] == before["full"].measured["accuracy"]
    facts = open_bundle(bundle).manifest.provenance["calibrated"]
    assert (facts["engine"], facts["device"], facts["gpu"]) == ("trt", "cuda", "Double GPU, 8.6")


def test_macs_are_the_manifests() -> None:
    manifest = open_bundle(TINY).manifest
    macs = macs_to_exits(manifest, [4, 9])
    graphs = [manifest.stem, *manifest.segments]
    assert macs.full == pytest.approx([sum(s.macs.of(n) for s in graphs) for n in (4, 9)])
    assert macs.to_exit[1, 0] == pytest.approx(graphs[0].macs.of(9) + graphs[1].macs.of(9))


def test_answers_at_a_calibrated_point_state_probability_and_set(bundle: Path, dev: Path) -> None:
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--coverage", "0.8"])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(bundle).manifest
    assert all(point.calibration is not None for point in manifest.points)
    rows = read_labelled(dev, manifest.labels)
    for point in manifest.points:
        assert point.calibration is not None and point.calibration.coverage == 0.8
        with load_classifier(bundle, point=point.name) as session:
            trace, _ = session.at_full_depth(rows.items, point.variant)
            for row, item in enumerate(rows.items):
                answer = session(str(item))
                logits = trace.logits[row, answer.exit - 1]
                scaled = logits / point.calibration.temperatures[answer.exit - 1]
                expected = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
                assert answer.calibrated == pytest.approx(expected.max(), abs=1e-4)
                assert answer.label_set is not None
                limit = 1 - point.calibration.quantiles[answer.exit - 1]
                sure = {n for n, p in zip(manifest.labels, expected, strict=True) if p > limit + 1e-4}
                maybe = {n for n, p in zip(manifest.labels, expected, strict=True) if p > limit - 1e-4}
                assert sure <= {*answer.label_set} <= maybe
                assert answer.label_set[:1] in ((), (answer.label,))


def test_another_threshold_has_no_calibration(bundle: Path, dev: Path) -> None:
    assert CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--coverage", "0.8"]).exit_code == 0
    with load_classifier(bundle, rule="max_probability", threshold=0.7123) as session:
        assert session.calibration is None
        answer = session("good film")
        assert answer.calibrated is None and answer.label_set is None


def test_a_calibration_that_does_not_fit_is_refused(bundle: Path, dev: Path) -> None:
    assert CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--coverage", "0.8"]).exit_code == 0
    text = (bundle / "manifest.json").read_text(encoding="utf-8")
    assert read_manifest(text, source="good").to_json() == text
    for change, message in [
        (lambda calibration: calibration["temperatures"].pop(), "one a segment"),
        (lambda calibration: calibration["temperatures"].__setitem__(0, 0.0), "above 0"),
        (lambda calibration: calibration.update(quantile=1.5), "0..1"),
    ]:
        value = json.loads(text)
        change(value["points"][0]["calibration"])
        with pytest.raises(BadManifest, match=message):
            read_manifest(json.dumps(value), source="bad")


TASK_ROWS: dict[str, list[dict[str, object]]] = {
    "multi_label": [{"labels": ["joy", "anger"][: at % 3]} for at in range(len(TEXTS))],
    "tokens": [{"entities": [{"start": 0, "end": 4, "label": ("PER", "LOC")[at % 2]}]} for at in range(7)],
    "regression": [{"label": 0.5 * at} for at in range(len(TEXTS))],
    "embedding": [{} for _ in TEXTS],
}


@pytest.fixture
def task_bundle(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A bundle of one of the tiny tasks, and labelled rows for it."""
    folder = tiny_bundles.TOKENS.parent / request.param
    bundle = Path(shutil.copytree(folder, tmp_path / "bundle"))
    rows = [{"text": text} | row for text, row in zip(TEXTS, TASK_ROWS[request.param], strict=True)]
    file = tmp_path / "dev.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return bundle, file


def all_tasks(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("task_bundle", names or tuple(TASK_ROWS), indirect=True)


@all_tasks()
def test_points_of_every_task_state_its_quality(task_bundle: tuple[Path, Path]) -> None:
    bundle, dev = task_bundle
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    manifest = open_bundle(bundle).manifest
    expected = {"regression": "spearman", "sentence-embedding": "agreement"}.get(manifest.task, "f1")
    assert all(next(iter(point.measured)) == expected for point in manifest.points)
    assert f"{expected} %" in done.stdout and "no labels" not in done.stderr
    own = "settled" if expected != "f1" else "max_probability"
    assert {point.rule.name for point in manifest.points} <= {own, "never"}
    for point in manifest.points:
        with load_row_session(bundle, point=point.name) as session:
            depths = [session(text).depth for text in TEXTS]
        assert np.mean(depths) == pytest.approx(point.measured["mean_exit"], abs=1e-3)


@all_tasks()
def test_every_task_can_be_calibrated_without_labels(task_bundle: tuple[Path, Path]) -> None:
    bundle, dev = task_bundle
    dev.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    points = {point.name: point for point in open_bundle(bundle).manifest.points}
    assert points["full"].measured["agreement"] == pytest.approx(100)
    embeds = open_bundle(bundle).manifest.task == "sentence-embedding"  # it never has labels
    assert ("no labels" in done.stderr) != embeds


@all_tasks("multi_label", "regression")
def test_coverage_is_for_single_labels(task_bundle: tuple[Path, Path]) -> None:
    bundle, dev = task_bundle
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--coverage", "0.9"])
    assert done.exit_code == 2 and "--coverage is for bundles that give one label" in done.output


@all_tasks("tokens", "embedding")
def test_a_rule_that_a_task_has_not_is_refused_by_name(task_bundle: tuple[Path, Path]) -> None:
    bundle, dev = task_bundle
    for rule in ("patience", "quee"):
        done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--rule", rule])
        assert done.exit_code == 2 and f"rule {rule}: it is not for " in done.output


def test_numbers_with_policies_are_swept_by_their_gate(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundles.REGRESSION, tmp_path / "bundle"))
    file = tmp_path / "dev.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    assert CliRunner().invoke(main, [str(file), "--bundle", str(bundle), "--rule", "gate"]).exit_code == 0
    points = {point.name: point for point in open_bundle(bundle).manifest.points}
    assert points["trained"].rule == RuleSpec("gate", {"threshold": 0.5})


def test_errors_leave_the_bundle_unchanged(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good", "label": "no such"}\n', encoding="utf-8")
    done = CliRunner().invoke(main, [str(bad), "--bundle", str(bundle)])
    assert done.exit_code == 2 and "line 1" in done.output
    assert (bundle / "manifest.json").read_bytes() == before
    done = CliRunner().invoke(main, [str(bad), "--bundle", str(tmp_path / "none")])
    assert done.exit_code == 2 and "no such folder" in done.output


def pairs(file: Path, count: int = 24) -> Path:
    """Rows {prompt, completion}."""
    words = ["good", "bad", "film", "plot", "scene", "warm", "very", "not"]
    rows = [
        {
            "prompt": f"the {words[n % 8]} was",
            "completion": " ".join(words[(n + k * k) % 8] for k in range(6)),
        }
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_a_router_is_learned_and_chooses_by_the_prompt(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(GENERATOR, tmp_path / "bundle"))
    with pytest.raises(BadSetting, match="has no router; fit one with: ee-calibrate"):
        load_generator(bundle, rule=RuleSpec("route", {"price": 0.0}))
    done = CliRunner().invoke(main, [str(pairs(tmp_path / "pairs.jsonl")), "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    assert "skip to 2" in done.output and "exit at 2" in done.output and "error of the router" in done.output
    manifest = open_bundle(bundle).manifest
    assert manifest.points[0].name == "route-95" and ROUTER_FILE in manifest.files
    assert manifest.rule.name == "gate"  # the bundle's own rule stays
    for point in manifest.points:
        assert point.measured["depth"] <= 3 and point.measured["nats"] > 0
    routes = list_routes(manifest)
    assert [(route.name, route.blocks) for route in routes] == [
        ("full", 3),
        ("skip to 2", 2),
        ("exit at 2", 2),
    ]
    depths: dict[float, set[int]] = {0.0: set(), 1e3: set()}
    for price in depths:
        with load_generator(bundle, rule=RuleSpec("route", {"price": price})) as session:
            for n in range(12):
                first, *later = session.generate(f"the {['good', 'bad', 'film'][n % 3]} was", 5)
                assert first.depth == 3 and len({chunk.depth for chunk in later}) == 1
                depths[price].add(later[0].depth)
    assert depths[1e3] == {2}
    with load_generator(bundle, point="route-60") as session:
        assert session.rule.name == "route" and list(session.generate("the film", 3))
    with pytest.raises(BadSetting, match="it has: route-95"):
        load_generator(bundle, point="default")


def test_searched_lists_become_points_and_routes(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(GENERATOR, tmp_path / "bundle"))
    words = [str(pairs(tmp_path / "pairs.jsonl")), "--bundle", str(bundle)]
    assert (done := CliRunner().invoke(main, [*words, "--beam", "2"])).exit_code == 0, done.output
    assert "searching skipped segments: 12 runs" in done.output and "skip-67" in done.output
    assert re.search(r"measured on +12 of 24 rows of", done.stderr)
    manifest = open_bundle(bundle).manifest
    point = manifest.points[-1]
    assert (point.name, point.rule) == ("skip-67", RuleSpec("skip", {}, skipped=(2,)))
    assert point.measured["depth"] == 2 and manifest.provenance["routed"]["search_rows"] == 12
    with load_generator(bundle, point="skip-67") as session:
        rows = read_pairs(
            tmp_path / "pairs.jsonl",
            session.longest,
            session.encode_prompt,
            session.encode_continuation,
        )
        walked = [score_walk(session, *row) for row in rows[12:]]
    assert point.measured["nats"] == pytest.approx(np.mean([score.nats for score in walked]), abs=1e-4)
    assert {score.depth for score in walked} == {2}
    again = CliRunner().invoke(main, [*words, "--rows", "0"])
    assert again.exit_code == 0 and "searching" not in again.output
    names = [entry.name for entry in open_bundle(bundle).manifest.points]
    assert names.count("skip-67") == 1, "without a search the lists stay"
    load_generator(bundle, point="route-60").close()


@pytest.mark.parametrize("option", ["--rows", "--beam"])
def test_options_of_the_search_are_for_generated_text(bundle: Path, dev: Path, option: str) -> None:
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), option, "1"])
    assert done.exit_code == 2 and f"{option} is for bundles that generate text" in done.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 1: field 'prompt' is missing"),
        ('{"prompt": 1, "completion": "a"}', "line 1: prompt and completion must be texts"),
        ("nothing", "line 1: Expecting value"),
        (
            '{"prompt": "a film", "completion": "was good"}',
            "1 rows with a prompt and two tokens of completion",
        ),
    ],
)
def test_bad_pairs_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(line + "\n", encoding="utf-8")
    done = CliRunner().invoke(main, [str(tmp_path / "pairs.jsonl"), "--bundle", str(GENERATOR)])
    assert done.exit_code == 2 and message in done.output
    done = CliRunner().invoke(
        main, [str(tmp_path / "pairs.jsonl"), "--bundle", str(GENERATOR), "--rule", "gate"]
    )
    assert done.exit_code == 2 and "--rule is not for generated text" in done.output


def test_scores_at_a_point_are_calibrated_and_its_rule_reads_them(bundle: Path, dev: Path) -> None:
    words = [str(dev), "--bundle", str(bundle), "--rule", "max_probability"]
    assert CliRunner().invoke(main, words).exit_code == 0
    point = next(p for p in open_bundle(bundle).manifest.points if p.rule.name == "max_probability")
    temperatures, read = point.rule.score_temperatures, point.rule.temperatures
    assert len(temperatures) == len(read) == len(point.exit_rows) and temperatures != read
    with load_classifier(bundle, point=point.name) as session:
        trace, _ = session.at_full_depth(TEXTS, point.variant)
        for row, answer in enumerate([*session.map(TEXTS), *map(session, TEXTS)]):
            scores, certainties = (
                softmax(trace.logits[row % len(TEXTS)] / np.array(each)[:, None]).max(-1)
                for each in (temperatures, read)
            )
            assert answer.score == pytest.approx(scores[answer.exit - 1], abs=1e-4)
            threshold = point.rule.parameters["threshold"]
            assert certainties[answer.exit - 1] >= threshold - 1e-5 or answer.exit == len(scores)
            assert max(certainties[: answer.exit - 1], default=0) < threshold + 1e-5
            assert answer.signals[-1][0] == answer.score
    with load_classifier(bundle, rule=RuleSpec("max_probability", point.rule.parameters)) as raw:
        assert raw("good film").score != pytest.approx(answer.score, abs=1e-6)


def test_scores_are_calibrated_by_labels_alone(bundle: Path, dev: Path) -> None:
    words = [str(dev), "--bundle", str(bundle), "--rule", "margin"]
    for more, labelled in ((["--agreement"], False), ([], True)):
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code == 0 and ("calibration error" in done.stdout) == labelled
        rules = [point.rule for point in open_bundle(bundle).manifest.points]
        assert all((rule.score_temperatures != ()) == labelled for rule in rules)
        # Whether full depth gives the same answer is known without labels.
        assert all((rule.temperatures != ()) == (rule.name == "margin") for rule in rules)


def test_the_threshold_of_a_call_keeps_the_temperatures_of_the_bundles_rule(bundle: Path, dev: Path) -> None:
    words = [str(dev), "--bundle", str(bundle), "--rule", "entropy"]
    assert CliRunner().invoke(main, words).exit_code == 0
    rule = open_bundle(bundle).manifest.rule
    with load_classifier(bundle, threshold=0.25) as session:
        assert session.rule.temperatures == rule.temperatures != ()


@pytest.mark.parametrize("name", ["write_bytes", "replace"])
def test_a_disk_that_refuses_leaves_the_bundle_as_it_was(
    bundle: Path, dev: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(bundle / "manifest.json"))

    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    monkeypatch.setattr(*((Path, "write_bytes", full) if name == "write_bytes" else ("os.replace", full)))
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)])
    assert done.exit_code == 2 and "No space left on device; nothing was calibrated" in done.output
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "dev.jsonl"}


@pytest.mark.parametrize("place", ["inside", "link", "no room beside"])
def test_a_bundle_is_written_wherever_it_is(
    bundle: Path, dev: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    name = str(bundle)
    if place == "inside":
        monkeypatch.chdir(bundle)
        name = "."
    elif place == "link":
        (bundle.parent / "elsewhere").mkdir()
        name = str(bundle.parent / "elsewhere" / "link")
        Path(name).symlink_to(bundle)
        beside = bundle.parent / "elsewhere"  # as another disk: no file may be renamed from it
        rename = os.replace

        def on_one_disk(source: Path, target: Path) -> None:
            assert Path(source).parent.resolve() != beside.resolve()
            rename(source, target)

        monkeypatch.setattr("os.replace", on_one_disk)
    else:
        access = os.access
        monkeypatch.setattr(
            "os.access", lambda path, mode: Path(path) != bundle.parent and access(path, mode)
        )
        write = Path.write_bytes

        def only_inside(path: Path, data: bytes) -> int:
            assert path.parent == bundle
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", only_inside)
    files = {path.name for path in bundle.iterdir()}
    done = CliRunner().invoke(main, [str(dev), "--bundle", name])
    assert done.exit_code == 0, done.output
    assert "saves-50" in {point.name for point in open_bundle(bundle).manifest.points}
    assert {path.name for path in bundle.iterdir()} == files
    assert {path.name for path in bundle.parent.iterdir()} <= {"bundle", "dev.jsonl", "elsewhere"}


def test_a_folder_that_cannot_be_written_is_refused_before_the_measurement(
    bundle: Path, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr("offramp.runtime.tuning.calibrate.measure_points", pytest.fail)
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)])
    assert done.exit_code == 2 and f"{bundle}: the folder cannot be written; nothing was" in done.output


def test_an_interrupted_calibration_ends_with_130(
    bundle: Path, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = (bundle / "manifest.json").read_bytes()
    monkeypatch.setattr("offramp.runtime.tuning.calibrate.measure_points", interrupt)
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)])
    assert done.exit_code == 130 and "ee-calibrate: interrupted; nothing was calibrated" in done.output
    assert (bundle / "manifest.json").read_bytes() == before


def test_other_rules_keep_the_limits_of_the_walks_that_forecasts_know(bundle: Path, dev: Path) -> None:
    limits = {"changes": 2.0, "increase": 0.0}
    manifest = open_bundle(bundle).manifest
    own = dataclasses.replace(manifest.points[0], rule=RuleSpec("quee", {"price": 0.1, **limits}))
    text = dataclasses.replace(manifest, points=(own,)).to_json()
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    for rule in ("gate", "entropy"):
        done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--rule", rule])
        assert done.exit_code == 0, done.output
        assert walk_limits(open_bundle(bundle).manifest) == limits


@pytest.mark.parametrize("options", [(), ("--risk", "0.9")])
def test_a_bundle_without_macs_can_be_calibrated(bundle: Path, dev: Path, options: tuple[str, ...]) -> None:
    manifest = open_bundle(bundle).manifest
    segments = tuple(dataclasses.replace(segment, macs=Macs()) for segment in manifest.segments)
    text = dataclasses.replace(manifest, segments=segments).to_json()
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), *options])
    assert done.exit_code == 0, done.output
    points = {point.name: point for point in open_bundle(bundle).manifest.points}
    assert points["default"].measured["macs_saved"] == 0
    if options:  # the cheapest by blocks, and not the first that passed
        assert points["default"].measured["mean_exit"] < manifest.blocks


def test_points_that_state_nothing_are_shown_without_figures(bundle: Path, dev: Path) -> None:
    manifest = open_bundle(bundle).manifest
    points = [dataclasses.replace(manifest.points[0], name="full", measured={})]
    points += [dataclasses.replace(manifest.points[0], name="int8-own", variant="int8", measured={})]
    text = dataclasses.replace(manifest, points=tuple(points)).to_json()
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--risk", "0.9"])
    assert done.exit_code == 0, done.output
    assert re.search(r"point full +nothing measured", done.stderr)


def test_points_that_stay_may_state_nothing(bundle: Path, dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_bundle(bundle).manifest
    own = dataclasses.replace(manifest.points[0], name="int8-own", variant="int8", measured={})
    text = dataclasses.replace(manifest, points=(own,)).to_json()
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    measure = exit_tables.measure_exit_table

    def without_int8(session: Any, rows: Any, variant: str, right: Any) -> Any:
        if variant == "int8":
            raise EngineUnavailable("no int8 here")
        return measure(session, rows, variant, right)

    monkeypatch.setattr(measure_points, "measure_exit_table", without_int8)
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    assert re.search(r"int8-own +int8 +- +- +- +-  gate", done.stdout)


def test_pairs_whose_likelihood_is_no_number_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(GENERATOR, tmp_path / "bundle"))
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    monkeypatch.setattr(
        "offramp.runtime.tuning.completions._log_likelihoods", lambda logits, ids: np.full(len(ids), np.nan)
    )
    done = CliRunner().invoke(main, [str(pairs(tmp_path / "pairs.jsonl")), "--bundle", str(bundle)])
    assert done.exit_code == 2 and "the network's logits are not finite" in done.output
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_points_that_another_run_wrote_meanwhile_are_not_lost(
    bundle: Path, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = measure_points.measure_points
    written = list[bytes]()

    def slow(*arguments: Any, **options: Any) -> Any:
        calibration = measure(*arguments, **options)
        monkeypatch.undo()
        other = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle), "--rule", "entropy"])
        assert other.exit_code == 0, other.output
        written.append((bundle / "manifest.json").read_bytes())
        return calibration

    monkeypatch.setattr("offramp.runtime.tuning.calibrate.measure_points", slow)
    done = CliRunner().invoke(main, [str(dev), "--bundle", str(bundle)])
    assert done.exit_code == 2 and "manifest.json: it changed while it was measured" in done.output
    assert [(bundle / "manifest.json").read_bytes()] == written
