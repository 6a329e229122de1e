"""Shapes that onnx can infer are filled in; a graph that it cannot infer stays as it is."""

import logging

import onnx_ir as ir

from qdq.graph.shapes import complete_shapes, infer_shapes, silence_onnx_ir

TEXT = """
<ir_version: 9, opset_import: ["" : 19]>
g (float[2,3] x) => (float[2,4] y)
<float[3,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}>
{
    t = MatMul (x, w)
    y = Neg (t)
}
"""


def test_missing_shapes_are_inferred():
    model = ir.from_onnx_text(TEXT)
    complete_shapes(model)
    product = model.graph.node(0).outputs[0]
    assert product.shape == [2, 4]
    assert product.dtype == ir.DataType.FLOAT


def test_complete_graphs_are_not_inferred(monkeypatch):
    model = ir.from_onnx_text(TEXT)
    complete_shapes(model)
    monkeypatch.setattr("qdq.graph.shapes.infer_shapes", lambda *_, **__: 1 / 0)
    complete_shapes(model)


def test_a_constant_that_cannot_be_written_stays_one():
    model = ir.from_onnx_text(TEXT)
    weight = model.graph.initializers["w"]
    missing = ir.ExternalTensor(
        "missing.bin", 0, 48, ir.DataType.FLOAT, shape=ir.Shape([3, 4]), name="w"
    )
    weight.const_value = missing
    infer_shapes(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.graph.initializers["w"] is weight
    assert weight.const_value is missing


def test_the_level_of_the_log_comes_back():
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    with silence_onnx_ir():
        assert logger.level == logging.CRITICAL
    assert logger.level == level
