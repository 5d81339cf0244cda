"""Common mistakes at every command, for golden.py: exit codes, and whether messages name what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from golden import OPTIONS, Doors, Run

COMMANDS = (
    "ee-run",
    "ee-bench",
    "ee-calibrate",
    "ee-split",
    "ee-verify",
    "ee-train",
    "ee-eval",
    "ee-compare",
)
TEXTS, DATA = "../inputs/texts.jsonl", "../data_text"
# A command, and the word that its message has to name; @ stands for the bundle of texts.
CASES: tuple[tuple[str, str], ...] = (
    ("ee-run --bundle nowhere", "nowhere"),
    ("ee-run --bundle ../data_text", "data_text"),
    ("ee-run --bundle damaged_manifest", "damaged_manifest"),
    ("ee-run --bundle damaged_json", "damaged_json"),
    ("ee-run --bundle damaged_graph --rule never", "segment_01"),
    ("ee-run @ gone.txt", "gone.txt"),
    ("ee-run @ ../inputs", "inputs"),
    (f"ee-run @ {TEXTS} {TEXTS}", "2"),
    ("ee-run @ --nosuch", "--nosuch"),
    ("ee-run @ --rule nosuch", "nosuch"),
    ("ee-run @ --rule quee", "quee"),
    ("ee-run @ --rule speculative", "speculative"),
    ("ee-run @ --rule max_probability", "max_probability"),
    ("ee-run @ --rule never --threshold 0.5", "never"),
    ("ee-run @ --rule fixed --threshold 9", "9"),
    ("ee-run @ --rule patience --threshold 1.5", "1.5"),
    ("ee-run @ --rule gate --threshold nan", "nan"),
    ("ee-run @ --threshold many", "many"),
    ("ee-run @ --point nosuch", "nosuch"),
    ("ee-run @ --point default --rule never", "default"),
    ("ee-run @ --point default --variant int8", "int8"),
    ("ee-run @ --variant int3", "int3"),
    ("ee-run @ --engine trt", "trt"),
    ("ee-run @ --engine abc", "abc"),
    ("ee-run @ --device cuda", "cuda"),
    ("ee-run @ --device cuda --provider tensorrt", "tensorrt"),
    ("ee-run @ --cuda-graphs", "cuda"),
    ("ee-run @ --batch-size 0", "--batch-size"),
    ("ee-run @ --threads 0", "--threads"),
    ("ee-run @ --format xml", "xml"),
    ("ee-run @ --cache propagate", "propagate"),
    ("ee-run --bundle bundle_image gone.lst", "gone.lst"),
    ("ee-run --bundle bundle_quee --rule gate", "gate"),
    ("ee-run --bundle bundle_quee --rule quee --threshold -1", "-1"),
    ("ee-run --bundle bundle_llama --engine trt", "trt"),
    ("ee-run --bundle bundle_llama --rule quee", "quee"),
    ("ee-run --bundle bundle_llama --rule route --threshold 0.1", "route"),
    ("ee-run --bundle bundle_llama --rule skip --threshold 9", "9"),
    ("ee-run --bundle bundle_llama --rule never --cache propagate", "never"),
    ("ee-run --bundle bundle_llama --max-new-tokens 0", "--max-new-tokens"),
    ("ee-run --bundle bundle_llama --variant int3", "int3"),
    ("ee-run --bundle bundle_llama --point nosuch", "nosuch"),
    ("ee-bench @ --data gone.jsonl", "gone.jsonl"),
    ("ee-bench @", "--data"),
    (f"ee-bench --bundle nowhere --data {TEXTS}", "nowhere"),
    (f"ee-bench @ --data {TEXTS}", "texts.jsonl"),
    (f"ee-bench @ --data {DATA}/test.jsonl --points nosuch", "nosuch"),
    (f"ee-bench @ --data {DATA}/test.jsonl --against nowhere", "nowhere"),
    (f"ee-bench @ --data {DATA}/test.jsonl --json nowhere/out.json", "nowhere"),
    (f"ee-bench @ --data {DATA}/test.jsonl --rules gate", "rules"),
    ("ee-bench --bundle bundle_llama --data ../inputs/prompts.txt --rules gate:x", "gate:x"),
    ("ee-bench --bundle bundle_llama --data ../inputs/prompts.jsonl", "prompts.jsonl"),
    (f"ee-calibrate @ {TEXTS}", "texts.jsonl"),
    ("ee-calibrate @ nolabels.jsonl", "nolabels.jsonl"),
    ("ee-calibrate @ otherlabels.jsonl", "otherlabels.jsonl"),
    ("ee-calibrate @ gone.jsonl", "gone.jsonl"),
    (f"ee-calibrate --bundle nowhere {DATA}/dev.jsonl", "nowhere"),
    (f"ee-calibrate @ {DATA}/dev.jsonl --rule quee", "quee"),
    (f"ee-calibrate @ {DATA}/dev.jsonl --rule nosuch", "nosuch"),
    (f"ee-calibrate @ {DATA}/dev.jsonl --engine trt", "trt"),
    ("ee-calibrate --bundle bundle_llama nolabels.jsonl", "nolabels.jsonl"),
    ("ee-calibrate --bundle bundle_llama ../data_pairs/dev.jsonl --rule gate", "--rule"),
    ("ee-split nowhere --out out1", "nowhere"),
    (f"ee-split {DATA} --out out2", "data_text"),
    ("ee-split ../model_bert --out out3", "model_bert"),
    ("ee-split ../ckpt_text --out bundle_text", "bundle_text"),
    ("ee-split ../ckpt_text --out ../data_text --overwrite", "data_text"),
    ("ee-split ../ckpt_text --out out4 --variants int8", "int8"),
    ("ee-split ../ckpt_text --out out5 --variants fp32,int3", "int3"),
    ("ee-split ../ckpt_text --out out6 --segments 9", "9"),
    ("ee-split ../ckpt_text --out out7 --segments auto", "--dev"),
    ("ee-split ../ckpt_text --out out8 --dev gone.jsonl", "gone.jsonl"),
    ("ee-split ../ckpt_text --out out9 --dev nolabels.jsonl", "nolabels.jsonl"),
    ("ee-split ../ckpt_text --out outa --truncate 2", "--truncate"),
    ("ee-split ../ckpt_text --out outb --rivals outb/r", "outb"),
    ("ee-split ../ckpt_text --out outc --texts gone.txt", "gone.txt"),
    ("ee-split ../ckpt_llama --out outd --rivals rivals2", "--rivals"),
    ("ee-split ../ckpt_llama --out oute --segments 9", "9"),
    ("ee-verify nowhere", "nowhere"),
    ("ee-verify damaged_graph", "segment_01"),
    ("ee-verify bundle_llama --trt", "trt"),
    ("ee-train --model ../model_bert --data nowhere --out t1", "nowhere"),
    (f"ee-train --model nowhere --data {DATA} --out t2", "nowhere"),
    (f"ee-train --model ../model_bert --data {DATA} --recipe nosuch --out t3", "nosuch"),
    (f"ee-train --model ../model_bert --data {DATA} --set nosuch=1 --out t4", "nosuch"),
    (f"ee-train --model ../model_bert --data {DATA} --set epochs=many --out t5", "epochs"),
    (f"ee-train --model ../model_bert --data {DATA} --exits 9 --out t6", "9"),
    (f"ee-train --model ../model_bert --data {DATA} --out ../ckpt_text", "ckpt_text"),
    (f"ee-train --model ../model_bert --data {DATA} --out ../data_text", "data_text"),
    (f"ee-train --model ../model_bert --data {DATA} --label-column kind --out t7", "kind"),
    (f"ee-train --init ../data_text --data {DATA} --out t8", "data_text"),
    (f"ee-train --data {DATA} --out t9", "--model"),
    ("ee-train --model ../model_bert --out ta", "--data"),
    (f"ee-train --model ../model_llama --data {DATA} --recipe joint --out tb", "llama"),
    (f"ee-eval nowhere --data {DATA}", "nowhere"),
    (f"ee-eval {DATA} --data {DATA}", "data_text"),
    ("ee-eval ../ckpt_text --data nowhere", "nowhere"),
    (f"ee-eval ../ckpt_text --data {DATA} --split nosuch", "nosuch"),
    (f"ee-eval ../ckpt_text --data {DATA} --points-from nosuch", "nosuch"),
    ("ee-compare --model ../model_bert --data nowhere --out c1", "nowhere"),
    (f"ee-compare --model ../model_bert --data {DATA} --recipes nosuch --out c2", "nosuch"),
    (f"ee-compare --data {DATA} --out c3", "--model"),
)


# Of Python: the bundle, how the session is asked, with what, and wishes of load().
RAISES: tuple[tuple[str, str, Any, dict[str, Any]], ...] = (
    ("nowhere", "call", "good", {}),
    ("damaged_manifest", "call", "good", {}),
    ("damaged_json", "call", "good", {}),
    ("damaged_graph", "call", "good", {"rule": "never"}),
    *(
        ("bundle_text", "call", "good", wish)
        for wish in (
            {"rule": "nosuch"}, {"rule": "quee"}, {"rule": "entropy"}, {"rule": "never", "threshold": 0.5},
            {"point": "nosuch"}, {"point": "default", "rule": "gate"}, {"variant": "int3"}, {"engine": "abc"},
            {"engine": "trt"}, {"device": "cuda"}, {"provider": "cuda"}, {"cuda_graphs": True},
            {"batch_size": 0}, {"threads": 0}, {"cache": "propagate"},
        )
    ),
    *(("bundle_text", door, item, {}) for door in ("call", "map") for item in (7, "", "\ud800", None)),
    ("bundle_text", "generate", ["good", {}], {}),
    ("bundle_image", "call", "gone.png", {}),
    ("bundle_image", "call", "../inputs/pictures/broken.png", {}),
    ("bundle_llama", "call", "good", {}),
    ("bundle_llama", "map", "good", {}),
    ("bundle_llama", "generate", ["", {}], {}),
    ("bundle_llama", "generate", [7, {}], {}),
    ("bundle_llama", "generate", ["good", {"max_new_tokens": 0}], {}),
    ("bundle_llama", "generate", ["the " * 90, {}], {}),
    ("bundle_llama", "generate", ["good", {}], {"cache": "abc"}),
    ("bundle_llama", "generate", ["good", {}], {"engine": "trt"}),
)  # fmt: skip


def mistakes(doors: Doors) -> Iterator[Run]:
    """Every case, then the options of every command."""
    _prepare(doors)
    for line, word in CASES:
        words = line.replace("@", "--bundle bundle_text").split()
        yield f"mistake: {line}", partial(_mistaken, doors, words, word)
    for bundle, door, item, wish in RAISES:
        yield (
            f"raises: {bundle} {door} {item!r:.40} {wish}",
            partial(_raised, doors, bundle, door, item, wish),
        )
    for name in COMMANDS:
        yield f"{name} --help", partial(_options, doors, name)


def _prepare(doors: Doors) -> None:
    """Files that are wrong in one way each."""
    cwd = doors.cwd
    for name in ("damaged_manifest", "damaged_json", "damaged_graph"):
        shutil.rmtree(cwd / name, ignore_errors=True)
        shutil.copytree(cwd / "bundle_text", cwd / name)
    told = doors.manifest("bundle_text")
    del told[doors.field("segments")]
    (cwd / "damaged_manifest" / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    (cwd / "damaged_json" / "manifest.json").write_text("{", encoding="utf-8")
    graph = cwd / "damaged_graph" / "segment_01.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    (cwd / "nolabels.jsonl").write_text('{"text": "good"}\n' * 9, encoding="utf-8")
    (cwd / "otherlabels.jsonl").write_text('{"text": "good", "label": "no such"}\n' * 9, encoding="utf-8")


def _mistaken(doors: Doors, words: list[str], word: str) -> dict[str, Any]:
    code, _, said = doors.command(words, b"good\n")
    lines = [line for line in said.splitlines() if line.strip()]
    told = next((line for line in lines if not line.startswith(("Usage:", "Try "))), "")
    wanted = OPTIONS.get(word, word) if doors.renamed else word
    return {
        "code": code,
        "names": wanted.lower() in said.lower(),
        "traceback": "Traceback" in said,
        "said": told[:300],
    }


def _raised(doors: Doors, bundle: str, door: str, item: Any, wish: dict[str, Any]) -> dict[str, Any]:
    """The classes of the error, the nearest first, none where there was no error."""
    (found,) = doors.python(bundle, [{"door": door, "items": [item], "load": wish}])
    return {"raw": found.get("raises", []), "message": found.get("message", "")}


def _options(doors: Doors, name: str) -> dict[str, Any]:
    code, out, _ = doors.command([name, "--help"])
    found = re.findall(r"^ +(?:-\w, )?(--[a-z][\w-]*)", out.decode("utf-8"), re.M)
    return {"code": code, "raw": {option: "-" for option in sorted(found)}}
