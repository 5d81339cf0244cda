"""Changes that an attacker would make in a bundle, with sizes and hashes made right again; needs onnx."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tiny_bundles import CLASSIFIER

MANIFEST, GRAPH = "manifest.json", "segment_00.onnx"
Change = Callable[[Path], object]
Json = dict[str, Any]


@dataclass(frozen=True)
class Attack:
    """An attack: number of its threat in SECURITY.md, what it does, and what the refusal says (a pattern)."""

    threat: int
    name: str
    change: Change
    refusal: str
    source: Path = CLASSIFIER

    def __str__(self) -> str:
        return f"T{self.threat}-{self.name.replace(' ', '-')}"

    def apply(self, folder: Path) -> Path:
        """Copy the source to a folder and change the copy."""
        shutil.copytree(self.source, folder)
        self.change(folder)
        return folder


def read_json(folder: Path) -> Json:
    """The manifest of a bundle, parsed."""
    value: Json = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return value


def write_json(folder: Path, value: Json) -> None:
    """Write a manifest."""
    (folder / MANIFEST).write_text(json.dumps(value), encoding="utf-8")


def rehash(folder: Path) -> None:
    """Make sizes and hashes of all files right, as an attacker would."""
    value = read_json(folder)
    for name in value["files"]:
        data = (folder / name).read_bytes()
        value["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write_json(folder, value)


def rehash_baselines(folder: Path, file: str, change: Change) -> None:
    """Change one graph of a folder of baselines, and make its size and hash right."""
    shutil.copy(CLASSIFIER / MANIFEST, folder / MANIFEST)
    shutil.copy(folder / file, folder / GRAPH)
    for name in read_json(folder)["files"]:
        (folder / name).touch()
    change(folder)
    data = (folder / GRAPH).read_bytes()
    (folder / file).write_bytes(data)
    listing = json.loads((folder / "baselines.json").read_text(encoding="utf-8"))
    for graph in listing["graphs"]:
        if graph["file"] == file:
            graph.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    (folder / "baselines.json").write_text(json.dumps(listing), encoding="utf-8")


def in_text(edit: Callable[[str], str | bytes]) -> Change:
    """A change of the manifest's text."""

    def change(folder: Path) -> None:
        data = edit((folder / MANIFEST).read_text(encoding="utf-8"))
        (folder / MANIFEST).write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def in_manifest(edit: Callable[[Json], object]) -> Change:
    """A change of the manifest's values."""

    def change(folder: Path) -> None:
        value = read_json(folder)
        edit(value)
        write_json(folder, value)

    return change


def setting(path: str, new: object) -> Change:
    """Another value of one field; path: keys and indices with dots between."""

    def edit(value: Json) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        inner: Any = value
        for key in parents:
            inner = inner[key]
        inner[last] = new

    return in_manifest(edit)


def in_bytes(edit: Callable[[bytes], bytes], file: str = GRAPH) -> Change:
    """A change of a file's bytes, with the right hash."""

    def change(folder: Path) -> None:
        (folder / file).write_bytes(edit((folder / file).read_bytes()))
        rehash(folder)

    return change


def in_graph(edit: Callable[[ModelProto], object], file: str = GRAPH) -> Change:
    """A change of an ONNX graph, with the right hash."""

    def edit_bytes(data: bytes) -> bytes:
        model = onnx.load_from_string(data)
        edit(model)
        changed: bytes = model.SerializeToString()
        return changed

    return in_bytes(edit_bytes, file)


def external(location: str, offset: int = 0, *, by_flag: bool = False) -> Change:
    """Take the largest weight of a graph from another file."""

    def edit(model: ModelProto) -> None:
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        size = len(tensor.raw_data)
        if not by_flag:  # the flag is what engines look at; other readers look for the location
            tensor.ClearField("raw_data")
            facts = {"location": location, "offset": str(offset), "length": str(size)}
            for key, text in facts.items():
                tensor.external_data.add(key=key, value=text)
        tensor.data_location = TensorProto.EXTERNAL

    def change(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(bytes(4096))
        in_graph(edit)(folder)

    return change


def adding(*nodes: onnx.NodeProto, opsets: Sequence[tuple[str, int]] = (), **weights: Any) -> Change:
    """Add nodes to a graph, which compute `extra`, and add that to the logits."""

    def edit(model: ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = ["before" if name == "logits" else name for name in node.output]
        model.graph.node.extend(nodes)
        model.graph.node.append(helper.make_node("Add", ["before", "extra"], ["logits"]))
        for name, value in weights.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        for domain, version in opsets:
            model.opset_import.append(helper.make_opsetid(domain, version))

    return in_graph(edit)


def float_info(name: str) -> onnx.ValueInfoProto:
    """A scalar float32 input or output of a graph."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [])


def identity(source: str, target: str, name: str = "inner") -> onnx.GraphProto:
    """A graph that copies a value from outside of it."""
    node = helper.make_node("Identity", [source], [target])
    return helper.make_graph([node], name, [], [float_info(target)])


def loop() -> Change:
    """A loop of 2**62 rounds."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"]), helper.make_node("Identity", ["value"], ["kept"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            float_info("value"),
        ],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, []), float_info("kept")],
    )
    node = helper.make_node("Loop", ["rounds", "start", "zero"], ["extra"], body=body)
    return adding(node, rounds=np.int64(2**62), start=np.bool_(True), zero=np.float32(0))


def scan() -> Change:
    """A scan over a tensor."""
    body = helper.make_graph(
        [helper.make_node("Add", ["sum_in", "item"], ["sum_out"])],
        "body",
        [float_info("sum_in"), float_info("item")],
        [float_info("sum_out")],
    )
    node = helper.make_node("Scan", ["zero", "items"], ["extra"], body=body, num_scan_inputs=1)
    return adding(node, zero=np.float32(0), items=np.zeros(4, np.float32))


def branches(depth: int) -> Change:
    """Branches in branches."""
    inner = identity("zero", "out_0")
    for number in range(1, depth):
        node = helper.make_node(
            "If",
            ["yes"],
            [f"out_{number}"],
            then_branch=inner,
            else_branch=identity("zero", f"else_{number}"),
        )
        inner = helper.make_graph([node], f"level_{number}", [], [float_info(f"out_{number}")])
    node = helper.make_node(
        "If", ["yes"], ["extra"], then_branch=inner, else_branch=identity("zero", "else_0")
    )
    return adding(node, yes=np.bool_(True), zero=np.float32(0))


def functions(count: int) -> Change:
    """Local functions, each of which calls the next one twice: 2**count nodes when they are inlined."""

    def edit(model: ModelProto) -> None:
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
        for number in range(count):
            last = number == count - 1
            kind, domain = ("Neg", "") if last else (f"F{number + 1}", "local")
            body = [helper.make_node(kind, [a], [b], domain=domain) for a, b in (("a", "t"), ("t", "b"))]
            model.functions.append(helper.make_function("local", f"F{number}", ["a"], ["b"], body, opsets))

    return in_graph(edit)


def weight(edit: Callable[[TensorProto], object]) -> Change:
    """A change of the first weight of a graph."""
    return in_graph(lambda model: edit(model.graph.initializer[0]))


def sized(operator: str, *inputs: Any) -> Change:
    """A node that makes a huge tensor of constants, summed up to one number."""
    names = [f"size_{number}" for number in range(len(inputs))]
    nodes = [
        helper.make_node(operator, names, ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["extra"], keepdims=0),
    ]
    return adding(*nodes, **dict(zip(names, inputs, strict=True)))


def many_nodes(count: int) -> Change:
    """A chain of this many nodes, beside the graph."""

    def edit(model: ModelProto) -> None:
        previous = "hidden"
        for number in range(count):
            model.graph.node.append(helper.make_node("Neg", [previous], [f"n{number}"]))
            previous = f"n{number}"

    return in_graph(edit)


def renamed(folder: Path, name: str) -> None:
    """List the first segment's file under another name."""
    value = read_json(folder)
    value["files"][name] = value["files"].pop(GRAPH)
    for variant in value["segments"][0]["variants"].values():
        if variant["file"] == GRAPH:
            variant["file"] = name
    write_json(folder, value)


def replaced(make: Callable[[Path], object], file: str = GRAPH) -> Change:
    """Something else in place of a file."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def moved_out(folder: Path) -> None:
    """A link to a right file outside of the bundle."""
    outside = folder.with_name(folder.name + "-outside.onnx")
    shutil.move(folder / GRAPH, outside)
    (folder / GRAPH).symlink_to(outside)


def sparse(folder: Path) -> None:
    """A file of 3 GiB that has no bytes on disk, and a manifest that claims as much as it may."""
    with open(folder / GRAPH, "wb") as file:
        file.truncate(3 * 2**30)
    in_manifest(lambda value: value["files"][GRAPH].update(bytes=2**31 - 1))(folder)


def tensors_named(value: Json, ending: str) -> list[Json]:
    """Descriptions of all tensors of stem and segments whose names end so."""
    parts = [value["stem"], *value["segments"]]
    return [
        tensor
        for part in parts
        for variant in part["variants"].values()
        for tensor in (*variant["inputs"], *variant["outputs"])
        if tensor["name"].endswith(ending)
    ]


def shapes(ending: str, shape: Sequence[int | str]) -> Change:
    """Another shape of tensors, everywhere in the manifest."""

    def edit(value: Json) -> None:
        for tensor in tensors_named(value, ending):
            tensor["shape"] = list(shape)

    return in_manifest(edit)


def second_variant(folder: Path) -> None:
    """A second variant whose hidden state is of another size than that of the first."""
    value = read_json(folder)
    for tensor in value["segments"][0]["variants"]["int8"]["outputs"]:
        if tensor["name"] == "next_hidden":
            tensor["shape"] = ["batch", "seq", 99]
    write_json(folder, value)


def other_neighbour(folder: Path) -> None:
    """A graph in place of one with other inputs: a right file, but not that of this segment."""
    shutil.copy(folder / "segment_02.onnx", folder / "segment_00.onnx")
    rehash(folder)


def twice(field: bytes) -> Change:
    """Append a field of the model that is there already; parsers take the last, the first, or merge them."""
    return in_bytes(lambda data: data + field)


def polyglot(data: bytes) -> bytes:
    """A file that is an ONNX graph and begins like ONNX Runtime's own format: the name of it at byte 4."""
    return b"\x08\x09" + b"\x12\x08" + b"ORTM\0\0\0\0" + data.removeprefix(b"\x08\x09")


def plan(folder: Path) -> None:
    """A TensorRT engine where a graph is listed."""
    (folder / GRAPH).write_bytes(b"ftrt" + bytes(4096))
    rehash(folder)


def text(old: str, new: str) -> Change:
    """The manifest with one text in place of another, once."""
    return in_text(lambda manifest: manifest.replace(old, new, 1))


def nest_before(value: Json, depth: int) -> None:
    """Graphs that run before graphs that run before graphs."""
    variant = value["segments"][0]["variants"]["fp32"]
    for _ in range(depth):
        variant["before"] = [dict(variant, before=[])]
        variant = variant["before"][0]


def external_constant(model: ModelProto) -> None:
    """A Constant node whose tensor is in another file."""
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def claim_packed(model: ModelProto) -> None:
    """A weight whose numbers are in a packed field, of which there are fewer than its sizes claim."""
    tensor = TensorProto(name="packed", data_type=TensorProto.FLOAT, dims=[2**30], float_data=[1.0, 2.0])
    model.graph.initializer.append(tensor)


def double_attribute(model: ModelProto) -> None:
    """An attribute of a node that is there twice, with two values."""
    node = next(node for node in model.graph.node if node.attribute)
    again = node.attribute.add()
    again.CopyFrom(node.attribute[0])
    again.i += 1
