"""The walker and the page in web/: Node gives the same exits, labels and logits as offramp.runtime.

Needs Node 20 and the packages of web/package.json (`npm ci` in web/); the test of the page also needs a
Chromium, named by OFFRAMP_CHROMIUM or found on PATH. Without them tests are skipped, and say what is missing,
unless OFFRAMP_REQUIRED names them (node, browser).
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import ROOT
from tiny_bundles import CLASSIFIER, MULTI_LABEL, WORDS, bundle_with_points, texts

from offramp.runtime import load_classifier
from offramp.runtime.bundle import manifest as format_1
from offramp.runtime.bundle.manifest import (
    FileFact,
    Manifest,
    OperatingPoint,
    RuleSpec,
    TextInput,
    Variant,
)
from offramp.runtime.classifier import Classifier
from offramp.runtime.rules.base import softmax
from offramp.runtime.rules.registry import RULES as RULES_OF_RUNTIME
from offramp.runtime.rules.registry import rules_for

pytestmark = pytest.mark.slow

WEB = ROOT / "web"
LIBRARIES = [WEB / "node_modules" / name for name in ("onnxruntime-web", "@huggingface/tokenizers")]
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
NODE = shutil.which("node")
BROWSER = os.environ.get("OFFRAMP_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
TOLERANCE = 1e-3
# Every rule that the walker has, at settings at which rows leave at several exits.
RULES: dict[str, dict[str, float]] = {
    "max_probability": {"threshold": 0.99},
    "margin": {"threshold": 0.98},
    "entropy": {"threshold": 0.05},
    "gate": {"threshold": 0.4},
    "patience": {"patience": 1},
    "patience_confident": {"threshold": 0.2, "patience": 2},
    "fixed": {"exit": 2},
    "never": {},
}
CERTAIN = ("max_probability", "margin", "entropy", "patience_confident")  # rules that read temperatures

REQUIRED = os.environ.get("OFFRAMP_REQUIRED", "").split()  # tools whose lack is a failure

needs_node = pytest.mark.skipif(
    NODE is None and "node" not in REQUIRED, reason="no node on PATH; install Node 20 or newer"
)
needs_packages = pytest.mark.skipif(
    (NODE is None or not all(folder.is_dir() for folder in LIBRARIES)) and "node" not in REQUIRED,
    reason="no node on PATH, or the packages of web/ are not installed; run: npm ci (in web/)",
)
needs_browser = pytest.mark.skipif(
    (BROWSER is None or not (WEB / "node_modules" / "playwright-core").is_dir())
    and "browser" not in REQUIRED,
    reason="no Chromium (install one or name it in OFFRAMP_CHROMIUM), or no playwright-core (npm ci in web/)",
)

Item = dict[str, Any]


def run_node(bundle: Path, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The answers of web/run.mjs to these items."""
    lines = "".join(json.dumps(item) + "\n" for item in items)
    done = node("run.mjs", str(bundle), text=lines)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def node(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    assert NODE is not None
    return subprocess.run(
        [NODE, *arguments],
        cwd=WEB,
        input=text,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def answers_of(session: Classifier, items: Sequence[Item]) -> list[dict[str, Any]]:
    """What offramp.runtime answers to items, in the form of web/run.mjs."""
    answers = []
    for item in items:
        text = item["text"] if "text_b" not in item else (item["text"], item["text_b"])
        answer = session(text)
        trace, _ = session.at_full_depth([text])
        answers.append(
            {
                "label": answer.label,
                "score": answer.score,
                "exit": answer.exit,
                "depth": answer.depth,
                "truncated": answer.truncated,
                "tokens": int(session.encode(text)["input_ids"].shape[1]),
                "logits": trace.logits[0, : answer.exit].tolist(),
            }
        )
    return answers


def assert_same(
    answers: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]], *, logits: float = TOLERANCE
) -> None:
    """Check that answers of the walker are those of offramp.runtime, with this tolerance of logits."""
    assert len(answers) == len(expected)
    for answer, right in zip(answers, expected, strict=True):
        assert "error" not in answer, answer
        same = ("label", "exit", "depth", "truncated", "tokens")
        assert {name: answer[name] for name in same} == {name: right[name] for name in same}
        assert answer["score"] == pytest.approx(right["score"], abs=TOLERANCE)
        steps = [step["logits"] for step in answer["steps"]]
        np.testing.assert_allclose(steps, right["logits"], rtol=0, atol=logits)


def with_points(bundle: Path, points: Sequence[OperatingPoint]) -> Manifest:
    """Give a bundle these operating points."""
    manifest = replace(manifest_of(bundle), points=tuple(points))
    (bundle / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def manifest_of(bundle: Path) -> Manifest:
    with closing(load_classifier(bundle)) as session:
        return session.manifest


def integer_products(bundle: Path) -> None:
    """Write the int8 graphs of a bundle as ee-split does: with operators of ONNX Runtime's own."""
    onnx = pytest.importorskip("onnx")
    from offramp.export.int8 import to_token_products

    manifest = manifest_of(bundle)
    files, operators = dict(manifest.files), set()
    for segment in manifest.segments:
        graph = onnx.load(bundle / segment.variants["fp32"].file)
        for number, product in enumerate(graph.graph.node):
            product.name = product.name or f"node_{number}"
        products = {product.name for product in graph.graph.node if product.op_type == "MatMul"}
        to_token_products(graph, products, reduced=True)
        operators |= {product.op_type for product in graph.graph.node}
        name = segment.variants["int8"].file
        (bundle / name).write_bytes(data := graph.SerializeToString())
        files[name] = FileFact(hashlib.sha256(data).hexdigest(), len(data))
    assert "MatMulIntegerToFloat" in operators
    (bundle / "manifest.json").write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "bundle"))


@needs_packages
@pytest.mark.parametrize("variant", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_every_rule_gives_the_exits_of_the_runtime(bundle: Path, variant: str) -> None:
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
    rows = texts(8, seed=3)
    items = [{"text": text, "point": point.name} for point in points for text in rows]
    expected = []
    for point in points:
        with closing(load_classifier(bundle, point=point.name)) as session:
            expected += answers_of(session, [{"text": text} for text in rows])
    assert len({answer["exit"] for answer in expected}) == 3
    assert_same(run_node(bundle, items), expected)


@needs_packages
def test_graphs_that_several_segments_run_come_before_their_own(bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    manifest, helper = manifest_of(bundle), onnx.helper
    hidden = manifest.segments[0].first_graph.inputs[0]
    ends = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(hidden.shape))]
        for name in ("hidden", "next_hidden")
    ]
    graph = helper.make_graph([helper.make_node("Tanh", ["hidden"], ["next_hidden"])], "shared", *ends)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (bundle / "shared.onnx").write_bytes(data := model.SerializeToString())
    shared = Variant("shared.onnx", (hidden,), (replace(hidden, name="next_hidden"),))
    segments = tuple(
        replace(
            segment,
            variants={
                name: replace(variant, before=(shared,) * number)
                for name, variant in segment.variants.items()
            },
        )
        for number, segment in enumerate(manifest.segments)
    )
    files = {**manifest.files, "shared.onnx": FileFact(hashlib.sha256(data).hexdigest(), len(data))}
    changed = replace(manifest, segments=segments, files=files)
    (bundle / "manifest.json").write_text(changed.to_json(), encoding="utf-8")
    items = [{"text": text} for text in texts(4, seed=5)]
    with closing(load_classifier(bundle, rule="never")) as session:
        expected = answers_of(session, items)
    never = {"rule": {"name": "never", "parameters": {}}}
    assert_same(run_node(bundle, [item | never for item in items]), expected)


@needs_packages
def test_unchanged_bundle_gives_the_labels_of_the_runtime_at_every_point() -> None:
    rows, items, expected = texts(6, seed=4), [], []
    for point in ("default", "fast"):  # fp32 by gates, int8 by patience
        items += [{"text": text, "point": point} for text in rows]
        with closing(load_classifier(CLASSIFIER, point=point)) as session:
            expected += answers_of(session, [{"text": text} for text in rows])
    # ONNX Runtime makes products with 8-bit activations of this bundle's DequantizeLinear and MatMul, but not
    # in WebAssembly. Graphs that ee-split writes leave it no such choice; see integer_products.
    assert_same(run_node(CLASSIFIER, items), expected, logits=0.1)


@needs_packages
def test_texts_are_encoded_as_by_the_runtime(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    assert isinstance(manifest.input, TextInput)
    text_input = replace(manifest.input, prefix="film : ")
    (bundle / "manifest.json").write_text(replace(manifest, input=text_input).to_json(), encoding="utf-8")
    words = " ".join(WORDS * 8)
    items: list[Item] = [
        {"text": ""},
        {"text": "The PLOT, was not-at-all good! \u4e1c\u4eac \U0001f642 na\u00efve"},
        {"text": words},
        {"text": "good " * 4000},
        {"text": "good", "text_b": "bad"},
        {"text": words, "text_b": "bad"},
        {"text": "good", "text_b": words},
        {"text": words, "text_b": words},
        {"text": " ".join(WORDS * 2), "text_b": " ".join(WORDS)},
    ]
    with closing(load_classifier(bundle)) as session:
        expected = answers_of(session, items)
    assert [answer["truncated"] for answer in expected].count(True) == 5
    assert_same(run_node(bundle, items), expected)


@needs_packages
def test_what_the_walker_does_not_know_is_refused_by_name(bundle: Path) -> None:
    items: list[Item] = [
        {"text": "good", "rule": {"name": "quee", "parameters": {"price": 0.1}}},
        {"text": "good", "rule": {"name": "gate", "parameters": {"threshold": 0.5, "floor": 1}}},
        {"text": "good", "point": "slow"},
        {"text": "good", "variant": "int4"},
        {"text": 5},
        {"text": "\ud800"},
    ]
    errors = [(answer["error"], answer["message"]) for answer in run_node(bundle, items)]
    assert [kind for kind, _ in errors] == [
        *("NotSupported", "NotSupported", "BadSetting", "BadSetting", "BadInput", "BadInput")
    ]
    for (_, message), name in zip(
        errors, ["quee", "floor", "slow", "int4", "number", "surrogate"], strict=True
    ):
        assert name in message


@needs_packages
def test_bundles_of_other_tasks_are_refused() -> None:
    done = node("run.mjs", str(MULTI_LABEL))
    assert done.returncode == 2 and "multi-label-classification" in done.stderr


@needs_node
def test_field_of_the_manifest_that_is_wrong_is_named() -> None:
    manifest = json.loads((CLASSIFIER / "manifest.json").read_text(encoding="utf-8"))
    changes: dict[str, Item] = {
        "format": {"format": 2},
        "extra": {"extra": 1},
        "their blocks": {"blocks": 5},
        "labels": {"labels": ["one"]},
        "threshold": {"rule": {"name": "gate", "parameters": {"threshold": "high"}}},
        "plain file name": {"files": {"../tokenizer.json": {"sha256": "0" * 64, "bytes": 1}}},
        "input.tokenizer": {"input": {**manifest["input"], "tokenizer": "other.json"}},
        "segments": {"segments": []},
        "an output of another name": {"stem": manifest["segments"][0]},
    }
    script = """
        import { readManifest } from "./manifest.js";
        for (const text of JSON.parse(process.argv[1])) {
            try { readManifest(JSON.stringify(text), "bundle"); console.log("read"); }
            catch (problem) { console.log(`${problem.name} ${problem.message}`); }
        }
    """
    changed = [manifest, *(manifest | change for change in changes.values())]
    done = node("--input-type=module", "-e", script, json.dumps(changed))
    lines = done.stdout.splitlines()
    assert lines[0] == "read", done.stderr
    for name, line in zip(changes, lines[1:], strict=True):
        assert line.startswith(("BadBundle", "NotSupported")), line
        assert name in line or name.startswith("an output"), line


@needs_packages
def test_file_that_differs_from_the_manifest_is_named(bundle: Path) -> None:
    data = bytearray((bundle / "segment_01.onnx").read_bytes())
    data[100] ^= 1
    (bundle / "segment_01.onnx").write_bytes(data)
    (answer,) = run_node(bundle, [{"text": "good", "rule": {"name": "never"}}])
    assert answer["error"] == "BadBundle" and "segment_01.onnx" in answer["message"]


@needs_node
def test_sha256_without_crypto_is_that_of_hashlib() -> None:
    script = """
        import { digestOf } from "./sha256.js";
        for (const n of [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000]) {
            const bytes = Uint8Array.from({ length: n }, (_, i) => i % 251);
            console.log(Buffer.from(digestOf(bytes)).toString("hex"));
        }
    """
    lengths = (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000)
    expected = [hashlib.sha256(bytes(i % 251 for i in range(n))).hexdigest() for n in lengths]
    assert node("--input-type=module", "-e", script).stdout.split() == expected


@needs_packages
def test_answer_states_what_was_run(bundle: Path) -> None:
    (answer,) = run_node(
        bundle, [{"text": "a good film", "rule": {"name": "fixed", "parameters": {"exit": 2}}}]
    )
    assert [step["segment"] for step in answer["steps"]] == [1, 2]
    assert [step["exits"] for step in answer["steps"]] == [False, True]
    assert answer["steps"][-1]["reading"]["value"] == 2
    assert answer["depth"] == 3 and all(step["ms"] >= 0 for step in answer["steps"])
    assert answer["ms"] == pytest.approx(answer["stemMs"] + sum(step["ms"] for step in answer["steps"]))
    probabilities = softmax(np.float32(answer["steps"][-1]["logits"]))
    np.testing.assert_allclose(answer["steps"][-1]["probabilities"], probabilities, atol=1e-6)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a web server with the page, its libraries and a bundle with guaranteed points."""
    folder = tmp_path / "site"
    folder.mkdir()
    for file in WEB.iterdir():
        if file.suffix in (".js", ".html", ".css"):
            shutil.copy(file, folder)
    done = node("vendor.mjs", str(folder / "vendor"))
    assert done.returncode == 0, done.stderr
    bundle_with_points(folder, guaranteed=True)
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files of a folder without a log."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@needs_packages
@needs_browser
def test_page_shows_a_walk_by_keyboard_on_desktop_and_phone(site: str, tmp_path: Path) -> None:
    use_page(site, tmp_path / "site" / "bundle")


@needs_browser
def test_page_of_a_server_shows_what_the_server_walks(tmp_path: Path) -> None:
    serving = pytest.importorskip("serving")
    bundle = bundle_with_points(tmp_path, guaranteed=True)
    with serving.serving(bundle) as server:
        use_page(f"http://127.0.0.1:{server.port}/demo", bundle)


def use_page(address: str, bundle: Path) -> None:
    """Use the page at an address by keyboard, and compare what it shows with the answers of a bundle."""
    text = "the film was not at all good"
    assert BROWSER is not None
    done = node("tests/page.mjs", BROWSER, address, text)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["errors"] == []
    assert report["requests"] == [address.split("/")[2]]
    assert report["overflow"] == {"desktop": False, "phone": False}
    assert report["focused"] == "point"
    for state in ("typed", "deepest", "shallowest"):
        shown = report[state]
        with closing(load_classifier(bundle, point=shown["point"])) as session:
            answer = session(text)
        with closing(load_classifier(bundle, rule="never")) as session:
            full = session(text)
        assert shown["label"] == f"{answer.label} {100 * answer.score:.1f} %"
        assert shown["full"] == f"{full.label} {100 * full.score:.1f} %"
        assert shown["detail"].startswith(f"exit {answer.exit}, {answer.depth} of 4 blocks, ")
        assert [segment["lit"] for segment in shown["segments"]] == [n < answer.exit for n in range(3)]
        assert [segment["exit"] for segment in shown["segments"]] == [n + 1 == answer.exit for n in range(3)]
        assert all(segment["label"] in session.labels for segment in shown["segments"])
        assert "with confidence 95 %" in shown["promise"]
        if answer.depth < 4:  # times of a server contain the wait for other rows
            assert shown["saved"].startswith(f"The early exit saved {4 - answer.depth} of 4 blocks")
            assert ("not compared" in shown["saved"]) == address.endswith("/demo")
    assert [report[state]["point"] for state in ("deepest", "shallowest")] == ["gate-3", "gate-1"]


def test_every_field_of_the_manifest_is_in_the_document() -> None:
    document = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    kinds = [
        *(format_1.Manifest, format_1.Segment, format_1.Variant, format_1.Tensor, format_1.Macs),
        *(format_1.TextInput, format_1.ImageInput, format_1.RuleSpec, format_1.OperatingPoint),
        *(format_1.StepCosts, format_1.Calibration, format_1.Guarantee, format_1.FileFact),
        format_1.DecoderFacts,
    ]
    names = {field.name for kind in kinds for field in fields(kind)}
    assert not {name for name in names if f"`{name}`" not in document}
    assert not {f"`{name}`" for name in (*format_1.TASKS, *RULES_OF_RUNTIME) if f"`{name}`" not in document}


@needs_node
def test_walker_has_the_rules_of_the_runtime_that_only_exit() -> None:
    script = 'import { RULE_NAMES } from "./rules.js"; console.log(JSON.stringify(RULE_NAMES.sort()));'
    names = json.loads(node("--input-type=module", "-e", script).stdout)
    exits = {name for name, rule in RULES_OF_RUNTIME.items() if rule.exits is not None}
    assert set(names) == exits & set(rules_for("classification")) == set(RULES)
