"""Constants of protobuf models, wherever they stand, and the files that hold their data."""

import numpy as np
import onnx
import pytest

from qdq.graph.tensors import external_fields, list_data_files, list_tensors

TEXT = """
<ir_version: 9, opset_import: ["" : 19, "own" : 1]>
g (float[2] x, bool b) => (float[2] y)
<float[2] w = {1, 2}>
{
    [const] c = Constant <value = float[2] {3, 4}> ()
    [branch] i = If (b) <
        then_branch = t () => (float[2] p) <float[2] v = {5, 6}> { p = Add (w, v) },
        else_branch = e () => (float[2] r) { [inner] r = Constant <value = float[2] {7, 8}> () }
    >
    f = own.F (c)
    s = Add (i, f)
    y = Add (x, s)
}
<domain: "own", opset_import: ["" : 19]>
F (a) => (z) {
    [in_function] k = Constant <value = float[2] {9, 10}> ()
    z = Mul (a, k)
}
"""


def test_every_constant_with_the_name_of_its_node():
    tensors = list_tensors(onnx.parser.parse_model(TEXT))
    first_numbers = {int(onnx.numpy_helper.to_array(tensor)[0]): name for name, tensor in tensors}
    assert first_numbers == {1: "", 3: "const", 5: "", 7: "inner", 9: "in_function"}


@pytest.fixture
def model_path(tmp_path):
    """A model with the weights `a` and `b` in two other files."""
    model = onnx.parser.parse_model("""
    <ir_version: 9, opset_import: ["" : 19]>
    g (float[2] x) => (float[2] y)
    <float[2] a = {1, 2}, float[2] b = {3, 4}>
    { s = Add (x, a) y = Add (s, b) }
    """)
    for tensor in model.graph.initializer:
        tensor.raw_data = np.zeros(2, np.float32).tobytes()
        tensor.ClearField("float_data")
        onnx.external_data_helper.set_external_data(tensor, f"{tensor.name}.bin", 0, 8)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def test_files_beside_the_model(model_path):
    folder = model_path.parent
    assert list_data_files(model_path) == [folder / "a.bin", folder / "b.bin"]


def test_fields_of_external_data(model_path):
    tensor = onnx.load(model_path, load_external_data=False).graph.initializer[0]
    assert external_fields(tensor) == {"location": "a.bin", "offset": "0", "length": "8"}


def test_no_files_beside_what_is_no_model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff\xff")
    assert list_data_files(path) == []
