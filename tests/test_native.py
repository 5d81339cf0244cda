"""The walker in native/: the same exits, labels and logits as offramp.runtime, the same bundles refused.

Builds it with CMake and the library of Python's onnxruntime, in build/native. The headers are those of a
folder that OFFRAMP_ORT_DIR names, or native/headers.sh gets them from Debian's packages. Where one of these
is missing the tests are skipped and say so, unless OFFRAMP_REQUIRED names native.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import ROOT
from test_web import CERTAIN, RULES, answers_of, integer_products, manifest_of, with_points
from tiny_bundles import CLASSIFIER, MULTI_LABEL, texts

from offramp.runtime import load_classifier
from offramp.runtime.bundle.manifest import FileFact, OperatingPoint, RuleSpec, Variant
from offramp.runtime.classifier import Classifier

NATIVE, BUILD = ROOT / "native", ROOT / "build" / "native"
TOLERANCE = 1e-3

pytestmark = pytest.mark.slow  # the first build takes half a minute

Row = dict[str, list[int]]


def run(*command: str | Path, text: str = "", folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


def missing(what: str) -> None:
    """Skip a test for lack of a tool; fail if OFFRAMP_REQUIRED names native."""
    if "native" in os.environ.get("OFFRAMP_REQUIRED", "").split():
        pytest.fail(f"the walker in native/ has to be tested here: {what}")
    pytest.skip(what)


@pytest.fixture(scope="module")
def ort() -> Path:
    """A folder with include/, the headers, and lib/, ONNX Runtime's library."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            missing(f"no {tool} on PATH")
    if named := os.environ.get("OFFRAMP_ORT_DIR"):
        return Path(named)
    folder, spec = BUILD / "ort", find_spec("onnxruntime")
    libraries = [*Path(str(spec and spec.origin)).parent.glob("capi/libonnxruntime.so.*")]
    if not libraries:
        missing(
            "this onnxruntime has no libonnxruntime.so; name a folder with include/ and lib/: OFFRAMP_ORT_DIR"
        )
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        link = folder / "lib" / name
        if not link.exists() or link.resolve() != libraries[0].resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(libraries[0])
    done = run("sh", NATIVE / "headers.sh", folder)
    if done.returncode:
        missing(f"native/headers.sh cannot get the headers: {done.stderr}")
    return folder


@pytest.fixture(scope="module")
def walker(ort: Path) -> Path:
    """The command `walk`, built."""
    folder = BUILD / "walk"
    configure = ["-S", str(NATIVE), "-B", str(folder), "-D", f"ORT_DIR={ort}"]
    for arguments in (configure, ["--build", str(folder)]):
        done = run("cmake", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "walk"


def compile_alone(ort: Path, source: Path, program: Path, *flags: str) -> None:
    """Compile one file that includes walker.hpp."""
    headers = ort / "include"
    library = f"-L{ort / 'lib'}", "-lonnxruntime", f"-Wl,-rpath,{ort / 'lib'}"
    includes = f"-I{NATIVE}", f"-isystem{headers}", f"-isystem{headers / 'onnxruntime'}"
    warnings = "-Wall", "-Wextra", "-Werror"
    done = run("c++", "-std=c++17", *warnings, *flags, *includes, source, "-o", program, *library)
    assert done.returncode == 0, done.stderr


Walk = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def walk(walker: Path) -> Walk:
    """A function that gives the answers of `walk BUNDLE --steps options` to rows, all without error."""

    def answers(bundle: Path, rows: Sequence[Row], *options: str) -> list[dict[str, Any]]:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        done = run(walker, bundle, "--steps", "--threads", "1", *options, text=lines)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return answers


@pytest.fixture
def refusal(walker: Path) -> Callable[..., str]:
    """A function that gives what `walk BUNDLE options` says when it refuses to begin."""

    def message(bundle: Path, *options: str) -> str:
        done = run(walker, bundle, *options, text='{"input_ids": [1]}\n')
        assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
        assert done.stderr.count("\n") == 1
        return done.stderr

    return message


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))


def rows_of(session: Classifier, items: Sequence[str]) -> list[Row]:
    """The rows that a tokenizer in an app would make of these texts."""
    rows = []
    for text in items:
        arrays = session.encode(text)
        rows.append({name: arrays[name][0].tolist() for name in ("input_ids", "token_type_ids")})
    return rows


def assert_same(answers: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Check that answers are those of offramp.runtime."""
    for answer, right in zip(answers, expected, strict=True):
        assert [*answer] == ["label", "score", "exit", "depth", "ms", "steps"]
        assert {name: answer[name] for name in ("label", "exit", "depth")} == {
            name: right[name] for name in ("label", "exit", "depth")
        }
        assert answer["score"] == pytest.approx(right["score"], abs=TOLERANCE)
        logits = [step["logits"] for step in answer["steps"]]
        np.testing.assert_allclose(logits, right["logits"], rtol=0, atol=TOLERANCE)


def change(bundle: Path, **fields: object) -> None:
    """Change fields of a bundle's manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / "manifest.json").write_text(json.dumps(manifest | fields), encoding="utf-8")


def put(bundle: Path, name: str, data: bytes) -> None:
    """Write a file of a bundle, with its right size and sha256 in the manifest."""
    manifest = manifest_of(bundle)
    (bundle / name).write_bytes(data)
    files = manifest.files | {name: FileFact(hashlib.sha256(data).hexdigest(), len(data))}
    (bundle / "manifest.json").write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_every_rule_gives_the_exits_of_the_runtime(walk: Walk, bundle: Path, variant: str) -> None:
    if variant == "int8":
        integer_products(bundle)
    points = [
        OperatingPoint(
            name,
            RuleSpec(name, parameters, (2.0, 1.5, 0.5) if name in CERTAIN else (), (1.25, 0.8, 3.0)),
            variant,
            "random texts",
            "dev",
            {},
        )
        for name, parameters in RULES.items()
    ]
    with_points(bundle, points)
    items, exits = texts(8, seed=3), set()
    for point in points:
        with closing(load_classifier(bundle, point=point.name)) as session:
            expected = answers_of(session, [{"text": text} for text in items])
            assert_same(walk(bundle, rows_of(session, items), "--point", point.name), expected)
        exits |= {answer["exit"] for answer in expected}
    assert exits == {1, 2, 3}


def test_unchanged_bundle_gives_the_answers_of_the_runtime_at_every_point(walk: Walk) -> None:
    items = texts(6, seed=4)
    for point in ("default", "fast"):  # fp32 by gates, int8 by patience
        with closing(load_classifier(CLASSIFIER, point=point)) as session:
            expected = answers_of(session, [{"text": text} for text in items])
            assert_same(walk(CLASSIFIER, rows_of(session, items), "--point", point), expected)


def test_without_a_point_the_rule_of_the_bundle_is_walked(walk: Walk) -> None:
    items = texts(6, seed=4)
    cases: list[tuple[str | None, list[str]]] = [(None, []), ("int8", ["--variant", "int8"])]
    for variant, options in cases:
        with closing(load_classifier(CLASSIFIER, variant=variant)) as session:
            expected = answers_of(session, [{"text": text} for text in items])
            assert_same(walk(CLASSIFIER, rows_of(session, items), *options), expected)


def test_graphs_that_several_segments_run_come_before_their_own(walk: Walk, bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    manifest, helper = manifest_of(bundle), onnx.helper
    hidden = manifest.segments[0].first_graph.inputs[0]
    ends = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(hidden.shape))]
        for name in ("hidden", "next_hidden")
    ]
    graph = helper.make_graph([helper.make_node("Tanh", ["hidden"], ["next_hidden"])], "shared", *ends)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    put(bundle, "shared.onnx", model.SerializeToString())
    manifest = manifest_of(bundle)
    shared = Variant("shared.onnx", (hidden,), (replace(hidden, name="next_hidden"),))
    segments = tuple(
        replace(
            segment,
            variants={
                name: replace(own, before=(shared,) * number) for name, own in segment.variants.items()
            },
        )
        for number, segment in enumerate(manifest.segments)
    )
    changed = replace(manifest, segments=segments, rule=RuleSpec("never", {}))
    (bundle / "manifest.json").write_text(changed.to_json(), encoding="utf-8")
    items = texts(4, seed=5)
    with closing(load_classifier(bundle)) as session:
        expected = answers_of(session, [{"text": text} for text in items])
        assert_same(walk(bundle, rows_of(session, items)), expected)


@pytest.mark.parametrize(("depth", "last"), [(1, 1), (2, 1), (3, 2), (9, 3)])
def test_max_depth_ends_rows_at_the_last_exit_within_it(walk: Walk, depth: int, last: int) -> None:
    items = texts(6, seed=4)
    with closing(load_classifier(CLASSIFIER)) as session:
        expected = [min(session(text).exit, last) for text in items]
        answers = walk(CLASSIFIER, rows_of(session, items), "--max-depth", str(depth))
    assert [answer["exit"] for answer in answers] == expected


def test_segments_beyond_max_depth_are_not_opened(walk: Walk, bundle: Path) -> None:
    (bundle / "segment_02.onnx").unlink()
    (answer,) = walk(bundle, [{"input_ids": [2, 5, 3]}], "--max-depth", "3")
    assert answer["exit"] <= 2


@pytest.mark.parametrize(
    "fields",
    [
        {"format: 2": {"format": 2}},
        {"multi-label": {"task": "multi-label-classification"}},
        {'"extra" is not a key': {"extra": 1}},
        {"blocks": {"blocks": 5}},
        {"labels": {"labels": ["one"]}},
        {"threshold": {"rule": {"name": "gate", "parameters": {"threshold": "high"}}}},
        {"needs threshold": {"rule": {"name": "gate", "parameters": {}}}},
        {"plain file name": {"files": {"../tokenizer.json": {"sha256": "0" * 64, "bytes": 1}}}},
        {"listed in files": {"files": {}}},
        {"weights inside": {"files": {"stem.onnx.data": {"sha256": "0" * 64, "bytes": 1}}}},
        {"segments": {"segments": []}},
        {"quee": {"rule": {"name": "quee", "parameters": {"price": 0.1}}}},
        {"floor": {"rule": {"name": "gate", "parameters": {"threshold": 0.5, "floor": 1}}}},
        {"fixed": {"rule": {"name": "fixed", "parameters": {"exit": 4}}}},
        {"temperatures": {"rule": {"name": "never", "parameters": {}, "temperatures": [1.0]}}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_field_of_the_manifest_that_is_wrong_is_named(
    refusal: Callable[..., str], bundle: Path, fields: dict[str, dict[str, object]]
) -> None:
    ((name, changed),) = fields.items()
    change(bundle, **changed)
    assert name in refusal(bundle)


def test_segment_that_reads_what_the_stem_does_not_give_is_refused(
    refusal: Callable[..., str], bundle: Path
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["segments"][1]["variants"]["fp32"]["inputs"][0]["shape"][2] = 32
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "segments[1]" in refusal(bundle)


@pytest.mark.parametrize(
    "text", ["{", '{"format": 1, "format": 1}', "[" * 1000, "\ud800", '{"format": 1e999}']
)
def test_manifest_that_is_no_json_is_refused(refusal: Callable[..., str], bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "manifest.json" in refusal(bundle)


def test_bundles_of_other_tasks_are_refused(refusal: Callable[..., str]) -> None:
    assert "multi-label-classification" in refusal(MULTI_LABEL)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--point", "slow"], "slow"),
        (["--variant", "int4"], "int4"),
        (["--point", "fast", "--variant", "fp32"], "fast"),
        (["--threads", "0"], "--threads"),
        (["--max-depth"], "--max-depth"),
        (["--depth", "1"], "--depth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_option_that_cannot_be_kept_is_named(
    refusal: Callable[..., str], options: list[str], named: str
) -> None:
    assert named in refusal(CLASSIFIER, *options)


def test_max_depth_before_the_first_exit_is_refused(refusal: Callable[..., str], bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    first, second, *rest = manifest["segments"]
    second["blocks"] = [*first["blocks"], *second["blocks"]]
    change(bundle, segments=[second, *rest], points=[], rule={"name": "never", "parameters": {}})
    assert "the first exit of this bundle is after 3 blocks" in refusal(bundle, "--max-depth", "2")


def test_changed_byte_is_refused(refusal: Callable[..., str], bundle: Path) -> None:
    data = bytearray((bundle / "segment_02.onnx").read_bytes())
    data[100] ^= 1
    (bundle / "segment_02.onnx").write_bytes(data)
    message = refusal(bundle)
    assert "segment_02.onnx" in message and "sha256" in message


@pytest.mark.parametrize("kind", ["shorter", "longer", "missing", "link", "folder", "pipe"])
def test_file_that_is_not_the_one_of_the_manifest_is_refused(
    refusal: Callable[..., str], bundle: Path, tmp_path: Path, kind: str
) -> None:
    file = bundle / "segment_02.onnx"
    data = file.read_bytes()
    file.unlink()
    if kind == "shorter":
        file.write_bytes(data[:-1])
    elif kind == "longer":
        file.write_bytes(data + b"\0")
    elif kind == "link":
        (tmp_path / "elsewhere.onnx").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere.onnx")
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    assert "segment_02.onnx" in refusal(bundle)


def test_graph_in_the_place_of_another_is_refused(refusal: Callable[..., str], bundle: Path) -> None:
    put(bundle, "segment_01.onnx", (bundle / "segment_02.onnx").read_bytes())
    message = refusal(bundle)
    assert "segment_01.onnx: its inputs are" in message


def test_sha256_of_files_of_every_length_is_that_of_hashlib(walk: Walk, bundle: Path) -> None:
    graph = (bundle / "segment_02.onnx").read_bytes()
    for length in (0, 1, 55, 56, 57, 63):  # of the last block of 64 bytes, where padding differs
        note = (length - len(graph) - 2) % 64
        data = graph + bytes((6 << 3 | 2, note)) + b"x" * note  # doc_string, the sixth field of a model
        assert len(data) % 64 == length
        put(bundle, "segment_02.onnx", data)
        assert len(walk(bundle, [{"input_ids": [2, 5, 3]}])) == 1


def test_line_that_cannot_be_answered_is_named_by_its_number(walker: Path) -> None:
    lines = {
        '{"input_ids": [2, 5, 3]}': None,
        "": "empty line",
        "{": "not JSON",
        "[1]": "an object",
        '{"text": "good"}': "text",
        '{"input_ids": []}': "0 tokens",
        '{"input_ids": "good"}': "input_ids",
        '{"input_ids": [2.5]}': "2.5",
        '{"input_ids": [-1]}': "-1",
        '{"input_ids": [26]}': "26",
        '{"input_ids": [2], "input_ids": [3]}': "twice",
        json.dumps({"input_ids": [2] * 49}): "49 tokens",
        '{"input_ids": [2, 3], "token_type_ids": [0]}': "types",
        '{"input_ids": [2, 3], "token_type_ids": [0, 99]}': "99",
        '{"input_ids": [5]}': None,
    }
    done = run(walker, CLASSIFIER, text="\n".join(lines))
    assert (done.returncode, done.stderr) == (1, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for number, (problem, answer) in enumerate(zip(lines.values(), answers, strict=True), 1):
        if problem is None:
            assert "label" in answer
        else:
            assert answer["line"] == number and problem in answer["error"]


def test_output_that_is_not_finite_is_no_answer(walker: Path, bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "segment_02.onnx")
    (maker,) = (node for node in model.graph.node if "logits" in node.output)
    maker.output[0] = "finite"
    steps = [("Exp", "finite", "positive"), ("Neg", "positive", "negative"), ("Log", "negative", "logits")]
    model.graph.node.extend(onnx.helper.make_node(kind, [read], [output]) for kind, read, output in steps)
    put(bundle, "segment_02.onnx", model.SerializeToString())
    change(bundle, rule={"name": "never", "parameters": {}})
    done = run(walker, bundle, text='{"input_ids": [2, 5, 3]}\n')
    assert done.returncode == 1 and "exit 3 is not finite" in json.loads(done.stdout)["error"]


def test_walker_has_the_rules_of_the_runtime_that_only_exit(
    refusal: Callable[..., str], bundle: Path
) -> None:
    change(bundle, rule={"name": "other", "parameters": {}}, points=[])
    (names,) = re.findall(r"it has (.*)$", refusal(bundle).strip())
    assert set(names.split(", ")) == set(RULES)  # test_web holds RULES to the runtime's


def test_example_of_the_readme_compiles_and_answers(ort: Path, bundle: Path) -> None:
    (code,) = re.findall(
        r"^```cpp\n(.*?)^```", (NATIVE / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    source, program = bundle.parent / "app.cpp", bundle.parent / "app"
    source.write_text(code, encoding="utf-8")
    compile_alone(ort, source, program)
    done = run(program, folder=bundle.parent)
    assert re.fullmatch(r"(negative|positive) at exit \d after \d blocks\n", done.stdout), done.stderr


def test_sanitizers_find_nothing(ort: Path, bundle: Path, tmp_path: Path) -> None:
    program, flags = (
        tmp_path / "walk",
        ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    )
    compile_alone(ort, NATIVE / "walker.cpp", program, *flags)
    lines = '{"input_ids": [2, 5, 3]}\n\n{\n{"input_ids": [99]}\n{"input_ids": [2], "token_type_ids": [99]}\n'
    for point in ("default", "fast"):
        done = run(program, bundle, "--point", point, "--steps", text=lines)
        assert (done.returncode, done.stderr, done.stdout.count("\n")) == (1, "", 5)
    random = np.random.default_rng(0)
    text = (bundle / "manifest.json").read_text(encoding="utf-8")
    values = re.findall(r'(?<=[:\[,]) ?("[^"]*"|\d+|\[\]|\{\}|null)', text)
    for _ in range(25):  # manifests in which a value is that of another field
        old, new = random.choice(values, 2)
        places = [match.start() for match in re.finditer(re.escape(str(old)), text)]
        at = int(random.choice(places))
        changed = text[:at] + str(new) + text[at + len(str(old)) :]
        (bundle / "manifest.json").write_text(changed, encoding="utf-8")
        done = run(program, bundle, text=lines)
        assert done.returncode in (1, 2) and done.stderr.count("\n") <= 1, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_walk_starts_no_thread_of_its_own(walker: Path) -> None:
    with subprocess.Popen(
        [walker, CLASSIFIER, "--threads", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b'{"input_ids": [2, 5, 3]}\n')
        process.stdin.flush()
        process.stdout.readline()
        threads = [*Path(f"/proc/{process.pid}/task").iterdir()]
        process.stdin.close()
    assert len(threads) == 1
