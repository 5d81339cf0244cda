"""ee-bench: its candidates, whether its figures agree with the walk, and errors; both tasks."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny_bundles
from click.testing import CliRunner

from offramp.runtime import BadInput, BadSetting, load_classifier
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.rules.resolve import points_to_measure
from offramp.runtime.tuning.bench import (
    FULL,
    RANDOM,
    measure_classifier,
    measure_generation,
    open_candidates,
    rule_options,
)
from offramp.runtime.tuning.bench import main as bench
from offramp.runtime.tuning.report import classification_text, html_page

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data"
TINY, BASELINES, GENERATOR = DATA / "tiny_bundle", DATA / "tiny_baselines", DATA / "tiny_generator"
BENCH = [sys.executable, "-m", "offramp.runtime.tuning.bench", "--bundle", str(TINY)]
LABELS = ("negative", "positive")
WORDS = ["the", "a", "film", "plot", "was", "very", "not", "at", "all", "good", "warm", "bad", "poor", "cold"]
TEXTS = [" ".join(WORDS[(3 * k + j * j) % len(WORDS)] for j in range(1 + k % 7)) for k in range(24)]
PROMPT = "the film was good and"
TRUTH = [LABELS[k % 2] for k in range(len(TEXTS))]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bench_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.CompletedProcess[str], Path]]:
    """The command with everything, once."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, TRUTH, strict=True)]
    data = write(folder / "data.jsonl", *rows)
    options = [
        "--baselines",
        str(BASELINES),
        "--points",
        "default,fast,full",
        "--turns",
        "2",
        "--threads",
        "1",
    ]
    outputs = ["--json", str(folder / "out.json"), "--report", str(folder / "out.html")]
    command = [*BENCH, "--data", str(data), "--batch-size", "4", *options, *outputs]
    yield subprocess.run(command, capture_output=True, text=True, timeout=120), folder


@pytest.fixture(scope="module")
def figures(bench_run: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((bench_run[1] / "out.json").read_text(encoding="utf-8"))
    return figures


def named(figures: dict[str, Any], name: str) -> dict[str, Any]:
    candidate: dict[str, Any] = next(entry for entry in figures["candidates"] if entry["name"] == name)
    return candidate


def test_every_candidate_is_in_the_table(
    bench_run: tuple[subprocess.CompletedProcess[str], Path], figures: dict[str, Any]
) -> None:
    done, folder = bench_run
    assert done.returncode == 0, done.stderr
    names = ["walk default", "walk fast", FULL, RANDOM, "monolith", "monolith_int8", "nested", "truncated_01"]
    assert [candidate["name"] for candidate in figures["candidates"]] == names
    assert [line.split("  ")[0].removesuffix(" (fp32)") for line in done.stdout.splitlines()[1:9]] == [
        name + " (int8)" * (name == "walk fast") for name in names
    ]
    assert (folder / "out.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in folder.iterdir()) == ["data.jsonl", "out.html", "out.json"]


def test_accuracy_and_exits_are_those_of_the_walk(figures: dict[str, Any]) -> None:
    for point in ("default", "fast"):
        name = f"walk {point}"
        with load_classifier(TINY, point=point) as session:
            answers = [session(text) for text in TEXTS]
        right = sum(answer.label == label for answer, label in zip(answers, TRUTH, strict=True))
        candidate = named(figures, name)
        assert candidate["accuracy"] == pytest.approx(100 * right / len(TEXTS), abs=1e-3)
        exits = [answer.exit for answer in answers]
        assert candidate["exits"] == [exits.count(number) for number in (1, 2, 3)]
        assert candidate["mean_exit"] == pytest.approx(sum(exits) / len(exits), abs=1e-4)


def test_figures_agree_with_each_other(figures: dict[str, Any]) -> None:
    for candidate in figures["candidates"]:
        assert sum(candidate["exits"]) == pytest.approx(len(TEXTS))
        assert (
            0
            < candidate["p50_ms"]
            <= candidate["p95_ms"]
            <= candidate["p99_ms"]
            <= candidate["percentiles_ms"][-1]
        )
        assert 0 < candidate["ratio_p5"] <= candidate["ratio"] <= candidate["ratio_p95"]
        assert 0 <= candidate["goodput"] <= 1 and 0 < candidate["macs_share"] <= 1
        assert candidate["bytes"] > 0
        assert (candidate["rows_per_second"] is None) == (candidate["kind"] == "nested")
    full, monolith = named(figures, FULL), named(figures, "monolith")
    assert full["mean_exit"] == monolith["mean_exit"] == 3 and full["macs_share"] == 1
    assert full["accuracy"] == monolith["accuracy"] and full["realised"] is None
    assert monolith["ratio"] == monolith["ratio_p5"] == monolith["time_share"] == 1
    assert named(figures, "nested")["exits"] == named(figures, "walk default")["exits"]
    assert named(figures, "truncated_01")["exits"] == [len(TEXTS), 0, 0]
    assert figures["about"]["budget_ms"] == pytest.approx(monolith["p50_ms"], rel=1e-4)


def test_macs_are_the_manifests(figures: dict[str, Any]) -> None:
    with load_classifier(TINY) as session:
        lengths = [session.encode(text)["input_ids"].shape[1] for text in TEXTS]
        macs = [
            sum(s.macs.of(n) for n in lengths) for s in (session.manifest.stem, *session.manifest.segments)
        ]
    assert named(figures, "truncated_01")["macs_share"] == pytest.approx(sum(macs[:2]) / sum(macs), abs=1e-5)


def test_facts_segments_and_cold_starts(figures: dict[str, Any]) -> None:
    about = figures["about"]
    assert (about["rows"], about["rows_there"], about["turns"]) == (len(TEXTS), len(TEXTS), 2)
    assert (about["engine"], about["threads"], about["reference"]) == ("ort", "1", "monolith")
    assert about["cpu"] and about["onnxruntime"] and about["left_out"] == []
    assert [segment["name"] for segment in figures["segments"]] == [
        "stem",
        *(f"segment_{k:02d}" for k in range(3)),
    ]
    assert [candidate["name"] for candidate in figures["cold_start"]] == ["walk default", "monolith"]
    assert all(
        candidate["seconds"] > 0 and len(candidate["each_seconds"]) == 3
        for candidate in figures["cold_start"]
    )
    assert all(candidate["peak_bytes"] > 2**20 for candidate in figures["cold_start"])


@pytest.fixture
def no_cold_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the new processes, which take longer than all the rest; test_baselines starts some."""
    monkeypatch.setattr("offramp.runtime.tuning.bench.time_cold_starts", lambda scripts, starts: [])


def test_without_labels_graphs_or_a_gate(tmp_path: Path) -> None:
    data = tmp_path / "plain.txt"
    data.write_text("good film\n\nbad plot\nwarm\n", encoding="utf-8")
    alone = measure_classifier(TINY, data, points="fast", rows=2, rounds=1, starts=1, budget_ms=1e6)
    assert [candidate["name"] for candidate in alone["candidates"]] == ["walk fast", FULL, RANDOM]
    assert all(
        candidate["accuracy"] is None and candidate["goodput"] == 1 for candidate in alone["candidates"]
    )
    assert (alone["about"]["rows"], alone["about"]["rows_there"]) == (2, 3)
    assert alone["about"]["reference"] == FULL and named(alone, FULL)["ratio"] == 1
    assert [candidate["name"] for candidate in alone["cold_start"]] == ["walk fast"]
    beside = measure_classifier(TINY, data, baselines=BASELINES, points="fast", rounds=1, starts=1)
    assert "nested" not in [candidate["name"] for candidate in beside["candidates"]]
    assert beside["about"]["left_out"][0].startswith("nested: ")


@pytest.mark.usefixtures("no_cold_starts")
def test_full_depth_alone(tmp_path: Path) -> None:
    data = write(tmp_path / "data", {"text": "good", "text_b": "bad", "label": 1})
    figures = measure_classifier(TINY, data, points="full", rounds=1, starts=1)
    assert [candidate["name"] for candidate in figures["candidates"]] == [FULL]
    assert figures["about"]["left_out"] == [f"{RANDOM}: no operating point to draw like"]


@pytest.mark.usefixtures("no_cold_starts")
@pytest.mark.parametrize(
    ("bundle", "metric", "label"),
    [
        (tiny_bundles.MULTI_LABEL, "f1", {"labels": ["joy"]}),
        (tiny_bundles.TOKENS, "f1", {"entities": [{"start": 0, "end": 3, "label": "PER"}]}),
        (tiny_bundles.REGRESSION, "spearman", {"label": 1.5}),
        (tiny_bundles.EMBEDDING, "cosine", {}),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_other_tasks_are_measured_by_their_metric(
    tmp_path: Path, bundle: Path, metric: str, label: dict[str, Any]
) -> None:
    data = write(tmp_path / "data.jsonl", *({"text": f"ann {text}"} | label for text in TEXTS[:6]))
    graphs = tiny_bundles.baselines_of(bundle)
    figures = measure_classifier(bundle, data, baselines=graphs, rounds=1, starts=1)
    assert figures["about"]["quality"] == metric
    assert metric in classification_text(figures).splitlines()[0]
    assert all(
        "accuracy" not in candidate and candidate[metric] is not None for candidate in figures["candidates"]
    )
    full, monolith = named(figures, FULL), named(figures, "monolith")
    assert full[metric] == pytest.approx(monolith[metric], abs=1e-3)
    if metric == "cosine":  # right is full depth's own answer
        assert full[metric] == pytest.approx(100) and named(figures, "truncated_01")[metric] < 100
    if metric == "spearman":  # pictures take longer than the rest
        assert "Spearman against time" in html_page(figures)


@pytest.mark.usefixtures("no_cold_starts")
def test_other_tasks_without_labels(tmp_path: Path) -> None:
    data = tmp_path / "plain.txt"
    data.write_text("good film\nann was at paris\n", encoding="utf-8")
    figures = measure_classifier(tiny_bundles.TOKENS, data, rounds=1, starts=1)
    assert all(candidate["f1"] is None for candidate in figures["candidates"])
    assert "no f1 to show" in html_page(figures)


def test_points_by_name() -> None:
    manifest = open_bundle(TINY).manifest
    assert points_to_measure(manifest, None) == ["default"]
    assert points_to_measure(manifest, "fast, default,full,fast") == ["fast", "default"]
    with pytest.raises(BadSetting, match="default, fast"):
        points_to_measure(manifest, " , ")


def test_what_cannot_start(tmp_path: Path) -> None:
    data = write(tmp_path / "data", {"text": "good"})
    none = str(tmp_path / "none")
    runs = {
        "missing data": ["--data", none],
        "missing graphs": ["--data", str(data), "--baselines", none],
        "unknown point": ["--data", str(data), "--points", "slow"],
        "no budget": ["--data", str(data), "--budget-ms", "nan"],
        "no folder": ["--data", str(data), "--json", none + "/out.json"],
    }
    for name, options in runs.items():
        done = CliRunner().invoke(bench, ["--bundle", str(TINY), *options])
        assert (done.exit_code, done.stdout) == (2, ""), name
        assert done.stderr.startswith("ee-bench: ") and done.stderr.count("\n") == 1, name


def test_a_graph_may_not_have_the_name_of_a_walk(tmp_path: Path) -> None:
    value = json.loads((BASELINES / "baselines.json").read_text(encoding="utf-8"))
    value["graphs"][0]["name"] = FULL
    (tmp_path / "baselines.json").write_text(json.dumps(value), encoding="utf-8")
    with ExitStack() as stack, pytest.raises(BadSetting, match="has the name of a walk"):
        open_candidates(open_bundle(TINY), tmp_path, "full", None, [], stack)


def test_rules_of_generated_text_are_measured(tmp_path: Path) -> None:
    data, out = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    data.write_text(json.dumps({"prompt": PROMPT}) + "\n" + json.dumps({"prompt": "a bad plot"}) + "\n")
    words = ["--bundle", str(GENERATOR), "--data", str(data), "--json", str(out), "--turns", "2"]
    rules = "speculative,gate:0.5,fixed:1"
    done = CliRunner().invoke(bench, [*words, "--rules", rules, "--max-new-tokens", "10"])
    assert done.exit_code == 0, done.output
    by_name = {
        candidate["name"]: candidate
        for candidate in json.loads(out.read_text(encoding="utf-8"))["candidates"]
    }
    assert list(by_name) == ["full depth", "speculative", "gate:0.5", "fixed:1"]
    assert by_name["full depth"]["same"] == by_name["speculative"]["same"] == 1.0
    assert by_name["full depth"]["ratio"] == 1.0 and by_name["full depth"]["depth"] == 3
    assert by_name["fixed:1"]["depth"] == 1 and by_name["fixed:1"]["blocks_run"] == 1
    assert sum(by_name["speculative"]["drafts"]["rounds"].values()) > 0
    positions = by_name["fixed:1"]["by_position"]
    assert positions[0] == {"from": 1, "mean": 3.0, "tokens": {"3": 4}}
    assert sum(sum(line["tokens"].values()) for line in positions) == 40
    assert "mean depth from token" in done.output and "tokens/s" in done.output
    assert "blocks run" in done.output.splitlines()[0]


def test_options_of_the_other_task_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "prompts.txt"
    data.write_text("a film\n", encoding="utf-8")

    def error(bundle: Path, *words: str) -> str:
        done = CliRunner().invoke(bench, ["--bundle", str(bundle), "--data", str(data), *words])
        assert done.exit_code == 2
        return done.output

    assert "--points is not for generated text" in error(GENERATOR, "--points", "default")
    assert "--baselines is not for generated text" in error(GENERATOR, "--baselines", str(BASELINES))
    assert "--report is not for generated text" in error(GENERATOR, "--report", str(tmp_path / "page.html"))
    assert "--rules is for generated text" in error(TINY, "--rules", "gate")
    assert "rule 'gate:high' is not known" in error(GENERATOR, "--rules", "gate:high")
    data.write_text("\n", encoding="utf-8")
    assert "no lines in it" in error(GENERATOR)
    data.write_text('{"prompt": 7}\n', encoding="utf-8")
    assert "prompts.txt:1" in error(GENERATOR)
    with pytest.raises(BadInput, match="name a file of prompts"):
        measure_generation(open_bundle(GENERATOR), tmp_path / "none")


def test_full_depth_is_always_a_candidate() -> None:
    bundle = open_bundle(GENERATOR)
    assert list(rule_options(None, bundle)) == ["full depth", "gate"]
    assert list(rule_options("never, fixed:2", bundle)) == ["full depth", "fixed:2"]


def test_a_skip_list_of_one_segment_is_no_number() -> None:
    options = rule_options("skip:-2,skip:2,gate:0.7", open_bundle(GENERATOR))
    assert options["skip:-2"] == {"rule": "skip:-2"}
    assert options["skip:2"] == {"rule": "skip", "threshold": 2.0}
    assert options["gate:0.7"] == {"rule": "gate", "threshold": 0.7}


def test_figures_are_printed_though_their_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out.json"))

    monkeypatch.setattr("offramp.runtime.tuning.report.write_atomically", full)
    data, out = write(tmp_path / "data", {"text": "good"}), tmp_path / "out.json"
    words = ["--bundle", str(TINY), "--data", str(data), "--turns", "1", "--json", str(out)]
    done = CliRunner().invoke(bench, words)
    assert done.exit_code == 2 and "walk full depth" in done.stdout
    assert done.stderr.endswith("out.json: No space left on device\n")


def test_answers_of_one_token_are_shown_without_a_rate(tmp_path: Path) -> None:
    data = tmp_path / "prompts.txt"
    data.write_text(PROMPT + "\n", encoding="utf-8")
    words = ["--bundle", str(GENERATOR), "--data", str(data), "--turns", "1", "--max-new-tokens", "1"]
    done = CliRunner().invoke(bench, words)
    assert done.exit_code == 0, done.output
    assert re.match(r"full depth +- +- +[0-9.]+ +- +- +- +- +100.0$", done.stdout.splitlines()[1])
