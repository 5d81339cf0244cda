"""ee-split as a user runs it; its exporter is a copier where the exporter is not what is tested."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner, Result

from offramp.export import baselines, bundle, monolith, trt_compile
from offramp.export.bundle import BadTarget
from offramp.export.classifier import ExportableClassifier
from offramp.export.cli import main
from offramp.export.samples import SENTENCES
from offramp.export.segments import Segment
from offramp.export.verify import verify
from offramp.runtime import load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.engines import cuda
from offramp.runtime.tuning.baselines import read_baselines
from offramp.training.checkpoint import load_checkpoint, save_checkpoint

RULE = {"name": "gate", "parameters": {"threshold": 0.4}}
POINT = {
    "name": "default",
    "rule": RULE,
    "variant": "fp32",
    "data": "",
    "split": "dev",
    "measured": {"accuracy": 90},
}
TRAINING: dict[str, Any] = {
    "recipe": "consistentee",
    "seed": 7,
    "command": {"model": "/data/somebody/model"},
    "data": {"name": "films", "rows": {"train": 3}},
    "operating_points": [POINT, {**POINT, "name": "small", "variant": "int8"}],
}


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def saved(exported: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with exits after blocks 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(dataclasses.replace(exported("bert").checkpoint, training=TRAINING), folder / "ckpt")
    return folder / "ckpt"


@pytest.fixture
def copied(exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The exporter is replaced by a copy of the same network's graphs: a second instead of ten."""
    folder = exported("bert").folder

    def copy(segment: Segment, path: Path) -> None:
        shutil.copyfile(folder / f"{segment.name}.onnx", path)

    monkeypatch.setattr(bundle, "to_onnx", copy)
    return folder


@pytest.mark.slow
def test_dropped_exits_are_really_exported(
    saved: Path, open_graph: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(saved, "--segments", "2", "--monolith", tmp_path / "one.onnx")
    assert result.exit_code == 0, result.output
    assert "operating points, measured with all, are too" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "one.onnx", "one_int8.onnx"]
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert [segment.blocks for segment in manifest.segments] == [(1, 2)]
    assert manifest.rule.name == "never" and manifest.points == ()
    source = ExportableClassifier(load_checkpoint(saved))
    report = verify(source, tmp_path / "bundle", source.split((2,)), ("fp32", "int8"), ["fine", "bad"])
    assert report.first_bad is None
    inputs = tiny.inputs()
    with torch.no_grad():
        truth = source.network(inputs).logits[:, -1].numpy()
    for name, tolerance in (("one.onnx", 1e-4), ("one_int8.onnx", 0.2)):
        session = open_graph(tmp_path / name)
        logits = session.run(None, {node.name: inputs[node.name].numpy() for node in session.get_inputs()})
        assert len(logits) == 1 and np.abs(logits[0] - truth).max() < tolerance


@pytest.mark.slow
def test_a_bundle_is_written_and_answers(saved: Path, copied: Path, tmp_path: Path) -> None:
    result = run(saved, "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["segment", "blocks"] and lines[-1].endswith(
        "written and verified, 2 segments of 2 blocks"
    )
    assert [line.split()[0] for line in lines[1:-1]] == ["stem", "segment_00", "segment_01"]
    assert lines[3].split()[1] == "2" and lines[3].endswith("%")
    with load(tmp_path / "bundle", rule="never") as session:
        assert session("a lovely film").depth == 2
        manifest = session.manifest
    assert manifest.variants == ("fp32", "int8") and list(manifest.stem.variants) == ["fp32"]
    assert (manifest.rule.name, manifest.rule.parameters) == ("gate", {"threshold": 0.4})
    assert [(point.name, point.data, point.variant) for point in manifest.points] == [
        ("default", "films", "fp32"),
        ("small", "films", "int8"),
    ]
    origin = manifest.provenance
    assert (origin["recipe"], origin["seed"]) == ("consistentee", 7) and "reduce_range" in origin["int8"]
    assert "somebody" not in (tmp_path / "bundle" / "manifest.json").read_text()


@pytest.mark.slow
def test_fp16_is_written_compiles_and_says_what_fp32_says(saved: Path, copied: Path, tmp_path: Path) -> None:
    result = run(saved, "--out", tmp_path / "bundle", "--variants", "fp32,fp16")
    assert result.exit_code == 0, result.output
    assert "fp16 labels kept" in result.stdout
    answers: dict[str, list[Any]] = {}
    for variant in ("fp32", "fp16"):
        with load(tmp_path / "bundle", variant=variant, rule="never") as session:
            answers[variant] = list(session.map(SENTENCES[:12]))
            segments = (session.manifest.stem, *session.manifest.segments)
    assert [list(segment.variants) for segment in segments] == [["fp32"], ["fp32", "fp16"], ["fp32", "fp16"]]
    names = [f"segment_0{n}{end}.onnx" for end in ("", "_fp16") for n in range(2)]
    compiled = list(trt_compile.compile_bundle(open_bundle(tmp_path / "bundle"), targets=("8.6",)))
    assert [one.graph for one in compiled] == ["stem.onnx", *names] and all(one.size for one in compiled)
    pairs = list(zip(answers["fp32"], answers["fp16"], strict=True))
    assert all(full.label == half.label for full, half in pairs)
    assert 0 < max(abs(full.score - half.score) for full, half in pairs) < 0.01


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    file = tmp_path / "dev.jsonl"
    rows = (
        f'{{"text": "{text}", "label": {at % 2}}}' for at, text in enumerate(("good", "so bad", "fine film"))
    )
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


@pytest.mark.slow
def test_exits_by_cost_and_points_on_the_engine(saved: Path, dev: Path, tmp_path: Path) -> None:
    result = run(saved, "--out", tmp_path / "bundle", "--segments", "auto", "--dev", dev)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("exit after") and "expected ms a row" in result.stdout
    with load(tmp_path / "bundle") as session:
        manifest = session.manifest
        assert session("good").depth in (1, 2)
    assert manifest.segments[-1].blocks[-1] == 2
    names = {point.name for point in manifest.points}
    assert {"default", "full", "int8-default", "int8-full"} <= names
    assert manifest.provenance["calibrated"]["rows"] == 3
    assert all(point.data == "dev.jsonl" for point in manifest.points)


@pytest.mark.slow
def test_baselines_are_what_ee_bench_reads(
    saved: Path, open_graph: Callable[[Path], Any], tmp_path: Path
) -> None:
    words = ("--out", tmp_path / "bundle", "--baselines", tmp_path / "baselines")
    result = run(saved, *words, "--truncate", "1,1")
    assert result.exit_code == 0, result.output
    listed = read_baselines(tmp_path / "baselines", open_bundle(tmp_path / "bundle").manifest)
    assert [(graph.kind, graph.variant, graph.exit) for graph in listed.graphs] == [
        ("monolith", "fp32", 2),
        ("monolith", "int8", 2),
        ("nested", "fp32", 2),
        ("truncated", "fp32", 1),
    ]
    inputs = tiny.inputs()
    with torch.no_grad():
        truth = load_checkpoint(saved).network(inputs).logits[:, 0].numpy()
    session = open_graph(tmp_path / "baselines" / listed.graphs[-1].file)
    logits = session.run(None, {node.name: inputs[node.name].numpy() for node in session.get_inputs()})[0]
    np.testing.assert_allclose(logits, truth, atol=1e-5)
    again = run(saved, *words, "--truncate", "1")
    assert again.exit_code == 2 and "or give --overwrite" in again.stderr
    taken = run(saved, "--out", tmp_path / "other", "--baselines", tmp_path / "baselines")
    assert taken.exit_code == 2 and "choose another --baselines" in taken.stderr
    bad = run(saved, "--out", tmp_path / "other", "--baselines", tmp_path / "more", "--truncate", "3")
    assert bad.exit_code == 2 and "this checkpoint has exits after 1, 2" in bad.stderr
    assert not (tmp_path / "more").exists() and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_baselines_are_cut_off_at_exits_that_the_bundle_keeps(saved: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "bundle", "--baselines", tmp_path / "baselines")
    result = run(saved, *words, "--segments", "2", "--truncate", "1")
    assert result.exit_code == 2 and "--truncate 1: " in result.stderr
    assert "the bundle has exits after 2" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ({"out": "a", "baselines": "a"}, "--baselines"),
        ({"out": "a", "baselines": "b/../a/."}, "--baselines"),
        ({"out": "a", "baselines": "a/b"}, "--baselines"),
        ({"out": "a/b", "baselines": "a"}, "--baselines"),
        ({"out": "real", "baselines": "link"}, "--baselines"),
        ({"out": "real", "baselines": "link/b"}, "--baselines"),
        ({"out": "link/b", "baselines": "."}, "--baselines"),
        ({"out": "a", "monolith": "a/one.onnx"}, "--monolith"),
        ({"out": "a", "monolith": "a"}, "--monolith"),
        ({"out": "real", "monolith": "link/deep/one.onnx"}, "--monolith"),
    ],
)
def test_places_that_lie_in_each_other_are_refused_first(
    places: dict[str, str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    words = [word for option, place in places.items() for word in (f"--{option}", place)]
    result = run("no_checkpoint", *words)  # which would be named, were it looked at before
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "--out" in result.stderr and named in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert not list((tmp_path / "real").iterdir())


def test_a_monolith_inside_of_baselines_is_refused(tmp_path: Path) -> None:
    words = (
        "--out",
        tmp_path / "a",
        "--baselines",
        tmp_path / "b",
        "--monolith",
        tmp_path / "b" / "one.onnx",
    )
    result = run("no_checkpoint", *words)
    assert result.exit_code == 2 and "--baselines" in result.stderr and "--monolith" in result.stderr


def test_truncate_without_baselines_is_refused(tmp_path: Path) -> None:
    result = run("no_checkpoint", "--out", tmp_path / "bundle", "--truncate", "1")
    assert result.exit_code == 2 and "give --baselines DIR, too" in result.stderr


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "step", "outcome"),
    [
        (bundle, "verify", "no bundle was written"),
        (monolith, "write_monolith", "written: bundle; not written: one.onnx, baselines"),
        (baselines, "write_baselines", "written: bundle, one.onnx; not written: baselines"),
    ],
)
def test_an_interruption_says_what_is_written(
    saved: Path,
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    step: str,
    outcome: str,
) -> None:
    def write(checkpoint: object, path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"a graph")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(monolith, "write_monolith", write)
    monkeypatch.setattr(module, step, interrupted)
    result = run(saved, "--variants", "fp32", "--monolith", "one.onnx", "--baselines", "baselines")
    assert result.exit_code == 130 and result.stderr.splitlines()[-1] == f"interrupted; {outcome}"
    assert (tmp_path / "bundle").exists() == outcome.startswith("written: bundle")
    assert ("written and verified" in result.stdout) == (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_an_interruption_while_the_old_bundle_goes(
    saved: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--out", tmp_path / "bundle", "--variants", "fp32")
    assert run(saved, *words).exit_code == 0
    remove = shutil.rmtree

    def cut_short(path: Path, **options: Any) -> None:
        if ".old-" in path.name and path.exists():
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(bundle.shutil, "rmtree", cut_short)
    result = run(saved, *words, "--overwrite")
    assert result.exit_code == 130 and f"interrupted; written: {tmp_path / 'bundle'}\n" in result.stderr
    monkeypatch.undo()
    monkeypatch.setattr(bundle, "verify", interrupted)
    assert "no bundle was written" in run(saved, *words, "--overwrite").stderr  # the old one is not news


@pytest.mark.slow
def test_baselines_that_cannot_be_put_in_place_leave_the_bundle(
    saved: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object, **__: object) -> None:
        raise BadTarget("somebody was faster")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baselines, "write_baselines", late)
    result = run(saved, "--variants", "fp32", "--baselines", "baselines")
    assert result.exit_code == 2
    assert "somebody was faster; written: bundle; not written: baselines" in result.stderr


@pytest.mark.slow
def test_an_engine_that_is_not_there_is_one_line(
    saved: Path, copied: Path, dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(cuda, "_load", gone)
    words = ["--variants", "fp32", "--dev", dev, "--engine", "trt"]
    result = run(saved, "--out", tmp_path / "bundle", *words)
    assert result.exit_code == 2 and "--engine trt: engine trt: no CUDA driver" in result.stderr
    assert "no bundle was written" in result.stderr and not (tmp_path / "bundle").exists()


def test_wishes_of_auto_that_cannot_be(saved: Path, dev: Path, tmp_path: Path) -> None:
    result = run(saved, "--out", tmp_path / "bundle", "--segments", "auto")
    assert result.exit_code == 2 and "give --dev FILE" in result.stderr
    dev.write_text('{"text": "good", "label": "positive"}\n{"text": "bad"}\n', encoding="utf-8")
    result = run(saved, "--out", tmp_path / "bundle", "--dev", dev)
    assert result.exit_code == 2 and 'line 2: no "label"' in result.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_fault_is_named_and_no_bundle_is_written(
    saved: Path,
    copied: Path,
    break_weight: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export = bundle.to_onnx

    def broken(segment: Segment, path: Path) -> None:
        export(segment, path)
        if segment.name == "segment_01":
            break_weight(path, "blocks.0.attention.self.query")

    monkeypatch.setattr(bundle, "to_onnx", broken)
    result = run(saved, "--out", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "segment_01, tensor logits, torch whole vs ORT segments" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_points_of_variants_that_are_not_written_are_left_out(
    saved: Path, copied: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("fine\n\nsehr schön\n", encoding="utf-8")
    words = ("--out", tmp_path / "b", "--variants", "fp32", "--texts", tmp_path / "texts.txt")
    assert run(saved, *words).exit_code == 0
    assert [point.name for point in open_bundle(tmp_path / "b").manifest.points] == ["default"]
    again = run(saved, *words)
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    assert run(saved, *words, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--segments", "3"), "block 3 does not exist"),
        (("--segments", "deep"), "say 'each', 'every N'"),
        (("--variants", "fp32,fp8"), "'fp8' is not known; choose among fp32, fp16, int8"),
        (("--variants", "int8"), "fp32 comes first"),
        (("--texts", "nowhere.txt"), "nowhere.txt: cannot be read"),
    ],
)
def test_bad_wishes(saved: Path, tmp_path: Path, words: tuple[str, str], message: str) -> None:
    result = run(saved, "--out", tmp_path / "bundle", *words)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


def test_a_model_without_exits_is_refused_with_the_command_that_adds_them(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "bert")
    done = CliRunner().invoke(main, [str(folder), "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 2
    assert f"holds a bert model without exits; add them first: ee-train --model {folder}" in done.output


def test_no_checkpoint(tmp_path: Path) -> None:
    result = run(tmp_path / "none")
    assert result.exit_code == 2 and "no such folder" in result.stderr


def test_a_missing_package_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.export.cli.NEEDED", ("torch", "a_package_that_nobody_has"))
    result = run(saved)
    assert result.exit_code == 2 and "pip install 'offramp[export,cpu]'" in result.stderr
