"""Two layers of each number system, for the tests of `to_tensorrt`."""

import torch
from torch import nn

from qdq.systems import (
    BinaryBases,
    BinaryInput,
    BinaryWeight,
    IntegerNetwork,
    LinearQuant,
    NormalQuant,
    PowerLevels,
    calibrate_inputs,
    convert_layer,
    duplicate_model_with_quant,
    min_max_quantize,
    prepare_acoustic,
    prepare_uint8_training,
    project_ternary,
    quantize_parameters,
)
from qdq.systems.grid import Grid, note_grid

_GENERATOR = torch.Generator().manual_seed(1)
_TIES = torch.randint(-32, 32, (1, 3, 10, 10), generator=_GENERATOR).add(0.5) / 8
IMAGES = torch.randn(8, 3, 10, 10, generator=_GENERATOR)
WITH_TIES = torch.cat([IMAGES, _TIES])
"""The last image has values halfway between two codes of `fixed_inputs`, whose scale is 1/8."""


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False)
    ).eval()


def net_layers(net):
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


def fixed_inputs(bits=8):
    """A calibrated quantizer in fixed point."""
    quantizer = LinearQuant("input", bits, counter=1)
    quantizer(4 * torch.randn(1000, generator=torch.Generator().manual_seed(2)))
    return quantizer


def give_inputs(net, bits=8):
    """Quantize the inputs of both layers in fixed point."""
    for layer in (net[0], net[2]):
        convert_layer(layer, getattr(layer, "weight_system", None), fixed_inputs(bits))
    return net


def make_fixed_point(bits=8):
    net = make_net()
    quantize_parameters(net, bits)
    duplicated = duplicate_model_with_quant(net, bits, counter=1)
    net = nn.Sequential(fixed_inputs(bits), *duplicated).eval()
    net(IMAGES)
    return net


def make_parameters(method, bits):
    """Weights that `quantize_parameters` has replaced."""
    net = make_net()
    quantize_parameters(net, bits, quant_method=method)
    return give_inputs(net)


def make_min_max(bits):
    """Min-max values of the activations, with the range of calibration batches; the first ReLU gives them Z = 0."""
    net = make_net()
    quantize_parameters(net, 8)
    quantizer = NormalQuant("between", bits, min_max_quantize)
    net = nn.Sequential(fixed_inputs(), net[0], net[1], quantizer, net[2]).eval()
    calibrate_inputs(net, [IMAGES])
    return net


def make_standing(kind):
    net = make_net()
    quantize_parameters(net, 8)
    return duplicate_model_with_quant(net, 8, type=kind).eval()


def make_standing_min_max():
    """`type="minmax"` with recorded ranges, of which none begins at 0."""
    net = nn.Sequential(fixed_inputs(), *make_standing("minmax")).eval()
    calibrate_inputs(net, [IMAGES])
    return net


def make_binary():
    net = make_net()
    for layer in (net[0], net[2]):
        convert_layer(layer, BinaryWeight("w"), fixed_inputs())
    return net


def make_ternary():
    net = make_net()
    for layer in (net[0], net[2]):
        alpha, codes = project_ternary(layer.weight.detach())
        with torch.no_grad():
            layer.weight.copy_(alpha * codes)
        scale = alpha.flatten().float()
        note_grid(layer, "weight", Grid("ternary", scale, torch.zeros_like(scale), -1, 1))
    return give_inputs(net)


def make_powers(bits, *, uses_smallest=True):
    net = make_net()
    for layer in (net[0], net[2]):
        levels = PowerLevels.of(layer.weight.detach(), bits)
        with torch.no_grad():
            values = levels.quantize(layer.weight)
            if not uses_smallest:
                values[values.abs() == 2.0**levels.smallest] = 0
            layer.weight.copy_(values)
        note_grid(layer, "weight", levels.describe(layer.weight.detach()))
    return give_inputs(net)


def make_uint8(symmetric):
    net = make_net()
    prepare_uint8_training(net, IMAGES, symmetric=symmetric)
    net.train()(IMAGES)
    return net.eval()


def make_integer(scheme, axis=None, groups=None, bits=8):
    net = IntegerNetwork(*make_net())
    net.quantize(bits, scheme=scheme, axis=axis, groups=groups)
    net.quantize_forward(IMAGES)
    net.freeze()
    return net


def make_acoustic(bits=8, ranges="static"):
    """Ranges of batches that `prepare_acoustic` was given ("static"), recorded later, or of each batch ("moving")."""
    net = make_net()
    prepare_acoustic(net, bits, batches=[IMAGES] if ranges == "static" else None)
    if ranges == "recorded":
        calibrate_inputs(net, [IMAGES])
    return net


def make_bnn():
    net = make_net()
    for layer in (net[0], net[2]):
        convert_layer(layer, BinaryWeight("w", scaled=False), BinaryInput("x"))
    net[1] = nn.Identity()
    return net


def make_bases():
    net = make_net()
    for layer in (net[0], net[2]):
        convert_layer(layer, BinaryBases("w", 3), fixed_inputs())
    return net
