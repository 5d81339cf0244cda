"""Data sets of the tasks: files as their authors publish them become JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from offramp.benchmarks.task_data import main


def written(name: str, source: Path, out: Path) -> list[dict[str, object]]:
    result = CliRunner().invoke(main, [name, str(source), str(out)])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (out / "dev.jsonl").read_text("utf-8").splitlines()]


def test_snips_has_a_tag_for_each_word(tmp_path: Path) -> None:
    for folder in ("train", "valid", "test"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "seq.in").write_text("play some jazz \n")
        (tmp_path / folder / "seq.out").write_text("O O B-genre\n")
    rows = written("snips", tmp_path, tmp_path / "out")
    assert rows == [{"tokens": ["play", "some", "jazz"], "tags": ["O", "O", "B-genre"]}]


def test_goemotions_has_the_names_of_the_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("joy\nanger\nfear\n")
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.tsv").write_text("so good\t0,2\tx1\n")
    assert written("goemotions", tmp_path, tmp_path / "out") == [
        {"text": "so good", "labels": ["joy", "fear"]}
    ]


def test_stsb_has_pairs_with_a_value(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        (tmp_path / f"stsb-en-{split}.csv").write_text('"A, b.",A b.,3.75\n')
    rows = written("stsb", tmp_path, tmp_path / "out")
    assert rows == [{"text": "A, b.", "text_b": "A b.", "label": 3.75}]
