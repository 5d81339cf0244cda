"""Checkpoints and inputs of golden.py, made once in its --work folder, with fixed seeds.

Checkpoints are made by the code that makes the record (tests/tiny.py, ee-train), and then used by all code.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Command = Callable[[Sequence[str]], tuple[int, bytes, str]]

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'robot' %}{{ raise_exception('no robots') }}"
    "{% endif %}{{ message['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}the{% endif %}"
)
JOURNEY = ("epochs=10", "batch_size=8", "lr=0.002", "heads_lr=0.01", "policy_epochs=20", "policy_lr=0.01")
WILD = """
import torch
from safetensors.torch import load_file, save_file
state = load_file({file!r})
torch.manual_seed(2)
for name in sorted(n for n in state if n.startswith("forecasts.") and n.endswith("last.weight")):
    state[name] = torch.randn_like(state[name])
    bias = torch.zeros_like(state[name.replace("weight", "bias")]).view(3, -1)  # [variant now, 1 + 3 * ahead]
    ahead = (bias.shape[1] - 1) // 3
    bias[0, 1 + ahead : 1 + 2 * ahead] = bias[1, 1 + 2 * ahead :] = -1.5  # another variant lures
    state[name.replace("weight", "bias")] = bias.flatten()
save_file(state, {file!r})
"""
LM = ("--recipe", "consistentee_lm", "--exits", "1,2", "--max-length", "32")
BERT = "import tiny, pathlib; tiny.model_folder(pathlib.Path({out!r}))"
LLAMA = """
import tiny, torch
from transformers import PreTrainedTokenizerFast
tiny.decoder("llama").save_pretrained({out!r})
words = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer(), eos_token="[SEP]", pad_token="[PAD]")
words.save_pretrained({out!r})
"""


def checkpoint(name: str, work: Path, command: Command, assets: Path | None) -> Path:
    """Folder ckpt_NAME in `work`, made if it is not there."""
    out = work / f"ckpt_{name}"
    if not out.exists():
        print(f"making {out.name}", file=sys.stderr, flush=True)
        beside = work / f"making_{name}"
        shutil.rmtree(beside, ignore_errors=True)
        MAKERS[name](beside, work, command, assets)
        beside.rename(out)
    return out


def snippet(code: str) -> None:
    """Run Python code in a fresh process, beside tests/tiny.py."""
    start = f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport torch; torch.set_num_threads(1)\n"
    subprocess.run([sys.executable, "-c", start + code], check=True)


def train(command: Command, out: Path, words: Sequence[str], sets: Sequence[str]) -> None:
    more = [word for one in sets for word in ("--set", one)]
    code, _, told = command(["ee-train", *words, "--precision", "fp32", "--out", str(out), *more])
    if code:
        raise SystemExit(f"ee-train for {out.name}: {told[-2000:]}")


def data(work: Path) -> Path:
    """Folder of tiny texts in train, dev and test."""
    if not (work / "data_text").exists():
        snippet(f"import tiny, pathlib; tiny.data_folder(pathlib.Path({str(work / 'data_text')!r}), dev=48)")
    return work / "data_text"


def _text(out: Path, work: Path, command: Command, assets: Path | None) -> None:
    model = _model(work, "bert", BERT.format(out=str(work / "model_bert")))
    train(command, out, ["--model", str(model), "--data", str(data(work))], JOURNEY)


def _quee(out: Path, work: Path, command: Command, assets: Path | None) -> None:
    model = _model(work, "bert", BERT.format(out=str(work / "model_bert")))
    sets = ("epochs=4", "batch_size=8", "lr=0.002", "heads_lr=0.01", "variants=fp32,int8,int4")
    train(command, out, ["--model", str(model), "--data", str(data(work)), "--recipe", "quee"], sets)
    snippet(WILD.format(file=str(next(out.glob("*.safetensors")))))


def _image(out: Path, work: Path, command: Command, assets: Path | None) -> None:
    folder, pictures = work / "model_dinov2", work / "data_image"
    _model(
        work,
        "dinov2",
        f"import tiny, pathlib; tiny.image_model_folder(pathlib.Path({str(folder)!r}), 'dinov2')\n"
        f"tiny.image_folder(pathlib.Path({str(pictures)!r}))",
    )
    sets = ("epochs=6", "batch_size=8", "lr=0.002", "heads_lr=0.01", "policy_epochs=10", "policy_lr=0.01")
    words = ["--model", str(folder), "--data", str(pictures), "--image-size", "24", "--whole-image"]
    train(command, out, [*words, "--augment", "flip,crop"], sets)


def _llama(out: Path, work: Path, command: Command, assets: Path | None) -> None:
    model = _model(work, "llama", LLAMA.format(out=str(work / "model_llama")))
    train(
        command,
        out,
        ["--model", str(model), "--data", str(pairs(work)), *LM],
        ("epochs=6", "heads_lr=0.02", "policies_lr=0.05", "policy_epochs=10", "alpha=0.05"),
    )
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _e5(out: Path, work: Path, command: Command, assets: Path | None) -> None:
    words = ["--model", _asset(assets, "models/e5-small"), "--data", str(real(work, "sst2", assets))]
    sets = ("epochs=1", "policy_epochs=5")  # 60 steps of 32 rows
    train(command, out, [*words, "--prefix", "query: ", "--max-length", "64"], sets)


def _e5_quee(out: Path, work: Path, command: Command, assets: Path | None) -> None:
    words = ["--model", _asset(assets, "models/e5-small"), "--data", str(real(work, "trec6", assets))]
    words += ["--prefix", "query: ", "--max-length", "64", "--recipe", "quee"]
    train(command, out, words, ("epochs=1", "lr=0.0001", "steps=100"))


def _smollm2(out: Path, work: Path, command: Command, assets: Path | None) -> None:
    snippet(
        "import pathlib; from offramp.benchmarks.fetch import fetch_smollm2; "
        f"fetch_smollm2(pathlib.Path({str(out)!r}))"
    )


MAKERS: dict[str, Callable[[Path, Path, Command, Path | None], None]] = {
    "text": _text,
    "quee": _quee,
    "image": _image,
    "llama": _llama,
    "e5": _e5,
    "e5_quee": _e5_quee,
    "smollm2": _smollm2,
}


def _model(work: Path, name: str, code: str) -> Path:
    if not (work / f"model_{name}").exists():
        snippet(code)
    return work / f"model_{name}"


def _asset(assets: Path | None, name: str) -> str:
    if assets is None:
        raise SystemExit(f"{name}: say --assets DIR, a folder that holds it")
    return str(assets.resolve() / name)


def pairs(work: Path) -> Path:
    """Folder of prompts with completions, for a tiny decoder."""
    folder = work / "data_pairs"
    if not folder.exists():
        rows = {s: _lines(data(work) / f"{s}.jsonl")[:24] for s in ("train", "dev")}
        folder.mkdir()
        for split, found in rows.items():
            told = [
                {"prompt": r["text"], "completion": ("not at all", "the film is good")[r["label"]]}
                for r in found
            ]
            _write(folder / f"{split}.jsonl", told)
    return folder


def real(work: Path, name: str, assets: Path | None) -> Path:
    """1920 training rows of a real data set, and the first 200 of dev and test."""
    folder, source = work / f"data_{name}", Path(_asset(assets, f"data/{name}"))
    if not folder.exists():
        folder.mkdir()
        rows = _lines(source / "train.jsonl")
        random.Random(0).shuffle(rows)
        for split, found in {
            "train": rows[:1920],
            **{s: _lines(source / f"{s}.jsonl")[:200] for s in ("dev", "test")},
        }.items():
            _write(folder / f"{split}.jsonl", [{"text": r["text"], "label": r["label"]} for r in found])
    return folder


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, rows: Sequence[Any]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def inputs(folder: Path) -> None:
    """Files that commands read: good lines among all kinds of bad ones."""
    folder.mkdir(exist_ok=True)
    drawn = random.Random(7)
    words = ["good", "fine", "lovely", "bad", "poor", "awful", "cold", "dull", "the", "a", "film", "plot"]
    words += ["scene", "was", "is", "and", "very", "quite", "not"]
    texts = [" ".join(drawn.choices(words, k=1 + at % 11)) for at in range(20)]
    good = [json.dumps({"text": text}) for text in texts]
    hard = [" ".join(drawn.choices(words, k=2 + at % 9)) for at in range(64)]  # the label is often a guess
    said = [sum((word in words[:3]) - (word in words[3:8]) for word in text.split()) for text in hard]
    _write(folder / "hard.jsonl", [{"text": t, "label": int(n > 0)} for t, n in zip(hard, said, strict=True)])
    bad = [
        "",
        "[1]",
        '{"text": 7}',
        '{"other": "good"}',
        '{"text": ""}',
        '{"text": "\\ud800 film"}',
        "{",
        "null",
    ]
    bad += [json.dumps({"text": "good", "text_b": 3}), json.dumps({"text": "x" * 300_000})]
    pair = [
        json.dumps({"text": "a good film", "text_b": "a dull plot"}),
        '{"text": "film", "text_b": null, "id": 4}',
    ]
    long = json.dumps({"text": "the film is very good " * 40})
    mixed = [
        *good[:6],
        bad[0],
        *good[6:9],
        *bad[1:5],
        pair[0],
        *good[9:14],
        *bad[5:],
        pair[1],
        long,
        *good[14:],
    ]
    raw = "\n".join(mixed).encode() + b"\n" + b'{"text": "caf\xe9"}\n' + good[0].encode()  # no line end
    (folder / "texts.jsonl").write_bytes(raw)
    plain = [
        *texts[:8],
        "",
        "  ",
        "the film is very good " * 40,
        "{not json",
        "caf\u00e9 film",
        "good " * 60_000,
    ]
    (folder / "texts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(plain).encode() + b"\r\nba\xffd\nfilm\n")
    prompts = [
        "the film was good and the plot",
        "a dull scene",
        "very",
        "not at all quite bad the",
        "awful warm a is",
    ]
    lines: list[Any] = [{"prompt": text} for text in prompts]
    lines += [{"prompt": prompts[0], "max_new_tokens": 3}, {"prompt": prompts[1], "stop": "the"}]
    lines += [{"prompt": prompts[2], "stop": ["a", "film"]}, {"prompt": prompts[0], "max_new_tokens": 0}]
    lines += [{"prompt": prompts[0], "stop": 7}, {"prompt": prompts[0], "top_p": 0.9}, {"text": prompts[0]}]
    lines += [{"prompt": "the film " * 80}, {"prompt": ""}, [1], {"messages": "good"}]
    lines += [{"messages": [{"role": "user", "content": "the film was good"}]}]
    lines += [
        {"messages": [{"role": "robot", "content": "the film"}]},
        {"messages": []},
        {"messages": [{"role": "user"}]},
    ]
    lines += [{"prompt": prompts[3], "stop": ["nowhere"], "max_new_tokens": 9}]
    _write(folder / "prompts.jsonl", lines)
    with (folder / "prompts.jsonl").open("ab") as stream:
        stream.write(b'\n{"prompt": "caf\xe9"}\n{"prompt": "\\ud800"}\n')
    (folder / "prompts.txt").write_text("\n".join([*prompts, "", "the " * 80]) + "\n")
    talk = ["The film begins with", "Once upon a time, a small dog", "The capital of France is"]
    talk += ["In 1969, people first", "Water boils when", "My favourite recipe needs two eggs,"]
    talk += ["def add(a, b):", "The three primary colours are", "Dear Sir or Madam,", "1, 2, 3, 4, 5,"]
    _write(folder / "talk.jsonl", [{"prompt": text} for text in talk])
    ends = [
        "a great actor who walks home.",
        "lived near the sea and liked to swim.",
        "Paris, on the river Seine.",
    ]
    _write(
        folder / "talk_pairs.jsonl",
        [{"prompt": t, "completion": " " + ends[at % 3]} for at, t in enumerate(talk)],
    )


def pictures(folder: Path) -> None:
    """PNG files, lists of them, and a file that is none."""
    if folder.exists():
        return
    listed = '{"image": "3.png"}\n{"image": 3}\n[]\n{"text": "a"}\n'
    code = (
        "import tiny, pathlib\n"
        f"folder = pathlib.Path({str(folder)!r}); folder.mkdir()\n"
        "for at in range(8):\n"
        "    (folder / f'{at}.png').write_bytes(tiny.png(at % 2, 9000 + at, (20 + at, 33 - at)))\n"
        "(folder / 'broken.png').write_bytes(tiny.png(0, 1)[:60])\n"
    )
    snippet(code)
    (folder / "list.txt").write_text("1.png\n\nnowhere.png\n2.png\n", encoding="utf-8")
    (folder / "list.jsonl").write_text(listed, encoding="utf-8")
