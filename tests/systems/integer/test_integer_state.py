"""The state of integer layers in models that are cast, moved and replicated."""

import copy

import pytest
import torch
from torch import nn

from qdq.errors import QdqError
from qdq.systems import IntegerNetwork, QLinear, QParam, QReLU, holding_ranges
from qdq.systems.integer import state

IMAGES = torch.randn(6, 1, 6, 6)
CASTS = {
    "half": lambda net: net.half(),
    "bfloat16": lambda net: net.bfloat16(),
    "double": lambda net: net.double(),
    "to": lambda net: net.to(torch.float16),
    "type": lambda net: net.type(torch.float64),
}


def make_calibrated():
    net = IntegerNetwork(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.Sigmoid(),
        nn.Linear(5, 2),
    ).eval()
    net.quantize(axis=0)
    with torch.no_grad():
        net.quantize_forward(IMAGES)
    return net


def list_buffers(net):
    """Those of the integer layers."""
    return {name: buffer for name, buffer in net.named_buffers() if "bn_module" not in name}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_a_frozen_network_that_is_cast_has_the_same_codes(cast):
    net = make_calibrated()
    net.freeze()
    expected = net.quantize_inference(IMAGES)
    before = {name: buffer.clone() for name, buffer in list_buffers(net.qlayers).items()}
    assert torch.float64 in {buffer.dtype for buffer in before.values()}
    CASTS[cast](net)
    for name, buffer in list_buffers(net.qlayers).items():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert torch.equal(net.quantize_inference(IMAGES), expected)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_a_calibrated_network_that_is_cast_keeps_its_ranges(cast):
    net = make_calibrated()
    before = {name: buffer.clone() for name, buffer in list_buffers(net.qlayers).items()}
    CASTS[cast](net)
    assert net.layers[0].weight.dtype != torch.float32  # the float layers are those of the model
    for name, buffer in list_buffers(net.qlayers).items():
        assert torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype
    net.freeze()
    assert torch.isfinite(net.quantize_inference(IMAGES)).all()


def test_codes_of_another_type_are_refused():
    """`type` casts integers, too."""
    net = make_calibrated()
    net.freeze()
    CASTS["type"](net)
    with pytest.raises(RuntimeError, match=r"QConvBNReLU of .* is of type torch.float64") as caught:
        net.quantize_inference(IMAGES)
    assert isinstance(caught.value, QdqError)


def test_ranges_are_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        qparam = QParam()
        qparam.update(torch.tensor([-1.0, 2.0]))
        loaded = QParam()
        loaded.load_state_dict(qparam.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {buffer.dtype for buffer in (*qparam.buffers(), *loaded.buffers())} == {torch.float32}


def test_the_state_follows_to_a_device(device):
    net = make_calibrated()
    net.freeze()
    expected = net.quantize_inference(IMAGES)
    net.half().to(device)
    assert {buffer.device.type for buffer in net.buffers()} == {device.type}
    result = net.quantize_inference(IMAGES.to(device)).cpu()
    assert (result - expected).abs().max() <= net.qlayers[-1].qo.scale.cpu() * 1.01


def replicate(module):
    """A replica with replicas of its children, as `nn.DataParallel` makes them."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter)
    return replica


def test_replicas_do_not_calibrate():
    qparam = replicate(QParam(label="conv1, qi"))
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"conv1, qi: a replica of nn.DataParallel"
        ) as caught:
            qparam.update(torch.ones(2))
        assert isinstance(caught.value, QdqError)
    layer = QLinear(nn.Linear(4, 3))
    replica = replicate(layer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"QLinear of Linear.*, qi: a replica"):
            replica(torch.randn(2, 4))
    assert not layer.qi.is_calibrated
    layer(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match=r"QLinear of Linear.*: a replica"):
        replicate(layer).freeze()
    relu = replicate(QReLU())
    with pytest.raises(RuntimeError, match="QReLU: a replica"):
        relu.freeze(layer.qo)


@torch.no_grad()
def test_replicas_compute_what_is_calibrated():
    net = make_calibrated()
    with holding_ranges(net):
        expected = net.quantize_forward(IMAGES)
        for _ in range(2):
            assert torch.equal(replicate(net).quantize_forward(IMAGES), expected)
    frozen = copy.deepcopy(net)
    frozen.freeze()
    expected = frozen.quantize_inference(IMAGES)
    for _ in range(2):
        assert torch.equal(replicate(frozen).quantize_inference(IMAGES), expected)


@torch.no_grad()
def test_several_processes_do_not_calibrate(monkeypatch):
    """Each would get its own ranges; with loaded or held ones they are frozen and run."""
    net = make_calibrated()
    monkeypatch.setattr(state, "find_rank", lambda: (0, 2))
    with pytest.raises(RuntimeError, match=r"QConvBNReLU of .*, qi: 2 processes calibrate"):
        net.quantize_forward(IMAGES)
    with holding_ranges(net):
        net.quantize_forward(IMAGES)
    net.freeze()
    assert net.quantize_inference(IMAGES).shape == (6, 2)


@pytest.mark.parametrize(
    ("made", "loaded"),
    [
        ({"num_bits": 8}, {"num_bits": 4}),
        ({"num_bits": 4}, {"num_bits": 8}),
        ({"num_bits": 8, "scheme": "signed"}, {"num_bits": 8}),
        ({"num_bits": 8}, {"num_bits": 8, "scheme": "symmetric"}),
    ],
)
def test_a_state_of_another_width_or_scheme_is_refused(made, loaded):
    first, second = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
    source, target = IntegerNetwork(first), IntegerNetwork(second)
    source.quantize(**made)
    source.quantize_forward(IMAGES)
    source.freeze()
    target.quantize(**loaded)
    with pytest.raises(
        RuntimeError, match=r"QConv2d of .*the loaded scale is .* [48] bits, "
    ) as caught:
        target.load_state_dict(source.state_dict())
    assert isinstance(caught.value, QdqError)
    target = IntegerNetwork(second)
    target.quantize(**made)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.quantize_inference(IMAGES), source.quantize_inference(IMAGES))
