"""docs/add-a-family.md: its adapter, registered by its line, is the model of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from transformers import AutoConfig, AutoModel

from offramp.models import EarlyExitNetwork, NetworkSpec
from offramp.models.families import FAMILIES, Family
from offramp.models.macs import stem_macs
from offramp.models.own_head import classification_class, own_head_of

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "add-a-family.md"


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> str:
    """The model type of the document's family, which is registered."""
    code, line = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len([row for row in code.splitlines() if row.strip()]) <= 40
    registered = re.fullmatch(r'\s*"(\w+)": (\w+)\.(\w+),\s*', line)
    assert registered is not None
    model_type, file, value = registered.groups()
    assert model_type not in FAMILIES, "choose a family that has no adapter for the example"
    module = ModuleType(file)
    exec(compile(code, str(DOCUMENT), "exec"), module.__dict__)
    family = getattr(module, value)
    assert isinstance(family, Family)
    monkeypatch.setitem(FAMILIES, model_type, family)
    return model_type


@pytest.mark.parametrize("embedding_size", [16, 32])
def test_its_blocks_are_those_of_transformers(documented: str, embedding_size: int) -> None:
    config = AutoConfig.for_model(documented, **tiny.SIZES, embedding_size=embedding_size)
    base: Any = tiny_families.lively(AutoModel.from_config(config)).eval()
    inputs = tiny_families.text_inputs("ernie")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        reference = base(**inputs, output_hidden_states=True).hidden_states
        network = EarlyExitNetwork(base, NetworkSpec(("a", "b"), (1, 2, 3))).eval()
        hidden, context = network.stem(inputs)
        for block, expected in enumerate(reference[1:]):
            hidden = network.run_block(block, hidden, context)
            torch.testing.assert_close(hidden[real], expected[real], atol=1e-5, rtol=0)
    assert stem_macs(network).token == (16 * 32 if embedding_size == 16 else 0)


def test_its_head_is_that_of_the_classification_model(documented: str) -> None:
    config = AutoConfig.for_model(documented, **tiny.SIZES)
    model = tiny_families.lively(classification_class(config).from_config(config)).eval()
    inputs = tiny_families.text_inputs("ernie")
    with torch.no_grad():
        expected = model(**inputs).logits
        head = own_head_of(model, 0.1)
        network = EarlyExitNetwork(model.base_model, NetworkSpec(("a", "b"), (1, 2, 3), own_head=True), head)
        torch.testing.assert_close(network.eval()(inputs).logits[:, -1], expected, atol=2e-5, rtol=1e-5)


def test_every_field_of_a_family_is_in_its_table() -> None:
    rows = re.findall(r"^\| (`.*?) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert documented == set(Family.__dataclass_fields__)
