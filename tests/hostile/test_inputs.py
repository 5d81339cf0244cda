"""Hostile lines and images: each keeps its place as an error, and none ends the run, hangs or turns white."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime import cli, load_row_session
from offramp.runtime.answers_cli import window_of, write_answers
from offramp.runtime.bundle.manifest import ImageInput
from offramp.runtime.errors import BadInput
from offramp.runtime.inputs import images
from offramp.runtime.inputs.images import open_picture, picture_pixels
from offramp.runtime.inputs.lines import LONGEST_LINE, Line, read_lines
from offramp.runtime.output import Output
from offramp.runtime.run_stats import RunStats
from offramp.runtime.termination import Termination

Image = pytest.importorskip("PIL.Image")
posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices with names")
linux = pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
FACTS = ImageInput(20, 20, (20,), "bilinear", "RGB", 1 / 255, (0.5,) * 3, (0.5,) * 3)


def run(data: bytes, *options: str, bundle: Path = CLASSIFIER) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and objects of ee-run, which must end by itself and write one object a line."""
    result = CliRunner().invoke(cli.main, ["--bundle", str(bundle), *options], input=data)
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()]


LINES: dict[str, tuple[bytes, str]] = {
    "JSON 10^5 deep": (b'{"text": "x", "a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "not JSON"),
    "text 10^4 deep": (b'{"text":' * 10**4 + b"1" + b"}" * 10**4, "not JSON|expected a string"),
    "JSON line of 100 MB": (b'{"text": "' + b"a" * 10**8 + b'"}', "a JSON line of more than 262144 bytes"),
    "half of a surrogate pair": (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    "half of a pair in the second text": (b'{"text": "a", "text_b": "\\udfff"}', "half of a surrogate pair"),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "not UTF-8 at byte"),
    "control character": (b'{"text": "\x1b[2J"}', "Invalid control character"),
    "whole number of 5000 digits": (b'{"text": "a", "x": 1' + b"0" * 5000 + b"}", "not JSON"),
    "UTF-16": ('{"text": "good"}'.encode("utf-16"), "not UTF-8"),
    "NUL alone": (b"\0\0\0", "not JSON"),
    "list": (b'["good"]', "expected a JSON object"),
    "number for a text": (b'{"text": NaN}', "expected a string, found float"),
    "blank": (b'{"text": " \\u00a0 "}', "is empty"),
    "nothing": (b"", "empty line"),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1", "4"])
@pytest.mark.parametrize("name", LINES)
def test_hostile_line_keeps_its_place(name: str, size: str) -> None:
    line, reason = LINES[name]
    good = b'{"text": "good film"}\n'
    code, objects = run(good + line + b"\n" + good, "--batch-size", size, "--format", "json")
    assert code == cli.SOME_FAILED and len(objects) == 3
    assert objects[0]["label"] == objects[2]["label"]
    assert objects[1]["line"] == 2
    assert re.search(reason, objects[1]["error"]), objects[1]
    assert len(objects[1]["error"]) < 500


TEXTS: dict[str, bytes] = {
    "100 MB without an end": b"good " * 20_000_000,
    "NUL bytes": b"a\0b\0good",
    "bidirectional marks": "\u202egood\u202c\u2066film".encode(),
    "10^5 marks on one letter": b"a" + "\u0301".encode() * 10**5,
    "escape sequences": b"\x1b[2Jgood\x07",
    "names of special tokens": b"[CLS] [SEP] [PAD] [MASK]",
    "line separators": "good\u2028bad\x0bx\x0cy\x85".encode(),
    "carriage returns alone": b"good\rbad\r",
}


@pytest.mark.parametrize("name", TEXTS)
def test_odd_text_is_answered(name: str) -> None:
    code, objects = run(b"good film\n" + TEXTS[name] + b"\ngood film\n", "--format", "text")
    assert code == cli.ALL_ANSWERED and len(objects) == 3
    assert objects[0]["label"] == objects[2]["label"]


def test_long_lines_take_the_memory_of_a_short_one() -> None:
    class Endless(io.RawIOBase):
        left = 50 * LONGEST_LINE

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            count = min(len(buffer), self.left)
            buffer[:count] = b"a" * count
            self.left -= count
            return count

    (line,) = read_lines(io.BufferedReader(Endless()))
    assert len(line.text) == LONGEST_LINE and line.cut


PROMPTS: dict[str, bytes] = {
    "half of a surrogate pair in a message": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "half of a surrogate pair in a role": b'{"messages": [{"role": "\\ud800", "content": "a"}]}',
    "half of a surrogate pair in a prompt": b'{"prompt": "\\ud800"}',
    "half of a surrogate pair in a key": b'{"prompt": "film", "\\ud800": 1}',
    "messages that are none": b'{"messages": [1]}',
    "no messages": b'{"messages": []}',
    "text for messages": b'{"messages": "x"}',
    "nothing for messages": b'{"messages": null}',
    "message without content": b'{"messages": [{"role": "user"}]}',
    "error with half of a surrogate pair": b'{"messages": [{"role": "user", "content": 5, "x": "\\ud800"}]}',
    "prompt and messages": b'{"prompt": "film", "messages": []}',
}


@pytest.mark.parametrize("name", PROMPTS)
def test_hostile_prompt_keeps_its_place(name: str) -> None:
    pytest.importorskip("jinja2")
    good = b'{"prompt": "film", "max_new_tokens": 2}\n'
    code, objects = run(good + PROMPTS[name] + b"\n" + good, bundle=GENERATOR)
    assert code == cli.SOME_FAILED
    assert ["error" in value for value in objects] == [False, True, False]
    assert objects[1]["line"] == 2


@linux
def test_name_that_is_not_utf8_can_be_written() -> None:
    line = Line(1, os.fsdecode(b"caf\xe9.jpg"))
    assert line.shown_name == r"caf\xe9.jpg"
    assert os.fsencode(line.name) == b"caf\xe9.jpg"
    json.dumps({"file": line.shown_name}, ensure_ascii=False).encode("utf-8")


@linux
def test_image_by_a_name_that_is_not_utf8_is_read_or_named(tmp_path: Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(name, "wb") as file:
        file.write(encoded(np.zeros((4, 4, 3), np.uint8)))
    assert open_picture(os.fsdecode(name)).size == (4, 4)
    with pytest.raises(BadInput) as caught:
        open_picture(os.fsdecode(name + b"x"))
    str(caught.value).encode("utf-8")


@posix
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device"])
def test_image_that_is_no_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        path = Path("/dev/zero")
    with pytest.raises(BadInput, match=f"{path.name}.*cannot be read as an image|{path.name}.*not a regular"):
        open_picture(path)


def encoded(array: Any, kind: str = "PNG", **facts: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **facts)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, body: bytes = b"") -> bytes:
    """A grey PNG of any size that its header likes to say."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, width, height, 0)
        + b"\x02\x02\x44\x01\x00;"
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
FITS = b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800)
BOMBS: dict[str, tuple[bytes, str]] = {
    "10^5 x 10^5 pixels": (png(100_000, 100_000), "over 89478485|DecompressionBomb|decompression bomb"),
    "12,000 x 12,000 pixels": (png(12_000, 12_000), "over 89478485|DecompressionBomb|decompression bomb"),
    "2^31 pixels in a row": (png(2**31 - 1, 1), "over 89478485|[bB]omb|cannot be read"),
    "65,535 x 65,535 pixels of a GIF": (gif(65_535, 65_535), "over 89478485|[bB]omb"),
    "text of 100 MB in 100 kB": (
        png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 9)), body=zlib.compress(bytes(20))),
        "cannot be read",
    ),
    "no pixels": (png(0, 0), "cannot be read"),
    "header alone": (png(4, 4)[:33], "cannot be read"),
    "pixels that are cut": (png(400, 400, body=zlib.compress(bytes(100))), "cannot be read"),
    "PostScript, which starts Ghostscript": (EPS, "no format of JPEG"),
    "FITS": (FITS, "no format of JPEG"),
    "page of the web": (b"<svg onload=alert(1)>", "no format of JPEG"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_image_bomb_is_refused(name: str) -> None:
    data, reason = BOMBS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns beyond its own limit
        with pytest.raises(BadInput, match=reason) as caught:
            open_picture(data)
    assert len(str(caught.value).splitlines()) == 1


def test_image_whose_resize_is_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10**6)  # a bomb of the real size takes seconds to make
    with pytest.raises(
        BadInput, match="20 x 1200000 pixels after it is resized from 1 x 60000, over 1000000"
    ):
        picture_pixels(np.zeros((60_000, 1, 3), np.uint8), FACTS)


def ramp(top: int) -> Any:
    return np.linspace(0, top, 64).reshape(8, 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_keeps_its_shades(kind: str) -> None:
    data = encoded(ramp(65_535).astype(np.uint16), kind)
    expected = (ramp(65_535).astype(np.uint16) >> 8).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(open_picture(data))[..., 0], expected)


def test_open_image_of_16_bits_keeps_its_shades() -> None:
    image = Image.fromarray(ramp(65_535).astype(np.uint16))
    assert len(np.unique(np.asarray(open_picture(image)))) > 60


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_of_an_unknown_range_are_refused(dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(encoded(ramp(1).astype(dtype), "TIFF"))
    with pytest.raises(BadInput, match=r"a\.tiff.*of an unknown range; save it with 8 bits a channel"):
        open_picture(path)


ORIENTED = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_turns_an_image_as_pillow_does(orientation: int, kind: str) -> None:
    from PIL import ImageOps

    exif = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = orientation
    data = encoded(ORIENTED, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(open_picture(data)), np.asarray(expected))


EXIF: dict[str, Callable[[], bytes]] = {
    "orientation 9": lambda: b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
    "orientation as a text": lambda: (
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0"
    ),
    "tags without an end": lambda: b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0" * 10,
    "tags that point at themselves": lambda: (
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"
    ),
    "random bytes": lambda: b"Exif\0\0" + np.random.default_rng(0).bytes(2000),
    "nothing": lambda: b"Exif\0\0",
}


@pytest.mark.parametrize("name", EXIF)
def test_damaged_exif_costs_no_picture(name: str) -> None:
    data = encoded(ORIENTED, "JPEG", exif=EXIF[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged tags
        assert open_picture(data).size == (8, 4)


@pytest.mark.slow
def test_bad_lines_do_not_wait_without_a_limit() -> None:
    """Of 1.2 million behind one good line, each waited for the next good one."""
    count, batch, waiting = 20_000, 4, [0]
    written = read = 0

    class Counted(Output):
        def write(self, value: Any, *, flush: bool = False) -> None:
            nonlocal written
            written += 1

    def lines() -> Iterator[Line]:
        nonlocal read
        for line in read_lines(io.BytesIO(b"good\n" + b"\xff\n" * count + b"good\n")):
            read += 1
            waiting[0] = max(waiting[0], read - written)
            yield line

    with load_row_session(CLASSIFIER, batch_size=batch) as session:
        write_answers(session, lines(), Counted(io.BytesIO()), RunStats(), Termination(), sets=False)
    assert written == read == count + 2
    assert waiting[0] <= 3 * window_of(batch)
