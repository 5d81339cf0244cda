"""Tests of benchmarks.readme_decoders: tables say what the files say; without a file there is no table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offramp.benchmarks import readme_decoders

MACHINE = {"cpu": "A CPU", "when": "2026-11-28T12:00:00+00:00"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(readme_decoders, "RESULTS", tmp_path)
    return tmp_path


def write(folder: Path, kind: str, facts: dict[str, Any]) -> None:
    (folder / f"{kind}_smollm2.json").write_text(json.dumps(facts | {"machine": MACHINE}), encoding="utf-8")


def test_without_results_there_are_no_tables(results: Path) -> None:
    assert readme_decoders.short() == [] and readme_decoders.all_tables() == []


def test_drafts_by_bundle_and_what_they_would_have_to_be_right_at(results: Path) -> None:
    way = {"same": 99, "speed": 1.3, "speed_median": 1.25, "accepted": {"1": 0.5}}
    need = {"exit": 1, "drafts": 1, "accepted": 0.4, "speed_at_most": 1.5}
    never = {"exit": 2, "drafts": 1, "accepted": None, "speed_at_most": 1.1}
    one = {"cuts": [4, 8, 30], "ways": {"full": {}, "1,2": way}}
    write(results, "lossless", {"variant": "fp32", "count": 100, "tokens": 64, "bundles": {"trained": one}})
    one = {"cuts": [4, 8, 30], "needs": [need, never]}
    write(results, "draft_costs", {"wished": 1.2, "bundles": {"trained": one}})
    table = readme_decoders.lossless()
    assert table[0].endswith("(A CPU, 2026-11-28)")
    assert table[-2] == "| trained | exit 1, 2 drafts | 99 of 100 | 1.30 | 1.25 | exit 1: 50% |"
    assert readme_decoders.needs()[-3:-1] == [
        "| trained | 1 (block 4) | 1 | 40% | 1.50 |",
        "| trained | 2 (block 8) | 1 | not reached | 1.10 |",
    ]


def test_a_table_a_model_and_task(results: Path) -> None:
    line = {"depth": 30.0, "cost": 1.0, "quality": 20.0, "se": 0.0}
    about = {"blocks": 30, "tokens": 512, "prompts": 4}
    write(results, "depth_wikitext", about | {"model": "m", "tasks": {"wikitext": {"full": line}}})
    oracle = {"depth": 6.5, "cost": 0.25, "quality": 21.0}
    ways = {"full": line, "oracle, as good as full": oracle}
    write(results, "depth_samsum", about | {"model": "other", "tasks": {"samsum": ways}})
    table = readme_decoders.depth()
    assert table[0] == "**Quality against depth**, other (30 blocks), test: 4 dialogues of samsum"
    assert table[2] == "|  | depth | cost | ROUGE-L | ± points, against full |"
    assert table[4:6] == [
        "| full | 30.00 | 1.00 | 20.00 | 0.00 |",
        "| oracle, as good as full | 6.50 | 0.25 | 21.00 |  |",
    ]
    assert table[7].endswith("m (30 blocks), test: 512 tokens of wikitext") and "± nats" in table[9]
