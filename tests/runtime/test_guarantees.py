"""Guarantees: what ee-calibrate --risk writes is what walks keep, and what cannot be promised is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundles
from click.testing import CliRunner, Result
from tiny_bundles import CLASSIFIER, texts

from offramp.runtime import load_classifier
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import OperatingPoint
from offramp.runtime.bundle.row_samples import DIGITS, SAMPLE, row_hashes, row_sample
from offramp.runtime.loading import load_row_session
from offramp.runtime.rules.quality import DISAGREEMENTS
from offramp.runtime.tuning.calibrate import main
from offramp.runtime.tuning.right_answers import AnswerReader
from offramp.runtime.tuning.risk import binomial_tail, rows_needed

pytestmark = pytest.mark.slow

FRESH = texts(300, seed=7)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))


def write(file: Path, rows: list[str], labels: tuple[str, ...] = ()) -> Path:
    """JSON lines of texts, with labels in turn if there are any."""
    objects = [
        {"text": text} | ({"label": labels[n % len(labels)]} if labels else {}) for n, text in enumerate(rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in objects), encoding="utf-8")
    return file


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    return write(tmp_path / "fresh.jsonl", FRESH)


def calibrate(file: Path, bundle: Path, *words: str) -> Result:
    return CliRunner().invoke(main, [str(file), "--bundle", str(bundle), *words])


def points_of(bundle: Path) -> dict[str, OperatingPoint]:
    return {point.name: point for point in open_bundle(bundle).manifest.points}


def test_a_guarantee_states_what_a_walk_at_its_point_gives(bundle: Path, fresh: Path) -> None:
    done = calibrate(fresh, bundle, "--risk", "0.3", "--confidence", "0.9")
    assert done.exit_code == 0, done.output
    points = points_of(bundle)
    with load_classifier(bundle, rule="never") as session:
        full = [session(text).label for text in FRESH]
    for name in ("risk-0.3", "int8-risk-0.3", "default"):
        point, guarantee = points[name], points[name].guarantee
        assert guarantee is not None and (guarantee.risk, guarantee.groups) == ("disagreement", "all")
        assert (guarantee.limit, guarantee.confidence, guarantee.rows) == (0.3, 0.9, len(FRESH))
        with load_classifier(bundle, point=name) as session:
            answers = [session(text) for text in FRESH]
        differ = np.mean([answer.label != label for answer, label in zip(answers, full, strict=True)])
        assert differ == pytest.approx(guarantee.observed, abs=0.02 if "int8" in name else 1e-6)
        assert guarantee.observed < guarantee.bound <= 0.3 and guarantee.bound_name == "clopper-pearson"
        exits = np.bincount([answer.exit - 1 for answer in answers], minlength=len(point.exit_rows))
        assert sum(point.exit_rows) == len(FRESH) and np.abs(exits - point.exit_rows).max() <= 6
    assert points["default"].rule == points["risk-0.3"].rule == open_bundle(bundle).manifest.rule
    assert points["risk-0.3"].measured["layers_saved"] > 0, "or this test shows little"
    row = next(line for line in done.stdout.splitlines() if line.startswith("risk-0.3"))
    assert "<= 0.3" in row and "0.9" in row and "300" in row


def test_the_first_of_several_risks_is_the_default(bundle: Path, fresh: Path) -> None:
    assert calibrate(fresh, bundle, "--risk", "0.1", "--risk", "0.4").exit_code == 0
    points = points_of(bundle)
    first, second = points["risk-0.1"], points["risk-0.4"]
    assert points["default"].guarantee == first.guarantee
    assert second.measured["layers_saved"] >= first.measured["layers_saved"]


def test_a_risk_that_the_rows_cannot_carry_is_refused_with_the_number_needed(
    bundle: Path, fresh: Path
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    done = calibrate(fresh, bundle, "--risk", "0.009")
    assert done.exit_code == 2 and f"needs at least {rows_needed(0.009, 0.95)} rows" in done.output
    assert (bundle / "manifest.json").read_bytes() == before
    assert calibrate(fresh, bundle, "--risk", "0.01").exit_code == 0, "299 rows are enough"


def change_provenance(bundle: Path, **entries: Any) -> None:
    """Set entries of a bundle's provenance."""
    value = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    value["provenance"] |= entries
    (bundle / "manifest.json").write_text(json.dumps(value), encoding="utf-8")


def train_on(bundle: Path, **splits: list[str]) -> None:
    """Write into provenance what ee-split takes from a training on these rows of a data set "films"."""
    samples = [
        {"split": split, "data": "films", "rows": len(rows), "hashes": row_sample(row_hashes(rows))}
        for split, rows in splits.items()
    ]
    change_provenance(bundle, rows_sample=samples)


@pytest.mark.parametrize("form", ["same", "reversed, without labels"])
def test_rows_that_chose_the_points_are_recognised(bundle: Path, tmp_path: Path, form: str) -> None:
    dev = write(tmp_path / "a.jsonl", FRESH[:100], open_bundle(bundle).manifest.labels)
    assert calibrate(dev, bundle).exit_code == 0
    again = dev if form == "same" else write(tmp_path / "b.jsonl", FRESH[99::-1])
    done = calibrate(again, bundle, "--risk", "0.3")
    assert done.exit_code == 2 and "100% of its rows are among the rows on which points were" in done.output
    done = calibrate(write(tmp_path / "c.jsonl", FRESH[60:200]), bundle, "--risk", "0.3")
    assert done.exit_code == 2 and "% of its rows are among the rows on which points were" in done.output
    assert calibrate(write(tmp_path / "d.jsonl", FRESH[100:]), bundle, "--risk", "0.3").exit_code == 0


@pytest.mark.parametrize("form", ["same", "reversed, with labels"])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_rows_of_the_training_are_refused(bundle: Path, tmp_path: Path, split: str, form: str) -> None:
    train_on(bundle, **{"train": texts(300, seed=8), "dev": texts(100, seed=9), split: FRESH})
    labels = open_bundle(bundle).manifest.labels
    file = tmp_path / "calib.jsonl"
    write(file, FRESH) if form == "same" else write(file, FRESH[::-1], labels)
    done = calibrate(file, bundle, "--risk", "0.3")
    assert done.exit_code == 2
    assert f"calib.jsonl: 100% of its rows are among the {split} rows of 'films'" in done.output
    assert "give rows that neither trained the network nor chose anything of it" in done.output


def test_rows_that_repeat_by_nature_are_taken_if_the_user_says_so(bundle: Path, tmp_path: Path) -> None:
    train_on(bundle, train=FRESH, dev=texts(100, seed=9))
    done = calibrate(write(tmp_path / "c.jsonl", FRESH), bundle, "--risk", "0.3", "--allow-seen")
    assert done.exit_code == 0
    assert "100.0% of its rows are among the train rows of 'films'" in done.stderr


def test_a_small_part_of_a_large_train_split_is_refused(bundle: Path, tmp_path: Path) -> None:
    train = [f"{text} {number}" for number, text in enumerate(texts(20000, seed=8))]
    train_on(bundle, train=train, dev=texts(100, seed=9))
    done = calibrate(write(tmp_path / "c.jsonl", train[::67]), bundle, "--risk", "0.3")
    assert done.exit_code == 2 and "100% of its rows are among the train rows of 'films'" in done.output


def test_a_part_of_a_training_is_recognised_as_often_as_the_docs_say() -> None:
    rows = 1000
    split = 150 * rows
    assert 1 - binomial_tail(1, rows, SAMPLE / split) > 0.99, "two rows that can be compared are enough"


def test_rows_of_the_training_are_measured_without_a_risk(bundle: Path, tmp_path: Path) -> None:
    train_on(bundle, train=texts(300, seed=8), dev=FRESH)
    done = calibrate(write(tmp_path / "c.jsonl", FRESH), bundle)
    assert done.exit_code == 0 and "films" not in done.output


def test_a_few_rows_of_the_training_are_warned_of(bundle: Path, tmp_path: Path, fresh: Path) -> None:
    train_on(bundle, train=[*(f"{text} 1" for text in texts(700, seed=8)), *FRESH[-5:]])
    done = calibrate(fresh, bundle, "--risk", "0.3")
    assert done.exit_code == 0
    assert "of its rows are among the train rows of 'films', on which the network was trained" in done.stderr


def test_new_rows_that_repeat_some_by_chance_are_no_false_alarm(bundle: Path, fresh: Path) -> None:
    train_on(bundle, train=texts(3000, seed=8), dev=texts(300, seed=9))
    done = calibrate(fresh, bundle, "--risk", "0.3")
    assert done.exit_code == 0 and "of its rows are among the dev rows" in done.stderr


@pytest.mark.parametrize(("known", "code"), [(1, 0), (2, 2)])
def test_one_row_shows_too_little_to_refuse_a_file(bundle: Path, fresh: Path, known: int, code: int) -> None:
    smallest = "".join(sorted(row_hashes(FRESH))[:known])  # all that can be compared with them is in them
    change_provenance(bundle, rows_sample=[{"split": "train", "data": "films", "hashes": smallest}])
    done = calibrate(fresh, bundle, "--risk", "0.3")
    assert done.exit_code == code and f"({known} of {known} that can be compared)" in done.output


def test_new_rows_in_a_file_of_a_known_name_are_taken(bundle: Path, fresh: Path) -> None:
    value = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    value["points"] = [point | {"data": fresh.name} for point in value["points"]]
    (bundle / "manifest.json").write_text(json.dumps(value), encoding="utf-8")
    assert calibrate(fresh, bundle, "--risk", "0.3").exit_code == 2
    train_on(bundle, train=texts(300, seed=8), dev=texts(100, seed=9))
    assert calibrate(fresh, bundle, "--risk", "0.3").exit_code == 0


def test_in_an_older_bundle_the_file_is_known_by_its_name(bundle: Path, fresh: Path) -> None:
    assert calibrate(fresh, bundle).exit_code == 0
    change_provenance(bundle, calibrated={"rows": len(FRESH)})
    done = calibrate(fresh, bundle, "--risk", "0.3")
    assert done.exit_code == 2 and "chosen on a file of this name" in done.output


def test_the_list_of_hashes_of_an_older_bundle_is_read(bundle: Path, fresh: Path) -> None:
    sample = row_sample(row_hashes(FRESH))
    hashes = [sample[start : start + DIGITS] for start in range(0, 64 * DIGITS, DIGITS)]
    change_provenance(bundle, calibrated={"rows": len(FRESH), "rows_sample": hashes})
    done = calibrate(fresh, bundle, "--risk", "0.3")
    assert done.exit_code == 2 and "100% of its rows are among the rows on which points were" in done.output


@pytest.mark.parametrize(
    "odd", [5, {"train": 1}, [5, {}, {"split": ["dev"]}], [{"split": "train", "hashes": "x" * 12}]]
)
def test_a_provenance_that_is_no_sample_is_left_out(bundle: Path, fresh: Path, odd: object) -> None:
    change_provenance(bundle, rows_sample=odd, calibrated={"rows_sample": odd})
    assert calibrate(fresh, bundle, "--risk", "0.3").exit_code == 0


def test_measured_points_and_guaranteed_ones_stand_beside_each_other(bundle: Path, tmp_path: Path) -> None:
    labels = open_bundle(bundle).manifest.labels
    dev, other = write(tmp_path / "dev.jsonl", FRESH[:100], labels), write(tmp_path / "c.jsonl", FRESH[100:])
    assert calibrate(dev, bundle).exit_code == 0
    measured = points_of(bundle)
    assert calibrate(other, bundle, "--risk", "0.3").exit_code == 0
    points = points_of(bundle)
    assert points["dev-0.5"] == measured["dev-0.5"] and points["default"].guarantee is not None
    # Temperatures are those that the rows of dev gave: fitted on the rows of a guarantee they would void it.
    for name, like in (("risk-0.3", "full"), ("int8-risk-0.3", "int8-full")):
        scores = points[name].rule.score_temperatures
        assert scores == measured[like].rule.score_temperatures != ()
    assert calibrate(dev, bundle).exit_code == 0
    again = points_of(bundle)
    assert again["risk-0.3"] == points["risk-0.3"] and again["default"] == measured["default"]


@pytest.mark.parametrize(("per", "groups"), [("exit", "exit 4"), ("class", "negative")])
def test_a_risk_can_be_kept_in_every_group(bundle: Path, tmp_path: Path, per: str, groups: str) -> None:
    file = write(tmp_path / "many.txt", texts(500, seed=3))
    done = calibrate(file, bundle, "--risk", "0.3", "--per", per)
    assert done.exit_code == 0, done.output
    guarantee = points_of(bundle)["risk-0.3"].guarantee
    assert guarantee is not None and guarantee.groups == per
    assert any(line.strip().startswith(groups[:4]) for line in done.stdout.splitlines())
    with load_classifier(bundle, point="risk-0.3") as walk, load_classifier(bundle, rule="never") as full:
        answers, labels = list(walk.map(texts(500, seed=3))), list(full.map(texts(500, seed=3)))
    keys = [answer.exit if per == "exit" else answer.label for answer in answers]
    for key in set(keys):
        inside = [a.label != b.label for a, b, k in zip(answers, labels, keys, strict=True) if k == key]
        assert np.mean(inside) <= 0.3 or len(inside) < 90


def test_the_increase_of_errors_is_bounded_with_labels(bundle: Path, tmp_path: Path, fresh: Path) -> None:
    done = calibrate(fresh, bundle, "--risk", "0.3", "--risk-of", "accuracy")
    assert done.exit_code == 2 and "--risk-of accuracy needs labels" in done.output
    labels = open_bundle(bundle).manifest.labels
    file = write(tmp_path / "labelled.jsonl", FRESH, labels)
    assert calibrate(file, bundle, "--risk", "0.3", "--risk-of", "accuracy").exit_code == 0
    point = points_of(bundle)["risk-0.3"]
    assert point.guarantee is not None and point.guarantee.risk == "error_increase"
    assert point.guarantee.bound_name == "betting"
    with load_classifier(bundle, rule="never") as session:
        right = [session(text).label == labels[n % len(labels)] for n, text in enumerate(FRESH)]
    lost = np.mean(right) - point.measured["accuracy"] / 100
    assert lost == pytest.approx(point.guarantee.observed, abs=1e-4)


def test_a_quality_that_full_depth_does_not_have_is_refused(bundle: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "labelled.jsonl", FRESH, open_bundle(bundle).manifest.labels)
    done = calibrate(file, bundle, "--risk", "0.1", "--risk-of", "quality")
    assert done.exit_code == 2 and "none keeps accuracy_loss <= 0.1" in done.output
    assert "its full depth has 0." in done.output


@pytest.mark.parametrize("task", ["multi_label", "tokens", "embedding"])
def test_answers_of_other_tasks_have_a_disagreement(tmp_path: Path, fresh: Path, task: str) -> None:
    bundle = Path(shutil.copytree(tiny_bundles.TOKENS.parent / task, tmp_path / "bundle"))
    done = calibrate(fresh, bundle, "--risk", "0.5")
    assert done.exit_code == 0, done.output
    manifest = open_bundle(bundle).manifest
    guarantee = points_of(bundle)["risk-0.5"].guarantee
    assert guarantee is not None and guarantee.risk == "disagreement"
    exact = "clopper-pearson" if task == "multi_label" else "betting"
    assert guarantee.bound_name == exact
    reader = AnswerReader(manifest)
    with load_row_session(bundle, point="risk-0.5") as session:
        trace, _ = session.at_full_depth(FRESH)
        exits = np.array([answer.exit - 1 for answer in session.map(FRESH)])
        places = None
        if reader.reads_words:
            batches = [(np.array([n]), session.encode(text)) for n, text in enumerate(FRESH)]
            places = reader.places(batches, len(FRESH))
    pairs = zip(reader.at_exits(trace, exits, places), reader.at_exits(trace, -1, places), strict=True)
    losses = [DISAGREEMENTS[manifest.kind](answer, full) for answer, full in pairs]
    assert np.mean(losses) == pytest.approx(guarantee.observed, abs=0.01)


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("regression", [], "--risk-of disagreement is not for regression"),
        ("tokens", ["--risk-of", "quality"], "is no mean over them, so that it has no such bound"),
        ("multi_label", ["--risk-of", "accuracy"], "use --risk-of disagreement"),
        ("multi_label", ["--per", "class"], "--per class is for bundles that give one label"),
    ],
)
def test_a_risk_that_a_task_has_not_is_refused(
    tmp_path: Path, fresh: Path, task: str, words: list[str], message: str
) -> None:
    bundle = Path(shutil.copytree(tiny_bundles.TOKENS.parent / task, tmp_path / "bundle"))
    done = calibrate(fresh, bundle, "--risk", "0.3", *words)
    assert done.exit_code == 2 and message in done.output


def test_options_of_a_risk_need_a_risk(bundle: Path, fresh: Path) -> None:
    done = calibrate(fresh, bundle, "--per", "exit")
    assert done.exit_code == 2 and "give it with --risk" in done.output
    done = calibrate(fresh, tiny_bundles.GENERATOR, "--risk", "0.1")
    assert done.exit_code == 2 and "--risk is not for generated text" in done.output


def test_the_rule_of_a_guarantee_reads_logits_as_dev_calibrated_them(bundle: Path, tmp_path: Path) -> None:
    dev, other = write(tmp_path / "a.txt", FRESH[:100]), write(tmp_path / "c.jsonl", FRESH[100:])
    assert calibrate(dev, bundle, "--rule", "max_probability").exit_code == 0
    measured = points_of(bundle)["dev-0.5"].rule
    assert measured.temperatures != () and measured.score_temperatures == (), "it has no labels"
    assert calibrate(other, bundle, "--risk", "0.3").exit_code == 0
    point = points_of(bundle)["risk-0.3"]
    assert point.rule.name == "max_probability" and point.rule.temperatures == measured.temperatures
    assert point.guarantee is not None
    with load_classifier(bundle, point="risk-0.3") as walk, load_classifier(bundle, rule="never") as full:
        rows = FRESH[100:]
        differ = [a.label != b.label for a, b in zip(walk.map(rows), full.map(rows), strict=True)]
    assert np.mean(differ) == pytest.approx(point.guarantee.observed, abs=1e-6)


@pytest.mark.parametrize("second", ["0.3", "0.30000001"])
def test_limits_of_one_name_are_refused_before_the_measurement(
    bundle: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    monkeypatch.setattr("offramp.runtime.tuning.measure_points.guaranteed_points", pytest.fail)
    done = calibrate(fresh, bundle, "--risk", "0.3", "--risk", second)
    assert done.exit_code == 2 and "--risk 0.3 is given twice; name each limit once" in done.output


def test_a_confidence_needs_a_risk(bundle: Path, fresh: Path) -> None:
    done = calibrate(fresh, bundle, "--confidence", "0.9")
    assert done.exit_code == 2 and "give it with --risk" in done.output


def test_a_default_goes_with_the_guarantee_that_new_rows_do_not_confirm(bundle: Path, tmp_path: Path) -> None:
    with load_classifier(bundle, rule="never") as session:
        right = [session(text).label for text in FRESH]
    wrong = {name: other for name, other in zip(session.labels, session.labels[::-1], strict=True)}
    options = ("--risk-of", "quality", "--risk", "0.5")
    assert calibrate(write_rows(tmp_path / "first.jsonl", right), bundle, *options).exit_code == 0
    assert points_of(bundle)["default"].guarantee == points_of(bundle)["risk-0.5"].guarantee is not None
    mostly_wrong = [label if n % 5 < 2 else wrong[label] for n, label in enumerate(right)]
    done = calibrate(write_rows(tmp_path / "second.jsonl", mostly_wrong), bundle, *options, "--risk", "0.9")
    assert done.exit_code == 0 and "fp32: none keeps accuracy_loss <= 0.5" in done.stdout, done.output
    points = points_of(bundle)
    assert "risk-0.9" in points and "risk-0.5" not in points
    assert all(point.guarantee is None or point.guarantee.limit == 0.9 for point in points.values())


def write_rows(file: Path, labels: list[str]) -> Path:
    """FRESH with these labels."""
    rows = zip(FRESH, labels, strict=True)
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    file.write_text(lines, encoding="utf-8")
    return file


@pytest.mark.parametrize("times", [1, 2])
def test_rows_that_are_copies_are_warned_of(bundle: Path, tmp_path: Path, times: int) -> None:
    rows = list(dict.fromkeys(FRESH))
    done = calibrate(write(tmp_path / "rows.jsonl", rows * times), bundle, "--risk", "0.9")
    assert done.exit_code == 0, done.output
    warning = f"{len(rows)} of {2 * len(rows)} rows are the same as another one; if they were copied"
    assert (warning in done.stderr) == (times == 2)
