"""Real exported bundles on the doubles of TensorRT: the same labels as on the CPU, in fp32 and fp16."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from doubles import gpu

from offramp.export.bundle import write_manifest
from offramp.export.describe import build_manifest
from offramp.export.samples import SENTENCES
from offramp.runtime import load
from offramp.runtime.bundle.manifest import ImageInput

pytestmark = pytest.mark.slow

OPTIONS = {
    "trt-8.6.1": {"engine": "trt"},
    "trt-10.3.0": {"engine": "trt"},
    "trt-11.4.0": {"engine": "trt", "cuda_graphs": True},
    "cuda": {"device": "cuda"},
}


@pytest.mark.parametrize("family", tiny.with_slow(tiny.EXPORTED, "bert"))
def test_a_bundle_gives_the_same_answers_on_a_gpu_and_on_the_cpu(
    family: str, exported: Callable[[str], Any], tmp_path: Path
) -> None:
    model = exported(family)
    bundle = Path(shutil.copytree(model.folder, tmp_path / "bundle"))
    manifest = write_manifest(bundle, build_manifest(model.source, model.split, ("fp32", "fp16")))
    if isinstance(manifest.input, ImageInput):
        random = np.random.default_rng(0)
        items: list[Any] = list(random.integers(0, 256, (9, 20, 24, 3), dtype=np.uint8))
    else:
        items = [*SENTENCES[:8], " ".join(SENTENCES[:3])]
    for variant in ("fp32", "fp16"):
        with load(bundle, rule="never", variant=variant) as session:
            expected = list(session.map(items, batch_size=4))
        for name, options in OPTIONS.items():
            with pytest.MonkeyPatch.context() as patch:
                version = name.removeprefix("trt-")
                machine = gpu.machine(patch, tmp_path / "cache", "10.3.0" if version == "cuda" else version)
                gpu.ort_on_cuda(patch, machine.cudart)
                with load(bundle, rule="never", variant=variant, **options) as session:  # type: ignore[arg-type]
                    for size in (1, 1, 1, 4):
                        answers = list(session.map(items, batch_size=size))
                        for answer, cpu_answer in zip(answers, expected, strict=True):
                            assert answer.label == cpu_answer.label and answer.steps == cpu_answer.steps, name
                            assert abs(answer.score - cpu_answer.score) < (
                                1e-4 if variant == "fp32" else 5e-3
                            )
                assert machine.cudart.faults == []
