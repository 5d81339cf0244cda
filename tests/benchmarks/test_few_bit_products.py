"""benchmarks/few_bit_products.py: the forms of weights, and the products of a bundle in each of them."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click import BadParameter

from offramp.benchmarks.few_bit_products import Form, product_shapes, write_products
from offramp.runtime.engines.threads import share_global_pool

BUNDLE = Path(__file__).parents[1] / "data" / "tiny_generator_native"


def test_forms_are_read() -> None:
    assert Form.parse("fp32") == Form(32)
    assert Form.parse("4/64/zero") == Form(4, 64, zero_points=True)
    assert Form.parse("8/32/float") == Form(8, 32, float_activations=True)


@pytest.mark.parametrize("form", ["4/32/zeros", "4", "int4", "4/x", "3/32"])
def test_a_wrong_form_is_refused(form: str) -> None:
    with pytest.raises(BadParameter, match=f"--forms {form}: give fp32, or such as 4/32"):
        Form.parse(form)


def test_products_are_those_of_segments_and_head() -> None:
    shapes = product_shapes(BUNDLE)
    manifest = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    assert shapes[-1] == (manifest["hidden_size"], manifest["vocab_size"])
    assert shapes.count((16, 128)) == manifest["blocks"]  # gate and up of a block in one product


def test_a_bundle_without_a_head_is_refused() -> None:
    with pytest.raises(BadParameter, match="tiny_bundle is no bundle of a language model"):
        product_shapes(BUNDLE.parent / "tiny_bundle")


def test_fewer_bits_are_fewer_bytes() -> None:
    forms = ("fp32", "8/32", "4/32/zero", "4/32", "4/64")
    sizes = [write_products([(64, 16), (64, 32)], Form.parse(form))[1] for form in forms]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize("form", ["fp32", "8/32", "4/32/zero", "4/32/float"])
def test_each_form_runs_on_several_tokens(form: str) -> None:
    model, _ = write_products([(64, 16), (32, 8)], Form.parse(form))
    options = onnxruntime.SessionOptions()
    share_global_pool(options)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs = session.run(None, {f"input_{width}": np.ones((3, width), np.float32) for width in (64, 32)})
    assert [output.shape for output in outputs] == [(3, 16), (3, 8)]
