"""Model repositories for Triton: configurations as its own protobuf reads them, and answers of model.py.

No server runs here. The Python model is run on a double of the server's module, which runs the repository's
real graphs; see tests/doubles/triton_python_backend_utils.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from doubles import triton_python_backend_utils as pb_utils
from google.protobuf import json_format
from onnx import TensorProto, helper, numpy_helper
from tiny_bundles import (
    CLASSIFIER,
    EMBEDDING,
    GENERATOR,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    bundle_with_points,
    texts,
)
from tritonclient.grpc.model_config_pb2 import DataType, ModelInstanceGroup

from offramp.export import sign
from offramp.export import triton_repository as triton
from offramp.runtime import load, load_row_session
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import (
    FILE_NAME,
    FileFact,
    ImageInput,
    Macs,
    Manifest,
    OperatingPoint,
    RuleSpec,
    Segment,
    Tensor,
    Variant,
)
from offramp.runtime.errors import BadBundle, BadSetting, BadSignature
from offramp.runtime.triton_model import check_variants

ALL = (CLASSIFIER, MULTI_LABEL, TOKENS, REGRESSION, EMBEDDING)
NAMES = [folder.name for folder in ALL]
GRAPHS = ("stem", "segment_00", "segment_01", "segment_02")
ELEMENTS = {TensorProto.FLOAT: DataType.TYPE_FP32, TensorProto.INT64: DataType.TYPE_INT64}
Write = Callable[..., Path]


@pytest.fixture
def repository(tmp_path: Path) -> Write:
    """Writes the repository of a bundle, with options of RepositoryOptions, and gives its folder."""

    def write(bundle: Path = CLASSIFIER, **options: Any) -> Path:
        folder = tmp_path / "repo"
        triton.write_repository(open_bundle(bundle), folder, triton.RepositoryOptions(**options))
        return folder

    return write


class Loaded:
    """A model as the server has loaded it. config: its configuration. server: what runs the graphs."""

    def __init__(self, repository: Path, name: str = "offramp") -> None:
        folder = repository / name
        self.config, self.server = pb_utils.read_config(folder), pb_utils.Server(repository)
        spec = importlib.util.spec_from_file_location(f"model_of_{name}", folder / "1" / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.model = module.TritonPythonModel()
        text = json_format.MessageToJson(self.config, preserving_proto_field_name=True)
        arguments = {"model_config": text, "model_repository": str(folder), "model_version": "1"}
        self.model.initialize(arguments | {"model_name": name, "model_instance_kind": "CPU"})

    def ask(self, *requests: pb_utils.InferenceRequest) -> list[pb_utils.InferenceResponse]:
        """Hand over requests together, as the server does."""
        pb_utils.SERVER = self.server
        responses: list[pb_utils.InferenceResponse] = self.model.execute(list(requests))
        assert len(responses) == len(requests)
        return responses

    def outputs(self, response: pb_utils.InferenceResponse) -> dict[str, list[Any]]:
        """The outputs of a response by name, each as the configuration has it: a value or a list a row."""
        assert not response.has_error(), response.error().message()
        tensors = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        assert tensors.keys() == {entry.name for entry in self.config.output}
        for entry in self.config.output:
            pb_utils.check(entry, tensors[entry.name], [-1, *entry.dims])
        return {
            name: values[:, 0].tolist() if values.shape[1] == 1 else values.tolist()
            for name, values in tensors.items()
        }

    def called(self) -> list[str]:
        """The graphs that were run, in order."""
        return [name.removeprefix(f"{self.config.name}_") for name, _ in self.server.calls]


@pytest.fixture
def loaded(repository: Write, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loaded]]:
    """Writes a repository and loads the model that walks; options as of `repository`."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)
    monkeypatch.setattr(pb_utils, "SERVER", None)
    models: list[Loaded] = []

    def open_model(bundle: Path = CLASSIFIER, **options: Any) -> Loaded:
        models.append(Loaded(repository(bundle, **options), options.get("name", "offramp")))
        return models[-1]

    yield open_model
    for opened in models:
        opened.model.finalize()


def request(
    items: Sequence[str | bytes],
    seconds: Sequence[str] | None = None,
    name: str = "text",
    **parameters: Any,
) -> pb_utils.InferenceRequest:
    """A request of a client, whose parameters are those of the server's protocol."""
    given = {name: items} if seconds is None else {name: items, "text_b": seconds}
    tensors = []
    for key, values in given.items():
        array = np.empty((len(values), 1), object)
        array[:, 0] = values
        tensors.append(pb_utils.Tensor(key, array))
    return pb_utils.InferenceRequest(inputs=tensors, parameters=parameters)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(triton.main, [str(argument) for argument in arguments])


def image_bundle(folder: Path) -> Path:
    """A bundle of two segments that reads images of 4 x 4 pixels and compares their left with their right."""
    folder.mkdir()
    random = np.random.default_rng(0)

    def info(tensor: Tensor) -> Any:
        return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.shape))

    pixels = Tensor("pixel_values", "float32", ("batch", 3, 4, 4))
    hidden, moved = (Tensor(name, "float32", ("batch", 3, 16)) for name in ("hidden", "next_hidden"))
    logits = Tensor("logits", "float32", ("batch", 2))

    def write(name: str, reads: Tensor, gives: Sequence[Tensor], nodes: Sequence[Any]) -> Variant:
        weights = [
            helper.make_tensor("shape", TensorProto.INT64, [3], [0, 3, 16]),
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("weights", TensorProto.FLOAT, [16, 2], random.normal(size=32)),
        ]
        used = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes, name, [info(reads)], [info(t) for t in gives], [w for w in weights if w.name in used]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(model, folder / f"{name}.onnx")
        return Variant(f"{name}.onnx", (reads,), tuple(gives))

    exits = [
        helper.make_node("ReduceMean", ["hidden", "axis"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["logits"]),
    ]
    stem = write(
        "stem", pixels, [hidden], [helper.make_node("Reshape", ["pixel_values", "shape"], ["hidden"])]
    )
    first = write(
        "segment_00",
        hidden,
        [moved, logits],
        [*exits, helper.make_node("Tanh", ["hidden"], ["next_hidden"])],
    )
    last = write("segment_01", hidden, [logits], exits)
    manifest = Manifest(
        format=1,
        task="image-classification",
        labels=("cat", "dog"),
        input=ImageInput(4, 4, (4, 4), "bilinear", "RGB", 1 / 255, (0.5,) * 3, (0.5,) * 3),
        hidden_size=16,
        vocab_size=0,
        blocks=2,
        stem=Segment("stem", (), Macs(row=1), {"fp32": stem}),
        segments=(
            Segment("segment_00", (1,), Macs(1), {"fp32": first}),
            Segment("segment_01", (2,), Macs(1), {"fp32": last}),
        ),
        rule=RuleSpec("max_probability", {"threshold": 0.7}),
        points=(),
        files={
            path.name: FileFact(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
            for path in folder.iterdir()
        },
        provenance={},
    )
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return folder


# configurations


@pytest.mark.parametrize("bundle", ALL, ids=NAMES)
def test_configuration_of_each_graph_is_its_interface(repository: Write, bundle: Path) -> None:
    folder, manifest = repository(bundle, variants=open_bundle(bundle).manifest.variants), open_bundle(bundle)
    files = manifest.manifest.graph_files
    assert {path.name for path in folder.iterdir()} == {
        "offramp",
        *(f"offramp_{Path(f).stem}" for f in files),
    }
    for file in files:
        model = folder / f"offramp_{Path(file).stem}"
        assert (model / "1" / "model.onnx").read_bytes() == (bundle / file).read_bytes()
        config, graph = pb_utils.read_config(model), onnx.load(bundle / file).graph
        assert (config.name, config.platform, config.max_batch_size) == (model.name, "onnxruntime_onnx", 0)
        for entries, nodes in ((config.input, graph.input), (config.output, graph.output)):
            known = {
                node.name: (
                    ELEMENTS[node.type.tensor_type.elem_type],
                    [
                        size.dim_value if size.HasField("dim_value") else -1
                        for size in node.type.tensor_type.shape.dim
                    ],
                )
                for node in nodes
            }
            assert {entry.name: (entry.data_type, list(entry.dims)) for entry in entries} == known


@pytest.mark.parametrize(
    ("bundle", "inputs", "outputs"),
    [
        (CLASSIFIER, ["text", "text_b"], ["label", "score"]),
        (MULTI_LABEL, ["text", "text_b"], ["scores"]),
        (TOKENS, ["text"], []),
        (REGRESSION, ["text", "text_b"], ["value"]),
        (EMBEDDING, ["text"], ["embedding"]),
    ],
    ids=NAMES,
)
def test_configuration_of_the_model_that_walks(
    repository: Write, bundle: Path, inputs: list[str], outputs: list[str]
) -> None:
    config = pb_utils.read_config(repository(bundle, max_batch=16, queue_delay=70, instances=3) / "offramp")
    assert (config.name, config.backend, config.platform) == ("offramp", "python", "")
    assert config.max_batch_size == 16  # the axis of rows is the server's: dims do not have it
    assert config.dynamic_batching.max_queue_delay_microseconds == 70
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, ModelInstanceGroup.KIND_CPU)
    assert [entry.name for entry in config.input] == inputs
    assert {entry.name for entry in config.input if entry.optional} == set(inputs) - {"text"}
    assert [entry.name for entry in config.output] == [*outputs, "exit", "depth", "answer"]


def test_each_precision_has_models_of_its_own(repository: Write) -> None:
    folder = repository(variants=("int8",))
    models = {path.name for path in folder.iterdir()}
    assert models == {"offramp", "offramp_stem", *(f"offramp_segment_0{n}_int8" for n in range(3))}


def test_precisions_of_points_are_written_if_none_is_named(repository: Write) -> None:
    models = {path.name for path in repository().iterdir()}
    assert {"offramp_segment_00", "offramp_segment_00_int8"} <= models  # of points default and fast


def test_names_begin_as_asked(repository: Write) -> None:
    folder = repository(name="reviews", variants=("fp32",))
    assert {path.name for path in folder.iterdir()} == {"reviews", *(f"reviews_{graph}" for graph in GRAPHS)}
    assert pb_utils.read_config(folder / "reviews_stem").name == "reviews_stem"


def test_tensorrt_is_a_setting_of_onnx_runtime(repository: Write) -> None:
    config = pb_utils.read_config(repository(engine="trt", variants=("fp32",)) / "offramp_segment_00")
    assert [group.kind for group in config.instance_group] == [ModelInstanceGroup.KIND_GPU]
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [(entry.name, dict(entry.parameters)) for entry in accelerators] == [
        ("tensorrt", {"precision_mode": "FP32"}),
        ("cuda", {"use_tf32": "0"}),
    ]


@pytest.mark.parametrize(("device", "kind"), [("cpu", "KIND_CPU"), ("cuda", "KIND_GPU")])
def test_graphs_run_on_the_device_that_was_named(repository: Write, device: str, kind: str) -> None:
    folder = repository(device=device, variants=("fp32",))
    config = pb_utils.read_config(folder / "offramp_stem")
    assert [ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group] == [kind]
    (walker,) = pb_utils.read_config(folder / "offramp").instance_group
    assert walker.kind == ModelInstanceGroup.KIND_CPU


def test_server_chooses_the_device_if_none_is_named(repository: Write) -> None:
    config = pb_utils.read_config(repository(variants=("fp32",)) / "offramp_stem")
    assert not config.instance_group and not config.HasField("optimization")


# answers


def expected(bundle: Path, items: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
    """The JSON objects of the answers of load() on engine ort."""
    with load_row_session(bundle, **options) as session:
        return [
            answer.as_json() | {"exit": answer.exit, "depth": answer.depth} for answer in session.map(items)
        ]


def assert_close(value: Any, wanted: Any) -> None:
    """Equal JSON values, but for numbers that differ by at most 1e-5."""
    if isinstance(wanted, Mapping):
        assert value.keys() == wanted.keys()
        for key in wanted:
            assert_close(value[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(value) == len(wanted)
        for one, other in zip(value, wanted, strict=True):
            assert_close(one, other)
    else:
        assert value == (pytest.approx(wanted, abs=1e-5) if isinstance(wanted, float) else wanted)


def answers_of(outputs: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in outputs["answer"]]


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ALL, ids=NAMES)
def test_answers_are_those_of_load(loaded: Callable[..., Loaded], bundle: Path) -> None:
    model, items = loaded(bundle), texts(40)
    outputs = model.outputs(model.ask(request(items))[0])
    wanted = expected(bundle, items)
    assert_close(answers_of(outputs), wanted)
    assert outputs["exit"] == [answer["exit"] for answer in wanted]
    assert outputs["depth"] == [answer["depth"] for answer in wanted]


@pytest.mark.slow
def test_label_and_score_are_outputs_of_their_own(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(), texts(40)
    outputs = model.outputs(model.ask(request(items))[0])
    wanted = expected(CLASSIFIER, items)
    assert outputs["label"] == [answer["label"].encode() for answer in wanted]
    assert outputs["score"] == pytest.approx([answer["score"] for answer in wanted], abs=1e-5)
    assert len(set(outputs["exit"])) > 1  # or these texts would show little


@pytest.mark.parametrize(
    ("bundle", "output", "key"),
    [
        (MULTI_LABEL, "scores", "scores"),
        (REGRESSION, "value", "value"),
        (EMBEDDING, "embedding", "embedding"),
    ],
)
def test_numbers_of_other_tasks_are_outputs(
    loaded: Callable[..., Loaded], bundle: Path, output: str, key: str
) -> None:
    model, items = loaded(bundle), texts(6)
    outputs = model.outputs(model.ask(request(items))[0])
    wanted = [answer[key] for answer in expected(bundle, items)]
    numbers = [list(value.values()) if isinstance(value, dict) else value for value in wanted]
    np.testing.assert_allclose(outputs[output], numbers, atol=1e-5)


def test_pairs_of_texts(loaded: Callable[..., Loaded]) -> None:
    model, first, second = loaded(), texts(5), texts(5, seed=1)
    outputs = model.outputs(model.ask(request(first, second))[0])
    assert_close(answers_of(outputs), expected(CLASSIFIER, list(zip(first, second, strict=True))))


@pytest.mark.slow
def test_long_texts_in_windows(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(long_texts="windows"), ["warm film " * 200, "a cold plot"]
    answers = answers_of(model.outputs(model.ask(request(items))[0]))
    assert answers[0].pop("windows") > 1
    assert_close(answers, expected(CLASSIFIER, items, long_texts="windows"))


def test_images_come_as_the_bytes_of_files(loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    bundle, random, files = image_bundle(tmp_path / "images"), np.random.default_rng(1), list[bytes]()
    for _ in range(12):
        out = io.BytesIO()
        image.fromarray(random.integers(0, 256, (5, 6, 3)).astype(np.uint8)).save(out, "PNG")
        files.append(out.getvalue())
    model = loaded(bundle)
    outputs = model.outputs(model.ask(request(files, name="image"))[0])
    assert_close(answers_of(outputs), expected(bundle, files))
    assert set(outputs["exit"]) == {1, 2}


def test_image_is_never_the_path_of_a_file(loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    model, path = loaded(image_bundle(tmp_path / "images")), tmp_path / "secret.png"
    pytest.importorskip("PIL.Image").new("RGB", (4, 4)).save(path)
    (response,) = model.ask(request([str(path)], name="image"))
    assert response.has_error() and response.error().code() == pb_utils.TritonError.INVALID_ARG


@pytest.mark.slow
def test_int8_alone(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(variants=("int8",)), texts(20)
    outputs = model.outputs(model.ask(request(items))[0])
    assert_close(answers_of(outputs), expected(CLASSIFIER, items, variant="int8"))
    assert {name for name in model.called() if name != "stem"} <= {f"segment_0{n}_int8" for n in range(3)}


def test_point_of_the_repository(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(point="fast"), texts(20)
    outputs = model.outputs(model.ask(request(items))[0])
    assert_close(answers_of(outputs), expected(CLASSIFIER, items, point="fast"))


def test_requests_handed_over_together_share_the_walk(loaded: Callable[..., Loaded]) -> None:
    hard = next(item for item in texts(40) if expected(CLASSIFIER, [item])[0]["exit"] > 1)
    model, items = loaded(variants=("fp32",)), [hard] * 3
    responses = model.ask(*(request([text], max_depth=3) for text in items))
    assert [model.outputs(response)["exit"] for response in responses] == [[2]] * 3
    assert model.server.calls == [("offramp_stem", 3), ("offramp_segment_00", 3), ("offramp_segment_01", 3)]


@pytest.mark.slow
def test_several_requests_each_get_their_own_rows(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(), texts(30)
    parts = [items[:1], items[1:12], items[12:]]
    responses = model.ask(*(request(part) for part in parts))
    answers = [answers_of(model.outputs(response)) for response in responses]
    assert [len(part) for part in answers] == [1, 11, 18]
    assert_close([answer for part in answers for answer in part], expected(CLASSIFIER, items))


@pytest.mark.slow
def test_each_request_is_walked_at_its_own_point(loaded: Callable[..., Loaded], tmp_path: Path) -> None:
    bundle, items = bundle_with_points(tmp_path), texts(20)
    model = loaded(bundle)
    names = ["gate-1", "gate-3"]
    responses = model.ask(*(request(items, point=name) for name in names))
    for name, response in zip(names, responses, strict=True):
        assert_close(answers_of(model.outputs(response)), expected(bundle, items, point=name))


@pytest.mark.slow
def test_depth_is_limited_by_a_parameter(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(), texts(12)
    (response,) = model.ask(request(items, max_depth=1))
    outputs = model.outputs(response)
    assert outputs["depth"] == [1] * 12
    answers = [
        answer | {"exit": 1, "depth": 1} for answer in expected(CLASSIFIER, items, rule="fixed", threshold=1)
    ]
    assert_close(answers_of(outputs), answers)


def test_segments_that_no_row_reached_are_not_called(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(variants=("fp32",)), texts(40)
    easy = [
        item for item, answer in zip(items, expected(CLASSIFIER, items), strict=True) if answer["exit"] == 1
    ]
    assert easy
    assert model.outputs(model.ask(request(easy))[0])["exit"] == [1] * len(easy)
    assert set(model.called()) == {"stem", "segment_00"}


def test_parameters_of_others_are_ignored(loaded: Callable[..., Loaded]) -> None:
    model = loaded()
    (response,) = model.ask(request(["a film"], binary_data_output=True, priority=1))
    assert not response.has_error()


# errors


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (request([b"\xff\xfe"]), "item 0: text is not UTF-8"),
        (request(["good", b"\x80"]), "item 1: text is not UTF-8"),
        (request([]), "text: expected one or more"),
        (request(["good"], name="words"), "text: expected one or more"),
        (request(["good", "bad"], ["warm"]), "text_b: 1 texts, and text has 2"),
        (request(["good"], point="none such"), "operating point 'none such' is not in this bundle"),
        (request(["good"], point=3), "point: expected the name"),
        (request(["good"], max_depth=0), "max_depth 0: the first exit of this bundle is after 1 blocks"),
        (request(["good"], max_depth="two"), "max_depth: expected a whole number"),
        (request(["good"], max_depth=True), "max_depth: expected a whole number"),
    ],
)
def test_bad_request_is_an_error_and_its_neighbours_are_answered(
    loaded: Callable[..., Loaded], bad: pb_utils.InferenceRequest, named: str
) -> None:
    model, items = loaded(), texts(8)
    first, middle, last = model.ask(request(items[:4]), bad, request(items[4:]))
    assert middle.has_error() and named in middle.error().message()
    assert middle.error().code() == pb_utils.TritonError.INVALID_ARG
    answers = [*answers_of(model.outputs(first)), *answers_of(model.outputs(last))]
    assert_close(answers, expected(CLASSIFIER, items))


def test_point_in_a_precision_that_was_not_written_names_the_cure(
    loaded: Callable[..., Loaded], tmp_path: Path
) -> None:
    manifest = open_bundle(CLASSIFIER).manifest
    other = next(p for p in manifest.points if p.variant != manifest.variants[0])
    assert isinstance(other, OperatingPoint)
    model = loaded(variants=(manifest.variants[0],))
    (response,) = model.ask(request(["good"], point=other.name))
    assert f"--variant {other.variant}" in response.error().message()


def test_rule_that_moves_between_precisions_needs_all_of_them() -> None:
    manifest = open_bundle(CLASSIFIER).manifest
    check_variants(manifest, "quee", "fp32", ("int8", "fp32"))
    with pytest.raises(BadSetting, match=r"rule quee walks fp32, int8, .* has fp32: .* --variant int8"):
        check_variants(manifest, "quee", "fp32", ("fp32",))


def test_rows_that_left_before_a_broken_segment_are_answered(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(variants=("fp32",)), texts(40)
    exits = [answer["exit"] for answer in expected(CLASSIFIER, items)]

    def broken(name: str, outputs: Mapping[str, np.ndarray]) -> None:
        if name == "offramp_segment_01":
            raise RuntimeError("out of memory")

    model.server.change = broken
    responses = model.ask(*(request([item]) for item in items))
    assert [response.has_error() for response in responses] == [exit > 1 for exit in exits]
    problem = responses[exits.index(max(exits))].error()
    assert problem.code() == pb_utils.TritonError.UNAVAILABLE
    assert "model offramp_segment_01 gave no answer: out of memory" in problem.message()


def test_broken_stem_costs_the_requests_of_its_batch_alone(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(max_batch=2), ["good", "bad", "the film was very warm and not at all cold " * 2]

    def broken(name: str, outputs: Mapping[str, np.ndarray]) -> None:
        if name == "offramp_stem" and outputs["hidden"].shape[1] > 8:
            raise RuntimeError("too long")

    model.server.change = broken
    responses = model.ask(*(request([item]) for item in items))
    assert [response.has_error() for response in responses] == [False, False, True]


def test_request_that_lost_a_row_is_an_error_as_a_whole(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(variants=("fp32",)), texts(40)
    exits = [answer["exit"] for answer in expected(CLASSIFIER, items)]
    easy, hard = items[exits.index(1)], items[exits.index(max(exits))]

    def broken(name: str, outputs: Mapping[str, np.ndarray]) -> None:
        if name == "offramp_segment_01":
            raise RuntimeError("out of memory")

    model.server.change = broken
    mixed, single = model.ask(request([easy, hard]), request([easy]))
    assert mixed.has_error() and not single.has_error()


def test_network_that_gives_no_number_is_an_error_of_its_request(loaded: Callable[..., Loaded]) -> None:
    model, items = loaded(variants=("fp32",)), ["good", "the film was not at all good"]

    def overflow(name: str, outputs: dict[str, np.ndarray]) -> None:
        if name == "offramp_segment_00" and outputs["next_hidden"].shape[1] >= 8:
            outputs["logits"] = np.where(
                np.arange(len(outputs["logits"]))[:, None] == 1, np.nan, outputs["logits"]
            )

    model.server.change = overflow
    good, bad = model.ask(request(items[:1], max_depth=1), request(items[1:], max_depth=1))
    assert not good.has_error()
    assert bad.has_error() and "not finite" in bad.error().message()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda outputs: outputs.update(hidden=outputs["hidden"].astype("float64")), "hidden is float64"),
        (lambda outputs: outputs.update(mask=outputs["mask"][:0]), r"mask is float32 \[0, 1, 1,"),
        (lambda outputs: outputs.pop("pool"), "model offramp_stem: it gave no output pool; write"),
    ],
)
def test_graph_that_gives_something_else_is_named(
    loaded: Callable[..., Loaded], change: Callable[[dict[str, np.ndarray]], Any], named: str
) -> None:
    model = loaded()
    model.server.change = lambda name, outputs: change(outputs) if name == "offramp_stem" else None
    (response,) = model.ask(request(["good"]))
    assert response.has_error()
    assert response.error().code() == pb_utils.TritonError.INTERNAL
    assert re.search(named, response.error().message())


def test_model_that_is_not_loaded_is_named(loaded: Callable[..., Loaded]) -> None:
    model = loaded()
    shutil.rmtree(model.server.repository / "offramp_segment_00")
    (response,) = model.ask(request(["good"]))
    assert response.error().code() == pb_utils.TritonError.UNAVAILABLE
    assert "model offramp_segment_00 gave no answer" in response.error().message()


def test_configuration_of_another_program_is_refused(
    loaded: Callable[..., Loaded], repository: Write
) -> None:
    folder = repository()
    config = folder / "offramp" / "config.pbtxt"
    config.write_text(config.read_text(encoding="utf-8").partition("parameters")[0], encoding="utf-8")
    with pytest.raises(BadSetting, match="no parameter models; write the model repository again"):
        Loaded(folder)


def test_tokenizer_that_changed_is_refused(loaded: Callable[..., Loaded], repository: Write) -> None:
    folder = repository()
    (folder / "offramp" / "1" / "bundle" / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BadBundle, match=r"tokenizer\.json"):
        Loaded(folder)


# writing


def test_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(BadSetting, match=r"holds notes\.txt, which would be lost; name an empty folder"):
        triton.write_repository(open_bundle(CLASSIFIER), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "repo").write_text("mine", encoding="utf-8")
    with pytest.raises(BadSetting, match="is a file or a link"):
        triton.write_repository(open_bundle(CLASSIFIER), tmp_path / "repo")


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    triton.write_repository(open_bundle(CLASSIFIER), tmp_path / "repo")
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]
    assert (tmp_path / "repo" / "offramp" / "1" / "model.py").is_file()


def test_damaged_graph_leaves_nothing_behind(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    data = bytearray((bundle / "segment_02.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "segment_02.onnx").write_bytes(data)
    with pytest.raises(BadBundle, match=r"segment_02\.onnx: sha256"):
        triton.write_repository(open_bundle(bundle), tmp_path / "repo")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_remains_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    remains = tmp_path / ".repo.new-by-ee-export-triton"
    (remains / "offramp").mkdir(parents=True)
    triton.write_repository(open_bundle(CLASSIFIER), tmp_path / "repo")
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


def test_signature_goes_with_the_manifest_and_is_verified(tmp_path: Path) -> None:
    bundle, key = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle")), tmp_path / "key.pem"
    public = sign.write_keys(key)
    sign.sign_bundle(bundle, key)
    triton.write_repository(open_bundle(bundle), tmp_path / "repo", require_signature=public)
    open_bundle(tmp_path / "repo" / "offramp" / "1" / "bundle", public)
    other = sign.write_keys(tmp_path / "other.pem")
    with pytest.raises(BadSignature):
        triton.write_repository(open_bundle(bundle), tmp_path / "repo2", require_signature=other)
    assert not (tmp_path / "repo2").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "../x"}, "name '../x': letters"),
        ({"engine": "openvino"}, "engine 'openvino'"),
        ({"engine": "trt", "device": "cpu"}, "engine trt runs on device cuda alone"),
        ({"max_batch": 0}, "max_batch 0: expected 1 to"),
        ({"queue_delay": -1}, "queue_delay -1: expected 0 to"),
        ({"variants": ("int4",)}, "variant 'int4' is not in .*; it offers: fp32, int8"),
        ({"variants": ("int8",), "engine": "trt"}, "variant int8 is ONNX Runtime's own"),
        ({"point": "none such"}, "operating point 'none such'"),
        ({"long_texts": "all"}, "long_texts 'all'"),
    ],
)
def test_options_that_cannot_be_are_refused(repository: Write, options: dict[str, Any], named: str) -> None:
    with pytest.raises(BadSetting, match=named):
        repository(**options)


def test_command_says_what_it_wrote(tmp_path: Path) -> None:
    result = run(CLASSIFIER, tmp_path / "repo", "--variant", "fp32", "--name", "reviews")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"{tmp_path / 'repo'}: written, model reviews over 4 graphs",
        "precision fp32; rows start in fp32",
        f"tritonserver --model-repository={tmp_path / 'repo'}    # where `pip install offramp` was run",
    ]


def test_language_model_is_refused_in_one_line(tmp_path: Path) -> None:
    result = run(GENERATOR, tmp_path / "repo")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("ee-export-triton: ") and "generates text" in line and "ee-serve" in line


@pytest.mark.slow
def test_server_needs_no_engine_of_ours() -> None:
    script = (
        "import sys, offramp.runtime.triton_model; "
        "print([name for name in ('onnxruntime', 'torch', 'onnx', 'fastapi') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_load_knows_no_engine_triton() -> None:
    with pytest.raises(BadSetting, match="engine 'triton' is not known"):
        load(CLASSIFIER, engine="triton")


def test_double_takes_what_the_server_documents() -> None:
    """The arguments, in order, as the Python backend binds them."""
    of_requests = """
        request_id correlation_id inputs requested_output_names model_name model_version flags timeout
        preferred_memory trace parameters
    """
    documented = {
        "InferenceRequest": of_requests.split(),
        "InferenceResponse": ["output_tensors", "error", "parameters"],
        "PreferredMemory": ["preferred_memory_type", "preferred_device_id"],
        "TritonError": ["message", "code"],
        "get_input_tensor_by_name": ["inference_request", "name"],
        "get_output_tensor_by_name": ["inference_response", "name"],
    }
    known = {name: list(inspect.signature(getattr(pb_utils, name)).parameters) for name in documented}
    assert known == documented


def test_empty_folder_stays_the_folder_that_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    before = repo.stat().st_ino
    monkeypatch.chdir(repo)
    done = run(CLASSIFIER, ".")
    assert done.exit_code == 0, done.output
    assert Path("offramp/1/model.py").is_file() and repo.stat().st_ino == before
    assert not [*repo.glob(".*")] and [path.name for path in tmp_path.iterdir()] == ["repo"]


def test_empty_folder_that_cannot_be_filled_stays_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name == "offramp":  # the last
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(BadSetting, match=r"cannot be written: .*No space left"):
        triton.write_repository(open_bundle(CLASSIFIER), tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_weights_in_a_file_of_their_own_go_with_the_graph(repository: Write, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))
    graph, name = onnx.load(bundle / "segment_01.onnx"), "segment_01.onnx.data"
    onnx.save(
        graph, bundle / "segment_01.onnx", save_as_external_data=True, location=name, size_threshold=260
    )
    manifest = open_bundle(bundle).manifest
    files = dict(manifest.files)
    for file in ("segment_01.onnx", name):
        data = (bundle / file).read_bytes()
        files[file] = FileFact(hashlib.sha256(data).hexdigest(), len(data))
    (bundle / "manifest.json").write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    folder = repository(bundle) / "offramp_segment_01" / "1"
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", name]
    loaded = onnx.load(folder / "model.onnx")  # with its weights, from the file that it names
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    whole = onnx.load(CLASSIFIER / "segment_01.onnx").graph.initializer
    assert all(np.array_equal(held[tensor.name], numpy_helper.to_array(tensor)) for tensor in whole)
