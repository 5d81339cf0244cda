"""One graph of a decoder says what its segments say; --segments auto cuts as what was timed allows."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.benchmarks.whole import PLACES, OneGraph
from offramp.export.cli import main as split
from offramp.export.decoder_auto import Grouping, Timed, _steps, choose_cuts, even_cuts, groupings
from offramp.export.decoder_monolith import write_monolith
from offramp.models.decoder import DecoderNetwork
from offramp.runtime.engines.threads import claim


@pytest.mark.parametrize("family", tiny.with_slow(["llama", "gpt2"], "llama"))
@pytest.mark.slow
def test_one_graph_says_what_transformers_says(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.decoder(family)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    files = write_monolith(DecoderNetwork(model), tmp_path / "one.onnx", ("fp32", "int8", "fp16"))
    assert sorted(files) == ["fp32", "int8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.onnx", "one_int8.onnx"]
    one = OneGraph(files["fp32"], claim(onnxruntime, None, True))
    monkeypatch.setattr("offramp.benchmarks.whole.PLACES", PLACES // 16)  # it has to grow
    for length in (1, 9, 21):  # the last one reads no past
        ids = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        with torch.no_grad():
            done = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, length:]
        assert list(one.generate(ids, 20)) == done.tolist()
    small = OneGraph(files["int8"], claim(onnxruntime, None, True))
    assert len(list(small.generate([5, 9], 6))) == 6


def test_groupings_are_even() -> None:
    assert groupings(30) == [30, 15, 10, 8, 6, 5, 4, 3, 2, 1] and groupings(1) == [1]
    assert even_cuts(30, 4) == (8, 15, 22, 30) and even_cuts(3, 3) == (1, 2, 3)


def test_the_choice_is_shown() -> None:
    times = {"fp32": Timed(20e-3, 100e-6), "int8": Timed(10e-3, 90e-6)}
    assert times["fp32"].seconds(1) == 20e-3 and times["fp32"].seconds(12) == pytest.approx(21.1e-3)
    table = Grouping(12, times, even_cuts(12, 3)).table().splitlines()
    assert [line.endswith("yes") for line in table[1:-1]].count(True) == 1
    assert table[1].split() == ["12", "1", "21.100", "0.938", "10.990", "0.894"]
    assert table[-1] == "a seam takes 100 us in fp32, 90 us in int8; speed: by that of one graph"


def test_auto_cuts_as_finely_as_seams_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, written = DecoderNetwork(tiny.decoder("llama")), []
    monkeypatch.setattr("offramp.export.decoder_auto._write", lambda *said: written.append(said[4]))
    seconds: dict[str, float] = {}

    def steps(bundles: list[Path], variant: str) -> list[float]:
        """What is opened first is slower, which must cancel out."""
        return [
            (1.0 if bundle.name == "one" else seconds[variant]) * (1.1 if bundle == bundles[0] else 1.0)
            for bundle in bundles
        ]

    monkeypatch.setattr("offramp.export.decoder_auto._steps", steps)
    for seconds["fp32"], cuts in ((1.001, (1, 2, 3)), (1.012, (2, 3)), (2.0, (3,))):
        assert choose_cuts(network, tmp_path).cuts == cuts
    seconds |= {"fp32": 1.001, "int4": 1.012}  # the cut is one, and has to do for both
    assert choose_cuts(network, tmp_path, ("fp32", "int4")).cuts == (2, 3)
    assert written[-1] == ("fp32", "int4")


def test_a_timing_that_ends_early_says_so(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match=r"seams in int8 ended with code 1; .* --segments 'every N'"):
        _steps([tmp_path / "none"], "int8")


@pytest.mark.slow
def test_ee_split_asks_auto_where_no_training_said_where(tmp_path: Path) -> None:
    tiny.decoder("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    words = [str(tmp_path / "model"), "--out", str(tmp_path / "bundle"), "--variants", "fp32,int8"]
    done = CliRunner().invoke(split, [*words, "--monolith", str(tmp_path / "one.onnx")])
    assert done.exit_code == 0, done.output
    assert " us in int8; speed" in done.output and "yes" in done.output and (tmp_path / "one.onnx").is_file()
