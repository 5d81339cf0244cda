"""Tests of benchmarks.fetch: mixed texts have summaries with prompts that are short enough, and reviews
without one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from offramp.benchmarks import fetch


def test_mixed_texts_can_be_limited_in_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def films(out: Path, train: int) -> Path:
        out.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [json.dumps({"text": f"a film {n}"}) + "\n" for n in range(50)]
            (out / f"{split}.jsonl").write_text("".join(rows))
        return out

    monkeypatch.setattr(fetch, "write_film_texts", films)
    pairs = [{"prompt": "p" * n, "completion": f"{n}<|endoftext|>"} for n in range(1, 41)]
    source = tmp_path / "pairs"
    source.mkdir()
    for split in ("train", "dev"):
        (source / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def mixed(name: str, *more: str) -> list[dict[str, str]]:
        words = ["mixed", str(tmp_path / name), "--summaries", str(source), "--reviews", "3", *more]
        result = CliRunner().invoke(fetch.main, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]

    rows = mixed("any", "--pairs", "30")
    assert len(rows) == 33 and sum(not row["prompt"] for row in rows) == 3
    assert max(len(row["prompt"]) for row in rows) > 10
    short = mixed("short", "--pairs", "8", "--characters", "10")
    assert len(short) == 11 and max(len(row["prompt"]) for row in short) <= 10
    assert all("endoftext" not in row["completion"] for row in short)
