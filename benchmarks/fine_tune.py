"""Fine-tune a model as a user would, by transformers' Trainer; the folder it saves is what --model takes.

    python benchmarks/fine_tune.py MODEL DATA OUT [--prefix "query: "] [--image-size 112]

MODEL: folder or hub name. DATA: a folder with train and test as JSON lines (text, label, and label_text or
not) or as parquet with images. OUT: folder of the *ForSequenceClassification or *ForImageClassification
model, its tokenizer or preprocessor, and fine_tune.json with the accuracy on test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import datasets
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DefaultDataCollator,
    Trainer,
    TrainingArguments,
)

from offramp.training.loop import best_precision


@click.command()
@click.argument("model")
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--prefix", default="", help="Put before every text.")
@click.option("--image-size", type=int, help="Side of the images; the preprocessor's if not given.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--lr", default=5e-5, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model: str,
    data: Path,
    out: Path,
    prefix: str,
    image_size: int | None,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train, save, and state the accuracy on test."""
    kind = "parquet" if (data / "train.parquet").is_file() else "json"
    suffix = "parquet" if kind == "parquet" else "jsonl"
    splits: Any = datasets.load_dataset(
        kind,
        data_files={name: str(data / f"{name}.{suffix}") for name in ("train", "test")},
        trust_remote_code=False,
    )
    labels = label_names(splits["train"])
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    if kind == "parquet":
        # a column of {bytes, path} that does not say that it holds images is read as a plain struct
        splits = splits.cast_column("image", datasets.Image())
        network: Any = AutoModelForImageClassification.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False, **names
        )
        processor: Any = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
        if image_size is not None:
            processor.size, processor.do_center_crop = {"height": image_size, "width": image_size}, False
        splits = splits.with_transform(lambda rows: image_inputs(processor, rows))
        collate: Any = DefaultDataCollator()
    else:
        network = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False, **names
        )
        processor = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        splits = splits.map(lambda row: text_inputs(processor, prefix, row), desc="tokenizing")
        collate = DataCollatorWithPadding(processor)
    options = TrainingArguments(
        output_dir=str(out.with_name(f"{out.name}.trainer")),
        num_train_epochs=epochs,
        learning_rate=lr,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        warmup_steps=round(0.1 * epochs * len(splits["train"]) / batch_size),
        weight_decay=0.01,
        bf16=best_precision() == "bf16",
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length" if kind == "json" else "random",
        remove_unused_columns=kind == "json",
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(
        model=network,
        args=options,
        train_dataset=splits["train"],
        data_collator=collate,
    )
    trainer.train()
    share = share_right(network, trainer.get_eval_dataloader(splits["test"]))
    network.save_pretrained(out)
    processor.save_pretrained(out)
    facts = {"accuracy": round(100 * share, 3), "rows": len(splits["test"])}
    (out / "fine_tune.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    click.echo(json.dumps(facts))


def label_names(table: Any) -> list[str]:
    """The names of the labels by number: those of column label_text, or the numbers."""
    feature = table.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    texts = (
        dict(zip(table["label"], table["label_text"], strict=True)) if "label_text" in table.features else {}
    )
    return [str(texts.get(number, number)) for number in sorted(set(table["label"]))]


def text_inputs(tokenizer: Any, prefix: str, row: dict[str, Any]) -> dict[str, Any]:
    """Token ids of a row of text or of a pair of texts."""
    second = row.get("text_b")
    return dict(tokenizer(prefix + row["text"], second, truncation=True, max_length=128))


def image_inputs(processor: Any, rows: dict[str, Any]) -> dict[str, Any]:
    """Pixels and labels of a batch of rows with images."""
    images = [image.convert("RGB") for image in rows["image"]]
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": rows["label"]}


@torch.no_grad()
def share_right(network: Any, batches: Any) -> float:
    """The share of rows whose most probable label is right, computed in fp32, as a bundle computes it."""
    network.eval()
    right: list[bool] = []
    for batch in batches:
        labels = batch.pop("labels")
        right += (network(**batch).logits.argmax(-1) == labels).tolist()
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
