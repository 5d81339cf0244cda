"""The attacks on bundles that are tests: copies of the tiny bundles with one thing changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from hostile_bundles import (
    GRAPH,
    MANIFEST,
    Attack,
    adding,
    branches,
    claim_packed,
    double_attribute,
    external,
    external_constant,
    functions,
    identity,
    in_bytes,
    in_graph,
    in_manifest,
    in_text,
    loop,
    many_nodes,
    moved_out,
    nest_before,
    plan,
    polyglot,
    renamed,
    replaced,
    scan,
    second_variant,
    setting,
    shapes,
    sized,
    sparse,
    text,
    twice,
    weight,
)
from onnx import TensorProto, helper, numpy_helper
from tiny_bundles import GENERATOR

HIDDEN_SIZE = '"hidden_size": 16'
DUPLICATED_INPUT = in_graph(lambda model: model.graph.input.append(model.graph.input[0]))
MODEL_GRAPH = b"\x3a\x02\x12\x00"  # a second graph, which protobuf merges with the first

ATTACKS = (
    # T1: files that are not those of the manifest
    Attack(
        1,
        "a byte changed",
        lambda f: (f / GRAPH).write_bytes(b"\x08" + (f / GRAPH).read_bytes()[1:-1] + b"!"),
        "sha256",
    ),
    Attack(
        1,
        "cut off",
        lambda f: (f / GRAPH).write_bytes((f / GRAPH).read_bytes()[:-9]),
        "bytes, the manifest has",
    ),
    Attack(
        1,
        "longer",
        lambda f: (f / GRAPH).write_bytes((f / GRAPH).read_bytes() + b"x"),
        "bytes, the manifest has",
    ),
    Attack(1, "missing", lambda f: (f / GRAPH).unlink(), "missing"),
    Attack(1, "not listed", in_manifest(lambda m: m["files"].pop(GRAPH)), "not listed in files"),
    # T2: text of the manifest
    Attack(2, "a key twice", text('"task":', '"format": 1, "task":'), "there twice"),
    Attack(2, "a file twice", text('"stem.onnx": {', '"segment_00.onnx": {'), "there twice"),
    *(
        Attack(2, f"number {number}", text(HIDDEN_SIZE, f'"hidden_size": {number}'), "number")
        for number in ("NaN", "Infinity", "-Infinity", "1e999")
    ),
    Attack(
        2,
        "nested arrays",
        text(HIDDEN_SIZE, '"hidden_size": ' + "[" * 10**5 + "]" * 10**5),
        "nested too deeply",
    ),
    Attack(
        2,
        "nested provenance",
        setting("provenance", {"a": json.loads("[" * 400 + "]" * 400)}),
        "provenance.*: nested",
    ),
    Attack(2, "graphs before graphs", in_manifest(lambda m: nest_before(m, 300)), "nested too deeply|before"),
    Attack(2, "UTF-16", in_text(lambda manifest: manifest.encode("utf-16")), "not UTF-8"),
    Attack(2, "half a surrogate pair", text('"negative"', '"\\ud800"'), r"labels\[0\]: half of a surrogate"),
    Attack(2, "half a pair in the prefix", setting("input.prefix", "\ud800"), "prefix: half of a surrogate"),
    Attack(2, "unknown key", setting("surprise\n\x1b[2J", 1), r"surprise\\n\\x1b\[2J: unknown key"),
    Attack(2, "another format", setting("format", 99), "format: 99"),
    Attack(2, "17 MB", in_text(lambda manifest: manifest + " " * 17 * 2**20), "at most"),
    # T3: numbers of the manifest
    Attack(3, "a size of 5000 digits", text(HIDDEN_SIZE, '"hidden_size": 1' + "0" * 5000), "digits"),
    Attack(3, "a size of 10^400", setting("hidden_size", 10**400), "hidden_size: a whole number of more"),
    Attack(
        3,
        "a parameter of 10^400",
        setting("rule.parameters.threshold", 10**400),
        "threshold'.: a whole number",
    ),
    Attack(3, "a parameter of 1e308", setting("rule.parameters.threshold", 1e308), "threshold.*at most"),
    Attack(3, "longest of 10^30", setting("input.longest", 10**30), "input.longest"),
    Attack(3, "longest of 10^9", setting("input.longest", 10**9), "input.longest"),
    Attack(3, "longest of 10^9, decoder", setting("input.longest", 10**9), "input.longest", GENERATOR),
    Attack(3, "pad_id of 10^30", setting("input.pad_id", 10**30), "input.pad_id"),
    Attack(3, "pad_id beyond the vocabulary", setting("input.pad_id", 10**6), "input.pad_id"),
    Attack(3, "a prefix of 5 MB", setting("input.prefix", "good " * 10**6), "input.prefix"),
    Attack(3, "10^9 blocks", setting("blocks", 10**9), "blocks"),
    Attack(3, "a block 2^70", setting("segments.0.blocks", [2**70]), "blocks"),
    Attack(3, "a vocabulary of 10^9", setting("vocab_size", 10**9), "vocab_size"),
    Attack(3, "an axis of 10^12", shapes("hidden", ["batch", "seq", 10**12]), "shape: 10+; expected at most"),
    Attack(3, "10^12 numbers in a tensor", shapes("hidden", ["batch", 10**6, 10**6]), "expected at most"),
    Attack(3, "MACs below 0", setting("segments.0.macs.token", -5), "macs.token"),
    Attack(3, "MACs of 10^400", setting("segments.0.macs.token", 10**400), "macs.token"),
    Attack(3, "a stop token below 0", setting("decoder.stop", [-1]), "decoder.stop", GENERATOR),
    # T4: claimed sizes of files
    Attack(
        4,
        "a file of 10^12 bytes",
        in_manifest(lambda m: m["files"][GRAPH].update(bytes=10**12)),
        "bytes: 10+; expected at most",
    ),
    Attack(
        4,
        "a file of 10^400 bytes",
        in_manifest(lambda m: m["files"][GRAPH].update(bytes=10**400)),
        "more than 64 bits",
    ),
    Attack(
        4,
        "a tokenizer of 1 GiB",
        in_manifest(lambda m: m["files"]["tokenizer.json"].update(bytes=2**30)),
        "expected at most",
    ),
    Attack(4, "3 GiB of nothing", sparse, "bytes, the manifest has"),
    # T5: names
    *(
        Attack(5, f"the name {name!a}", lambda f, name=name: renamed(f, name), "not a plain file name")
        for name in (
            "../x.onnx",
            "/etc/passwd",
            "a/b.onnx",
            "..",
            ".",
            "",
            "a\\b",
            "c:x",
            "x\0.onnx",
            "x\n.onnx",
            "\u202ex",
        )
    ),
    Attack(
        5,
        "the manifest lists itself",
        setting("files", {MANIFEST: {"sha256": "a" * 64, "bytes": 1}}),
        "files",
    ),
    # T6: what is no file
    Attack(6, "a link out of the bundle", moved_out, "a link out of the bundle"),
    Attack(
        6, "a link to /dev/zero", replaced(lambda p: p.symlink_to("/dev/zero")), "a link out of the bundle"
    ),
    Attack(6, "a loop of links", replaced(lambda p: p.symlink_to(p)), GRAPH),
    Attack(6, "a folder", replaced(Path.mkdir), GRAPH),
    Attack(6, "a named pipe", replaced(lambda p: os.mkfifo(p)), "not a regular file"),
    Attack(6, "a pipe as manifest", replaced(lambda p: os.mkfifo(p), MANIFEST), "not a regular file"),
    # T8: segments that do not fit
    Attack(8, "axis past in a classifier", shapes("hidden", ["batch", "past", 16]), "'past'"),
    Attack(
        8, "the batch in the middle", shapes("hidden", ["seq", "batch", 16]), "the batch is the first axis"
    ),
    Attack(8, "another size in a variant", second_variant, "tensors other than those of the first variant"),
    Attack(
        8,
        "other inputs than the stem's outputs",
        setting("segments.1.variants.fp32.inputs.0.shape", ["batch", "seq", 9]),
        "tensors other than",
    ),
    Attack(8, "segments in another order", in_manifest(lambda m: m["segments"].reverse()), "blocks"),
    Attack(
        8,
        "a cache of another rank",
        setting("segments.0.variants.fp32.inputs.0.shape", ["batch"]),
        "segments",
        GENERATOR,
    ),
    Attack(8, "no variants", setting("segments.0.variants", {}), "variants"),
    # T9: weights in other files
    Attack(9, "a file of the working directory", external("weights.bin"), "external data"),
    Attack(9, "an absolute path", external("/etc/passwd"), "external data"),
    Attack(9, "a path upwards", external("../weights.bin"), "external data"),
    Attack(9, "memory of the process", external("*/_ORT_MEM_ADDR_/*", 4198400), "external data"),
    Attack(9, "the flag alone", external("", by_flag=True), "external data"),
    Attack(9, "in a constant", in_graph(lambda m: external_constant(m)), "external data"),
    # T10: operators of others
    Attack(
        10,
        "a domain of its own",
        adding(helper.make_node("Evil", [], ["extra"], domain="evil"), opsets=[("evil", 1)]),
        "'evil'",
    ),
    Attack(
        10,
        "an operator of a domain of its own",
        adding(helper.make_node("Evil", [], ["extra"], domain="evil")),
        "'evil:Evil'",
    ),
    Attack(
        10,
        "an operator of ONNX Runtime",
        adding(helper.make_node("Inverse", ["hidden"], ["extra"], domain="com.microsoft")),
        "com.microsoft:Inverse",
    ),
    Attack(
        10, "texts", adding(helper.make_node("StringNormalizer", ["hidden"], ["extra"])), "StringNormalizer"
    ),
    Attack(
        10,
        "random numbers",
        adding(helper.make_node("RandomNormal", [], ["extra"], shape=[2**40])),
        "RandomNormal",
    ),
    Attack(10, "sequences", adding(helper.make_node("SequenceEmpty", [], ["extra"])), "SequenceEmpty"),
    # T11: engines and other formats
    Attack(
        11,
        "an engine in a node",
        adding(
            helper.make_node("EPContext", [], ["extra"], domain="com.microsoft", ep_cache_context="x.engine")
        ),
        "EPContext",
    ),
    Attack(11, "the format of ONNX Runtime", in_bytes(polyglot), "ONNX Runtime's own format"),
    Attack(11, "a TensorRT engine", plan, "not a graph|not an ONNX graph"),
    Attack(
        11,
        "a pickle",
        in_bytes(lambda _: b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
        "not a graph|not an ONNX graph",
    ),
    # T12: control flow
    Attack(12, "an endless loop", loop(), "'Loop' is not allowed"),
    Attack(12, "a scan", scan(), "'Scan' is not allowed"),
    Attack(12, "a branch", branches(1), "'If' is not allowed"),
    Attack(12, "thirty branches in branches", branches(30), "'If' is not allowed"),
    Attack(
        12,
        "a graph in a plain node",
        in_graph(
            lambda m: m.graph.node[0].attribute.append(helper.make_attribute("body", identity("a", "b")))
        ),
        "a graph of its own",
    ),
    # T13: local functions
    Attack(13, "an inlining bomb", functions(28), "field 25"),
    # T14: too much of it
    Attack(14, "too many nodes", many_nodes(20_001), "more than 20000 nodes"),
    Attack(
        14,
        "too many fields",
        in_bytes(lambda data: data + b"\x72\x00" * 500_001),
        "more than 500000 fields",
    ),
    # T15: claims of tensors
    Attack(15, "sizes of 2^80", weight(lambda t: t.dims.extend([2**40, 2**40])), "need"),
    Attack(15, "gigabytes in 4 bytes", weight(lambda t: t.dims.extend([2**30])), "need"),
    Attack(15, "sizes below 0", weight(lambda t: t.dims.extend([-5])), "sizes"),
    Attack(15, "shorter than its sizes", weight(lambda t: setattr(t, "raw_data", t.raw_data[:-4])), "need"),
    Attack(
        15, "texts as weights", weight(lambda t: setattr(t, "data_type", TensorProto.STRING)), "data type 8"
    ),
    Attack(15, "numbers twice", weight(lambda t: t.int64_data.append(1)), "two fields"),
    Attack(15, "packed numbers", in_graph(lambda m: claim_packed(m)), "need"),
    # T16: constants of gigabytes
    Attack(16, "ConstantOfShape", sized("ConstantOfShape", np.array([12_500_000_000])), "numbers"),
    Attack(16, "Expand", sized("Expand", np.float32(0), np.array([2**20, 2**20])), "numbers"),
    Attack(16, "Tile", sized("Tile", np.zeros(4, np.float32), np.array([2**40])), "numbers"),
    Attack(16, "Range", sized("Range", np.int64(0), np.int64(2**60), np.int64(1)), "numbers"),
    Attack(16, "Pad", sized("Pad", np.zeros(4, np.float32), np.array([0, 2**40])), "numbers"),
    # T17: names and fields twice
    Attack(17, "an input twice", DUPLICATED_INPUT, "there twice"),
    Attack(17, "an output twice", in_graph(lambda m: m.graph.node.append(m.graph.node[-1])), "there twice"),
    Attack(
        17,
        "a weight over an input",
        in_graph(lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros(1), "hidden"))),
        "there twice",
    ),
    Attack(17, "an attribute twice", in_graph(lambda m: double_attribute(m)), "is there twice"),
    Attack(17, "two graphs in a file", twice(MODEL_GRAPH), "field graph is there twice"),
    # T19: no ONNX graph
    Attack(19, "random bytes", in_bytes(lambda _: np.random.default_rng(0).bytes(4096)), "graph"),
    Attack(19, "zeros", in_bytes(lambda _: bytes(4096)), "graph"),
    Attack(19, "empty", in_bytes(lambda _: b""), "no graph"),
    Attack(19, "cut in a field", in_bytes(lambda data: data[: len(data) // 2]), "ends in the middle"),
    Attack(19, "a number without end", in_bytes(lambda _: b"\x08" + b"\xff" * 50), "more than 64 bits"),
    Attack(19, "an unknown field", twice(b"\xfa\x01\x00"), "field 31"),
    Attack(19, "a group", twice(b"\x0b\x0c"), "type 3"),
    # T27: names that choose what runs
    Attack(27, "an unknown task", setting("task", "__class__"), "task: '__class__'"),
    Attack(27, "images for a task of texts", setting("task", "image-classification"), "task"),
    Attack(
        27, "an unknown tokenizer file", setting("input.tokenizer", "../tokenizer.json"), "input.tokenizer"
    ),
)


def of_kind(threat: int) -> list[Attack]:
    """The attacks of one threat."""
    return [attack for attack in ATTACKS if attack.threat == threat]
