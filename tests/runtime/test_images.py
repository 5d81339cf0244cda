"""Pixels against transformers' image processors, and what is refused as a picture."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import ImageInput, Macs, Segment, Tensor, Variant
from offramp.runtime.errors import BadBundle, BadInput, EngineUnavailable, ItemError
from offramp.runtime.inputs.images import (
    ImageReader,
    ImageRow,
    normalize_pixels,
    open_picture,
    picture_pixels,
)

Image = pytest.importorskip("PIL.Image")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = ImageInput(20, 20, (20, 20), "bilinear", "RGB", 1 / 255, MEAN, STD)
# One step of 0..255 is 1 / (255 * 0.22) = 0.018 here: this holds every pixel to the same byte.
TOLERANCE = 1e-5


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def file_of(array: NDArray[np.uint8], kind: str = "PNG", **facts: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **facts)
    return out.getvalue()


@pytest.mark.slow  # transformers imports torch
@pytest.mark.parametrize("shape", [(32, 32), (40, 25), (25, 41), (11, 90), (7, 5), (20, 20)])
@pytest.mark.parametrize("cut", [(23, 20), (20, 20), (13, 20), None])
@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_pixels_equal_transformers(
    shape: tuple[int, int], cut: tuple[int, int] | None, resample: int
) -> None:
    """The shorter side resized and the centre cut out (smaller ones padded), or both sides resized."""
    bit = pytest.importorskip("transformers.models.bit.image_processing_pil_bit")
    vit = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    picture = Image.fromarray(noise(*shape))
    shared: dict[str, Any] = {"image_mean": list(MEAN), "image_std": list(STD), "resample": resample}
    resize: tuple[int, ...]
    if cut is None:
        processor = vit.ViTImageProcessorPil(size={"height": 20, "width": 20}, **shared)
        resize = (20, 20)
    else:
        crop = {"height": cut[1], "width": cut[1]}
        processor = bit.BitImageProcessorPil(size={"shortest_edge": cut[0]}, crop_size=crop, **shared)
        resize = cut[:1]
    expected = np.stack(processor(picture)["pixel_values"])
    names = ("nearest", "lanczos", "bilinear", "bicubic")
    facts = ImageInput(20, 20, resize, names[resample], "RGB", 1 / 255, MEAN, STD)
    values = normalize_pixels(picture_pixels(picture, facts)[None], facts)
    assert values.dtype == np.float32 and values.flags.c_contiguous
    np.testing.assert_allclose(values, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("shape", "resize", "size"),
    [
        ((40, 25), (10,), (16, 10)),  # the shorter side, cut down to whole pixels
        ((25, 40), (10,), (10, 16)),
        ((11, 90), (20,), (20, 163)),
        ((40, 25), (12, 14), (12, 14)),
        ((40, 25), (), (40, 25)),
    ],
)
def test_pixels_are_the_centre_of_the_resized_image(
    shape: tuple[int, int], resize: tuple[int, ...], size: tuple[int, int]
) -> None:
    array = noise(*shape)
    resized = (
        np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR)) if resize else array
    )
    top, left = (size[0] - 8) // 2, (size[1] - 6) // 2
    facts = ImageInput(8, 6, resize, "bilinear", "RGB", 1 / 255, MEAN, STD)
    np.testing.assert_array_equal(picture_pixels(array, facts), resized[top : top + 8, left : left + 6])


def test_pixels_of_a_small_image_have_a_black_border() -> None:
    array = noise(5, 8)
    facts = ImageInput(8, 8, (), "bilinear", "RGB", 1 / 255, MEAN, STD)
    framed = picture_pixels(array, facts)
    np.testing.assert_array_equal(framed[2:7], array)
    assert not framed[:2].any() and not framed[7:].any()


def test_normalized_is_scaled_then_shifted_by_channel() -> None:
    array = noise(20, 20)
    values = normalize_pixels(array[None], PLAIN)
    assert values.dtype == np.float32 and values.flags.c_contiguous and values.shape == (1, 3, 20, 20)
    expected = (array / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(values[0].transpose(1, 2, 0), expected, atol=TOLERANCE, rtol=0)


def test_every_kind_of_picture_gives_the_same_pixels(tmp_path: Path) -> None:
    array = noise(20, 20)
    path = tmp_path / "a.png"
    path.write_bytes(file_of(array))
    for picture in (path, str(path), path.read_bytes(), Image.fromarray(array), array):
        np.testing.assert_array_equal(picture_pixels(picture, PLAIN), array)


def test_every_colour_mode_becomes_rgb() -> None:
    grey = noise(9, 9)[..., 0]
    assert (picture_pixels(grey, PLAIN)[..., :1] == picture_pixels(grey, PLAIN)).all()
    for mode in ("RGBA", "P", "L", "CMYK", "1"):
        out = io.BytesIO()
        Image.fromarray(noise(9, 9)).convert(mode).save(out, "TIFF")
        assert picture_pixels(out.getvalue(), PLAIN).shape == (20, 20, 3)


def test_bgr_without_resize() -> None:
    array = noise(20, 20)
    facts = ImageInput(20, 20, (), "nearest", "BGR", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(
        normalize_pixels(picture_pixels(array, facts)[None], facts)[0, 0], array[..., 2]
    )


def test_exif_rotation_is_applied() -> None:
    array = noise(4, 8)
    exif = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = 6  # the camera was held a quarter turn
    assert np.asarray(open_picture(file_of(array, "TIFF", exif=exif))).shape == (8, 4, 3)


@pytest.mark.parametrize(
    ("picture", "named"),
    [
        (b"not an image", "cannot be read as an image"),
        (b"", "cannot be read as an image"),
        ("nowhere.png", "no such image file: 'nowhere.png'"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((3, 4, 4), np.uint8), "expected uint8 [height, width, 3]"),
        (np.zeros((0, 4, 3), np.uint8), "[0, 4, 3]"),
        (7, "found 7"),
        (None, "found None"),
    ],
)
def test_other_objects_are_refused(picture: Any, named: str) -> None:
    with pytest.raises(BadInput) as problem:
        picture_pixels(picture, PLAIN)
    assert named in str(problem.value)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    jpeg = file_of(noise(64, 64), "JPEG")
    for name, data in (("cut.jpg", jpeg[: len(jpeg) // 2]), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match=name):
            picture_pixels(tmp_path / name, PLAIN)
    with pytest.raises(BadInput, match="cannot be read"):
        picture_pixels(tmp_path, PLAIN)


def image_bundle(input_name: str = "pixel_values") -> Bundle:
    """As much of a bundle as a reader of images needs: 20 x 20 pixels become 17 tokens."""
    tensor = Tensor(input_name, "float32", ("batch", 3, 20, 20))
    graph = Variant("stem.onnx", (tensor,), (Tensor("hidden", "float32", ("batch", 17, 8)),))
    manifest: Any = SimpleNamespace(input=PLAIN, stem=Segment("stem", (), Macs(), {"fp32": graph}))
    return Bundle(Path("bundle"), manifest)


def test_reader_gives_a_row_or_an_error_for_each_item() -> None:
    reader, array = ImageReader(image_bundle()), noise(20, 20)
    first, error, last = reader.read([array, "nowhere.png", file_of(array)])
    assert error == ItemError(1, "no such image file: 'nowhere.png'")
    assert isinstance(first, ImageRow) and isinstance(last, ImageRow)
    assert first.length == 17 and not first.truncated
    values = reader.arrays([first, last])["pixel_values"]
    np.testing.assert_array_equal(values, normalize_pixels(np.stack([array, array]), PLAIN))
    blank = reader.blank(3, 99)["pixel_values"]
    assert blank.shape == (3, 3, 20, 20) and blank.dtype == np.float32 and not blank.any()


def test_reader_of_another_stem_is_refused() -> None:
    with pytest.raises(BadBundle, match="stem input 'audio' cannot be made from an image"):
        ImageReader(image_bundle("audio"))


def test_missing_pillow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'offramp\[vision\]'"):
        ImageReader(image_bundle())
