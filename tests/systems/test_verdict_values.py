"""What `to_tensorrt` exports has the values of the emulation: ONNX Runtime against it, and the census of TensorRT-RTX.

All networks of a verdict are one model, which is exported and built once.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import verdict_nets as nets
from onnx import numpy_helper
from torch import nn
from verdict_nets import IMAGES, WITH_TIES, net_layers

from qdq import build_engine, export_onnx
from qdq.errors import ExportError
from qdq.systems import IntegerNetwork, QConv2d, to_tensorrt
from qdq.systems.layer import SystemLayer

pytestmark = pytest.mark.xdist_group("verdict_values")  # one worker exports


@dataclass
class Case:
    """A network, and what is known about it before it is converted.

    `codes` are the bounds of the codes of both inputs. `slack` is how far from a tie, in codes, float32 may round to
    the other side: 0 where all scales are powers of two, so that products and sums are exact.
    """

    make: Any
    codes: tuple = ((-128, 127), (-128, 127))
    slack: float = 1e-4
    reason: str = ""
    least_db: float = 0.0


SIGNED_6 = ((-32, 31), (-32, 31))
EXACT = {
    "fixed point": Case(nets.make_fixed_point, slack=0),
    "fixed point, 6 bits": Case(lambda: nets.make_fixed_point(6), SIGNED_6, 0),
    "fixed point, 1 bit": Case(lambda: nets.make_parameters("linear", 1)),
    "log, 1 bit": Case(lambda: nets.make_parameters("log", 1)),
    "tanh, 1 bit": Case(lambda: nets.make_parameters("tanh", 1)),
    "min-max from 0, 7 bits": Case(lambda: nets.make_min_max(7), ((-128, 127), (0, 127))),
    "binary": Case(nets.make_binary),
    "ternary": Case(nets.make_ternary),
    "powers of two, 4 bits": Case(lambda: nets.make_powers(4), slack=0),
    "powers of two, 5 bits, smallest level unused": Case(
        lambda: nets.make_powers(5, uses_smallest=False), slack=0
    ),
    "UINT8 training, symmetric": Case(lambda: nets.make_uint8(True)),
    "integer, per layer": Case(lambda: nets.make_integer("symmetric")),
    "integer, per group": Case(lambda: nets.make_integer("symmetric", 0, 4)),
    "integer, 6 bits": Case(lambda: nets.make_integer("symmetric", bits=6), SIGNED_6),
    "integer, per channel": Case(lambda: nets.make_integer("symmetric", 0)),
}
CONVERTED = {
    "min-max weights": Case(
        lambda: nets.make_parameters("minmax", 8), reason="zero point", least_db=25
    ),
    "min-max activations": Case(nets.make_standing_min_max, reason="zero point", least_db=25),
    "unsigned codes": Case(lambda: nets.make_min_max(8), reason="codes from 0 to 255", least_db=25),
    "affine": Case(lambda: nets.make_integer("unsigned"), reason="zero point", least_db=25),
    "acoustic, 8 bits": Case(nets.make_acoustic, reason="zero point", least_db=25),
    "acoustic, recorded later": Case(
        lambda: nets.make_acoustic(ranges="recorded"), reason="zero point", least_db=25
    ),
    "UINT8 training": Case(lambda: nets.make_uint8(False), reason="zero point", least_db=25),
    "powers of two, 5 bits": Case(lambda: nets.make_powers(5), reason="codes from", least_db=25),
    "binary activations": Case(nets.make_bnn, reason="no 1-bit gain", least_db=60),
    "binary bases": Case(nets.make_bases, reason="sum of 3 binary bases", least_db=25),
}


class Together(nn.Module):
    """Networks with an input each, so that TensorRT joins none of their layers."""

    def __init__(self, networks):
        super().__init__()
        self.nets = nn.ModuleList(networks)

    def forward(self, images):
        return [net(batch) for net, batch in zip(self.nets, images, strict=True)]


def emulate(net):
    """The inputs of both layers as the emulation has them, the output of the second one, and that of the network."""
    if isinstance(net, IntegerNetwork):
        return emulate_integers(net)
    inputs, outputs, handles = [], [], []
    for layer in net_layers(net):
        system = layer.input_system if isinstance(layer, SystemLayer) else None
        if system is None:
            handle = layer.register_forward_pre_hook(lambda _, values: inputs.append(values[0]))
        else:
            handle = system.register_forward_hook(lambda _, __, values: inputs.append(values))
        handles += [handle, layer.register_forward_hook(lambda *call: outputs.append(call[-1]))]
    with torch.no_grad():
        output = net(WITH_TIES)
    for handle in handles:
        handle.remove()
    return [tensor.numpy() for tensor in inputs], outputs[-1].numpy(), output.numpy()


def emulate_integers(net):
    """The same of integers; there is no float output of a layer."""
    inputs = []
    codes = net.qlayers[0].qi.quantize_tensor(WITH_TIES)
    for qlayer in net.qlayers:
        if isinstance(qlayer, QConv2d):
            inputs.append(qlayer.qi.dequantize_tensor(codes).numpy())
        codes = qlayer.quantize_inference(codes)
    return inputs, None, net.quantize_inference(WITH_TIES).numpy()


@dataclass
class Layer:
    """A layer in the file."""

    input_scale: float
    input_codes: np.ndarray
    weight_scale: np.ndarray
    weight_codes: np.ndarray
    output: np.ndarray


@dataclass
class Export:
    """A network in the file, and its emulation; `emulated_result` is of the second layer, None for integers."""

    transfer: Any
    emulated_inputs: list
    emulated_weights: list
    emulated_result: Any
    emulated_output: np.ndarray
    layers: Any = None
    output: Any = None


def export(cases, path):
    """Export all networks as one model and run it: the name of a case -> its `Export`."""
    networks, exports = [], {}
    for name, case in cases.items():
        net = case.make()
        inputs, result, output = emulate(net)
        if case.reason:
            refuse(net, case)
        transfer = to_tensorrt(net, convert=bool(case.reason))
        weights = [layer.weight.detach().clone().numpy() for layer in net_layers(net)]
        networks.append(net)
        exports[name] = Export(transfer, inputs, weights, result, output)
    model = Together(networks).eval()
    export_onnx(model, {"images": [IMAGES[:2].clone() for _ in networks]}, path)
    layers, outputs = run_file(path)
    names = {module: name for name, module in model.named_modules()}
    for net, exported, output in zip(networks, exports.values(), outputs, strict=True):
        exported.layers = [layers[f"{names[module]}/Conv"] for module in net_layers(net)]
        exported.output = output
    return exports


def refuse(net, case):
    """It is refused with the reason, and nothing changes."""
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ExportError, match=case.reason) as refused:
        to_tensorrt(net)
    assert "convert=True" in refused.value.fix
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


def run_file(path):
    """Name of a convolution -> its `Layer`; and the outputs of the model."""
    model = onnx.load(path)
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    outputs = [value.name for value in graph.output]
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    wanted = {}
    for node in convolutions:
        wanted[node.output[0]] = onnx.TensorProto.FLOAT
        wanted[makers[node.input[0]].input[0]] = onnx.TensorProto.INT8  # what Q gives DQ
    for name, kind in wanted.items():
        if name not in outputs:
            graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [value.name for value in graph.output]
    feeds = {value.name: WITH_TIES.numpy() for value in session.get_inputs()}
    values = dict(zip(names, session.run(names, feeds), strict=True))
    layers = {}
    for node in convolutions:
        input_node, weight_node = (makers[name] for name in node.input[:2])
        layers[node.name] = Layer(
            float(constants[input_node.input[1]]),
            values[input_node.input[0]],
            constants[weight_node.input[1]].reshape(-1, 1, 1, 1),
            constants[weight_node.input[0]],
            values[node.output[0]],
        )
    return layers, [values[name] for name in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("verdicts")


@pytest.fixture(scope="module")
def exact(folder):
    return export(EXACT, folder / "exact.onnx")


@pytest.fixture(scope="module")
def converted(folder):
    return export(CONVERTED, folder / "converted.onnx")


@pytest.mark.parametrize("name", EXACT)
def test_exact_systems_have_exact_verdicts_and_the_codes_of_their_weights(name, exact):
    layers = exact[name].transfer.layers
    assert [layer.precision for layer in layers] == ["int8", "int8"]
    assert {tensor.verdict for layer in layers for tensor in layer.tensors} == {"exact"}
    for layer, weight in zip(exact[name].layers, exact[name].emulated_weights, strict=True):
        assert layer.weight_codes.dtype == np.int8
        values = layer.weight_codes * layer.weight_scale.astype(np.float64)
        np.testing.assert_allclose(values, weight, rtol=1e-5)


def convolve(codes, layer):
    """The output of a layer for codes of its input, in float64."""
    values = torch.tensor(codes * np.float64(layer.input_scale))
    weight = torch.tensor(layer.weight_codes * layer.weight_scale.astype(np.float64))
    return nn.functional.conv2d(values, weight).numpy()


@pytest.mark.parametrize("name", EXACT)
def test_the_file_has_the_nearest_codes(name, exact):
    case, (first, last) = EXACT[name], exact[name].layers
    output = follow(case, first, last, [layer.input_codes for layer in (first, last)], np.rint)
    np.testing.assert_allclose(last.output, output, rtol=0, atol=1e-5 * np.abs(output).max())


@pytest.mark.parametrize("name", EXACT)
def test_the_emulation_has_the_same_codes_but_for_ties(name, exact):
    """It may round ties up, where the file rounds them to even; nothing else may differ."""
    case, (first, last) = EXACT[name], exact[name].layers
    inputs = []
    for layer, values in zip((first, last), exact[name].emulated_inputs, strict=True):
        codes = values / np.float64(layer.input_scale)
        inputs.append(np.rint(codes))
        np.testing.assert_allclose(codes, inputs[-1], atol=1e-3)
    output = follow(case, first, last, inputs, lambda scaled: np.floor(scaled + 0.5))
    result = exact[name].emulated_result
    if result is not None:
        np.testing.assert_allclose(result, output, rtol=0, atol=1e-5 * np.abs(output).max())
    # The images but the last one have no ties.
    assert np.array_equal(inputs[0][:-1], first.input_codes[:-1])


def follow(case, first, last, codes, round_ties):
    """Require the nearest codes in both layers, by exact arithmetic; the output of the second one.

    Where all is exact in float32, ties must be rounded as the function does; otherwise either neighbour may be right.
    """
    scaled = WITH_TIES.double().numpy() / first.input_scale
    for layer, found, bounds in zip((first, last), codes, case.codes, strict=True):
        scaled = np.clip(scaled, *bounds)
        is_tie = np.abs(scaled - np.floor(scaled) - 0.5) <= case.slack
        assert is_tie.mean() < 0.2
        assert np.array_equal(found[~is_tie], np.rint(scaled)[~is_tie])
        assert (np.abs(found - scaled) <= 0.5 + case.slack).all()
        if case.slack == 0:
            assert np.array_equal(found, np.clip(round_ties(scaled), *bounds))
        output = convolve(found, layer)
        scaled = np.maximum(output, 0) / last.input_scale
    return output


def test_a_network_with_ties_differs_by_one_code(exact):
    first = exact["fixed point"].layers[0]
    codes = np.rint(exact["fixed point"].emulated_inputs[0] / first.input_scale)
    differences = codes - first.input_codes
    assert not differences[:-1].any()
    assert set(np.unique(differences[-1])) == {0, 1}
    # Half up and half to even differ at every other tie.
    assert abs(differences[-1].mean() - 0.5) < 0.1


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_systems(name, converted):
    case, exported = CONVERTED[name], converted[name]
    verdicts = []
    for layer in exported.transfer.layers:
        assert layer.precision == "int8"
        verdicts += [tensor for tensor in layer.tensors if tensor.verdict == "convert"]
    assert verdicts
    assert all(tensor.after_db is None or tensor.after_db > 8 for tensor in verdicts)
    assert case.reason in exported.transfer.format_table()
    expected = exported.emulated_output[:-1]  # the last image exceeds the ranges of the others
    error = np.square(exported.output[:-1] - expected).sum()
    signal = np.square(expected).sum()
    assert 10 * np.log10(signal / max(error, 1e-30)) > case.least_db


@pytest.mark.trt
@pytest.mark.parametrize("verdict", ["exact", "converted"])
def test_every_layer_runs_in_int8(verdict, folder, request):
    exports = request.getfixturevalue(verdict)
    report = build_engine(folder / f"{verdict}.onnx", backend="rtx")
    assert not report.missing_int8
    assert sum(layer.int8 for layer in report.layers) == 2 * len(exports)
