"""Reading kernels from both kinds of builder output; the samples are written by hand from real ones."""

import json

import pytest

from qdq.errors import BuildError
from qdq.trt.kernels import Kernel, parse_build_log, parse_layer_json


def _tensor(name, dtype, dimensions="-1,16,8,8"):
    return (
        f"{{ Name: {name}, Dimensions: [{dimensions}], Strides: [1024,1,128,16], StrideOrder: [3,0,2,1], "
        f"Datatype: {dtype}, Format: (NHWC) Channel major format }}"
    )


def _line(name, layer_type, inputs, constants, outputs, metadata):
    return (
        f"Name: {name}, LayerType: {layer_type}, Inputs: [ {inputs}], Constants: [ {constants}], "
        f"Outputs: [ {outputs}], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {metadata}"
    )


def test_build_log():
    conv = _line(
        "layer1.0/Conv_myl0_2",
        "correlation",
        _tensor("a", "Int8"),
        f"{_tensor('w', 'Int8')}, {_tensor('s', 'Float')}",
        _tensor("b", "Half"),
        "[ONNX Layer: layer1.0/Conv]\x1e[ONNX Layer: DQ_1]\x1f[ONNX Layer: Q_1]",
    )
    signal = (
        "Name: __mye1_myl0_3, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 0, EventId: 1, Metadata: "
    )
    kernels = parse_build_log(
        ["unrelated", "Layers:\n" + conv + "\n" + signal + "\n\nEngine Metadata:"]
    )
    assert kernels == [
        Kernel(
            "layer1.0/Conv_myl0_2",
            "correlation",
            ("Int8",),
            ("Int8", "Float"),
            ("Half",),
            ("layer1.0/Conv", "DQ_1", "Q_1"),
        ),
        Kernel("__mye1_myl0_3", "signal", (), (), (), (), 0, 0),
    ]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([("Int8", "1,16,8,8")], 1024),
        ([("Half", "2,16"), ("Float", "3"), ("Int8", "")], 64 + 12 + 1),  # the last one is a scalar
        ([("Int4", "3"), ("Int64", "1,0")], 2),
        ([("Half", "2,16"), ("Float", "-1,3")], None),
        ([("Float", "E0,3")], None),
        ([("Complex", "2")], None),
        ([], 0),
    ],
)
def test_bytes_read_and_written(tensors, expected):
    text = ", ".join(_tensor(f"t{i}", *tensor) for i, tensor in enumerate(tensors))
    constant = _tensor("w", "Float", "7")
    (written,) = parse_build_log(
        [_line("k", "kgen", _tensor("x", "Int8", "5"), constant, text, "")]
    )
    (read,) = parse_build_log([_line("k", "kgen", text, constant, _tensor("y", "Int8", "5"), "")])
    assert (written.input_bytes, written.output_bytes) == (5, expected)
    assert (read.input_bytes, read.output_bytes) == (expected, 5)


@pytest.mark.parametrize("separator", ["", "\x1e", "\x1f", "\x1f\x1e"])
@pytest.mark.parametrize("name", ["/model/blocks.0/conv[0][1]/Conv", "a, b] c", "x[2]"])
def test_node_names_with_brackets_and_any_separator(name, separator):
    metadata = separator.join(f"[ONNX Layer: {node}]" for node in (name, "other", name))
    line = _line(
        "k", "gemm", _tensor("a", "Int8"), _tensor("w", "Int8"), _tensor("b", "Float"), metadata
    )
    assert parse_build_log([line])[0].onnx_nodes == (name, "other")


def test_a_log_without_kernels_is_said():
    with pytest.raises(BuildError, match="lists no kernels"):
        parse_build_log(["Layers in a new format"])


TENSORRT_10 = {
    "Layers": [
        {
            "Name": "conv1 + relu1",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "x",
                    "Dimensions": [1, 64, 28, 28],
                    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format.",
                }
            ],
            "Outputs": [
                {
                    "Name": "y",
                    "Dimensions": [1, 64, 28, 28],
                    "Format/Datatype": "Row major linear FP32",
                }
            ],
            "Weights": {"Type": "Int8", "Count": 4096},
            "Bias": {"Type": "Float", "Count": 64},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32",
        },
        {
            "Name": "fc/Gemm_myl0_1",
            "LayerType": "gemm",
            "Inputs": [{"Name": "y", "Dimensions": [1, 64], "Format/Datatype": "Half"}],
            "Constants": [{"Name": "w", "Dimensions": [64, 10], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "z", "Dimensions": [1, 10], "Format/Datatype": "Half"}],
            "Metadata": "[ONNX Layer: fc/Gemm]",
        },
    ],
    "Bindings": ["x", "z"],
}

TENSORRT_11 = {
    "Layers": [
        {
            "Name": "conv1_myl0_1",
            "LayerType": "correlation",
            "Inputs": [{"Name": "x", "Datatype": "Int8", "Format": "Channel major format"}],
            "Constants": [
                {"Name": "w", "Datatype": "Int8", "Format": "Channel major format"},
                {"Name": "s", "Datatype": "Float", "Format": "Row major linear format"},
            ],
            "Outputs": [{"Name": "y", "DataType": "BF16", "Format": "Channel major format"}],
            "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]",
        }
    ],
    "I/O Tensors": [{"Name": "x", "IOMode": "Input", "DataType": "Float"}],
}


def test_layer_json_of_tensorrt_10():
    assert parse_layer_json(json.dumps(TENSORRT_10)) == [
        Kernel(
            "conv1 + relu1",
            "CaskConvolution",
            ("Int8",),
            ("Int8",),
            ("Float",),
            ("conv1", "relu1"),
            50176,
            200704,
        ),
        Kernel("fc/Gemm_myl0_1", "gemm", ("Half",), ("Half",), ("Half",), ("fc/Gemm",), 128, 20),
    ]


def test_layer_json_of_tensorrt_11():
    assert parse_layer_json(json.dumps(TENSORRT_11)) == [
        Kernel(
            "conv1_myl0_1",
            "correlation",
            ("Int8",),
            ("Int8", "Float"),
            ("BFloat16",),
            ("conv1", "relu1"),
        )
    ]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"Layers": ["conv1 + relu1"]}', '{"Layers": [{"Name": "conv1"}]}']
)
def test_layer_json_without_details_is_said(text):
    with pytest.raises(BuildError, match="cannot be read") as caught:
        parse_layer_json(text)
    assert "profilingVerbosity=detailed" in caught.value.fix
