"""Convert images to pixels as the manifest describes: Pillow decodes and resizes, numpy normalizes.

Training also uses this file, so that a bundle gets the same pixels as its network in training. The steps are
those of transformers' image processors on Pillow: RGB, resize, cut the centre out, rescale, normalize.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.bundle.manifest import ImageInput
from offramp.runtime.errors import BadBundle, BadInput, EngineUnavailable, ItemError

if TYPE_CHECKING:
    from PIL.Image import Image

    from offramp.runtime.bundle.files import Bundle

Pixels = NDArray[np.uint8]
# Formats of pictures alone. Pillow reads others, too: some by starting a program (EPS: Ghostscript), some
# that hold anything, and some that it cannot recognise, so that any file may be one.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "MPO", "JPEG2000", "AVIF", "ICO", "DIB")
_ALWAYS_LOADED = FORMATS[:5]  # Pillow imports its readers of the others only when they are needed
MAX_PIXELS = 89_478_485  # of a file, and of what it is resized to; Pillow warns beyond
PIXELS = "pixel_values"
_SIXTEEN_BITS = ("PNG", "PPM")  # older versions of Pillow open such a file with numbers of 32 bits
_ORIENTATION = 0x0112  # the tag of EXIF
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def open_picture(picture: Any) -> Image:
    """Open a picture as a PIL image in RGB.

    picture: a path, the bytes of a file, a PIL image, or an array uint8 [height, width] (grey) or [height,
    width, 3] (RGB). A path has to be a regular file, in a format of FORMATS. The rotation that a camera wrote
    into a file is applied; an image that is already open stays as it is. Grey of 16 bits becomes grey of 8.
    Raises BadInput for other values, for images of more than MAX_PIXELS, and for numbers of an unknown range;
    EngineUnavailable if Pillow is not installed.
    """
    images = _pillow("PIL.Image")
    try:
        if isinstance(picture, np.ndarray):
            return _of_array(picture, images)
        if isinstance(picture, images.Image):
            return _to_rgb(picture, images)
        if not isinstance(picture, (str, bytes, bytearray, os.PathLike)):
            raise BadInput(f"expected a path, bytes, a PIL image or an array, found {picture!r:.60}")
        with _bytes_of(picture) as source, _decoder(source) as opened:
            _check_size(opened.size)
            return _to_rgb(_upright(opened, images), images)
    except BadInput as problem:
        if isinstance(picture, (str, os.PathLike)):
            raise BadInput(f"{os.fspath(picture)!r}: {problem}") from None
        raise
    except FileNotFoundError:
        raise BadInput(f"no such image file: {os.fspath(picture)!r}") from None
    except Exception as problem:  # a broken file makes Pillow raise nearly anything
        name = repr(os.fspath(picture)) if isinstance(picture, (str, os.PathLike)) else "the bytes"
        unknown = isinstance(problem, images.UnidentifiedImageError)
        what = f"no format of {', '.join(FORMATS)}" if unknown else f"{type(problem).__name__}: {problem}"
        raise BadInput(f"{name} cannot be read as an image: {' '.join(what.split())}") from problem


def picture_pixels(picture: Any, facts: ImageInput) -> Pixels:
    """Open, resize and cut a picture to an array uint8 [height, width, 3], with channels in RGB order."""
    image = open_picture(picture)
    if facts.resize:
        wide, high = _target(image.size, facts.resize)
        _check_size((wide, high), f" after it is resized from {image.width} x {image.height}")
        filters = _pillow("PIL.Image").Resampling
        image = image.resize((wide, high), filters[facts.resample.upper()])
    return _centre(np.asarray(image), facts.height, facts.width)


def normalize_pixels(images: Pixels, facts: ImageInput) -> NDArray[np.float32]:
    """Normalize pixels uint8 [batch, height, width, 3] to the stem's input, as the manifest describes.

    Returns float32 [batch, 3, height, width].
    """
    scale, mean, std = facts.scale, np.array(facts.mean), np.array(facts.std)
    if facts.channels == "BGR":
        images = images[..., ::-1]
    factor, shift = (scale / std).astype(np.float32), (-mean / std).astype(np.float32)
    values = images.astype(np.float32) * factor + shift  # [batch, height, width, 3]
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class ImageRow:
    """One image as pixels uint8 [height, width, 3]; length: its number of tokens in the network."""

    pixels: Pixels
    length: int
    truncated: bool = False
    rest: tuple[ImageRow, ...] = ()  # an image has no windows


class ImageReader:
    """Converts images to the stem's inputs as the manifest describes; safe to call from several threads."""

    def __init__(self, bundle: Bundle) -> None:
        stem = bundle.manifest.stem.first_graph
        facts = bundle.manifest.input
        assert isinstance(facts, ImageInput)
        self._facts = facts
        unknown = [tensor.name for tensor in stem.inputs if tensor.name != PIXELS]
        if unknown:
            raise BadBundle(f"{bundle.folder}: stem input {unknown[0]!r} cannot be made from an image")
        (hidden,) = (tensor for tensor in stem.outputs if tensor.name == "hidden")
        self._length = int(hidden.shape[1])
        _pillow(
            "PIL.Image"
        )  # raises an error for a missing Pillow when a bundle is opened, not at the first image

    def read(self, items: Sequence[object]) -> list[ImageRow | ItemError]:
        """Convert each item to a row of pixels, or to an ItemError if it is no image."""
        rows: list[ImageRow | ItemError] = []
        for number, item in enumerate(items):
            try:
                rows.append(ImageRow(picture_pixels(item, self._facts), self._length))
            except BadInput as problem:
                rows.append(ItemError(number, str(problem)))
        return rows

    def arrays(self, rows: Sequence[ImageRow], pad_alone: bool = False) -> dict[str, NDArray[Any]]:
        """Stack rows to the stem's input, float32 [batch, 3, height, width]; images need no padding."""
        return {PIXELS: normalize_pixels(np.stack([row.pixels for row in rows]), self._facts)}

    def blank(self, rows: int, length: int) -> dict[str, NDArray[Any]]:
        """The stem's input for black images; `length` is ignored, as every image has the same length."""
        return {PIXELS: np.zeros((rows, 3, self._facts.height, self._facts.width), np.float32)}


def _bytes_of(picture: str | bytes | bytearray | os.PathLike[str]) -> BinaryIO:
    """The bytes of a picture, or of a regular file; raises BadInput for a pipe or a device by that name."""
    if isinstance(picture, (bytes, bytearray)):
        return io.BytesIO(picture)
    # Not blocking, and looked at after it is open: it might be replaced between a look and the opening.
    handle = os.open(picture, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return open(handle, "rb")
    os.close(handle)
    raise BadInput("not a regular file, so it cannot be read as an image")


def _decoder(source: BinaryIO) -> Image:
    """Open an image by its first bytes as one of FORMATS; nothing is decoded yet."""
    images = _pillow("PIL.Image")
    try:
        return images.open(source, formats=_ALWAYS_LOADED)  # type: ignore[no-any-return]
    except images.UnidentifiedImageError:
        images.init()
        others = [name for name in FORMATS if name in images.OPEN and name not in _ALWAYS_LOADED]
        return images.open(source, formats=others)  # type: ignore[no-any-return]


def _check_size(size: tuple[int, int], what: str = "") -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise BadInput(f"{size[0]} x {size[1]} pixels{what}, over {MAX_PIXELS}; make it smaller")


def _upright(image: Image, images: Any) -> Image:
    """The image turned as the camera that took it says; damaged facts of a camera turn nothing."""
    image.load()  # a TIFF turns itself here, and drops the tag
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # facts of a camera are not the picture, and Pillow raises nearly anything
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(images.Transpose[turn])


def _to_rgb(image: Image, images: Any) -> Image:
    """The image in RGB, 8 bits a channel.

    Pillow itself cuts whole numbers over 255 and fractions, so that an image turns white or black.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        grey = np.asarray(image)
        return images.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")  # type: ignore[no-any-return]
    if image.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if image.mode == "I" else "fractions"
        raise BadInput(f"pixels that are {kind}, of an unknown range; save it with 8 bits a channel")
    return image.convert("RGB")


def _target(size: tuple[int, int], resize: Sequence[int]) -> tuple[int, int]:
    """Width and height to resize to; size: width and height, in Pillow's order."""
    if len(resize) == 2:
        return resize[1], resize[0]
    short, long = sorted(size)
    scaled = resize[0], max(1, int(resize[0] * long / short))
    return scaled if size[0] <= size[1] else (scaled[1], scaled[0])


def _centre(image: Pixels, height: int, width: int) -> Pixels:
    """Cut out the middle of an image [any, any, 3]; a smaller image gets a black border."""
    high, wide = image.shape[:2]
    if high < height or wide < width:
        canvas = np.zeros((max(high, height), max(wide, width), 3), np.uint8)
        top, left = -((high - len(canvas)) // 2), -((wide - canvas.shape[1]) // 2)
        canvas[top : top + high, left : left + wide] = image
        image, (high, wide) = canvas, canvas.shape[:2]
    top, left = (high - height) // 2, (wide - width) // 2
    return image[top : top + height, left : left + width]


def _of_array(array: NDArray[Any], images: Any) -> Image:
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not array.size or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise BadInput(
            f"an array of {array.dtype} {list(array.shape)}; expected uint8 [height, width, 3] in RGB "
            "or [height, width]"
        )
    image: Image = images.fromarray(np.ascontiguousarray(array)).convert("RGB")
    return image


def _pillow(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as problem:
        raise EngineUnavailable(
            f"images need Pillow, which cannot be imported ({problem}); pip install 'offramp[vision]'"
        ) from problem


__all__ = [
    "BadInput",
    "ImageInput",
    "ImageReader",
    "ImageRow",
    "normalize_pixels",
    "open_picture",
    "picture_pixels",
]
