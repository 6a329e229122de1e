"""Centered inputs: the float model stays the same, and int8 gains behind clamps with two bounds."""

import copy
from collections import Counter
from functools import partial

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import qdq
from qdq.metrics import sqnr_db


class Narrow(nn.Module):
    """Like a block of EfficientNet-Lite: one ReLU6 serves two places, the depthwise filter pads."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(3, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 32, 1)
        self.widen = nn.Linear(32, 64)
        self.classify = nn.Linear(64, 10)
        self.relu = nn.ReLU6()

    def forward(self, x):
        x = self.relu(self.depthwise(self.relu(self.expand(x))))
        x = self.relu(self.head(self.project(x)).mean((2, 3)))
        return self.classify(self.relu(self.widen(x)))


@pytest.fixture
def net():
    model = Narrow().eval()
    with torch.no_grad():
        for layer in (model.depthwise, model.widen):
            layer.weight.mul_(8)
            layer.bias.add_(2.0)
    return model


@pytest.fixture
def images():
    return torch.randn(24, 3, 12, 12)


def quantize(model, images):
    qdq.swap_modules(model, images[:2], include=["*"])
    qdq.rewire_operations(model, images[:2])
    qdq.calibrate_model(model, [images], method="mse")
    qdq.correct_bias(model, [images])


def test_float_model_is_unchanged_and_int8_gains(net, images):
    fitted, held = images[:16], images[16:]
    expected = qdq.predict(net, [held])
    plain = copy.deepcopy(net)
    quantize(plain, fitted)
    report = qdq.center_inputs(net, [fitted[:8], fitted[8:]], include=["*"])
    assert sqnr_db(expected, qdq.predict(net, [held])) > 100
    assert report.float_db > 100
    centered = {entry.read_by: entry for entry in report.inputs if not entry.reason}
    assert set(centered) == {("project",), ("classify",)}
    assert centered["project",].offset == pytest.approx(3, abs=0.7)
    assert 4 < centered["project",].gain_db < 7  # half of the step is 6 dB
    quantize(net, fitted)
    gain_db = sqnr_db(expected, qdq.predict(net, [held])) - sqnr_db(
        expected, qdq.predict(plain, [held])
    )
    assert gain_db > 1
    qdq.restore_modules(net)
    assert sqnr_db(expected, qdq.predict(net, [held])) > 100


def test_the_gain_is_that_of_the_tensor():
    """Squared errors with the best ranges, computed in float64."""
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1)).eval()
    images = 3 * torch.randn(8, 4, 10, 10)
    x = model[:2](images).detach().double().flatten()
    report = qdq.center_inputs(model, [images], include=["*"])
    (entry,) = (entry for entry in report.inputs if not entry.reason)

    def error(values, amax):
        step = amax / 127
        return float(((values / step).round().clamp(-128, 127) * step - values).square().mean())

    fractions = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    plain = min(error(x, fraction * x.max()) for fraction in fractions)
    centered = min(error(x - f * x.max() / 2, f * x.max() / 2) for f in fractions)
    gain_db = 10 * float(torch.tensor(plain / centered).log10())
    assert entry.gain_db == pytest.approx(gain_db, abs=0.1)


def test_the_file_has_no_more_operators(net, images, tmp_path):
    operators = []
    for is_centered in (False, True):
        model = copy.deepcopy(net)
        if is_centered:
            qdq.center_inputs(model, [images], include=["*"])
        quantize(model, images)
        exported = qdq.export_onnx(model, images[:2], tmp_path / "net.onnx")
        expected = qdq.predict(model, [images])
        floor_db = qdq.measure_tie_floor(model, [images], expected=expected)
        assert sqnr_db(expected, qdq.predict(exported.path, [images])) > min(floor_db - 3, 60)
        check = qdq.check_onnx(exported.path)
        assert not [finding for finding in check.findings if finding.severity == "error"]
        graph = onnx.load(exported.path).graph
        operators.append(Counter(node.op_type for node in graph.node))
    assert operators[0] == operators[1]
    assert "Sub" not in operators[1]
    ort.InferenceSession(exported.path)


class Pooled(nn.Module):
    """The end of MobileNetV2: a clamp, pooling, dropout, a linear layer."""

    def __init__(self, pool):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.pool = pool
        self.last = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(8))
        with torch.no_grad():
            self.first.weight.mul_(4)
            self.first.bias.add_(2.0)

    def forward(self, x):
        return self.last(self.pool(self.first(x).clamp(0, 6)))


class GlobalMean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


POOLS = [
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d(5),
    nn.AdaptiveMaxPool2d(1),
    nn.MaxPool2d(2, padding=1),
    GlobalMean(),
]


@pytest.mark.parametrize("pool", POOLS)
def test_an_input_behind_pooling_is_centered(pool, images, tmp_path):
    model = Pooled(pool).eval()
    expected = qdq.predict(model, [images])
    report = qdq.center_inputs(model, [images], include=["last.2", "first"])
    (entry,) = (entry for entry in report.inputs if not entry.reason)
    assert entry.read_by == ("last.2",) and entry.offset > 1
    assert sqnr_db(expected, qdq.predict(model, [images])) > 100
    qdq.swap_modules(model, images[:2], include=["last.2", "first"])
    qdq.rewire_operations(model, images[:2])
    qdq.calibrate_model(model, [images])
    actual = qdq.predict(model, [images])
    exported = qdq.export_onnx(model, images[:2], tmp_path / "net.onnx")
    assert "Sub" not in [node.op_type for node in onnx.load(exported.path).graph.node]
    floor_db = qdq.measure_tie_floor(model, [images], expected=actual)
    assert sqnr_db(actual, qdq.predict(exported.path, [images])) > min(floor_db - 3, 60)


def test_an_input_behind_a_quantized_or_padding_pooling_stays(images):
    reasons = []
    for pool in (nn.AdaptiveAvgPool2d(2), nn.AvgPool2d(2, padding=1), nn.AdaptiveAvgPool2d(3)):
        model = Pooled(pool).eval()
        qdq.predict(model, [images])  # makes the lazy layer
        report = qdq.center_inputs(model, [images], include=["last.2", "first", "pool"])
        reasons += [entry.reason for entry in report.inputs if entry.read_by == ("last.2",)]
    rest = "before it may read padding, or has windows of several sizes"
    assert reasons == [
        "pool lies between it and the clamp, and is quantized itself",
        f"avg_pool2d {rest}",
        f"adaptive_avg_pool2d {rest}",
    ]


def test_a_classifier_behind_pooling_that_is_a_convolution_stays_quantized(images):
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Conv2d(16, 32, 1), nn.Flatten()).eval()
    before = qdq.plan_swap(model, images[:2]).of("quantize")
    report = qdq.center_inputs(model, [images])
    assert [entry.read_by for entry in report.inputs if not entry.reason] == [("3",)]
    assert qdq.plan_swap(model, images[:2]).of("quantize") == before


class ManyOutputs(nn.Module):
    """One output is -inf in places; one layer gets no rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)
        self.before, self.rare = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)
        self.register_buffer("rows", torch.zeros(0, dtype=torch.long))

    def forward(self, x):
        y = self.second(self.first(4 * x).clamp(0, 6))
        rare = self.rare(self.before(x[self.rows]).clamp(0, 6))
        return {"y": y, "masked": torch.where(y > 0, y, -torch.inf), "rare": rare}


def test_outputs_that_do_not_count_and_empty_tensors(images):
    model = ManyOutputs().eval()
    include = ["second", "rare"]
    with pytest.raises(qdq.StateError, match="NaN or Inf"):
        qdq.center_inputs(copy.deepcopy(model), [images], include=include)
    report = qdq.center_inputs(model, [images], include=include, outputs={"y": "y"})
    reasons = {entry.read_by: entry.reason for entry in report.inputs}
    assert reasons == {("second",): "", ("rare",): "it is empty in the batches"}
    assert report.float_db > 100


def test_a_network_without_such_clamps_does_not_run(images, monkeypatch):
    from qdq.accuracy import centering

    monkeypatch.setattr(centering, "call_model", None)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    report = qdq.center_inputs(model, [images], include=["*"])
    assert all(entry.reason for entry in report.inputs) and report.float_db == float("inf")


def test_what_is_read_by_something_else_stays():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.second = nn.Conv2d(8, 8, 1)
            self.third = nn.Conv2d(8, 8, 3, padding=1)
            self.fourth = nn.Conv2d(8, 8, 1, bias=False)
            self.fifth = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.first(x).clamp(0, 6)
            x = (x + self.second(x)).clamp(0, 6)
            x = self.third(x).clamp(0, 6)
            x = self.fourth(x).clamp(min=0)
            return self.fifth(x)

    model = Shortcut().eval()
    images = 4 * torch.randn(4, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    report = qdq.center_inputs(model, [images], include=["*"])
    reasons = {name: entry.reason for entry in report.inputs for name in entry.read_by}
    assert "no clamp with two bounds" in reasons["first"]
    assert reasons["second"] == "add reads it, too"
    assert reasons["third"] == "it pads its input with zeros"
    assert "it has no bias" in reasons["fourth"]
    assert "no clamp with two bounds" in reasons["fifth"]
    assert report.float_db == float("inf")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert "0 of 5 inputs" in report.format_table()


def test_a_clamp_around_0_is_centered_already():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardtanh(), nn.Conv2d(8, 8, 1)).eval()
    report = qdq.center_inputs(model, [5 * torch.randn(4, 3, 6, 6)], include=["*"])
    assert report.inputs[1].reason == "no offset lowers the noise by 3 dB"


def test_a_second_call_changes_nothing(net, images):
    qdq.center_inputs(net, [images], include=["*"])
    before = copy.deepcopy(net.state_dict())
    again = qdq.center_inputs(net, [images], include=["*"])
    assert all(torch.equal(values, before[name]) for name, values in net.state_dict().items())
    reasons = {entry.read_by: entry.reason for entry in again.inputs}
    assert reasons["project",] == reasons["classify",] == "it is centered already"


def test_it_goes_together_with_rounding_and_a_saved_state(net, images):
    qdq.center_inputs(net, [images], include=["*"])
    swapped = copy.deepcopy(net)
    expected = qdq.predict(net, [images])
    quantize(net, images)
    before_db = sqnr_db(expected, qdq.predict(net, [images]))
    qdq.round_weights(net, [images])
    assert sqnr_db(expected, qdq.predict(net, [images])) > before_db
    qdq.swap_modules(swapped, images[:2], include=["*"])
    qdq.rewire_operations(swapped, images[:2])
    swapped.load_state_dict(net.state_dict())
    torch.testing.assert_close(swapped(images), net(images), rtol=0, atol=0)


def test_refusals(net, images):
    with pytest.raises(qdq.ArgumentError, match="least_db is nan"):
        qdq.center_inputs(net, [images], least_db=float("nan"))
    with pytest.raises(qdq.ArgumentTypeError, match="least_db is '3'"):
        qdq.center_inputs(net, [images], least_db="3")
    with pytest.raises(qdq.ArgumentTypeError):
        qdq.center_inputs(net, images)
    with pytest.raises(qdq.DataError):
        qdq.center_inputs(net, [])
    qdq.swap_modules(net, images[:2], include=["*"])
    with pytest.raises(qdq.StateError, match="before swap_modules"):
        qdq.center_inputs(net, [images])


def test_rounded_weights_do_not_shift_the_mean(images):
    """Without any pass: the bias of a centered layer follows the rounding of its weight."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU6(), nn.Conv2d(16, 8, 1)).eval()
    expected = model(images)
    qdq.center_inputs(model, [images], include=["*"])
    qdq.swap_modules(model, images[:2], include=["2"])
    qdq.calibrate_model(model, [images])
    layer = model[2]
    with torch.no_grad():  # coarse codes, whose errors have a mean
        layer.weight_quantizer.amax = layer.weight_quantizer.amax * 20
    error = model(images) - expected
    plain = nn.functional.conv2d(
        model[:2](images), layer.weight_quantizer(layer.weight) - layer.weight
    )
    torch.testing.assert_close(error, plain, rtol=0, atol=0.02)  # the step of the input


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_corrected_biases_have_the_mean_of_the_float_output(net, images, method):
    expected = qdq.predict(net, [images])
    qdq.center_inputs(net, [images], include=["*"])
    qdq.swap_modules(net, images[:2], include=["*"])
    qdq.calibrate_model(net, [images])
    before_db = sqnr_db(expected, qdq.predict(net, [images]))
    report = qdq.correct_bias(net, [images], method=method)
    actual = qdq.predict(net, [images])
    assert report.after_db == pytest.approx(sqnr_db(expected, actual), abs=1e-3)
    assert report.after_db > before_db - 0.5
    if method == "empirical":
        deviations = (actual - expected).mean(0) / expected.std(0)
        assert abs(deviations).max() < 1e-3


@pytest.mark.parametrize(
    "change",
    [
        qdq.round_weights,
        partial(qdq.reconstruct_blocks, steps=20),
        partial(qdq.tune_weights, steps=20),
    ],
    ids=["round_weights", "reconstruct_blocks", "tune_weights"],
)
def test_reported_figures_are_those_of_the_model(net, images, change, tmp_path):
    expected = qdq.predict(net, [images])
    qdq.center_inputs(net, [images], include=["*"])
    qdq.swap_modules(net, images[:2], include=["*"])
    qdq.rewire_operations(net, images[:2])
    qdq.calibrate_model(net, [images])
    report = change(net, [images])
    actual = qdq.predict(net, [images])
    assert report.after_db == pytest.approx(sqnr_db(expected, actual), abs=0.05)
    exported = qdq.export_onnx(net, images[:2], tmp_path / "net.onnx")
    assert sqnr_db(actual, qdq.predict(exported.path, [images])) > 45
    with qdq.disable_quantization(net):
        assert sqnr_db(expected, qdq.predict(net, [images])) > 100


class PadsOddSizes(nn.Conv2d):
    def forward(self, x):
        if x.shape[-1] % 2:
            x = nn.functional.pad(x, (1, 0, 1, 0))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


class Clamps(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(nn.functional.relu6(x), self.weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (PadsOddSizes(8, 8, 2), "it pads its input with zeros"),
        (Clamps(8, 8, 1), "its forward changes the input before the product"),
    ],
)
def test_forwards_of_subclasses_that_do_more_stay(layer, reason):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), layer).eval()
    report = qdq.center_inputs(model, [torch.randn(4, 3, 8, 8)], include=["*"])
    assert report.inputs[-1].reason == reason
    assert report.float_db == float("inf")


def test_a_clamp_behind_a_sum_stays(images):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.second((x + self.first(x)).clamp(0, 6))

    report = qdq.center_inputs(Residual().eval(), [images], include=["*"])
    reasons = {entry.read_by: entry.reason for entry in report.inputs}
    assert reasons["second",].startswith("no convolution with a bias")


def test_ctrl_c_leaves_the_model_as_it_was(net, images, monkeypatch):
    from qdq.accuracy import centering

    observe = centering._observe
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return observe(*arguments)

    monkeypatch.setattr(centering, "_observe", interrupted)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyboardInterrupt):
        qdq.center_inputs(net, [images], include=["*"])
    state = net.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(values, before[name]) for name, values in state.items())


def test_a_compiled_model_computes_the_same(net, images):
    qdq.center_inputs(net, [images], include=["*"])
    qdq.swap_modules(net, images[:2], include=["*"])
    qdq.calibrate_model(net, [images])
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), net(images))
