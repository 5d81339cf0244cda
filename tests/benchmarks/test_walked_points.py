"""What a bundle walks has the perplexity that torch computes: skips, searched lists, controllers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.benchmarks.walked_points import main, read_rows
from offramp.export.bundle import write_bundle
from offramp.export.decoder import open_decoder
from offramp.export.options import ExportOptions
from offramp.models.controllers import Controllers
from offramp.models.decoder import DecoderNetwork
from offramp.training.checkpoint import save_exits
from offramp.training.data import BadData


def test_windows_are_halved_and_pairs_are_kept(tmp_path: Path) -> None:
    texts = [{"text": "the film was very good and warm at all"}] * 4
    tiny.write_rows(tmp_path / "texts", *texts, split="test")
    tokenizer = tiny.hub_tokenizer()
    rows = read_rows(str(tmp_path / "texts"), tokenizer, 6, {"test": range(1, 4)})["test"]
    assert [(len(prompt), len(completion)) for prompt, completion in rows] == [(3, 3)] * 3
    pair = {"prompt": "the film was", "completion": "good and warm"}
    tiny.write_rows(tmp_path / "pairs", pair, pair | {"completion": ""}, split="test")
    (row,) = read_rows(str(tmp_path / "pairs"), tokenizer, 40, {"test": range(9)})["test"]
    assert [len(part) for part in row] == [3, 4]
    with pytest.raises(BadData, match="has no dev split"):
        read_rows(str(tmp_path / "pairs"), tokenizer, 40, {"dev": range(9)})


@pytest.mark.slow
def test_a_bundle_reproduces_torch(tmp_path: Path) -> None:
    network = DecoderNetwork(tiny.decoder("llama"))
    network.controllers = Controllers(3, network.hidden_size, start=0.0)
    with torch.no_grad():
        for parameter in network.controllers.parameters():
            parameter.normal_(std=0.5)
    model, bundle = tmp_path / "model", tmp_path / "bundle"
    network.model.save_pretrained(model)
    save_exits(network, model)
    tiny.hub_tokenizer().save_pretrained(model)
    source = open_decoder(model)
    write_bundle(source, source.split("each"), bundle, ExportOptions(("fp32",)))
    words = ["the film was very good and", "a bad plot is not warm at all", "the scene was quite dull"]
    for split in ("dev", "test"):
        tiny.write_rows(tmp_path / "texts", *({"text": text} for text in words * 6), split=split)
    call = ["--bundle", bundle, "--model", model, "--data", tmp_path / "texts", "--window", 12, "--rows", 6]
    call += ["--dev-rows", 3, "--shares", "0.66", "--out", tmp_path / "result.json"]
    done = CliRunner().invoke(main, list(map(str, call)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    names = ["full", "even skip, 2 segments", "searched skip, 2 segments", "controllers"]
    assert list(result["rules"]) == names and result["test_rows"] == 6
    for line in result["rules"].values():
        assert line["perplexity"] == pytest.approx(line["torch_perplexity"], rel=1e-3)
        assert line["ms"] > 0
    assert result["rules"]["searched skip, 2 segments"]["skipped_segments"] == [2]
    assert 2 < result["rules"]["controllers"]["depth"] < 3
