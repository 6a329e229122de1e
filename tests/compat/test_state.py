"""State that comes from elsewhere: pytorch-quantization's and ModelOpt's dictionaries, and whole pickled models."""

import pickle

import pytest
import torch
from torch import nn

from qdq import calibrate_model, swap_modules
from qdq.compat import nn as quant_nn
from qdq.errors import ModelError


def build():
    return nn.Sequential(quant_nn.QuantConv2d(3, 4, 3), nn.Flatten(), quant_nn.QuantLinear(4 * 36, 5)).eval()


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def calibrated(inputs):
    model = build()
    calibrate_model(model, [inputs], method="max")
    return model


def test_keys_are_those_of_pytorch_quantization(calibrated):
    added = set(calibrated.state_dict()) - set(build().state_dict())
    assert added == {f"{layer}._{which}_quantizer._amax" for layer in (0, 2) for which in ("input", "weight")}
    assert calibrated.state_dict()["0._weight_quantizer._amax"].shape == (4, 1, 1, 1)
    assert calibrated.state_dict()["0._input_quantizer._amax"].shape == ()


def test_state_moves_to_qdq_and_back(calibrated, inputs):
    core = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    swap_modules(core, include="*")
    core.load_state_dict(calibrated.state_dict())
    back = build()
    back.load_state_dict(core.state_dict())
    assert torch.equal(back(inputs), calibrated(inputs))
    torch.testing.assert_close(core(inputs), calibrated(inputs), atol=0.05, rtol=0)


def test_modelopt_state_loads(calibrated, inputs):
    theirs = {
        key.replace("._input_", ".input_").replace("._weight_", ".weight_"): value
        for key, value in calibrated.state_dict().items()
    }
    assert "0.input_quantizer._amax" in theirs
    model = build()
    model.load_state_dict(theirs)
    assert torch.equal(model(inputs), calibrated(inputs))
    assert "0.input_quantizer._amax" in theirs  # the caller's dictionary is as before


def test_modelopt_state_with_what_is_not_there_is_refused():
    theirs = {**build().state_dict(), "0.output_quantizer._amax": torch.tensor(1.0)}
    with pytest.raises(RuntimeError, match="output_quantizer"):
        build().load_state_dict(theirs)


def test_whole_model_pickled_elsewhere_is_refused(calibrated):
    again = pickle.loads(pickle.dumps(calibrated))  # noqa: S301  # our own
    assert set(again.state_dict()) == set(calibrated.state_dict())
    quantizer = quant_nn.TensorQuantizer()
    state = quantizer.__getstate__()
    del state["name"]  # as the original has it
    with pytest.raises(ModelError, match=r"pickled as a whole.*state_dict"):
        quant_nn.TensorQuantizer.__new__(quant_nn.TensorQuantizer).__setstate__(state)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_in_any_shape(shape):
    mine, theirs = (
        quant_nn.TensorQuantizer(),
        {"_amax": torch.full(shape, 2.0), "_pre_quant_scale": torch.full(shape, 3.0)},
    )
    mine.amax, mine.pre_quant_scale = 1.0, 1.0
    mine.load_state_dict(theirs)
    assert mine.amax.item() == 2.0
    assert mine.pre_quant_scale.item() == 3.0
