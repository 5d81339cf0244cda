"""docs/add-a-method.md: its recipe, registered by its line, trains by its name."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny

from offramp.training.options import TrainConfig
from offramp.training.recipes import RECIPES
from offramp.training.train import train

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "add-a-method.md"


def test_the_documents_recipe_trains_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len([row for row in code.splitlines() if row.strip()]) <= 40
    registered = re.fullmatch(r'\s*"(\w+)": "([\w.]+)",\s*', line)
    assert registered is not None
    name, place = registered.groups()
    module = ModuleType(place)
    monkeypatch.setitem(sys.modules, place, module)  # as if it were a file
    exec(compile(code, str(DOCUMENT), "exec"), module.__dict__)
    monkeypatch.setitem(RECIPES, name, place)
    config = TrainConfig(
        model=str(tiny.model_folder(tmp_path / "model")),
        init=None,
        data=str(tiny.data_folder(tmp_path / "data")),
        recipe=name,
        out=tmp_path / "ckpt",
        exits="each",
        pooling=None,
        prefix="",
        max_length=64,
        seed=0,
        precision="fp32",
        settings=("epochs=6", "batch_size=8", "lr=0.002", "heads_lr=0.01", "smoothing=0.2"),
        save_every=1e9,
        text_column="text",
        text_b_column="text_b",
        label_column="label",
    )
    training = train(config)
    assert training["rule"] == "margin"
    assert training["settings"]["smoothing"] == 0.2
    assert training["dev"]["full_depth"] > 80
