"""Small graphs as ONNX text, and what ONNX Runtime computes with them."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from qdq.graph.passes import run_passes

HEADER = '<ir_version: 9, opset_import: ["" : %d]>\n'


def read(text, opset=19):
    """A model from the text behind the header, with types and shapes inferred."""
    proto = onnx.parser.parse_model(HEADER % opset + text)
    return ir.from_proto(
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    )


def ops(model):
    """The operators of the main graph, in graph order."""
    return [node.op_type for node in model.graph]


def compute(model, seed=0):
    """Outputs by name on random inputs, operator by operator.

    With its optimizations ONNX Runtime computes the same graph otherwise: it folds Pad, removes Casts, fuses Add.
    """
    content = ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(content, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(seed)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
    feed = {}
    for value in session.get_inputs():
        numbers = 3 * random.normal(size=value.shape)
        feed[value.name] = numbers.astype(types[value.type])

    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def apply(model, *passes):
    """Run passes; the numbers must stay to the bit, the signature too, and a second run must change nothing."""
    expected_outputs = compute(model)
    run_passes(model, passes)
    outputs = compute(model)
    assert expected_outputs.keys() == outputs.keys()
    for name, expected in expected_outputs.items():
        assert expected.dtype == outputs[name].dtype
        assert expected.tobytes() == outputs[name].tobytes(), name
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    for graph_pass in passes:
        assert not graph_pass(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once
    return model
