"""Tests of benchmarks.gpu without a GPU: on the CPU, and on doubles of CUDA and TensorRT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import documents
import numpy as np
import pytest
from click.testing import CliRunner
from doubles import gpu

from offramp.benchmarks.gpu import main
from offramp.runtime.engines.cuda import driver_problem

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        documents.run_heavy_here(monkeypatch)
        done = CliRunner().invoke(main, ["prepare", str(folder), "--blocks", "4", "--width", "32"])
    assert done.exit_code == 0, done.output
    return folder


def run(work: Path, file: Path, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["run", str(work), "--turns", "3", "--json", str(file), *words])
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def numbers(figures: Any) -> list[float]:
    if isinstance(figures, dict):
        return [number for value in figures.values() for number in numbers(value)]
    return [figures] if isinstance(figures, float) else []


@pytest.mark.slow
def test_on_the_cpu_it_measures_onnx_runtime_and_torch(work: Path, tmp_path: Path) -> None:
    result = run(work, tmp_path / "out.json", "--device", "cpu", "--rows", "1,3", "--lengths", "8")
    assert [(row["variant"], row["rows"]) for row in result["measured"]] == [
        *(("fp32", 1), ("fp32", 3)),
        *(("fp16", 1), ("fp16", 3)),
    ]
    for row in result["measured"]:
        assert {"ort each", "ort thirds", "torch / one graph"} <= set(row)
        assert np.isfinite(numbers(row)).all() and row["ort each"]["exit 1"]["MACs saved"] > 0.5
    assert result["left out"] == {} and result["targets"] == {}


@pytest.mark.slow
def test_with_a_gpu_it_measures_every_engine(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = gpu.machine(monkeypatch, tmp_path / "cache")
    gpu.ort_on_cuda(monkeypatch, machine.cudart)
    monkeypatch.setattr("offramp.benchmarks.gpu.torch_run", lambda *arguments: lambda: None)
    result = run(work, tmp_path / "out.json", "--rows", "1,4", "--lengths", "8", "--budget", "1")
    engines = {
        f"{name}{more}" for name in ("ort each", "ort thirds", "trt thirds") for more in ("", " graphs")
    }
    for row in result["measured"]:
        assert engines <= set(row) and np.isfinite(numbers(row)).all()
        assert {"a wait costs us", "plain / CUDA graphs"} <= set(row["trt thirds"])
    assert set(result["targets"]) == {"each", "thirds", "required"} and result["left out"] == {}
    assert result["machine"]["trt gpu"] == "Double GPU, 8.6" and machine.cudart.faults == []


def test_without_a_gpu_it_names_the_option_for_the_cpu(tmp_path: Path) -> None:
    if driver_problem() is None:
        pytest.skip("this machine has a GPU")
    for name in ("each", "thirds"):
        shutil.copytree(TINY, tmp_path / name)
    done = CliRunner().invoke(main, ["run", str(tmp_path)])
    assert done.exit_code == 2 and "without a GPU: --device cpu" in done.output


@pytest.mark.gpu
def test_onnx_runtime_reaches_the_targets(tmp_path: Path) -> None:
    """Not yet run anywhere: 12 x 768 in fp16, batch 1."""
    assert CliRunner().invoke(main, ["prepare", str(tmp_path)]).exit_code == 0
    result = run(tmp_path, tmp_path / "out.json", "--turns", "100", "--rows", "1")
    assert any(result["targets"][cut]["holds"] for cut in ("each", "thirds")), result["targets"]
