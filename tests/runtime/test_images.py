"""Pixels against transformers' own image processors, and pictures that are none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import ImageInput
from offramp.runtime.errors import BadInput
from offramp.runtime.inputs.images import decode, normalized, pixels

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


@pytest.mark.parametrize("shape", [(32, 32), (40, 25), (25, 41), (11, 90), (7, 5), (20, 20)])
@pytest.mark.parametrize("cut", [(23, 20), (20, 20), (13, 20), None])
@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_as_transformers_does_it(shape: tuple[int, int], cut: tuple[int, int] | None, resample: int) -> None:
    """The shorter side resized and the centre cut out (smaller ones padded), or both sides resized."""
    bit = pytest.importorskip("transformers.models.bit.image_processing_pil_bit")
    vit = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    given = Image.fromarray(noise(*shape))
    shared: dict[str, Any] = {"image_mean": list(MEAN), "image_std": list(STD), "resample": resample}
    resize: tuple[int, ...]
    if cut is None:
        processor = vit.ViTImageProcessorPil(size={"height": 20, "width": 20}, **shared)
        resize = (20, 20)
    else:
        crop = {"height": cut[1], "width": cut[1]}
        processor = bit.BitImageProcessorPil(size={"shortest_edge": cut[0]}, crop_size=crop, **shared)
        resize = cut[:1]
    expected = np.stack(processor(given)["pixel_values"])
    names = ("nearest", "lanczos", "bilinear", "bicubic")
    facts = ImageInput(20, 20, resize, names[resample], "RGB", 1 / 255, MEAN, STD)
    found = normalized(pixels(given, facts)[None], facts)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_every_form_of_a_picture_is_the_same(tmp_path: Path) -> None:
    array = noise(20, 20)
    path = tmp_path / "a.png"
    path.write_bytes(file_of(array))
    for picture in (path, str(path), path.read_bytes(), Image.fromarray(array), array):
        np.testing.assert_array_equal(pixels(picture, PLAIN), array)


def test_grey_and_transparent_and_palette_become_rgb() -> None:
    grey = noise(9, 9)[..., 0]
    assert (pixels(grey, PLAIN)[..., :1] == pixels(grey, PLAIN)).all()
    for mode in ("RGBA", "P", "L", "CMYK", "1"):
        out = io.BytesIO()
        Image.fromarray(noise(9, 9)).convert(mode).save(out, "TIFF")
        assert pixels(out.getvalue(), PLAIN).shape == (20, 20, 3)


def test_the_order_of_channels_and_no_resize() -> None:
    array = noise(20, 20)
    facts = ImageInput(20, 20, (), "nearest", "BGR", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(normalized(pixels(array, facts)[None], facts)[0, 0], array[..., 2])


def test_what_a_camera_says_of_its_rotation_is_followed() -> None:
    array = noise(4, 8)
    turned = Image.new("RGB", (1, 1)).getexif()
    turned[0x0112] = 6  # the camera was held a quarter turn
    assert np.asarray(decode(file_of(array, "TIFF", exif=turned))).shape == (8, 4, 3)


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
def test_what_is_no_picture_is_named(picture: Any, named: str) -> None:
    with pytest.raises(BadInput) as problem:
        pixels(picture, PLAIN)
    assert named in str(problem.value)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    whole = file_of(noise(64, 64), "JPEG")
    for name, data in (("cut.jpg", whole[: len(whole) // 2]), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match=name):
            pixels(tmp_path / name, PLAIN)
    with pytest.raises(BadInput, match="cannot be read"):
        pixels(tmp_path, PLAIN)
