"""A decoder's bundle generates what transformers generates, token for token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import tiny
import torch
from click.testing import CliRunner

from offramp.export.aot import main as verify
from offramp.export.cli import main as split
from offramp.runtime import BadSetting, Session, SessionClosed, load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.cli import main as run
from offramp.runtime.engines.ort_decoder import PLACES, DecoderEngine
from offramp.runtime.engines.threads import claim
from offramp.runtime.errors import BadInput, BadManifest
from offramp.runtime.generate import generate

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"


# Graphs of every family are in test_decoder.
@pytest.fixture(scope="module", params=tiny.with_slow(["llama", "gpt2", "qwen3"], "llama"))
def made(request: pytest.FixtureRequest, decoder_bundle: Callable[[str], Any]) -> tuple[Any, Path]:
    return decoder_bundle(request.param)  # type: ignore[no-any-return]


@pytest.fixture
def engine(made: tuple[Any, Path]) -> DecoderEngine:
    return DecoderEngine(onnxruntime, open_bundle(made[1]), "fp32", claim(onnxruntime, None, True))


@torch.no_grad()
def greedy(model: Any, ids: list[int], most: int) -> list[int]:
    done = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False)
    return [int(token) for token in done[0, len(ids) :]]


@pytest.mark.parametrize("length", [1, 2, 7, 23])
def test_it_says_what_transformers_says(made: tuple[Any, Path], engine: DecoderEngine, length: int) -> None:
    model, _ = made
    for seed in range(5):
        ids = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        said = list(generate(engine, ids, 17))
        assert [token.id for token in said] == greedy(model, ids, 17)
        assert {token.depth for token in said} == {3}


def test_the_cache_grows_and_forgets_nothing(
    made: tuple[Any, Path], engine: DecoderEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.runtime.engines.decoder.PLACES", 4)
    assert engine.cache().places == 4 < PLACES
    ids = [5, 9, 30]
    most = engine.cache().longest - 5
    assert [token.id for token in generate(engine, ids, most)] == greedy(made[0], ids, most)


def test_it_ends_where_it_should(made: tuple[Any, Path], engine: DecoderEngine) -> None:
    ids = [5, 9, 30]
    whole = [token.id for token in generate(engine, ids, 12)]
    end = whole.index(whole[6])
    assert [token.id for token in generate(engine, ids, 12, stop=[whole[6]])] == whole[: end + 1]
    longest = engine.cache().longest
    assert len(list(generate(engine, ids, 1000))) == longest - len(ids) + 1
    with pytest.raises(BadInput, match="the prompt has no token"):
        list(generate(engine, [], 3))
    with pytest.raises(BadInput, match=rf"{longest + 1} tokens: this network reads {longest}"):
        list(generate(engine, [5] * (longest + 1), 3))


def test_int8_talks_too(made: tuple[Any, Path]) -> None:
    small = DecoderEngine(onnxruntime, open_bundle(made[1]), "int8", claim(onnxruntime, None, True))
    assert len(list(generate(small, [5, 9, 30], 9))) == 9


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["decoder"], None, r"decoder: missing for task text-generation"),
        (["decoder", "stop"], [60], r"decoder.stop: 60 is not in a vocabulary of 60"),
        (["labels"], ["a", "b"], r"labels: a decoder has none"),
        (["segments", 1, "blocks"], [3], r"segments: their blocks must be 1 to 3"),
        (
            ["segments", 0, "variants", "fp32", "outputs", 1, "name"],
            "new_k_7",
            r"variants\['int8'\]: tensors other",
        ),
        (["stem", "variants", "fp32", "outputs", 0, "name"], "state", r"stem: it has no output 'hidden'"),
        (
            ["decoder", "head", "variants", "fp32", "outputs", 0, "shape", 2],
            59,
            r"decoder.head.variants\['int8'\]: tensors other",
        ),
    ],
)
def test_a_manifest_that_cannot_be(
    made: tuple[Any, Path], tmp_path: Path, path: list[Any], value: Any, message: str
) -> None:
    bundle = Path(shutil.copytree(made[1], tmp_path / "bundle"))
    told = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    *way, last = path
    place = told
    for step in way:
        place = place[step]
    place[last] = value
    (bundle / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(BadManifest, match=message):
        open_bundle(bundle)


@pytest.fixture(scope="module")
def writer(made: tuple[Any, Path]) -> Iterator[Session]:
    with load(made[1]) as session:
        yield session


PROMPT = "the film was good and the plot"


def test_a_session_writes_what_the_engine_says(writer: Session, engine: DecoderEngine) -> None:
    pieces = list(writer.generate(PROMPT, 12))
    ids = tiny.tokenizer().encode(PROMPT).ids
    assert [piece.token for piece in pieces] == [token.id for token in generate(engine, ids, 12)]
    assert "".join(piece.text for piece in pieces) == tiny.tokenizer().decode(
        [piece.token for piece in pieces]
    )
    seconds = [piece.seconds for piece in pieces]
    assert seconds == sorted(seconds) and {piece.depth for piece in pieces} == {3}


def test_it_stops_before_a_word(writer: Session) -> None:
    whole = "".join(piece.text for piece in writer.generate(PROMPT, 12))
    words = whole.split()
    stop = next((word for word in words[2:] if word not in words[:2]), words[-1])
    text = "".join(piece.text for piece in writer.generate(PROMPT, 12, stop=[stop, "nowhere"]))
    assert text == whole[: whole.index(stop)]
    assert "".join(piece.text for piece in writer.generate(PROMPT, 12, stop=["nowhere"])) == whole


def test_two_texts_at_once_do_not_mix(writer: Session) -> None:
    alone = [[piece.text for piece in writer.generate(prompt, 8)] for prompt in (PROMPT, "a dull scene")]
    both = zip(writer.generate(PROMPT, 8), writer.generate("a dull scene", 8), strict=True)
    assert [list(texts) for texts in zip(*((a.text, b.text) for a, b in both), strict=True)] == alone


def test_what_a_session_of_a_decoder_does_not_do(writer: Session, made: tuple[Any, Path]) -> None:
    for refused in (lambda: writer("good"), lambda: writer.map(["good"]), lambda: writer.encode("good")):
        with pytest.raises(BadSetting, match="this bundle generates text"):
            refused()
    with pytest.raises(BadInput, match="expected a string or messages, found 7"):
        writer.generate(7)  # type: ignore[arg-type]
    with pytest.raises(BadSetting, match="max_new_tokens 0"):
        writer.generate("good", 0)
    for wishes in ({"engine": "trt"}, {"provider": "cuda"}, {"device": "cuda"}):
        with pytest.raises(BadSetting, match="does not know this wish yet"):
            load(made[1], **wishes)  # type: ignore[arg-type]
    with pytest.raises(BadSetting, match=r"cache propagate: .*it has no cache"):
        load(TINY, cache="propagate")
    with pytest.raises(BadSetting, match="variant 'fp16' is not in"):
        load(made[1], variant="fp16")
    with load(TINY) as classifier, pytest.raises(BadSetting, match="this bundle classifies"):
        classifier.generate("good")


def test_closed_it_says_so(made: tuple[Any, Path]) -> None:
    session = load(made[1])
    session.warm_up()
    pieces = session.generate(PROMPT, 5)
    next(pieces)
    session.close()
    with pytest.raises(SessionClosed):
        next(pieces)


def test_tensorrt_is_not_for_decoders_yet(made: tuple[Any, Path]) -> None:
    done = CliRunner().invoke(verify, [str(made[1]), "--trt"])
    assert done.exit_code == 2 and "generates text, which engine trt does not walk yet" in done.output


# By the commands.


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as transformers saves it, and its bundle in two segments, by ee-split."""
    folder = tmp_path_factory.mktemp("talking")
    tiny.decoder("qwen2").save_pretrained(folder / "model")
    tiny.tokenizer().save(str(folder / "model" / "tokenizer.json"))
    words = [
        str(folder / "model"),
        "--out",
        str(folder / "bundle"),
        "--segments",
        "2",
        "--variants",
        "fp32,fp16",
    ]
    done = CliRunner().invoke(split, words)
    assert done.exit_code == 0 and "2 segments of 3 blocks" in done.output, done.output
    return folder


def ran(bundle: Path, given: str, *words: str) -> tuple[int, list[dict[str, Any]], str]:
    done = CliRunner().invoke(run, ["--bundle", str(bundle), *words], input=given)
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.slow
def test_ee_run_answers_prompts(talking: Path) -> None:
    code, answers, told = ran(talking / "bundle", "the film\na plot\n", "--max-new-tokens", "5", "--stats")
    assert code == 0 and len(answers) == 2
    for answer, prompt in zip(answers, ("the film", "a plot"), strict=True):
        with load(talking / "bundle") as session:
            assert answer["text"] == "".join(piece.text for piece in session.generate(prompt, 5))
        assert answer["tokens"] <= 5 and answer["depth"] == 3 and answer["tokens_per_s"] > 0
    assert "tokens " in told and "mean depth 3.00 of 3" in told and "engine     ort" in told


@pytest.mark.slow
def test_ee_run_takes_wishes_line_by_line_and_keeps_the_place_of_what_cannot_be(talking: Path) -> None:
    lines: list[Any] = [
        {"prompt": "the film", "max_new_tokens": 2},
        {"prompt": "the film", "stop": ["a", "b"], "max_new_tokens": 3},
        {"prompt": "the film", "max_new_tokens": 0},
        {"prompt": "the film", "stop": 7},
        {"prompt": "the film", "top_p": 0.9},
        {"text": "the film"},
        {"prompt": "the film " * 80},
    ]
    code, answers, _ = ran(talking / "bundle", "".join(json.dumps(line) + "\n" for line in lines))
    assert code == 1 and [answer.get("line") for answer in answers] == [None, None, 3, 4, 5, 6, 7]
    assert answers[0]["tokens"] == 2
    problems = [answer["error"] for answer in answers[2:]]
    for problem, said in zip(
        problems,
        ("max_new_tokens: expected", "stop: expected", "'top_p'", '"prompt"', "this network reads 64"),
        strict=True,
    ):
        assert said in problem


@pytest.mark.slow
def test_what_ee_split_does_not_do_with_a_model_of_transformers(talking: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "bundle")]
    done = CliRunner().invoke(split, [str(talking / "model"), *out, "--rivals", str(tmp_path / "rivals")])
    assert done.exit_code == 2 and "--rivals is for trained checkpoints" in done.output
    tiny.model_folder(tmp_path / "encoder")
    done = CliRunner().invoke(split, [str(tmp_path / "encoder"), *out])
    assert done.exit_code == 2 and "supported: gpt2, llama" in done.output
    (talking / "model" / "tokenizer.json").rename(tmp_path / "away.json")
    done = CliRunner().invoke(split, [str(talking / "model"), *out])
    (tmp_path / "away.json").rename(talking / "model" / "tokenizer.json")
    assert done.exit_code == 2 and "it has no tokenizer.json" in done.output
    assert not (tmp_path / "bundle").exists()
