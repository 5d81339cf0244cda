"""ee-bench: what it reads, whom it lets run, and whether its figures agree with the walk."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from offramp.runtime import BadInput, BadSetting, load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.rules.resolve import chosen_points
from offramp.runtime.tuning.bench import CHANCE, FULL, measure
from offramp.runtime.tuning.labelled import read_data

DATA = Path(__file__).parents[1] / "data"
TINY, RIVALS = DATA / "tiny_bundle", DATA / "tiny_rivals"
BENCH = [sys.executable, "-m", "offramp.runtime.tuning.bench", "--bundle", str(TINY)]
LABELS = ("negative", "positive")
WORDS = ["the", "a", "film", "plot", "was", "very", "not", "at", "all", "good", "warm", "bad", "poor", "cold"]
TEXTS = [" ".join(WORDS[(3 * k + j * j) % len(WORDS)] for j in range(1 + k % 7)) for k in range(24)]
TRUTH = [LABELS[k % 2] for k in range(len(TEXTS))]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.CompletedProcess[str], Path]]:
    """The command with everything, once."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, TRUTH, strict=True)]
    data = write(folder / "data.jsonl", *rows)
    options = ["--against", str(RIVALS), "--points", "default,fast,full", "--turns", "2", "--threads", "1"]
    outputs = ["--json", str(folder / "out.json"), "--report", str(folder / "out.html")]
    command = [*BENCH, "--data", str(data), "--batch-size", "4", *options, *outputs]
    yield subprocess.run(command, capture_output=True, text=True, timeout=120), folder


@pytest.fixture(scope="module")
def figures(ran: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ran[1] / "out.json").read_text(encoding="utf-8"))
    return found


def named(figures: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in figures["contenders"] if one["name"] == name)
    return found


def test_everybody_is_in_the_table(
    ran: tuple[subprocess.CompletedProcess[str], Path], figures: dict[str, Any]
) -> None:
    done, folder = ran
    assert done.returncode == 0, done.stderr
    names = ["walk default", "walk fast", FULL, CHANCE, "monolith", "monolith_int8", "nested", "truncated_01"]
    assert [one["name"] for one in figures["contenders"]] == names
    assert [line.split("  ")[0].removesuffix(" (fp32)") for line in done.stdout.splitlines()[1:9]] == [
        name + " (int8)" * (name == "walk fast") for name in names
    ]
    assert (folder / "out.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in folder.iterdir()) == ["data.jsonl", "out.html", "out.json"]


def test_accuracy_and_exits_are_those_of_the_walk(figures: dict[str, Any]) -> None:
    for name, wish in {"walk default": {"point": "default"}, "walk fast": {"point": "fast"}}.items():
        with load(TINY, **wish) as session:
            answers = [session(text) for text in TEXTS]
        right = sum(answer.label == label for answer, label in zip(answers, TRUTH, strict=True))
        one = named(figures, name)
        assert one["accuracy"] == pytest.approx(100 * right / len(TEXTS), abs=1e-3)
        exits = [answer.exit for answer in answers]
        assert one["exits"] == [exits.count(number) for number in (1, 2, 3)]
        assert one["mean_exit"] == pytest.approx(sum(exits) / len(exits), abs=1e-4)


def test_figures_agree_with_each_other(figures: dict[str, Any]) -> None:
    for one in figures["contenders"]:
        assert sum(one["exits"]) == pytest.approx(len(TEXTS))
        assert 0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"] <= one["percentiles_ms"][-1]
        assert 0 < one["ratio_p5"] <= one["ratio"] <= one["ratio_p95"]
        assert 0 <= one["goodput"] <= 1 and 0 < one["macs_share"] <= 1
        assert one["bytes"] > 0
        assert (one["rows_per_second"] is None) == (one["kind"] == "nested")
    full, monolith = named(figures, FULL), named(figures, "monolith")
    assert full["mean_exit"] == monolith["mean_exit"] == 3 and full["macs_share"] == 1
    assert full["accuracy"] == monolith["accuracy"] and full["realised"] is None
    assert monolith["ratio"] == monolith["ratio_p5"] == monolith["time_share"] == 1
    assert named(figures, "nested")["exits"] == named(figures, "walk default")["exits"]
    assert named(figures, "truncated_01")["exits"] == [len(TEXTS), 0, 0]
    assert figures["about"]["budget_ms"] == pytest.approx(monolith["p50_ms"], rel=1e-4)


def test_macs_are_the_manifests(figures: dict[str, Any]) -> None:
    with load(TINY) as session:
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
    assert [stage["name"] for stage in figures["segments"]] == [
        "stem",
        *(f"segment_{k:02d}" for k in range(3)),
    ]
    assert [one["name"] for one in figures["cold_start"]] == ["walk default", "monolith"]
    assert all(one["seconds"] > 0 and len(one["each_seconds"]) == 3 for one in figures["cold_start"])
    assert all(one["peak_bytes"] > 2**20 for one in figures["cold_start"])


def test_without_labels_graphs_or_a_gate(tmp_path: Path) -> None:
    data = tmp_path / "plain.txt"
    data.write_text("good film\n\nbad plot\nwarm\n", encoding="utf-8")
    found = measure(TINY, data, points="fast", rows=2, turns=1, starts=1, budget_ms=1e6)
    assert [one["name"] for one in found["contenders"]] == ["walk fast", FULL, CHANCE]
    assert all(one["accuracy"] is None and one["goodput"] == 1 for one in found["contenders"])
    assert (found["about"]["rows"], found["about"]["rows_there"]) == (2, 3)
    assert found["about"]["reference"] == FULL and named(found, FULL)["ratio"] == 1
    assert [one["name"] for one in found["cold_start"]] == ["walk fast"]
    against = measure(TINY, data, against=RIVALS, points="fast", turns=1, starts=1)
    assert "nested" not in [one["name"] for one in against["contenders"]]
    assert against["about"]["left_out"][0].startswith("nested: ")


def test_full_depth_alone(tmp_path: Path) -> None:
    data = write(tmp_path / "data", {"text": "good", "text_b": "bad", "label": 1})
    found = measure(TINY, data, points="full", turns=1, starts=1)
    assert [one["name"] for one in found["contenders"]] == [FULL]
    assert found["about"]["left_out"] == [f"{CHANCE}: no operating point to draw like"]


def test_points_by_name() -> None:
    manifest = open_bundle(TINY).manifest
    assert chosen_points(manifest, None) == ["default"]
    assert chosen_points(manifest, "fast, default,full,fast") == ["fast", "default"]
    with pytest.raises(BadSetting, match="default, fast"):
        chosen_points(manifest, " , ")


def test_labels_by_name_or_number(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data",
        {"text": "a", "label": "positive"},
        {"text": "b", "text_b": "c", "label": 0},
        {"text": "d", "label": 1},
    )
    items, truth, there = read_data(path, LABELS, 2)
    assert items == ["a", ("b", "c")] and there == 3
    assert truth is not None and truth.tolist() == [1, 0]


@pytest.mark.parametrize("label", ["neutral", 2, -1, True, 1.0, []])
def test_a_label_that_is_none_is_named(tmp_path: Path, label: object) -> None:
    path = write(tmp_path / "data", {"text": "a", "label": 0}, {"text": "b", "label": label})
    with pytest.raises(BadInput, match=r"data:2: label .* is not one of: negative, positive"):
        read_data(path, LABELS, 9)


def test_data_that_cannot_be_measured(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for text, said in (
        ("", "no lines"),
        ("\n\n", "no lines"),
        ('{"text": "a"}\n\n{"text": 3}\n', r"data:3: .*expected a string"),
        ('{"text": "a", "label": 1}\n{"text": "a"}\n', r'data:2: "label" must be on every line'),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(BadInput, match=said):
            read_data(path, LABELS, 9)
    with pytest.raises(BadInput, match="--data"):
        read_data(tmp_path / "none", LABELS, 9)


def test_what_cannot_start(tmp_path: Path) -> None:
    data = write(tmp_path / "data", {"text": "good"})
    none = str(tmp_path / "none")
    runs = {
        "missing data": ["--data", none],
        "missing graphs": ["--data", str(data), "--against", none],
        "unknown point": ["--data", str(data), "--points", "slow"],
        "no budget": ["--data", str(data), "--budget-ms", "nan"],
        "no folder": ["--data", str(data), "--json", none + "/out.json"],
    }
    for name, options in runs.items():
        done = subprocess.run([*BENCH, *options], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, ""), name
        assert done.stderr.startswith("ee-bench: ") and done.stderr.count("\n") == 1, name


def test_a_graph_may_not_pass_for_a_walk(tmp_path: Path) -> None:
    from offramp.runtime.tuning.bench import gather

    value = json.loads((RIVALS / "rivals.json").read_text(encoding="utf-8"))
    value["graphs"][0]["name"] = FULL
    (tmp_path / "rivals.json").write_text(json.dumps(value), encoding="utf-8")
    with ExitStack() as stack, pytest.raises(BadSetting, match="has the name of a walk"):
        gather(open_bundle(TINY), tmp_path, "full", None, [], stack)
