"""Ranges of calibration batches for quantizers that otherwise have the range of each batch."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qdq.errors import ArgumentError, ExportError, StateError
from qdq.systems import (
    AcousticInput,
    NormalQuant,
    calibrate_inputs,
    duplicate_model_with_quant,
    log_minmax_quantize,
    min_max_quantize,
    prepare_acoustic,
    quantize_parameters,
    tanh_quantize,
    to_tensorrt,
)
from qdq.systems.ranged import list_moving

BATCHES = [torch.tensor([[0.5, -1.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 1.0]])]


def record(bits=8):
    quantizer = NormalQuant("fc_quant", bits, min_max_quantize)
    calibrate_inputs(nn.Sequential(quantizer), BATCHES)
    return quantizer


def formula(values, bits, low, high):
    x, n = np.clip(values.double().numpy(), low, high), 2**bits - 1
    return np.floor((x - low) / (high - low) * n + 0.5) / n * (high - low) + low


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_min_max_has_the_range_of_all_batches_from_then_on(bits):
    quantizer = record(bits)
    for values in (torch.randn(50), torch.randn(50) * 0.1, torch.tensor([-9.0, 9.0])):
        expected = formula(values, bits, -1.0, 3.0)
        np.testing.assert_allclose(quantizer(values).numpy(), expected, atol=1e-6)
    assert not torch.equal(quantizer(BATCHES[0]), min_max_quantize(BATCHES[0], bits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_and_the_gradient_stay(dtype):
    values = torch.randn(50).to(dtype).requires_grad_()
    result = record()(values)
    assert result.dtype == dtype
    result.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


def test_ranges_are_returned_saved_loaded_and_copied():
    model = nn.Sequential(NormalQuant("a", 8, min_max_quantize), AcousticInput(name="b"))
    ranges = calibrate_inputs(model, iter(BATCHES))
    facts = [(entry.name, entry.amax, entry.method, entry.batches) for entry in ranges]
    assert facts == [("0", 3.0, "min-max", 3), ("1", 3.0, "min-max", 3)]
    loaded = nn.Sequential(NormalQuant("a", 8, min_max_quantize), AcousticInput(name="b"))
    loaded.load_state_dict(model.state_dict())
    values = torch.randn(20)
    for twin in (loaded, copy.deepcopy(model)):
        assert list_moving(twin) == {}
        assert torch.equal(twin(values), model(values))


def test_calibration_sees_the_values_of_the_float_activations():
    model = nn.Sequential(*[NormalQuant("a", 1, min_max_quantize) for _ in range(2)])
    calibrate_inputs(model, BATCHES)
    assert [float(quantizer.low) for quantizer in model] == [-1, -1]
    assert not any(quantizer.is_collecting for quantizer in model)


def test_only_min_max_has_a_range_to_record():
    kinds = (log_minmax_quantize, tanh_quantize, lambda values, bits: values.round())
    model = nn.Sequential(*[NormalQuant("x", 8, kind) for kind in kinds])
    assert list_moving(model) == {}
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([BATCHES[0], torch.tensor([[1.0, torch.nan]])], ArgumentError, "^1_minmax_quant: .* nan"),
        ([], StateError, "^1_minmax_quant: no range; 0 batches"),
    ],
)
def test_a_failed_calibration_leaves_no_range(batches, error, message):
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    model = duplicate_model_with_quant(model, 8, type="minmax")
    with pytest.raises(error, match=message):
        calibrate_inputs(model, batches)
    assert list(list_moving(model)) == ["1_minmax_quant"]
    assert not model.get_submodule("1_minmax_quant").is_collecting


def test_a_quantizer_that_no_batch_reaches_is_named():
    model = nn.Sequential(NormalQuant("x", 8, min_max_quantize))
    model.unused = nn.ModuleList([NormalQuant("y", 8, min_max_quantize)])
    model.forward = lambda values: model[0](values)
    with pytest.raises(StateError, match=r"^unused\.0: no range; 3 batches did not reach 1 of 2"):
        calibrate_inputs(model, BATCHES)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("qdq.systems.quantizer.find_rank", lambda: (0, 2))
    with pytest.raises(StateError, match="calibrates in 2 processes"):
        record()


def make_min_max():
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    quantize_parameters(model, 8)
    return duplicate_model_with_quant(model, 8, type="minmax")


def make_acoustic():
    model = nn.Sequential(nn.Linear(2, 3)).eval()
    prepare_acoustic(model)
    return model


@pytest.mark.parametrize("make", [make_min_max, make_acoustic])
def test_without_a_range_the_message_names_the_call_and_with_it_the_model_is_converted(make):
    model = make()
    with pytest.raises(ExportError, match=r"qdq\.systems\.calibrate_inputs\(model, batches\)"):
        to_tensorrt(model, convert=True)
    calibrate_inputs(model, BATCHES)
    values = torch.cat(BATCHES)
    expected = model(values)
    with pytest.raises(ExportError, match="convert=True"):
        to_tensorrt(model)
    to_tensorrt(model, convert=True)
    calibrate_inputs(model, BATCHES)  # of the first layer, whose input no system quantizes
    assert (model(values) - expected).abs().max() < 0.1


def test_batches_that_are_one_tensor_are_refused():
    with pytest.raises(TypeError, match="batches is one Tensor"):
        calibrate_inputs(nn.Sequential(NormalQuant("x", 8, min_max_quantize)), BATCHES[0])


def test_values_beyond_float32_give_a_finite_range():
    quantizer = NormalQuant("x", 8, min_max_quantize)
    values = torch.tensor([-1e300, 1e300], dtype=torch.float64)
    calibrate_inputs(nn.Sequential(quantizer), [values])
    assert torch.isfinite(quantizer(values)).all()
