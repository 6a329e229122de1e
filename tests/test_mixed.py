"""The choice between int8 and FP8, against a search by hand."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from residual_block import Block
from torch import nn

import qdq
from qdq import ArgumentError, ArgumentTypeError, mixed
from qdq.metrics import sqnr_db
from qdq.mixed import FormatChoice, LayerFormat
from qdq.swap import quantized_layers

BOTH = ("int8", "fp8")


class Outliers(nn.Module):
    """The first layer reads values with outliers, which FP8 keeps; the second one even values, better in int8."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).clamp(-2, 2))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


@pytest.fixture
def inputs():
    x = torch.randn(32, 64)
    x[0, 0] = 2000.0
    return x


def calibrate(model, x, folder, formats=BOTH):
    qdq.swap_modules(model, x, formats=formats)
    qdq.rewire_operations(model, x, formats=formats)
    path = folder / "calibration.safetensors"
    qdq.calibrate_model(model, [x], method="max", statistics=path)
    return qdq.Statistics.load(path)


def choose(model, x, statistics, **options):
    return qdq.choose_formats(model, [x], statistics, **{"sm": 89, "method": "max", **options})


def test_each_layer_gets_the_format_with_the_smaller_error(inputs, tmp_path):
    model = Outliers().eval()
    expected = model(inputs).detach().numpy()
    statistics = calibrate(model, inputs, tmp_path)
    choice = choose(model, inputs, statistics)
    assert choice.formats == {"first": "fp8", "second": "int8"}
    assert model.first.input_quantizer.format.is_float
    assert model.first.weight_quantizer.format.is_float
    assert not model.second.input_quantizer.format.is_float

    # The same figures from models in one format.
    for entry in choice.choices:
        for formats, decibels in ((("int8",), entry.int8_db), (("fp8",), entry.fp8_db)):
            qdq.restore_modules(model)
            calibrate(model, inputs, tmp_path / str(formats), formats)
            (name,) = entry.layers
            qdq.disable_quantization(model)
            qdq.enable_quantization(model.get_submodule(name))
            output = model(inputs).detach().numpy()
            assert sqnr_db(expected, output) == pytest.approx(decibels, abs=1e-3)


def measure_mixes(model, x, statistics, layers):
    """SQNR of the whole model with each mix of formats, pinned by hand: formats of the layers -> dB."""
    with qdq.disable_quantization(model):
        expected = model(x).detach().numpy()
    decibels = {}
    for formats in itertools.product(BOTH, repeat=len(layers)):
        pinned = dict(zip(layers, formats, strict=True))
        choose(model, x, statistics, pinned=pinned)
        decibels[formats] = sqnr_db(expected, model(x).detach().numpy())
    return decibels


@pytest.mark.parametrize(
    "seed", [1, 3]
)  # with 3, layer 0 is better in FP8 alone, but not with the others
def test_the_choice_is_by_the_error_of_the_whole_model(seed, tmp_path):
    torch.manual_seed(seed)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]).eval()
    x = torch.randn(16, 32)
    x[0, 0] = 20.0
    statistics = calibrate(model, x, tmp_path)
    layers = ["0", "1", "2", "3"]
    choice = choose(model, x, statistics)
    expected = measure_mixes(model, x, statistics, layers)
    chosen = tuple(choice.formats[layer] for layer in layers)
    assert choice.int8_db == pytest.approx(expected[("int8",) * 4], abs=1e-3)
    assert choice.fp8_db == pytest.approx(expected[("fp8",) * 4], abs=1e-3)
    assert choice.chosen_db == pytest.approx(expected[chosen], abs=1e-3)
    assert choice.chosen_db >= max(choice.int8_db, choice.fp8_db)
    # The search again, by the table.
    start = max(("int8",) * 4, ("fp8",) * 4, key=expected.get)
    other = BOTH[1 - BOTH.index(start[0])]

    def gain(entry):
        noise = {"int8": 10 ** (-entry.int8_db / 10), "fp8": 10 ** (-entry.fp8_db / 10)}
        return noise[start[0]] - noise[other]

    for entry in sorted(choice.choices, key=gain, reverse=True):
        index = layers.index(entry.layers[0])
        candidate = (*start[:index], other, *start[index + 1 :])
        start = max(start, candidate, key=expected.get)
    assert chosen == start


class Killed(BaseException):
    """The process ends in the middle of a measurement."""


@pytest.fixture
def count_runs(monkeypatch):
    """Counts the measurements, and ends the process at one of them."""
    run = mixed._Trial._measure

    def count(kill_at=0):
        numbers = []

        def measure(self):
            numbers.append(len(numbers) + 1)
            if numbers[-1] == kill_at:
                raise Killed
            return run(self)

        monkeypatch.setattr(mixed._Trial, "_measure", measure)
        return numbers

    return count


def test_what_was_measured_for_another_gpu_is_not_measured_again(inputs, count_runs, tmp_path):
    model = Outliers().eval()
    statistics = calibrate(model, inputs, tmp_path)
    path = tmp_path / "analysis.jsonl"
    runs = count_runs()
    choose(copy.deepcopy(model), inputs, statistics, sm=75, path=path)  # nothing to choose
    assert not runs
    l4 = choose(copy.deepcopy(model), inputs, statistics, path=path)
    assert (
        len(runs) == 7
    )  # two layers alone and two formats for all; one of the two mixes was known
    rtx50 = choose(copy.deepcopy(model), inputs, statistics, sm=120, path=path)
    assert rtx50 == replace(l4, sm=120)
    assert len(runs) == 7


@pytest.mark.parametrize("kill_at", [1, 2, 4, 5, 6, 7])
def test_a_choice_that_was_killed_continues(kill_at, inputs, count_runs, tmp_path):
    model = Outliers().eval()
    statistics = calibrate(model, inputs, tmp_path)
    whole, killed, again = (copy.deepcopy(model) for _ in range(3))
    expected = choose(whole, inputs, statistics)
    path = tmp_path / "formats.jsonl"
    count_runs(kill_at)
    with pytest.raises(Killed):
        choose(killed, inputs, statistics, path=path)
    runs = count_runs()
    assert choose(again, inputs, statistics, path=path) == expected
    alone = min((kill_at - 1) // 2 * 2, 4)  # both formats of a layer are one line
    in_all = max(kill_at - 1 - 4, 0)
    assert len(runs) == 7 - alone - in_all
    for name, values in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], values), name
    torch.testing.assert_close(again(inputs), whole(inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda options: options.update(method="mse"),
        lambda options: options.update(weight_method="mse"),
        lambda options: options.update(pinned={"first": "int8"}),
        lambda options: options.update(outputs={"half": lambda named: named["output"][:, :32]}),
        lambda options: options["model"].second.weight.data.mul_(1.01),
        lambda options: options["x"].mul_(1.01),
    ],
)
def test_measurements_of_something_else_are_not_used(change, inputs, count_runs, tmp_path):
    model = Outliers().eval()
    statistics = calibrate(model, inputs, tmp_path)
    path = tmp_path / "formats.jsonl"
    choose(copy.deepcopy(model), inputs, statistics, path=path)
    options = {"model": copy.deepcopy(model), "x": inputs.clone(), "statistics": statistics}
    change(options)
    expected = choose(**(options | {"model": copy.deepcopy(options["model"])}))
    runs = count_runs()
    assert choose(**options, path=path) == expected
    assert runs


def test_a_file_that_cannot_be_written_is_refused(inputs, tmp_path):
    model = Outliers().eval()
    statistics = calibrate(model, inputs, tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match="cannot write"):
        choose(model, inputs, statistics, path=tmp_path)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_a_gpu_without_fp8_gets_int8_and_float_attention(tmp_path):
    x = torch.randn(2, 16, 64)
    model = Attention().eval()
    statistics = calibrate(model, x, tmp_path)
    choice = choose(model, x, statistics, sm=qdq.find_target_sm("t4"))
    site = "layer.scaled_dot_product_attention"
    assert choice.formats == {"layer": "int8", "layer.out_proj": "int8", site: "float"}
    assert "SM 75 has no FP8" in choice.format_table()
    assert qdq.export_onnx(model, x, tmp_path / "m.onnx").remainder == "fp32"


def test_plan_and_pins(inputs, tmp_path):
    model = Outliers().eval()
    statistics = calibrate(model, inputs, tmp_path)
    choice = choose(model, inputs, statistics, pinned={"first": "int8", "second": "fp8"})
    assert choice.formats == {"first": "int8", "second": "fp8"}
    plan = qdq.analyze_layers(model, [inputs]).plan
    assert plan.precisions == {"first": "int8", "second": "fp8"}
    path = qdq.save_plan(plan, tmp_path / "plan.yaml")
    assert qdq.load_plan(path).precisions == plan.precisions


class Heads(nn.Module):
    """Two of the layers have one input."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.query = nn.Linear(32, 32)
        self.key = nn.Linear(32, 32)
        self.last = nn.Linear(32, 32)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.query(x)) + torch.tanh(self.key(x)))


class Resized(nn.Module):
    """A resize that only the last layer reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3)
        self.second = nn.Conv2d(16, 16, 3)
        self.last = nn.Conv2d(16, 16, 3)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(x.reshape(-1, 16, 8, 8)))))
        return self.last(F.interpolate(x, scale_factor=2.0)).mean((2, 3))


def chain():
    return nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])


@pytest.mark.parametrize(
    ("build", "pins"), [(chain, ["3"]), (Heads, ["key"]), (Heads, ["[fk]*"]), (Resized, ["last"])]
)
def test_a_layer_pinned_to_float_is_float_while_the_others_are_chosen(build, pins, tmp_path):
    torch.manual_seed(3)
    model = build().eval()
    without = copy.deepcopy(model)
    x = torch.randn(64, 32)
    x[0, 0] = 20.0
    expected = model(x).detach().numpy()
    statistics = calibrate(model, x, tmp_path)
    pinned = dict.fromkeys(pins, "float")
    choice = choose(model, x, statistics, pinned=pinned)

    # The choice in a model without these quantizers.
    qdq.swap_modules(without, x, exclude=pins, formats=BOTH)
    qdq.rewire_operations(without, x, exclude=pins, formats=BOTH)
    qdq.calibrate_model(without, [x], method="max", statistics=tmp_path / "without.safetensors")
    truth = choose(without, x, qdq.Statistics.load(tmp_path / "without.safetensors"))
    chosen = {name: form for name, form in choice.formats.items() if form != "float"}
    assert chosen == truth.formats
    for figure in ("int8_db", "fp8_db", "chosen_db"):
        assert getattr(choice, figure) == pytest.approx(getattr(truth, figure), abs=1e-6)
    reasons = {name: entry.reason for entry in choice.choices for name in entry.layers}
    floats = choice.formats.keys() - chosen.keys()
    assert all(reasons[name] == "pinned by the plan" for name in floats - {"interpolate"})
    assert reasons.get("interpolate", "nothing quantized reads its result").startswith("nothing")

    # For another GPU the choice is the same. The analysis finds all layers on, and agrees on those in float.
    again = choose(model, x, statistics, pinned=pinned, sm=120)
    assert again.formats == choice.formats
    plan = qdq.analyze_layers(model, [x], pinned=pinned).plan
    assert {name for name, form in plan.precisions.items() if form == "float"} == floats
    assert sqnr_db(expected, model(x).detach().numpy()) == pytest.approx(choice.chosen_db, abs=1e-6)


def test_the_table_names_a_group_by_its_first_layer():
    group = LayerFormat(("query", "key", "value"), "int8", "the smaller error", 40.0, 30.25)
    single = LayerFormat(("last",), "float", "pinned by the plan")
    _, first, second = FormatChoice(89, (group, single)).format_table().splitlines()
    assert first == "  query and 2 more  int8     40.00    30.25  the smaller error"
    assert second == "  last              float        -        -  pinned by the plan"


class TwoOutputs(nn.Module):
    """The first row, which has an outlier, and the others, whose error is large if int8 has its range."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)

    def forward(self, x):
        x = self.first(x)
        return {"outlier": x[:1], "others": x[1:]}


def test_weights_say_which_outputs_decide(inputs, tmp_path):
    inputs[0, 0] = 40.0
    model = TwoOutputs().eval()
    expected = model(inputs)["outlier"].detach().numpy()
    statistics = calibrate(model, inputs, tmp_path)
    with pytest.raises(ArgumentError, match="weights names other;"):
        choose(model, inputs, statistics, weights={"other": 1.0})
    assert choose(model, inputs, statistics).formats == {"first": "fp8"}
    choice = choose(model, inputs, statistics, weights={"outlier": 1.0})
    assert choice.formats == {"first": "int8"}
    output = model(inputs)["outlier"].detach().numpy()
    assert sqnr_db(expected, output) == pytest.approx(choice.chosen_db, abs=1e-3)


def test_what_does_not_fit_is_refused(inputs, tmp_path):
    model = Outliers().eval()
    statistics = calibrate(model, inputs, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match="'entropy' is for integer codes"):
        choose(model, inputs, statistics, method="entropy")
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(ArgumentError, match="'third' to fp8"):
        choose(model, inputs, statistics, pinned={"third": "fp8"})
    with pytest.raises(ArgumentError, match="target is 'v100'"):
        qdq.find_target_sm("v100")
    with pytest.raises(ArgumentError, match="formats is"):
        qdq.parse_formats("int8,int4")
    assert qdq.parse_formats("fp8, int8") == BOTH


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(16, 16, 3, padding=1)
        self.b0 = Block()
        self.head = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.head(self.b0(torch.relu(self.stem(x)))).mean((2, 3))


def name_formats(model):
    """Layer -> the formats of its input and weight."""
    formats = {}
    for name, layer in quantized_layers(model).items():
        quantizers = layer.quantizers().values()
        formats[name] = {quantizer.format.name for quantizer in quantizers}
    return formats


@pytest.mark.parametrize("fp8", ["b0.conv1", "b0.conv2"])
def test_fp8_of_one_layer_leaves_the_layers_of_other_groups_in_int8(fp8, tmp_path):
    x = torch.randn(2, 16, 8, 8)
    model = Residual().eval()
    statistics = calibrate(model, x, tmp_path)
    leader = model.b0.conv1.input_quantizer
    assert model.b0._add_quantizer.leader is leader
    pinned = {"stem": "int8", "b0.*": "int8", "head": "int8", fp8: "fp8"}
    choice = choose(model, x, statistics, pinned=pinned)
    assert name_formats(model) == {name: {chosen} for name, chosen in choice.formats.items()}
    assert choice.formats[fp8] == "fp8"
    assert (
        not model.b0._add_quantizer.is_enabled
    )  # FP8 computes no sum, and int8 cannot share its range


def test_the_figure_of_fp8_is_without_the_shortcut_that_it_switches_off(tmp_path):
    x = torch.randn(2, 16, 8, 8)
    model = Residual().eval()
    expected = model(x).detach().numpy()
    statistics = calibrate(model, x, tmp_path)
    choice = choose(model, x, statistics)
    (measured,) = (entry.fp8_db for entry in choice.choices if entry.layers == ("b0.conv2",))
    choose(model, x, statistics, pinned={"b0.conv2": "fp8"})
    qdq.disable_quantization(model)
    qdq.enable_quantization(model.b0.conv2)
    assert sqnr_db(expected, model(x).detach().numpy()) == pytest.approx(measured, abs=1e-3)


@pytest.mark.parametrize("begin", [BOTH, ("fp8", "int8")])
def test_a_saved_model_of_both_formats_is_loaded_into_a_freshly_swapped_one(begin, tmp_path):
    x = torch.randn(2, 16, 8, 8)
    torch.manual_seed(0)
    model = Residual().eval()
    statistics = calibrate(model, x, tmp_path)
    choose(model, x, statistics, pinned={"stem": "fp8", "b0.*": "int8", "head": "fp8"})
    path = qdq.save_tuned(model, tmp_path / "tuned.safetensors")
    loaded = Residual().eval()
    qdq.swap_modules(loaded, x, formats=begin)
    qdq.rewire_operations(loaded, x, formats=begin)
    qdq.load_tuned(loaded, path)
    assert name_formats(loaded) == name_formats(model)
    assert torch.equal(loaded(x), model(x))
    qdq.load_tuned(loaded, path)  # into one that has these formats already
    assert torch.equal(loaded(x), model(x))


def test_a_second_choice_is_that_of_a_new_model(inputs, tmp_path):
    model = Outliers().eval()
    statistics = calibrate(model, inputs, tmp_path)
    int8_output = model(inputs)
    first = choose(model, inputs, statistics)
    assert choose(model, inputs, statistics) == first
    second = choose(model, inputs, statistics, sm=75)
    assert second.formats == {"first": "int8", "second": "int8"}
    assert torch.equal(model(inputs), int8_output)  # ranges of weights are per channel again


def test_the_order_of_the_formats_changes_nothing(inputs, tmp_path):
    model = Outliers().eval()
    first = choose(model, inputs, calibrate(model, inputs, tmp_path / "int8 first"))
    output = model(inputs)
    qdq.restore_modules(model)
    second = choose(model, inputs, calibrate(model, inputs, tmp_path / "fp8 first", BOTH[::-1]))
    assert second == first
    assert torch.equal(model(inputs), output)


class Called(nn.Module):
    """A layer that reads what a call reads, two that read one tensor, and a call with a weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.query = nn.Linear(16, 16)
        self.key = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = self.last(F.interpolate(x, scale_factor=2.0)) + F.interpolate(
            self.up(x), scale_factor=2.0
        )
        x = torch.tanh(x).mean((2, 3))
        return F.linear(torch.tanh(self.query(x) + self.key(x).exp()), self.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pinned": {"up": "fp8"}}, "up is pinned to fp8, which it cannot have: a function call"),
        ({"pinned": {"query": "fp8", "key": "int8"}}, "query is pinned to fp8 and key to int8"),
        ({"pinned": {"query": "fp16"}}, "query is pinned to 'fp16'"),
        ({"pinned": {"query": "fp8"}, "sm": 86}, "query is pinned to fp8, .*: SM 86 has no FP8"),
        ({"weight_method": "bogus"}, "unknown weight method 'bogus'"),
        ({"method": "laplace", "sm": 75}, "'laplace' is for integer codes"),
    ],
)
def test_invalid_pins_and_methods_are_refused_before_anything_changes(options, message, tmp_path):
    x = torch.randn(2, 16, 4, 4)
    model = Called().eval()
    statistics = calibrate(model, x, tmp_path)
    before = name_formats(model)
    with pytest.raises(ArgumentError, match=message):
        choose(model, x, statistics, **options)
    assert name_formats(model) == before


@pytest.mark.parametrize(("formats", "pin"), [(("int8",), "fp8"), (("fp8",), "int8")])
def test_the_analysis_takes_no_pin_to_another_format(formats, pin, inputs, tmp_path):
    model = Outliers().eval()
    calibrate(model, inputs, tmp_path, formats)
    with pytest.raises(ArgumentError, match=f"second is pinned to {pin}, but it is quantized to"):
        qdq.analyze_layers(model, [inputs], pinned={"second": pin})
    plan = qdq.analyze_layers(model, [inputs], pinned={"second": formats[0]}).plan
    assert plan.precisions == {"first": formats[0], "second": formats[0]}


def test_attention_that_the_target_left_in_float_may_be_pinned_to_float(tmp_path):
    x = torch.randn(2, 16, 64)
    model = Attention().eval()
    statistics = calibrate(model, x, tmp_path)
    choose(model, x, statistics, sm=75)
    pinned = {"layer.scaled_dot_product_attention": "float"}
    assert qdq.analyze_layers(model, [x], pinned=pinned, max_float_layers=0).layers


def test_sm_is_a_whole_number(inputs, tmp_path):
    model = Outliers().eval()
    with pytest.raises(ArgumentTypeError, match="sm is '89'"):
        choose(model, inputs, calibrate(model, inputs, tmp_path), sm="89")


class Calls(nn.Module):
    """Two linear layers as calls: the first reads outliers, the second even values."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(64, 64))
        self.second = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        hidden = F.layer_norm(F.linear(x, self.first), [64])
        return hidden.clamp(-2, 2) @ self.second


def test_calls_with_a_weight_have_a_format_each(inputs, tmp_path):
    model = Calls().eval()
    expected = model(inputs).detach().numpy()
    statistics = calibrate(model, inputs, tmp_path)
    int8_output = model(inputs)
    choice = choose(model, inputs, statistics)
    assert choice.formats == {"linear": "fp8", "matmul": "int8"}
    path = qdq.save_tuned(model, tmp_path / "tuned.safetensors")
    chosen_output = model(inputs)

    # The figures of FP8 from a model that is rewired for FP8 alone.
    alone = Calls().eval()
    alone.load_state_dict(dict(model.named_parameters()))
    calibrate(alone, inputs, tmp_path / "alone", ("fp8",))
    for entry in choice.choices:
        (name,) = entry.layers
        with qdq.disable_quantization(alone):
            for quantizer in vars(alone)["_modules"].values():
                quantizer.is_enabled = quantizer.name.startswith(f"_{name}_")
            output = alone(inputs).detach().numpy()
        assert sqnr_db(expected, output) == pytest.approx(entry.fp8_db, abs=1e-3)

    # Ranges of weights are per channel again.
    choose(model, inputs, statistics, sm=75)
    assert torch.equal(model(inputs), int8_output)
    qdq.load_tuned(model, path)
    assert torch.equal(model(inputs), chosen_output)
    file = qdq.export_onnx(model, inputs, tmp_path / "m.onnx", precision="fp32").path
    assert sqnr_db(chosen_output.detach().numpy(), qdq.predict(file, [inputs])) > 100
    types = [layer.promised for layer in qdq.check_onnx(file).coverage.layers]
    assert types == ["FP8", "Int8"]


def test_a_call_of_a_large_convolution_stays_in_int8(tmp_path):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16, 7, 7))

        def forward(self, x):
            return F.conv2d(torch.tanh(x), self.weight).mean((2, 3))

    x = torch.randn(2, 16, 8, 8)
    model = Large().eval()
    choice = choose(model, x, calibrate(model, x, tmp_path))
    assert choice.formats == {"conv2d": "int8"}
    assert "kernel 7 x 7" in choice.format_table()
    qdq.restore_modules(model)
    with pytest.raises(ArgumentError, match="no function call that a rule quantizes"):
        qdq.rewire_operations(model, x, formats=("fp8",))
