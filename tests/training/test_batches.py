"""Images for training: every layout gives the same pixels, an unreadable file is named, augmentations."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch

from offramp.runtime.inputs.images import ImageInput
from offramp.training.batches import encode_images, parse_augment, random_crops
from offramp.training.data import BadData, Columns, Rows, load_data

FACTS = ImageInput(16, 16, (16, 16), "bicubic", "RGB", 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LABELS = [0, 1, 1, 0, 1]


def pixels_of(rows: Rows) -> np.ndarray:
    return encode_images(rows, FACTS, 17).pixels


def class_folders(root: Path) -> Path:
    for number, label in enumerate(LABELS):
        place = root / "train" / ("blue" if label else "red")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(tiny.png(label, number))
    return root


def test_every_layout_gives_the_same_pixels(tmp_path: Path) -> None:
    images = [tiny.png(label, number) for number, label in enumerate(LABELS)]
    expected = np.stack([tiny.image(label, number) for number, label in enumerate(LABELS)])
    for number, data in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(data)
    names = ["red", "blue"]
    structs = [{"bytes": data, "path": None} for data in images]
    hub = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"image": structs, "label": LABELS}, features=hub)
    table.to_parquet(tmp_path / "hub.parquet")
    table = datasets.Dataset.from_dict({"image": structs, "label": [names[label] for label in LABELS]})
    table.to_parquet(tmp_path / "plain.parquet")
    lines = [{"image": f"{number}.png", "label": names[label]} for number, label in enumerate(LABELS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = "".join(f"{line['image']},{line['label']}\n" for line in lines)
    (tmp_path / "rows.csv").write_text("image,label\n" + rows)
    for file in ("hub.parquet", "plain.parquet", "rows.jsonl", "rows.csv"):
        data = load_data(str(tmp_path / file), dev_share=0.2)
        assert data.has_images
        order = np.random.default_rng(0).permutation(5)
        for split, chosen in (("train", np.sort(order[1:])), ("dev", order[:1])):
            rows_of = data.split(split)
            np.testing.assert_array_equal(pixels_of(rows_of), expected[chosen])
            label_names = [data.labels[label] for label in rows_of.label]
            assert label_names == [names[LABELS[at]] for at in chosen], file


def test_class_folders_are_labels_in_order(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "train" / "red" / ".hidden").write_bytes(b"")
    data = load_data(str(tmp_path), dev_share=0.2)
    assert data.labels == ("blue", "red")
    assert sorted(len(rows) for rows in data.splits.values()) == [1, 4]
    without = load_data(str(tmp_path / "train"), dev_share=0.2)  # no splits: all of it is train
    np.testing.assert_array_equal(pixels_of(without.split("train")), pixels_of(data.split("train")))


def test_an_unreadable_image_is_named_by_file_and_row(tmp_path: Path) -> None:
    lines = ["ok.png", "broken.png", "nowhere.png"]
    (tmp_path / "ok.png").write_bytes(tiny.png(0))
    (tmp_path / "broken.png").write_bytes(tiny.png(0)[:60])
    for bad in (1, 2):
        rows = [{"image": name, "label": at % 2} for at, name in enumerate([lines[0], lines[0], lines[bad]])]
        file = tmp_path / f"{bad}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = load_data(str(file), dev_share=0.01)
        with pytest.raises(BadData, match=rf"{bad}\.jsonl, row 3: .*{lines[bad]}"):
            for rows_of in data.splits.values():
                pixels_of(rows_of)


@pytest.mark.parametrize("value", [None, 7, ""])
def test_a_row_without_an_image_is_named(tmp_path: Path, value: object) -> None:
    rows = [{"image": "a.png", "label": 0}, {"image": value, "label": 1}]
    file = tmp_path / "rows.jsonl"
    if isinstance(value, int):
        rows[0]["image"] = 8
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadData, match=r"rows\.jsonl, row [12]: column 'image'"):
        load_data(str(file))


def test_another_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(tiny.png(0))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"img": "a.png", "fine": at % 2}) + "\n" for at in range(4)))
    data = load_data(str(file), Columns(image="img", label="fine"))
    assert data.has_images and data.labels == ("0", "1")
    with pytest.raises(BadData, match="--image-column"):
        load_data(str(file))


def test_empty_class_folders_are_reported(tmp_path: Path) -> None:
    (tmp_path / "train" / "red").mkdir(parents=True)
    with pytest.raises(BadData, match="folder of images for each label"):
        load_data(str(tmp_path))


def test_augmentation_is_random_and_only_for_training(tmp_path: Path) -> None:
    data = load_data(str(class_folders(tmp_path)), dev_share=0.2)
    rows = encode_images(data.split("train"), FACTS, 17, augment=("flip", "crop"))
    index = np.arange(4)
    torch.manual_seed(0)
    first, second = (rows.batch(index)[0]["pixel_values"] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, rows.batch(index)[0]["pixel_values"]), "a resumed run gets the same images"
    plain = rows.plain.batch(index)[0]["pixel_values"]
    torch.testing.assert_close(plain, torch.from_numpy(rows.pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    assert rows.take(np.array([2])).augment == ("flip", "crop")


def test_a_random_crop_contains_the_middle() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3)).astype(np.uint8)
    moved = random_crops(images)
    corners = set()
    for before, after in zip(images, moved, strict=True):
        fits = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (after[4:-4, 4:-4] == before[2 + top : 10 + top, 2 + left : 10 + left]).all()
        ]
        assert len(fits) == 1
        corners.add(fits[0])
    assert len(corners) > 10


def test_augmentations_are_checked() -> None:
    assert parse_augment("none") == () and parse_augment("flip, crop") == ("flip", "crop")
    with pytest.raises(ValueError, match="some of flip, crop"):
        parse_augment("mixup")
