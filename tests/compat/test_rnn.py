"""Against torch's own LSTM with quantizers off, and against a loop in numpy with quantizers on; both in float64."""

import copy
import inspect
import io
import itertools
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from qdq import calibrate_model
from qdq.compat import calib
from qdq.compat import nn as quant_nn
from qdq.compat.nn.modules import _utils
from qdq.compat.nn.modules.quant_rnn import LSTM, LSTMCell, QuantLSTM, QuantLSTMCell
from qdq.compat.optim.helper import quant_weight_inplace
from qdq.compat.tensor_quant import QuantDescriptor
from qdq.errors import QdqError

TIME, BATCH, FEATURES, HIDDEN = 5, 3, 4, 6
LENGTHS = [3, 5, 1]


def quantizers_of(module):
    return [m for m in module.modules() if isinstance(m, quant_nn.TensorQuantizer)]


def switched_off(module):
    for quantizer in quantizers_of(module):
        quantizer.disable()
    return module


def make_pair(quant_class=QuantLSTM, seed=0, **options):
    """A float module and a quantized one with its parameters, in float64."""
    torch.manual_seed(seed)
    options = {"dtype": torch.float64, **options}
    quantized = quant_class(FEATURES, HIDDEN, **options)
    original = quant_class.float_class(FEATURES, HIDDEN, **options)
    original.load_state_dict(quantized.state_dict(), strict=True)
    return original, quantized


def collect_stats(model, *batches):
    """As the recipes have it."""
    for module in quantizers_of(model):
        if module._calibrator is not None:
            module.disable_quant()
            module.enable_calib()
        else:
            module.disable()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for module in quantizers_of(model):
        if module._calibrator is not None:
            module.enable_quant()
            module.disable_calib()
        else:
            module.enable()


def compute_amax(model, **kwargs):
    for module in quantizers_of(model):
        if isinstance(module._calibrator, calib.MaxCalibrator):
            module.load_calib_amax()
        elif module._calibrator is not None:
            module.load_calib_amax(**kwargs)


def calibrated(model, *batches, **kwargs):
    collect_stats(model, *batches)
    compute_amax(model, **kwargs)
    return model


def flatten(result):
    """Outputs, h and c; a packed output as its fields."""
    output, (h, c) = result
    return (
        [*(field for field in output if field is not None), h, c]
        if isinstance(output, PackedSequence)
        else [output, h, c]
    )


def assert_same(found, expected):
    for one, other in zip(flatten(found), flatten(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# -- quantizers off: torch's own LSTM ------------------------------------------------------------------------------

OPTIONS = [
    dict(
        zip(("num_layers", "bias", "batch_first", "bidirectional", "dropout"), values, strict=True)
    )
    for values in itertools.product((1, 3), (True, False), (True, False), (True, False), (0, 0.4))
    if values[0] > 1 or values[-1] == 0
]


def make_inputs(form, options):
    """The input and what state goes with it."""
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    state = tuple(torch.randn(rows, BATCH, HIDDEN, dtype=torch.float64) for _ in range(2))
    if form == "unbatched":
        return torch.randn(TIME, FEATURES, dtype=torch.float64), tuple(part[:, 0] for part in state)
    batch_first = options.get("batch_first", False)
    x = torch.randn(
        *((BATCH, TIME) if batch_first else (TIME, BATCH)), FEATURES, dtype=torch.float64
    )
    if form == "padded":
        return x, state
    lengths = LENGTHS if form == "packed" else sorted(LENGTHS, reverse=True)
    return pack_padded_sequence(
        x, lengths, batch_first=batch_first, enforce_sorted=form == "packed sorted"
    ), state


@pytest.mark.parametrize("form", ["padded", "unbatched", "packed", "packed sorted"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_equals_torch_with_quantizers_off(options, form):
    original, quantized = make_pair(**options)
    switched_off(quantized)
    x, state = make_inputs(form, options)
    for training, hx in itertools.product((False, True), (None, state)):
        original.train(training)
        quantized.train(training)
        torch.manual_seed(7)  # the same dropout
        expected = original(x, hx)
        torch.manual_seed(7)
        assert_same(quantized(x, hx), expected)


def test_packed_sequences_come_back_in_the_order_of_the_caller():
    _, quantized = make_pair(bidirectional=True, num_layers=2)
    switched_off(quantized)
    sequences = [torch.randn(length, FEATURES, dtype=torch.float64) for length in LENGTHS]
    output, (h, c) = quantized(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(output)
    assert lengths.tolist() == LENGTHS
    for row, sequence in enumerate(sequences):
        alone, (h_alone, c_alone) = quantized(sequence)
        torch.testing.assert_close(padded[: len(sequence), row], alone)
        torch.testing.assert_close(h[:, row], h_alone)
        torch.testing.assert_close(c[:, row], c_alone)


def test_dropout_of_one_drops_everything_between_layers_in_training():
    original, quantized = make_pair(num_layers=2, dropout=1.0)
    switched_off(quantized)
    x = torch.randn(TIME, BATCH, FEATURES, dtype=torch.float64)
    assert_same(quantized(x), original(x))
    torch.testing.assert_close(quantized(x)[0], quantized(2 * x)[0])
    assert not torch.allclose(quantized.eval()(x)[0], quantized(2 * x)[0])


@pytest.mark.parametrize("form", ["padded", "unbatched", "packed"])
def test_gradients_equal_torch_with_quantizers_off(form):
    options = {"num_layers": 2, "bidirectional": True}
    original, quantized = make_pair(**options)
    switched_off(quantized)
    x, state = make_inputs(form, options)
    for module in (original, quantized):
        output, (h, c) = module(x, state)
        output = output.data if isinstance(output, PackedSequence) else output
        (output.square().sum() + h.sin().sum() + c.sum()).backward()
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(quantized.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(BATCH,), ()])
def test_cell_equals_torch_with_quantizers_off(bias, shape):
    original, quantized = make_pair(QuantLSTMCell, bias=bias)
    switched_off(quantized)
    x, h, c = (
        torch.randn(*shape, n, dtype=torch.float64, requires_grad=True)
        for n in (FEATURES, HIDDEN, HIDDEN)
    )
    for hx in (None, (h, c)):
        expected, found = original(x, hx), quantized(x, hx)
        torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((h1 * c1).sum(), (x, h, c)) for h1, c1 in (expected, found)]
    torch.testing.assert_close(gradients[0], gradients[1])


# -- quantizers on: numpy ------------------------------------------------------------------------------------------


def fake_quant(x, amax):
    s = 127 / amax
    return np.clip(np.rint(x * s), -128, 127) / s


def numpy_lstm(weights, x, amax=None):
    """One direction of one layer over x[time, batch, feature]; without amax in float. Also max of |[x, h]|."""
    w_ih, w_hh, b_ih, b_hh = weights
    weight = np.concatenate([w_ih, w_hh], axis=1)
    if amax is not None:
        weight = fake_quant(
            weight, np.float64(np.abs(weight).max(axis=1, keepdims=True).astype(np.float32))
        )
    h = c = np.zeros((x.shape[1], w_hh.shape[1]))
    outputs, largest = [], 0.0
    for step in x:
        both = np.concatenate([step, h], axis=1)
        largest = max(largest, np.abs(both).max())
        gates = (both if amax is None else fake_quant(both, amax)) @ weight.T + b_ih + b_hh
        i, f, g, o = np.split(gates, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs), h, c, np.float64(np.float32(largest))


def weights_of(module, suffix):
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [module.get_parameter(name + suffix).detach().numpy() for name in names]


def test_quantized_equals_numpy():
    _, quantized = make_pair(num_layers=2, bidirectional=True)
    x = torch.randn(TIME, BATCH, FEATURES, dtype=torch.float64)
    calibrated(quantized, x)
    output, (h, c) = quantized(x)

    expected, in_float = x.numpy(), x.numpy()
    for layer in range(2):
        floats, results = [], []
        for direction, suffix in enumerate((f"_l{layer}", f"_l{layer}_reverse")):
            index, order = 2 * layer + direction, slice(None, None, -1 if direction else 1)
            outputs, _, _, amax = numpy_lstm(weights_of(quantized, suffix), in_float[order])
            floats.append(outputs[order])
            torch.testing.assert_close(
                quantized._input_quantizers[index].amax.double(), torch.tensor(amax)
            )
            outputs, h_last, c_last, _ = numpy_lstm(
                weights_of(quantized, suffix), expected[order], amax
            )
            results.append(outputs[order])
            np.testing.assert_allclose(h[index].detach(), h_last, rtol=0, atol=1e-6)
            np.testing.assert_allclose(c[index].detach(), c_last, rtol=0, atol=1e-6)
        in_float, expected = np.concatenate(floats, axis=2), np.concatenate(results, axis=2)
    np.testing.assert_allclose(output.detach(), expected, rtol=0, atol=1e-6)
    assert np.abs(output.detach().numpy() - in_float).max() > 1e-4  # and it does quantize


def test_quantized_cell_equals_numpy():
    _, cell = make_pair(QuantLSTMCell)
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    calibrated(cell, x)
    _, h, c, _ = numpy_lstm(
        weights_of(cell, ""), x[None].numpy(), np.float64(np.float32(x.abs().max()))
    )
    found = cell(x)
    np.testing.assert_allclose(found[0].detach(), h, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1].detach(), c, rtol=0, atol=1e-6)


def test_gradients_pass_straight_through():
    """Where no value is clipped, the gradient is that of a float LSTM at the quantized values."""
    _, quantized = make_pair()
    x = torch.randn(1, BATCH, FEATURES, dtype=torch.float64, requires_grad=True)
    calibrated(quantized, x.detach())
    for quantizer in quantizers_of(quantized):
        quantizer.amax.mul_(1.01)  # float32: what is rounded down would clip the largest value
    quantized(x)[0].sum().backward()
    reference = nn.LSTM(FEATURES, HIDDEN, dtype=torch.float64)
    reference.load_state_dict(
        {name: value for name, value in quantized.state_dict().items() if "amax" not in name}
    )
    quant_weight_inplace(wrapped := copy.deepcopy(quantized))
    for name, parameter in reference.named_parameters():
        parameter.data.copy_(wrapped.get_parameter(name))
    at = quantized._input_quantizers[0](x).detach().requires_grad_()
    reference(at)[0].sum().backward()
    torch.testing.assert_close(x.grad, at.grad, rtol=1e-6, atol=1e-9)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            quantized.get_parameter(name).grad, parameter.grad, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_weights_are_quantized_once_and_inputs_at_every_step(form):
    options = {"num_layers": 2, "bidirectional": True}
    _, quantized = make_pair(**options)
    calls = dict.fromkeys(quantizers_of(quantized), 0)

    def count(quantizer, *_):
        calls[quantizer] += 1

    for quantizer in calls:
        quantizer.register_forward_hook(count)
    x, _ = make_inputs(form, options)
    quantized(x)
    assert [calls[q] for q in quantized._weight_quantizers] == [1] * 4
    assert [calls[q] for q in quantized._input_quantizers] == [TIME] * 4


def test_padding_is_not_observed():
    _, quantized = make_pair(bidirectional=True)
    x = torch.rand(TIME, BATCH, FEATURES, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        x[length:, row] = 100
    calibrated(quantized, pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    assert all(quantizer.amax <= 1 for quantizer in quantized._input_quantizers)


# -- modules -------------------------------------------------------------------------------------------------------


def test_names_and_signatures():
    assert LSTM is QuantLSTM is quant_nn.LSTM
    assert LSTMCell is QuantLSTMCell is quant_nn.QuantLSTMCell
    assert isinstance(make_pair()[1], nn.LSTM)
    assert isinstance(make_pair(QuantLSTMCell)[1], nn.LSTMCell)
    for quant_class in (QuantLSTM, QuantLSTMCell):
        original = quant_class.float_class(2, 3)
        names = set(inspect.signature(quant_class.__init__).parameters) - {"self", "kwargs"}
        assert all(hasattr(original, name) for name in names)
        rebuilt = quant_class(**{name: getattr(original, name) for name in names})
        assert rebuilt.state_dict().keys() == original.state_dict().keys()
    assert quant_nn.QuantLSTM.default_quant_desc_weight.axis == 0
    assert quant_nn.QuantLSTM.default_quant_desc_input.axis is None


def test_descriptors_reach_every_quantizer():
    lstm = QuantLSTM(
        FEATURES,
        HIDDEN,
        2,
        bidirectional=True,
        quant_desc_input=QuantDescriptor(num_bits=6, calib_method="histogram"),
        quant_desc_weight=QuantDescriptor(num_bits=4),
    )
    assert [q.num_bits for q in lstm._input_quantizers] == [6] * 4
    assert [(q.num_bits, q.axis) for q in lstm._weight_quantizers] == [(4, None)] * 4
    with pytest.raises(TypeError, match="Unused keys"):
        QuantLSTM(FEATURES, HIDDEN, quant_desc_bias=QuantDescriptor())
    for quant_class in (QuantLSTM, QuantLSTMCell):
        with pytest.raises(ValueError, match="Only fake quantization is supported"):
            quant_class(FEATURES, HIDDEN, quant_desc_input=QuantDescriptor(fake_quant=False))


@pytest.mark.parametrize("quant_class", [QuantLSTM, QuantLSTMCell])
def test_state_dict(quant_class):
    original, quantized = make_pair(quant_class)
    quantized.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(quantized.state_dict(), strict=True)
    calibrated(quantized, torch.randn(BATCH, FEATURES, dtype=torch.float64))
    state = quantized.state_dict()
    prefixes = [
        f"_{kind}_quantizer" + ("s.0" if quant_class is QuantLSTM else "")
        for kind in ("input", "weight")
    ]
    assert state.keys() - original.state_dict().keys() == {f"{prefix}._amax" for prefix in prefixes}
    assert state[f"{prefixes[0]}._amax"].shape == ()
    assert state[f"{prefixes[1]}._amax"].shape == (4 * HIDDEN, 1)

    _, fresh = make_pair(quant_class, seed=1)
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    assert torch.equal(fresh(x)[0], quantized(x)[0])


def test_only_the_list_items_are_quantizers_of_an_lstm():
    _, quantized = make_pair(num_layers=2)
    names = [
        name
        for name, module in quantized.named_modules()
        if isinstance(module, quant_nn.TensorQuantizer)
    ]
    assert names == [f"_{kind}_quantizers.{i}" for kind in ("input", "weight") for i in range(2)]


def transfer(float_module, quant_class):
    """As the recipes convert a module of any class: no constructor runs, and there is no num_layers."""
    quant_module = quant_class.__new__(quant_class)
    for name, value in vars(float_module).items():
        setattr(quant_module, name, value)

    def __init__(self):
        desc_input, desc_weight = _utils.pop_quant_desc_in_kwargs(self.__class__)
        self.init_quantizer(desc_input, desc_weight)
        if isinstance(self._input_quantizer._calibrator, calib.HistogramCalibrator):
            self._input_quantizer._calibrator._torch_hist = True
            self._weight_quantizer._calibrator._torch_hist = True

    __init__(quant_module)
    return quant_module


@pytest.mark.parametrize("calib_method", ["max", "histogram"])
@pytest.mark.parametrize("quant_class", [QuantLSTM, QuantLSTMCell])
def test_converted_modules_work(quant_class, calib_method, monkeypatch):
    desc = QuantDescriptor(calib_method=calib_method)
    monkeypatch.setattr(quant_class, "default_quant_desc_input", desc)
    options = {"num_layers": 2, "bidirectional": True} if quant_class is QuantLSTM else {}
    original, _ = make_pair(quant_class, **options)
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    expected = original(x)
    parameters = list(original.parameters())
    converted = transfer(original, quant_class)
    assert len(quantizers_of(converted)) == (8 if quant_class is QuantLSTM else 2)
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    torch.testing.assert_close(switched_off(converted)(x), expected)

    for quantizer in quantizers_of(converted):
        quantizer.enable()
    calibrated(converted, x, method="mse")
    assert all(quantizer.amax is not None for quantizer in quantizers_of(converted))
    moved = copy.deepcopy(converted).to("cpu").float()
    assert moved(x.float())[0].dtype == torch.float32
    torch.testing.assert_close(moved(x.float())[0].double(), converted(x)[0], rtol=0, atol=0.05)


def test_conversion_of_a_projection_is_refused():
    with pytest.raises(ValueError, match="proj_size is 2"):
        transfer(nn.LSTM(FEATURES, HIDDEN, proj_size=2), QuantLSTM)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"method": "mse"}, {"method": "entropy"}, {"method": "percentile", "percentile": 99.9}],
)
def test_calibration_as_the_recipes_do_it(kwargs):
    desc = QuantDescriptor(calib_method="histogram" if kwargs else "max")
    lstm = QuantLSTM(FEATURES, HIDDEN, 2, quant_desc_input=desc)
    model = nn.ModuleDict({"lstm": lstm})
    batches = [torch.randn(TIME, BATCH, FEATURES) for _ in range(3)]
    model.forward = lambda x: model["lstm"](x)
    calibrated(model, *batches, **kwargs)
    largest = max(batch.abs().max() for batch in batches)
    assert 0 < lstm._input_quantizers[0].amax <= largest * (1 + 1e-6)
    assert lstm._input_quantizers[1].amax <= 1 + 1e-6  # h of the layer before
    for layer, quantizer in enumerate(lstm._weight_quantizers):
        weight = torch.cat(
            [lstm.get_parameter(f"weight_{kind}_l{layer}") for kind in ("ih", "hh")], dim=1
        )
        assert torch.equal(quantizer.amax, weight.abs().amax(1, keepdim=True).detach())
    if not kwargs:
        assert lstm._input_quantizers[0].amax == largest
    error = (lstm(batches[0])[0] - switched_off(lstm)(batches[0])[0]).abs().max()
    assert 0 < error < 0.1


@pytest.mark.parametrize("quant_class", [QuantLSTM, QuantLSTMCell])
def test_copies_pickles_and_moves(quant_class):
    _, quantized = make_pair(quant_class)
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    calibrated(quantized, x)
    expected = quantized(x)[0]
    buffer = io.BytesIO()
    torch.save(quantized, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(quantized),
        pickle.loads(pickle.dumps(quantized)),  # noqa: S301
        torch.load(buffer, weights_only=False),
        quantized.to("cpu"),
    ):
        assert torch.equal(other(x)[0], expected)
        assert all(quantizer._calibrator is not None for quantizer in quantizers_of(other))
    if quant_class is QuantLSTM:
        quantized.flatten_parameters()
        assert torch.equal(quantized(x)[0], expected)


@pytest.mark.parametrize("quant_class", [QuantLSTM, QuantLSTMCell])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(quant_class, dtype):
    _, quantized = make_pair(quant_class)
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    calibrated(quantized, x)
    expected = quantized(x)[0]
    found = quantized.to(dtype)(x.to(dtype))[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05)


def test_autocast():
    _, quantized = make_pair(dtype=torch.float32, num_layers=2, bidirectional=True)
    x = torch.randn(TIME, BATCH, FEATURES)
    calibrated(quantized, x)
    expected = quantized(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantized(x)[0]
        found.sum().backward()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


def test_functional_call_sees_the_weights_it_is_given():
    _, quantized = make_pair()
    switched_off(quantized)
    x = torch.randn(TIME, BATCH, FEATURES, dtype=torch.float64)
    other, _ = make_pair(seed=3)
    found = torch.func.functional_call(quantized, dict(other.named_parameters()), (x,))
    assert_same(found, other(x))


def test_weights_are_quantized_in_place_as_in_forward():
    _, quantized = make_pair(num_layers=2, bidirectional=True)
    x = torch.randn(TIME, BATCH, FEATURES, dtype=torch.float64)
    calibrated(quantized, x)
    expected = quantized(x)
    quant_weight_inplace(quantized)
    for quantizer in quantized._weight_quantizers:
        quantizer.disable()
    for found, value in zip(flatten(quantized(x)), flatten(expected), strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6)


# -- capture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
)
def test_exported_program_equals_eager(options):
    _, quantized = make_pair(dtype=torch.float32, **options)
    switched_off(quantized.eval())
    x = torch.randn(BATCH, TIME, FEATURES) if options else torch.randn(TIME, BATCH, FEATURES)
    dims = ({0 if options else 1: torch.export.Dim("batch", min=2)}, None)
    program = torch.export.export(quantized, (x, None), dynamic_shapes=dims)
    wider = torch.randn(*((7, TIME) if options else (TIME, 7)), FEATURES)
    assert_same_float(program.module()(wider, None), quantized(wider))


def assert_same_float(found, expected):
    for one, other in zip(flatten(found), flatten(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
)
def test_onnx_agrees_with_torch(options, dynamo, tmp_path, recwarn):
    _, quantized = make_pair(dtype=torch.float32, **options)
    x = torch.randn(BATCH, TIME, FEATURES) if options else torch.randn(TIME, BATCH, FEATURES)
    calibrated(quantized.eval(), x)
    path = tmp_path / "lstm.onnx"
    torch.onnx.export(quantized, (x,), path, dynamo=dynamo, opset_version=18)
    assert not [str(w.message) for w in recwarn if "quant_rnn" in w.filename]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = flatten(quantized(x))
    for one, other in zip(found, expected, strict=True):
        # One code more or less in [x, h].
        np.testing.assert_allclose(one, other.detach(), rtol=0, atol=2e-3)


def test_compiled_equals_eager():
    """As one graph where torch lets a subclass of its LSTM in; by default it runs such a module eagerly."""
    _, quantized = make_pair(dtype=torch.float32, num_layers=2)
    x = torch.randn(TIME, BATCH, FEATURES)
    calibrated(quantized, x)
    expected = quantized(x)
    assert_same_float(torch.compile(quantized, backend="eager")(x), expected)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        assert_same_float(torch.compile(quantized, backend="eager", fullgraph=True)(x), expected)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"proj_size": 2},
        {"proj_size": -1},
        {"dropout": 1.5},
        {"dropout": -0.1},
        {"dropout": True},
        {"dropout": "0.5"},
    ],
)
def test_impossible_options(options):
    with pytest.raises(ValueError, match=next(iter(options))) as raised:
        QuantLSTM(FEATURES, HIDDEN, num_layers=2, **options)
    assert isinstance(raised.value, QdqError)


def test_another_number_of_quantizers_is_refused():
    lstm = QuantLSTM(FEATURES, HIDDEN, bidirectional=True)
    lstm.init_quantizer(QuantDescriptor(), QuantDescriptor(), num_layers=2)
    with pytest.raises(ValueError, match="need 2 quantizers"):
        lstm.init_quantizer(QuantDescriptor(), QuantDescriptor(), num_layers=1)


GOOD = torch.zeros(2, BATCH, HIDDEN)


@pytest.mark.parametrize(
    ("shape", "hx", "kind", "message"),
    [
        (
            (TIME, BATCH, FEATURES),
            (GOOD[:1], GOOD),
            RuntimeError,
            r"hx: h has shape \(1, 3, 6\); expected \(2, 3, 6\)",
        ),
        ((TIME, BATCH, FEATURES), (GOOD, GOOD[:, :1]), RuntimeError, "hx: c has shape"),
        ((TIME, BATCH, FEATURES), (GOOD[:, 0], GOOD[:, 0]), RuntimeError, "hx: h has shape"),
        ((TIME, FEATURES), (GOOD, GOOD), RuntimeError, r"expected \(2, 6\)"),
        ((TIME, BATCH, FEATURES), GOOD, TypeError, r"expected the pair of tensors \(h, c\)"),
        ((TIME, BATCH, FEATURES), (GOOD,), TypeError, "expected the pair"),
        ((TIME, BATCH, FEATURES + 1), None, RuntimeError, "expected input_size, 4"),
        ((FEATURES,), None, ValueError, "expected 2 or 3"),
        ((1, TIME, BATCH, FEATURES), None, ValueError, "expected 2 or 3"),
        ((0, BATCH, FEATURES), None, RuntimeError, "length 0"),
    ],
)
def test_what_does_not_fit_is_told(shape, hx, kind, message):
    lstm = QuantLSTM(FEATURES, HIDDEN, num_layers=2)
    with pytest.raises(kind, match=message) as raised:
        lstm(torch.zeros(shape), hx)
    assert isinstance(raised.value, QdqError)
    if kind is RuntimeError:
        assert isinstance(raised.value, ValueError)


def test_what_does_not_fit_a_packed_sequence_is_told():
    lstm = QuantLSTM(FEATURES, HIDDEN, num_layers=2)
    packed = pack_padded_sequence(torch.zeros(TIME, BATCH, FEATURES), LENGTHS, enforce_sorted=False)
    with pytest.raises(RuntimeError, match="hx: h has shape"):
        lstm(packed, (GOOD[:, :2], GOOD))
    with pytest.raises(RuntimeError, match="expected input_size"):
        QuantLSTM(FEATURES + 1, HIDDEN)(packed)


def test_what_does_not_fit_a_cell_is_told():
    cell = QuantLSTMCell(FEATURES, HIDDEN)
    for x, hx, message in (
        (torch.zeros(1, BATCH, FEATURES), None, "expected 1 or 2"),
        (torch.zeros(BATCH, FEATURES + 1), None, "expected input_size, 4"),
        (torch.zeros(BATCH, FEATURES), (GOOD[0], GOOD[0, :1]), "hx: c has shape"),
        (torch.zeros(FEATURES), (GOOD[0], GOOD[0]), r"expected \(6,\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cell(x, hx)


def test_another_kind_of_numbers_is_told():
    with pytest.raises(
        ValueError, match=r"input is torch\.float64, the weights are torch\.float32"
    ):
        QuantLSTM(FEATURES, HIDDEN)(torch.zeros(TIME, FEATURES, dtype=torch.float64))


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_calibrate_model_of_the_core(method):
    _, quantized = make_pair(dtype=torch.float32)
    x = torch.randn(TIME, BATCH, FEATURES)
    ranges = {r.name: r for r in calibrate_model(quantized, [x], method=method)}
    rows = torch.cat([quantized.weight_ih_l0, quantized.weight_hh_l0], dim=1).detach()
    assert torch.equal(quantized._weight_quantizers[0].amax, rows.abs().amax(1, keepdim=True))
    assert ranges["_weight_quantizers.0"].method == "max"
    assert ranges["_input_quantizers.0"].method == method


def test_narrow_weights_are_exported_where_no_code_gets_lost(tmp_path):
    narrow = QuantDescriptor(axis=0, narrow_range=True)
    quantized = QuantLSTM(FEATURES, HIDDEN, quant_desc_weight=narrow)
    x = torch.randn(TIME, BATCH, FEATURES)
    calibrated(quantized.eval(), x)
    path = str(tmp_path / "lstm.onnx")
    torch.onnx.export(quantized, (x,), path)
    outputs = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"input": x.numpy()}
    )
    np.testing.assert_allclose(outputs[0], quantized(x)[0].detach().numpy(), atol=1e-5)
    quantized._weight_quantizers[0].amax.mul_(0.5)
    with pytest.raises(QdqError, match=r"_weight_quantizers\.0 has narrow_range"):
        torch.onnx.export(quantized, (x,), path)
