import importlib.util
import logging

import numpy as np
import pytest
import torch
from graph_text import apply, ops, read
from torch import nn

from qdq import build_engine, calibrate_model, export_onnx, swap_modules
from qdq.graph.transpose_keys import TransposeKeys

GRAPH = """
g (float[N,3,7,8] q, float[N,3,7,8] k) => (float[N,3,7,7] y)
{ t = Transpose <perm = [0, 1, 3, 2]> (k) y = MatMul (q, t) }
"""


def test_keys_are_transposed_with_the_heads_joined():
    model = apply(read(GRAPH.replace("N", "2")), TransposeKeys())
    assert ops(model) == ["Reshape", "Transpose", "Reshape", "Mul", "MatMul"]


@pytest.mark.parametrize(
    ("text", "expected_ops"),
    [
        (GRAPH, ["Reshape", "Transpose", "Reshape", "Mul", "MatMul"]),  # an open batch
        (
            GRAPH.replace("3,7,8", "3,M,8").replace("7,7", "M,M"),
            ["Transpose", "MatMul"],
        ),  # an open length
        (
            GRAPH.replace("[0, 1, 3, 2]", "[0, 2, 1, 3]").replace("3,7,8] k", "8,3,7] k"),
            ["Transpose", "MatMul"],
        ),
    ],
)
def test_what_is_rewritten(text, expected_ops):
    model = read(text)
    assert TransposeKeys()(model).modified == (len(expected_ops) > 2)
    assert ops(model) == expected_ops


class Attention(nn.Module):
    """Written out, as in many repositories."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(96), nn.Linear(96, 288), nn.Linear(96, 96)

    def forward(self, x):
        parts = self.qkv(self.norm(x)).reshape(x.shape[0], 49, 3, 3, 32).permute(2, 0, 3, 1, 4)
        weights = (parts[0] @ parts[1].transpose(-2, -1)).softmax(-1)
        return x + self.proj((weights @ parts[2]).transpose(1, 2).reshape(x.shape[0], 49, 96))


@pytest.mark.trt
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
def test_the_product_in_front_of_attention_stays_int8_in_the_engine(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(4, 49, 96)
    swap_modules(model, x)
    calibrate_model(model, [x])
    built = build_engine(export_onnx(model, x, tmp_path / "model.onnx").path, backend="rtx")
    assert {layer.module for layer in built.layers if layer.int8} == {"qkv", "proj"}
    assert not built.missing_int8
    assert np.isfinite(built.seconds)
