import onnx_ir as ir
import pytest
import torch
from torch import nn

import qdq
from qdq.errors import ArgumentError
from qdq.marks import marked
from qdq.quantizer import named_quantizers

OPERATOR = torch.ops.qdq.fake_quantize.default


@pytest.fixture
def model():
    """Two quantized layers and a float one."""
    layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)]
    model = nn.Sequential(*layers).eval()
    qdq.swap_modules(model)
    qdq.calibrate_model(model, [torch.randn(3, 16)])
    return model


def test_a_quantizer_is_one_node_of_the_captured_program(model):
    with marked(model) as marks, torch.no_grad():
        program = torch.export.export(model, (torch.randn(3, 16),))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert len(calls) == 5 + len(marks)

    quantizers = dict(named_quantizers(model))
    assert len(marks) == 4
    assert [mark.name for mark in marks] == list(quantizers)
    places = {node.args[1]: node.args[2:] for node in calls if node.target is OPERATOR}
    for mark in marks:
        amax = quantizers[mark.name].amax
        place = (0, amax.numel()) if amax.dim() else (1, 0)
        assert places[mark.scale] == (*place, ir.DataType.INT8)


def test_half_precision_goes_through_float32(model):
    values = torch.randn(3, 16, dtype=torch.float16)
    with marked(model):
        result = model[0]._input_quantizer(values)
    assert result.dtype == torch.float16
    assert torch.equal(result, values)


def test_only_what_has_run_is_said_to_have(model):
    with marked(model) as marks:
        model[2](torch.randn(3, 16))
    assert [mark.has_run for mark in marks] == [False, False, True, True]


def test_ranges_of_another_size_are_refused(model):
    with marked(model), pytest.raises(ArgumentError, match="does not fit"):
        model[0]._weight_quantizer(torch.randn(5, 16))


def test_afterwards_quantizers_quantize_again(model):
    x = torch.randn(3, 16)
    expected = model(x)
    with pytest.raises(RuntimeError, match="stop"), marked(model):
        raise RuntimeError("stop")
    assert torch.equal(model(x), expected)
