"""The reader of graphs: what checked-in graphs hold, and bytes that no ONNX library would write."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tiny_bundles import DATA

from offramp.runtime.bundle.graph_checks import GraphFacts, check_graph
from offramp.runtime.errors import BadBundle

GRAPHS = sorted(DATA.glob("**/*.onnx"))


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message: a whole number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def node(operator: bytes, inputs: list[bytes], output: bytes, *attributes: bytes) -> bytes:
    data = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, operator)
    return field(1, data + b"".join(field(5, attribute) for attribute in attributes))


def int64s(name: bytes, *values: int) -> bytes:
    return (
        field(1, len(values))
        + field(2, 7)
        + field(8, name)
        + field(9, struct.pack(f"<{len(values)}q", *values))
    )


def model(*parts: bytes) -> bytes:
    return field(1, 9) + field(7, b"".join(parts)) + field(8, field(2, 18))


def check(*parts: bytes) -> GraphFacts:
    return check_graph(model(*parts), "x.onnx")


def refusal(data: bytes) -> str:
    with pytest.raises(BadBundle, match=r"^x\.onnx: ") as caught:
        check_graph(data, "x.onnx")
    return str(caught.value)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_checked_in_graph_is_accepted(path: Path) -> None:
    facts = check_graph(path.read_bytes(), str(path), branches=path.stem.startswith("nested"))
    assert facts.nodes > 0 and facts.opset == 18 and 0 < facts.weights < path.stat().st_size


def branching(depth: int) -> bytes:
    """A node If whose branch holds such a node, and so on."""
    inner = node(b"Neg", [b"x"], b"y")
    for number in range(depth):
        branch = field(1, b"then_branch") + field(6, inner) + field(20, 5)
        inner = node(b"If", [b"c"], b"y%d" % number, branch)
    return inner


def test_branches_are_for_nested_baselines_alone() -> None:
    data = model(branching(2))
    assert "operator 'If' is not allowed" in refusal(data)
    assert check_graph(data, "x.onnx", branches=True).operators == {"If": 2, "Neg": 1}


def test_operators_in_branches_are_checked() -> None:
    branch = field(1, b"then_branch") + field(6, node(b"Loop", [], b"y")) + field(20, 5)
    with pytest.raises(BadBundle, match="operator 'Loop' is not allowed"):
        check_graph(model(node(b"If", [b"c"], b"z", branch)), "x.onnx", branches=True)


def test_branches_in_branches_have_a_limit() -> None:
    with pytest.raises(BadBundle, match="more than 32 deep"):
        check_graph(model(branching(40)), "x.onnx", branches=True)


def test_facts_count_operators_and_bytes_of_weights() -> None:
    facts = check(node(b"Add", [b"a", b"w"], b"b"), node(b"Neg", [b"b"], b"c"), field(5, int64s(b"w", 1, 2)))
    assert facts.operators == {"Add": 1, "Neg": 1} and (facts.weights, facts.opset) == (16, 18)


def test_size_of_a_constant_node_is_known() -> None:
    shape = field(1, b"value") + field(5, int64s(b"", 2**20, 2**20)) + field(20, 4)
    parts = (node(b"Constant", [], b"s", shape), node(b"ConstantOfShape", [b"s"], b"b"))
    assert "1.1e+12 numbers" in refusal(model(*parts))


def test_size_of_an_attribute_of_whole_numbers_is_known() -> None:
    ints = field(1, b"value_ints") + field(8, 2**20) + field(8, 2**20) + field(20, 7)
    parts = (node(b"Constant", [], b"s", ints), node(b"Expand", [b"x", b"s"], b"b"))
    assert "numbers" in refusal(model(*parts))


def test_size_in_a_packed_field_is_known() -> None:
    tensor = field(1, 1) + field(2, 7) + field(8, b"s") + field(7, varint(2**40))
    assert "numbers" in refusal(model(field(5, tensor), node(b"ConstantOfShape", [b"s"], b"b")))


def test_reshape_of_unknown_and_negative_sizes_is_accepted() -> None:
    check(field(5, int64s(b"s", 0, -1, 12, 32)), node(b"Reshape", [b"x", b"s"], b"b"))


def test_large_step_of_a_range_is_accepted() -> None:
    parts = [
        field(5, field(2, 7) + field(8, name) + field(9, struct.pack("<q", value)))
        for name, value in ((b"start", 0), (b"limit", 2**40), (b"step", 2**30))
    ]
    check(*parts, node(b"Range", [b"start", b"limit", b"step"], b"b"))


NO_MESSAGES = [b"", b"\x00", b"\x08", b"\x3a\x7f", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 9]


@pytest.mark.parametrize("data", NO_MESSAGES)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    refusal(data)


def test_graph_twice_is_refused_as_parsers_would_merge_them() -> None:
    assert "field graph is there twice" in refusal(model() + field(7, b""))


def test_name_twice_in_a_node_is_refused() -> None:
    assert "op_type is there twice" in refusal(model(field(1, field(4, b"Neg") + field(4, b"Loop"))))


def test_known_field_of_another_type_is_refused() -> None:
    assert "field 4 (type 0)" in refusal(model(field(1, field(4, 5))))


def test_message_beyond_its_parent_is_refused() -> None:
    inner = varint(1 << 3 | 2) + varint(100) + b"\x22\x03Neg"
    assert "middle of a field" in refusal(field(7, inner) + field(14, b"x" * 200))


def test_name_with_control_characters_is_escaped_in_messages() -> None:
    message = refusal(model(node(b"Loop\x1b[2J\n", [], b"out\xff")))
    assert message.isprintable() and "Loop\\x1b[2J\\n" in message


def test_name_that_is_not_utf8_is_refused() -> None:
    assert "not UTF-8" in refusal(model(node(b"Neg", [b"a"], b"\xe5b")))


def test_name_in_another_script_is_accepted() -> None:
    assert check(node(b"Neg", [b"a"], "größe".encode())).nodes == 1


def test_operators_of_onnx_may_be_named_by_their_domain() -> None:
    data = field(2, b"b") + field(4, b"Neg") + field(7, b"ai.onnx")
    assert check(field(1, data)).operators == {"Neg": 1}


def test_operator_of_another_domain_is_not_taken_for_that_of_onnx() -> None:
    data = field(2, b"b") + field(4, b"Neg") + field(7, b"com.microsoft")
    assert "'com.microsoft:Neg' is not allowed" in refusal(model(field(1, data)))
