"""ee-serve with a bundle that reads images: they come as bytes, and no request opens a file of the server."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import CLASSIFY, Server, serving

from offramp.runtime import load
from offramp.runtime.bundle.manifest import (
    FILE_NAME,
    FileFact,
    ImageInput,
    Macs,
    Manifest,
    RuleSpec,
    Segment,
    Tensor,
    Variant,
)
from offramp.runtime.errors import BadSetting
from offramp.runtime.serving import models

onnx = pytest.importorskip("onnx")
image = pytest.importorskip("PIL.Image")
WALK = "/v1/walk"


def image_bundle(folder: Path) -> Path:
    """A bundle of one segment that reads images of 4 x 4 pixels and compares their left with their right."""
    folder.mkdir()
    float32 = onnx.TensorProto.FLOAT

    def write(name: str, reads: Tensor, gives: Tensor, weights: Sequence[Any], *nodes: Any) -> Variant:
        infos = [onnx.helper.make_tensor_value_info(t.name, float32, list(t.shape)) for t in (reads, gives)]
        graph = onnx.helper.make_graph(nodes, name, infos[:1], infos[1:], weights)
        opset = onnx.helper.make_opsetid("", 18)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / f"{name}.onnx")
        return Variant(f"{name}.onnx", (reads,), (gives,))

    pixels = Tensor("pixel_values", "float32", ("batch", 3, 4, 4))
    hidden = Tensor("hidden", "float32", ("batch", 3, 16))
    logits = Tensor("logits", "float32", ("batch", 2))
    sides = np.tile([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]], (4, 1))
    constants = {
        "shape": onnx.numpy_helper.from_array(np.array([0, 3, 16]), "shape"),
        "axis": onnx.numpy_helper.from_array(np.array([1]), "axis"),
        "sides": onnx.numpy_helper.from_array(sides.astype(np.float32), "sides"),
    }
    node = onnx.helper.make_node
    stem = write(
        "stem", pixels, hidden, [constants["shape"]], node("Reshape", ["pixel_values", "shape"], ["hidden"])
    )
    segment = write(
        "segment_00",
        hidden,
        logits,
        [constants["axis"], constants["sides"]],
        node("ReduceMean", ["hidden", "axis"], ["mean"], keepdims=0),
        node("MatMul", ["mean", "sides"], ["logits"]),
    )
    manifest = Manifest(
        format=1,
        task="image-classification",
        labels=("left", "right"),
        input=ImageInput(4, 4, (4, 4), "bilinear", "RGB", 1 / 255, (0.5,) * 3, (0.5,) * 3),
        hidden_size=16,
        vocab_size=0,
        blocks=1,
        stem=Segment("stem", (), Macs(row=1), {"fp32": stem}),
        segments=(Segment("segment_00", (1,), Macs(1), {"fp32": segment}),),
        rule=RuleSpec("never", {}),
        points=(),
        files={
            path.name: FileFact(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
            for path in folder.iterdir()
        },
        provenance={},
    )
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of the server that no request may read."""
    path: Path = tmp_path_factory.mktemp("private") / "secret.png"
    image.new("RGB", (4, 4)).save(path)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(image_bundle(tmp_path_factory.mktemp("served") / "images")) as opened:
        yield opened


def test_an_image_comes_in_base64(server: Server) -> None:
    pixels, out = np.zeros((4, 4, 3), np.uint8), io.BytesIO()
    pixels[:, 2:] = 255
    image.fromarray(pixels).save(out, "PNG")
    for prefix in ("", "data:image/png;base64,"):
        data = prefix + base64.b64encode(out.getvalue()).decode()
        assert server.results({"input": {"image": data}})[0]["label"] == "right"


def test_a_walk_of_an_image_bundle_is_refused_before_anything_is_read(
    server: Server, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.models.rows(None).session, "read", lambda items: 1 / 0)
    status, answer, _ = server.ask(WALK, {"input": str(secret)})
    assert status == 400 and answer["error"]["type"] == "bad_request"
    assert answer["error"]["message"] == (
        "model images: its task is image-classification; this route is for bundles that give a text one "
        "label: ask /v1/classify"
    )


def test_a_walk_does_not_tell_whether_a_file_exists(server: Server, secret: Path) -> None:
    paths = (secret, secret.with_name("nowhere.png"), secret.parent)
    answers = [server.ask(WALK, {"input": str(path)}) for path in paths]
    assert [status for status, _, _ in answers] == [400] * 3
    assert len({answer["error"]["message"] for _, answer, _ in answers}) == 1


def test_a_served_image_bundle_takes_bytes_alone(server: Server, secret: Path) -> None:
    model = server.models.rows(None)
    for item in (str(secret), secret, (str(secret), "b")):
        with pytest.raises(BadSetting, match="model images reads images: ask /v1/classify"):
            model.read([secret.read_bytes(), item])


@pytest.mark.parametrize(
    "form",
    ["{}", {"text": "{}"}, {"image": "{}"}, {"image": "file://{}"}, {"image": "data:image/png;base64,{}"}],
    ids=str,
)
def test_the_path_of_a_file_is_no_image(server: Server, secret: Path, form: Any) -> None:
    fill = str(secret)
    item = form.format(fill) if isinstance(form, str) else {key: v.format(fill) for key, v in form.items()}
    with load(server.models.rows(None).folder) as session:
        assert session(str(secret)).label  # the session itself opens it
    status, answer, _ = server.ask(CLASSIFY, {"input": item})
    assert status == 400 and "label" not in str(answer)


def test_routes_read_items_by_the_one_method_that_refuses_paths() -> None:
    """A session opens a text as the path of an image: ServedModel.read alone gives it what requests sent."""
    reads = re.compile(r"\bsession(?:\.(?:read|map|at_full_depth)\b|\()")
    calls = [
        (file.name, place)
        for file in sorted(Path(models.__file__).parent.glob("*.py"))
        for place in reads.findall(file.read_text(encoding="utf-8"))
    ]
    assert calls == [("models.py", "session.read")]
