"""What ONNX Runtime's own profile says of a graph, sorted into products with weights and others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from offramp.benchmarks.decoder_profile import profiled, runs_of, spent
from offramp.export.precision import weights_alone
from offramp.runtime.engines.threads import fit


def graph_with_two_products(path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "weights"], ["y"], name="a"),
        onnx.helper.make_node("MatMul", ["y", "other"], ["z"], name="b"),
        onnx.helper.make_node("Softmax", ["z"], ["said"], name="c"),
    ]
    x, other, said = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 2, 64]), ("other", [1, 64, 64]), ("said", [1, 2, 64]))
    )
    graph = onnx.helper.make_graph(
        nodes, "g", [x, other], [said], [onnx.numpy_helper.from_array(weights, "weights")]
    )
    imports = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=imports), path)


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_profile_is_sorted(variant: str, tmp_path: Path) -> None:
    file = tmp_path / "fp32.onnx"
    graph_with_two_products(file)
    if variant != "fp32":
        weights_alone(variant, file, tmp_path / f"{variant}.onnx")
    options = onnxruntime.SessionOptions()
    fit(options)  # another test may have made the process's pool
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "ours")
    session = onnxruntime.InferenceSession(
        str(tmp_path / f"{variant}.onnx"), options, providers=["CPUExecutionProvider"]
    )
    given = {"x": np.ones((1, 2, 64), np.float32), "other": np.ones((1, 64, 64), np.float32)}
    for _ in range(5):
        session.run(None, given)
    session.end_profiling()
    found = profiled(tmp_path, "ours")
    assert found["operators"] == 3 and set(found["by_name"]) <= {"MatMul", "Softmax"}
    assert 0 < found["weights"] < found["run"] and 0 < found["other"] < found["run"]


def test_sums_by_hand() -> None:
    node = {"cat": "Node", "name": "a_kernel_time"}
    weights = {"op_name": "MatMulNBits", "input_type_shape": [{}, {}], "parameter_size": "9"}
    events = [
        {"cat": "Session", "name": "model_run", "ts": 100, "dur": 50},
        {"cat": "Session", "name": "model_run", "ts": 200, "dur": 70},
        {**node, "ts": 110, "dur": 20, "args": weights},
        {**node, "ts": 140, "dur": 10, "args": {"op_name": "Add", "input_type_shape": [{}, {}]}},
        {**node, "ts": 210, "dur": 20, "args": weights},
        {**node, "ts": 240, "dur": 30, "args": {"op_name": "MatMul", "input_type_shape": [{}, {}]}},
        {**node, "name": "a_fence_before", "ts": 1, "dur": 9, "args": {"op_name": "Add"}},
    ]
    runs = runs_of(events)
    assert runs == [
        {"run": 0.05, "weights": 0.02, "Add": 0.01},
        {"run": 0.07, "weights": 0.02, "MatMul": 0.03},
    ]
    found = spent(runs)
    assert (found["run"], found["weights"], found["other"], found["between"]) == (0.06, 0.02, 0.02, 0.02)
    late = {**node, "ts": 160, "dur": 1, "args": weights}
    with pytest.raises(Exception, match="outside every run"):
        runs_of([*events, late])
