"""LSTMs of layers: the numbers of `nn.LSTM`, quantization of each of their layers, and the export."""

import copy
import logging
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from qdq import check_onnx, export_onnx, predict
from qdq.distiller import (
    DistillerLSTM,
    DistillerLSTMCell,
    PostTrainLinearQuantizer,
    collect_quant_stats,
    convert_model_to_distiller_lstm,
    modularize,
)
from qdq.errors import ArgumentError, UnsupportedError
from qdq.systems import to_tensorrt

WORDS = torch.randint(0, 30, (6, 3), generator=torch.Generator().manual_seed(0))
HIDDEN = 16


class Recurrent(nn.Module):
    """A network with an LSTM inside, as in the published names."""

    def __init__(self, **options):
        super().__init__()
        self.rnn = nn.LSTM(16, HIDDEN, **options)

    def forward(self, x, states=None):
        return self.rnn(x, states)


class Language(nn.Module):
    """An embedding, an LSTM and a classifier."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.rnn = Recurrent(**options)
        directions = 2 if options.get("bidirectional") else 1
        self.decoder = nn.Linear(directions * HIDDEN, 16)

    def forward(self, x, states=None):
        outputs, states = self.rnn(self.embedding(x), states)
        return self.decoder(outputs), states


def make_language(**options):
    torch.manual_seed(0)
    return convert_model_to_distiller_lstm(Language(**options)).eval()


def quantize(model, **options):
    options.setdefault("model_activation_stats", collect_quant_stats(model, [WORDS]))
    quantizer = PostTrainLinearQuantizer(copy.deepcopy(model), **options)
    quantizer.prepare_model(WORDS)
    return quantizer


def run(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


def snr_db(expected, values):
    return float(10 * torch.log10(expected.square().sum() / (expected - values).square().sum()))


OPTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2, "dropout": 0.5},
    "both directions": {"bidirectional": True},
    "all": {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.3},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_computes_what_torch_computes(options, dtype):
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 7, **options).to(dtype).eval()
    layers = DistillerLSTM.from_pytorch_impl(lstm)
    assert not layers.training
    num_cells = lstm.num_layers * (2 if lstm.bidirectional else 1)
    inputs = torch.randn(4, 3, 5, dtype=dtype)
    batch = inputs.shape[0 if lstm.batch_first else 1]
    states = tuple(torch.randn(2, num_cells, batch, 7, dtype=dtype))
    single = inputs[:, 0], tuple(state[:, 0] for state in states)
    for arguments in ((inputs,), (inputs, states), single[:1], single):
        torch.testing.assert_close(run(layers, *arguments), run(lstm, *arguments))


def test_gradients_are_those_of_torch():
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 7, num_layers=2, bidirectional=True).double()
    layers = DistillerLSTM.from_pytorch_impl(lstm)
    inputs = torch.randn(4, 3, 5, dtype=torch.float64)
    for module in (lstm, layers):
        module(inputs)[0].square().sum().backward()
    cell = layers.cells_reverse[1]
    torch.testing.assert_close(cell.fc_gate_x.weight.grad, lstm.weight_ih_l1_reverse.grad)
    torch.testing.assert_close(cell.fc_gate_h.bias.grad, lstm.bias_hh_l1_reverse.grad)


def test_dropout_is_between_layers_in_training():
    layers = DistillerLSTM(5, 7, num_layers=2, dropout=1.0)
    inputs = torch.randn(4, 3, 5)
    dropped = run(layers, inputs)[0]
    torch.testing.assert_close(dropped, run(layers, 2 * inputs)[0])
    assert not torch.allclose(dropped, run(layers.eval(), inputs)[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_way_back_has_the_same_weights(options):
    lstm = nn.LSTM(5, 7, **options)
    restored = DistillerLSTM.from_pytorch_impl(lstm).to_pytorch_impl()
    assert repr(restored) == repr(lstm)
    torch.testing.assert_close(restored.state_dict(), lstm.state_dict(), rtol=0, atol=0)


def test_a_cell_is_converted_both_ways():
    torch.manual_seed(0)
    cell = nn.LSTMCell(5, 7).double()
    layers = convert_model_to_distiller_lstm(cell)
    assert isinstance(layers, DistillerLSTMCell)
    inputs, states = torch.randn(3, 5).double(), tuple(torch.randn(2, 3, 7).double())
    for arguments in ((inputs,), (inputs, states)):
        torch.testing.assert_close(run(layers, *arguments), run(cell, *arguments))
    restored = layers.to_pytorch_impl()
    torch.testing.assert_close(restored.state_dict(), cell.state_dict(), rtol=0, atol=0)


class Own(nn.LSTM):
    """An LSTM with a forward of its own."""

    def forward(self, x):
        return super().forward(2 * x)


def test_all_lstms_of_a_model_are_replaced_but_those_that_compute_something_else(caplog):
    model = nn.ModuleDict(
        {
            "first": nn.LSTM(5, 7),
            "inner": nn.ModuleList([nn.LSTM(7, 7), nn.GRU(7, 7)]),
            "projected": nn.LSTM(5, 7, proj_size=3),
            "own": Own(5, 7),
            "normed": nn.utils.parametrizations.weight_norm(nn.LSTM(5, 7), "weight_hh_l0"),
        }
    )
    model["again"] = model["first"]
    model["first"].eval()
    with caplog.at_level(logging.WARNING, logger="qdq"):
        assert convert_model_to_distiller_lstm(model) is model
    assert isinstance(model["first"], DistillerLSTM) and model["again"] is model["first"]
    assert not model["first"].training and model["inner"][0].training
    assert [type(module) for module in model["inner"]] == [DistillerLSTM, nn.GRU]
    stays = [line.partition(" stays in float: ") for line in caplog.messages]
    assert [name for name, _, _ in stays] == ["projected", "own", "normed"]
    assert "proj_size" in stays[0][2] and "subclass" in stays[1][2]
    with pytest.raises(UnsupportedError, match="proj_size"):
        DistillerLSTM.from_pytorch_impl(model["projected"])


def test_inputs_that_are_refused():
    layers = DistillerLSTM(5, 7)
    with pytest.raises(UnsupportedError, match="packed sequence"):
        layers(pack_sequence([torch.randn(3, 5), torch.randn(2, 5)]))
    with pytest.raises(ArgumentError, match="no time step"):
        layers(torch.randn(0, 3, 5))


@pytest.mark.parametrize("mode", ["SYMMETRIC", "ASYMMETRIC_UNSIGNED"])
@pytest.mark.parametrize("clip", ["NONE", "AVG", "GAUSS", "LAPLACE"])
def test_all_clip_modes_are_near_the_float_model(clip, mode):
    model = make_language(num_layers=2, bidirectional=True)
    quantizer = quantize(model, mode=mode, clip_acts=clip, per_channel_wts=True)
    expected, _ = run(model, WORDS)
    outputs, _ = run(quantizer.model, WORDS)
    assert snr_db(expected, outputs) > (30 if clip == "NONE" else 12)


@pytest.mark.parametrize("mode", ["SYMMETRIC", "ASYMMETRIC_SIGNED"])
def test_a_sequence_in_two_parts_is_the_whole_one(mode):
    """States that come back without a scale are rounded to the one that they had."""
    model = quantize(make_language(num_layers=2), mode=mode).model
    outputs, states = run(model, WORDS)
    first, middle = run(model, WORDS[:4])
    second, last = run(model, WORDS[4:], middle)
    assert torch.equal(torch.cat([first, second]), outputs)
    torch.testing.assert_close(last, states, rtol=0, atol=0)


def test_ranges_are_cut_to_what_the_gates_use():
    model = make_language()
    statistics = collect_quant_stats(model, [WORDS])
    cell = "rnn.rnn.cells.0."
    for name in ("eltwiseadd_gate", "eltwiseadd_cell"):
        layer = statistics[cell + name]
        layer.output = replace(layer.output, min=-20.0, max=20.0)
    prepared = quantize(model, model_activation_stats=statistics).model_activation_stats
    gate = prepared[cell + "eltwiseadd_gate"].output
    assert (gate.min, gate.max) == (-6, 6)  # of the sigmoids, whose window has that of tanh inside
    state = prepared[cell + "eltwiseadd_cell"].output
    assert (state.min, state.max) == (-20, 20)  # the next time step reads it, too


def test_parameters_of_a_cell_are_set_by_name():
    quantizer = quantize(make_language(), save_fp_weights=True)
    cell = "rnn.rnn.cells.0."
    quantizer.update_linear_quant_params(
        {cell + "fc_gate_h.w_scale": 9.0, cell + "eltwisemult_hidden.output_clipping": 0.5}
    )
    layers = quantizer.layers
    readjusted = {name for name, layer in layers.items() if layer.force_readjust}
    assert readjusted == {
        f"{cell}fc_gate_h",
        f"{cell}eltwiseadd_gate",
        f"{cell}eltwisemult_hidden",
        "decoder",
    }
    outputs, (hidden, _) = run(quantizer.model, WORDS)
    weight = layers[cell + "fc_gate_h"]
    expected = (weight.float_weight * 9).round().clamp(-128, 127)
    assert torch.equal(weight.wrapped_module.weight, expected)
    assert hidden.abs().max() <= 0.5 and outputs.isfinite().all()


def test_overrides_by_the_names_of_cells():
    overrides = OrderedDict(
        {
            "rnn.rnn.cells.0.act_.*": {"bits_activations": None},
            "rnn.rnn.cells.0.*": {"bits_weights": 4, "clip_acts": "AVG"},
        }
    )
    quantizer = quantize(make_language(num_layers=2), overrides=overrides)
    cells = quantizer.model.rnn.rnn.cells
    assert cells[0].fc_gate_x.wrapped_module.weight.abs().max() <= 8
    assert cells[1].fc_gate_x.wrapped_module.weight.abs().max() > 8
    assert type(cells[0].act_o) is nn.Sigmoid
    reasons = {entry.name: entry.reason for entry in quantizer.left_float.entries}
    assert reasons["rnn.rnn.cells.0.act_h"] == "bits_activations is null"
    assert quantizer.resolution.unused == {}


def test_the_state_dict_rebuilds_the_model():
    model = make_language()
    quantizer = quantize(model)
    rebuilt = quantize(make_language(), model_activation_stats=collect_quant_stats(model, [WORDS]))
    rebuilt.model.load_state_dict(quantizer.model.state_dict())
    assert torch.equal(run(rebuilt.model, WORDS)[0], run(quantizer.model, WORDS)[0])


def test_dynamic_ranges():
    model = make_language(num_layers=2)
    quantizer = quantize(model, model_activation_stats=None, per_channel_wts=True)
    kinds = {name.rpartition(".")[2] for name in quantizer.layers}
    assert kinds == {"embedding", "fc_gate_x", "fc_gate_h", "decoder"}
    assert snr_db(run(model, WORDS)[0], run(quantizer.model, WORDS)[0]) > 30


class Residual(nn.Module):
    """An LSTM with functions around it."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(16, 16)

    def forward(self, x):
        return torch.relu(self.rnn(x)[0] + x)


def test_modularize_leaves_it_whole():
    model = convert_model_to_distiller_lstm(Residual()).eval()
    rows = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(1))
    traced = modularize(model, rows)
    assert traced.rnn is model.rnn
    assert {"add", "relu"} <= dict(traced.named_children()).keys()
    assert torch.equal(run(traced, rows), run(model, rows))


def test_a_plain_lstm_says_how_it_is_quantized(caplog):
    torch.manual_seed(0)
    model = Language().eval()
    statistics = collect_quant_stats(model, [WORDS])
    quantizer = PostTrainLinearQuantizer(model, model_activation_stats=statistics)
    with caplog.at_level(logging.WARNING, logger="qdq"):
        quantizer.prepare_model(WORDS)
    (line,) = [line for line in caplog.messages if "rnn.rnn" in line]
    assert "convert_model_to_distiller_lstm" in line


def test_the_engine_has_the_linear_layers_of_the_cells_in_int8(tmp_path):
    words = WORDS[:2]
    quantizer = quantize(make_language(bidirectional=True), per_channel_wts=True)
    emulated, _ = run(quantizer.model, words)
    transfer = to_tensorrt(quantizer.model)
    expected = [name for name in quantizer.layers if "fc_gate" in name or name == "decoder"]
    int8 = [layer.name for layer in transfer.layers if layer.precision == "int8"]
    assert sorted(int8) == sorted(expected)
    tensors = [tensor for layer in transfer.layers for tensor in layer.tensors]
    assert tensors and {tensor.verdict for tensor in tensors} == {"exact"}
    path = tmp_path / "lstm.onnx"
    export_onnx(quantizer.model, words, path, dynamic_batch=False)
    assert {finding.severity for finding in check_onnx(path).findings} <= {"info"}
    outputs = torch.from_numpy(predict(path, [words])["output_0"])
    torch.testing.assert_close(outputs, run(quantizer.model, words)[0])
    assert snr_db(emulated, outputs) > 30
