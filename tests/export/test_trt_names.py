"""What export.aot asks of TensorRT's API is there in the real bindings, by tests/data/trt_names.json."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from offramp.export import aot

TABLE: dict[str, list[str]] = json.loads(
    (Path(__file__).parents[1] / "data" / "trt_names.json").read_text(encoding="utf-8")
)
# The class behind each variable; "" is the module.
OBJECTS = {
    "trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
    "blob": "IHostMemory",
}
ONLY_RTX = {
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}


def touched(source: str) -> set[str]:
    """Dotted names, as in the table, of all attributes that the source reads or sets on such objects."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        if path and isinstance(node, ast.Name) and node.id in OBJECTS:
            found.add(".".join([*filter(None, [OBJECTS[node.id]]), *path]))
    return {name for name in found if not name.endswith("__init__")}


def test_what_the_compiler_asks_for_is_in_tensorrt_11() -> None:
    names = touched(Path(aot.__file__).read_text(encoding="utf-8"))
    assert {"Builder", "Builder.create_network", "ILogger.Severity.ERROR"} <= names
    assert names >= ONLY_RTX
    assert [name for name in sorted(names - ONLY_RTX) if "11.4.0" not in TABLE.get(name, ())] == []


def test_a_call_by_another_name_would_be_found() -> None:
    source = (
        Path(aot.__file__).read_text(encoding="utf-8").replace("build_serialized_network", "build_engine")
    )
    (gone,) = (name for name in touched(source) if name.endswith("build_engine"))
    assert TABLE.get(gone) == ["8.6.1"] or gone not in TABLE


def test_the_table_knows_what_came_and_went() -> None:
    assert TABLE["IExecutionContext.execute_async_v2"] == ["8.6.1"]
    assert TABLE["IExecutionContext.set_device_memory"] == ["10.3.0", "10.16.1", "11.4.0"]
    assert "11.4.0" not in TABLE["BuilderFlag.FP16"]
