import copy
import dataclasses
import inspect
import json
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended_device import list_waits, watch
from processes import Processes
from torch import nn

from qdq import (
    ArgumentError,
    DataError,
    StateError,
    analyze_layers,
    calibrate_model,
    correct_bias,
    enable_quantization,
    rewire_operations,
    swap_modules,
)
from qdq.accuracy import bias
from qdq.analyze import MODES, check_options, probe
from qdq.cli.analyze import AnalysisOptions
from qdq.metrics import sqnr_db
from qdq.quantizer import disable_quantization, named_quantizers, toggling
from qdq.swap import quantized_layers, restore_modules
from qdq.units import find_units, group_units


@pytest.fixture
def batches():
    return [torch.randn(4, 3, 12, 12), torch.randn(4, 3, 12, 12)]


def outputs(model, batches):
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches]).numpy()


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_equals_a_loop_over_copies(quantized, batches, mode):
    analysis = analyze_layers(quantized, batches, mode=mode)
    reference = copy.deepcopy(quantized)
    restore_modules(reference)
    expected = outputs(reference, batches)
    assert analysis.sqnr_db == pytest.approx(
        sqnr_db(expected, outputs(quantized, batches)), abs=1e-6
    )
    assert {layer.name for layer in analysis.layers} == {"stem", "conv", "head"}
    for layer in analysis.layers:
        twin = copy.deepcopy(quantized)
        if mode == "one-at-a-time":
            for name in {"stem", "conv", "head"} - {layer.name}:
                restore_modules(twin.get_submodule(name))
        else:
            restore_modules(twin.get_submodule(layer.name))
        assert layer.sqnr_db == pytest.approx(sqnr_db(expected, outputs(twin, batches)), abs=1e-6)
    order = [layer.sqnr_db for layer in analysis.layers]
    assert order == sorted(order, reverse=mode == "leave-one-out")


def test_only_ranks_by_default(quantized, batches):
    analysis = analyze_layers(quantized, batches)
    assert analysis.float_layers == []
    assert all(quantizer.is_enabled for _, quantizer in named_quantizers(quantized))


def test_switches_the_worst_off(quantized, batches):
    analysis = analyze_layers(quantized, batches, max_float_layers=2, max_float_share=1)
    assert len(analysis.float_layers) == 2
    assert analysis.float_layers[0] == analysis.layers[0].name
    for name, layer in quantized_layers(quantized).items():
        assert layer.input_quantizer.is_enabled == (name not in analysis.float_layers)
        assert layer.weight_quantizer.is_enabled == (name not in analysis.float_layers)
    assert analysis.steps[-1].sqnr_db > analysis.sqnr_db


def test_all_layers_off_is_the_float_model(quantized, batches):
    analysis = analyze_layers(quantized, batches, max_float_layers=10, max_float_share=1)
    assert len(analysis.steps) == 3
    assert analysis.steps[-1].sqnr_db == float("inf")


def test_stops_at_the_target(quantized, batches):
    base = analyze_layers(quantized, batches)
    target = base.sqnr_db + 0.01
    analysis = analyze_layers(
        quantized, batches, target_sqnr=target, max_float_layers=3, max_float_share=1
    )
    assert len(analysis.steps) == 1
    assert "reaches the target" in analysis.stopped_by


def test_target_reached_before_the_first_step(quantized, batches):
    analysis = analyze_layers(
        quantized, batches, target_sqnr=1.0, max_float_layers=3, max_float_share=1
    )
    assert analysis.float_layers == []


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_metric_of_the_caller_ranks(quantized, batches, mode):
    def metric(model):
        # a metric that likes float "head" best, whatever the SQNR says
        return float(not model.head.input_quantizer.is_enabled)

    options = {
        "metric": metric,
        "target_metric": 1.0,
        "max_float_layers": 3,
        "max_float_share": 1,
        "mode": mode,
    }
    analysis = analyze_layers(quantized, batches, **options)
    assert analysis.layers[0].name == "head"
    assert analysis.float_layers == ["head"]
    assert analysis.metric == 0


def test_disabled_layers_stay_so_and_are_not_ranked(quantized, batches):
    disable_quantization(quantized.conv)
    analysis = analyze_layers(quantized, batches)
    assert {layer.name for layer in analysis.layers} == {"stem", "head"}
    assert not quantized.conv.input_quantizer.is_enabled


def test_disabled_quantizer_of_a_layer_stays_so(quantized, batches):
    quantized.conv.input_quantizer.disable()
    analyze_layers(quantized, batches)
    assert not quantized.conv.input_quantizer.is_enabled
    assert quantized.conv.weight_quantizer.is_enabled


def test_interruption_leaves_the_model_as_it_was(quantized, batches):
    calls = []

    def metric(model):
        calls.append(1)
        if len(calls) == 6:  # all int8, three layers, then the second step of the search
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        analyze_layers(quantized, batches, metric=metric, max_float_layers=3, max_float_share=1)
    assert all(quantizer.is_enabled for _, quantizer in named_quantizers(quantized))


def test_table_and_json(quantized, batches, tmp_path):
    analysis = analyze_layers(quantized, batches, max_float_layers=1, max_float_share=1)
    table = analysis.format_table(rows=2)
    assert analysis.layers[0].name in table
    assert "1 less sensitive" in table
    content = json.loads(analysis.save(tmp_path / "analysis.json").read_text())
    assert [layer["name"] for layer in content["layers"]] == [
        layer.name for layer in analysis.layers
    ]


def test_bad_input(quantized, residual, batches):
    with pytest.raises(DataError, match="no batch"):
        analyze_layers(quantized, [])
    with pytest.raises(ArgumentError, match="one-at-a-time"):
        analyze_layers(quantized, batches, mode="loo")
    with pytest.raises(ArgumentError, match="target_metric"):
        analyze_layers(quantized, batches, target_metric=0.5)
    with pytest.raises(ArgumentError, match="-1"):
        analyze_layers(quantized, batches, max_float_layers=-1)


def test_uncalibrated(residual, batches):
    with pytest.raises(StateError, match="no layer"):
        analyze_layers(residual, batches)
    swap_modules(residual)
    with pytest.raises(StateError, match="no amax"):
        analyze_layers(residual, batches)


def test_nan_outputs_are_an_error(quantized, batches):
    quantized.head.bias.data[0] = float("nan")
    with pytest.raises(StateError, match="NaN"):
        analyze_layers(quantized, batches)


class Deep(nn.Module):
    """Three residual blocks and a head: shortcuts, groups and a clear order of sensitivity."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"a": nn.Conv2d(16, 16, 3, padding=1), "b": nn.Conv2d(16, 16, 3, padding=1)}
            )
            for _ in range(3)
        )
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = x + block["b"](torch.relu(block["a"](x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def deep():
    model = Deep().eval()
    data = [torch.randn(4, 3, 10, 10) for _ in range(3)]
    swap_modules(model, data[0], include=["*"])
    rewire_operations(model, data[0])
    calibrate_model(model, data, method="max")
    return model, data


def reference_of(model, batches):
    with disable_quantization(model):
        return outputs(model, batches)


def naive(model, batches, units, mode):
    """SQNR of every unit alone by a loop of full evaluations."""
    reference, values = reference_of(model, batches), {}
    for unit in units:
        if mode == "one-at-a-time":
            with disable_quantization(model):
                for quantizer in unit.quantizers:
                    quantizer.enable()
                values[unit.name] = sqnr_db(reference, outputs(model, batches))
        else:
            with toggling(unit.quantizers):
                values[unit.name] = sqnr_db(reference, outputs(model, batches))
    return values


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
@pytest.mark.parametrize("groups", [None, "block", "shared", ["blocks.*.a", "re:stem|head"]])
def test_equals_the_naive_loop(deep, mode, groups):
    model, batches = deep
    units = group_units(model, find_units(model, batches[0]), groups)
    expected = naive(model, batches, units, mode)
    analysis = analyze_layers(model, batches, mode=mode, groups=groups)
    assert analysis.full_evaluations == ""
    assert {layer.name: layer.sqnr_db for layer in analysis.layers} == pytest.approx(
        expected, abs=1e-9
    )
    assert all(layer.gain_low <= layer.gain_high for layer in analysis.layers)


def test_a_shortcut_goes_with_its_convolution(deep):
    model, batches = deep
    units = {unit.name: unit for unit in find_units(model, batches[0])}
    for block in range(3):
        assert units[f"blocks.{block}.b"].calls == (("add", "add_1", "add_2")[block],)
    assert "add" not in units
    analyze_layers(model, batches, pinned={"blocks.1.b": "float"})
    assert not model._add_1_quantizer.is_enabled
    assert model._add_quantizer.is_enabled


def test_groups(deep):
    model, batches = deep
    units = group_units(model, find_units(model, batches[0]), "block")
    assert {unit.name: unit.layers for unit in units} == {
        "stem": ("stem",),
        **{f"blocks.{n}": (f"blocks.{n}.a", f"blocks.{n}.b") for n in range(3)},
        "head": ("head",),
    }
    with pytest.raises(ArgumentError, match="matches no quantized layer"):
        analyze_layers(model, batches, groups=["nothing.*"])
    with pytest.raises(ArgumentError, match="blocks"):
        analyze_layers(model, batches, groups="blocks")


def expected_metric(name, reference, actual, labels):
    reference, actual = reference.astype(np.float64), actual.astype(np.float64)
    if name == "cosine":
        return (reference * actual).sum() / np.linalg.norm(reference) / np.linalg.norm(actual)
    if name == "top1":
        return (actual.argmax(1) == labels).mean()

    def softmax(x):
        return np.exp(x - x.max(1, keepdims=True)) / np.exp(x - x.max(1, keepdims=True)).sum(
            1, keepdims=True
        )

    p, q = softmax(reference), softmax(actual)
    return (p * np.log(p / q)).sum(1).mean()


@pytest.mark.parametrize("name", ["cosine", "kl", "top1"])
def test_metrics_of_the_outputs(deep, name):
    model, images = deep
    labels = torch.randint(0, 16, (12,))
    batches = list(zip(images, labels.split(4), strict=True))
    reference, actual = reference_of(model, images), outputs(model, images)
    analysis = analyze_layers(model, batches, metric=name, mode="leave-one-out")
    assert analysis.metric == pytest.approx(
        expected_metric(name, reference, actual, labels.numpy()), rel=1e-6
    )
    best = analysis.layers[0]
    sign = -1 if name == "kl" else 1
    assert best.gain == pytest.approx(sign * (best.metric - analysis.metric))
    assert best.gain == max(layer.gain for layer in analysis.layers)
    assert name in analysis.format_table()


def test_a_metric_that_is_better_when_lower(deep):
    model, batches = deep

    def loss(model):
        return float(sum(quantizer.is_enabled for _, quantizer in named_quantizers(model)))

    options = {"metric": loss, "higher_is_better": False, "mode": "leave-one-out"}
    analysis = analyze_layers(model, batches, max_float_layers=1, max_float_share=1, **options)
    assert analysis.steps[0].metric < analysis.metric  # a residual convolution has three quantizers
    assert analysis.layers[0].gain == 3
    assert analysis.metric_name.endswith("loss")


def test_bootstrap_holds_the_gain_and_narrows_with_more_samples(deep):
    model, _ = deep
    widths = []
    for count in (2, 20):
        analysis = analyze_layers(
            model, [torch.randn(4, 3, 10, 10) for _ in range(count)], mode="leave-one-out"
        )
        assert all(layer.gain_low <= layer.gain <= layer.gain_high for layer in analysis.layers)
        widths.append(np.mean([layer.gain_high - layer.gain_low for layer in analysis.layers]))
    assert widths[1] < widths[0]
    assert analyze_layers(model, [torch.randn(1, 3, 10, 10)]).layers[0].gain_low is None


def test_greedy_measures_anew_after_each_step(deep):
    model, batches = deep
    reference = reference_of(model, batches)
    units = find_units(model, batches[0])
    chosen = []
    with ExitStack() as states:
        for _ in range(3):
            values = {}
            for unit in units:
                if unit.name not in chosen:
                    with toggling(unit.quantizers):
                        values[unit.name] = sqnr_db(reference, outputs(model, batches))
            chosen.append(max(values, key=values.get))
            states.enter_context(
                toggling(next(unit.quantizers for unit in units if unit.name == chosen[-1]))
            )
        last = max(values.values())
    analysis = analyze_layers(
        model, batches, mode="leave-one-out", max_float_layers=3, max_float_share=1
    )
    assert [step.layer for step in analysis.steps] == chosen
    assert analysis.steps[-1].sqnr_db == pytest.approx(last, abs=1e-9)
    assert sqnr_db(reference, outputs(model, batches)) == pytest.approx(last, abs=1e-9)


def test_many_layers_are_screened_by_default(deep, monkeypatch):
    model, batches = deep
    monkeypatch.setattr("qdq.analyze.options.SCREENED_FROM", 8)
    monkeypatch.setattr("qdq.analyze.options._MEASURED_WHEN_SCREENED", 3)
    screened = analyze_layers(model, batches)
    by_hand = analyze_layers(model, batches, confirm=3)
    assert [layer.is_exact for layer in screened.layers] == [True] * 3 + [False] * 5
    assert [layer.name for layer in screened.layers] == [layer.name for layer in by_hand.layers]
    assert "5 of 8 are estimated, not measured; confirm=8 measures all" in screened.format_table()

    for options in ({"confirm": 8}, {"groups": ["blocks.0.*"]}, {"max_float_layers": 4}):
        exact = analyze_layers(model, batches, **options)
        assert all(layer.is_exact for layer in exact.layers)
        assert "estimated" not in exact.format_table()
    with torch.inference_mode():  # no gradients, so no estimate
        assert all(layer.is_exact for layer in analyze_layers(model, batches).layers)


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_screen_and_confirm(deep, mode):
    model, batches = deep
    # A bad range.
    model.blocks[1]["a"].weight_quantizer.amax = model.blocks[1]["a"].weight_quantizer.amax * 40
    exact = analyze_layers(model, batches, mode=mode)
    assert exact.layers[0].name == "blocks.1.a"
    screened = analyze_layers(model, batches, mode=mode, confirm=0)
    assert screened.layers[0].name == "blocks.1.a"
    assert not any(layer.is_exact for layer in screened.layers)
    confirmed = analyze_layers(
        model, batches, mode=mode, confirm=2, max_float_layers=1, max_float_share=1
    )
    assert [layer.is_exact for layer in confirmed.layers] == [True, True] + [False] * 6
    expected = {layer.name: layer.sqnr_db for layer in exact.layers}
    assert all(
        layer.sqnr_db == pytest.approx(expected[layer.name]) for layer in confirmed.layers[:2]
    )
    assert confirmed.float_layers == ["blocks.1.a"]
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


def test_pinned(deep):
    model, batches = deep
    analysis = analyze_layers(
        model,
        batches,
        pinned={"stem": "float", "blocks.*": "int8"},
        max_float_layers=4,
        max_float_share=1,
    )
    assert [layer.name for layer in analysis.layers] == ["head"]
    assert analysis.float_layers == ["stem", "head"]
    assert analysis.plan.precisions["blocks.0.a"] == "int8"
    with pytest.raises(ArgumentError, match="steam"):
        analyze_layers(model, batches, pinned={"steam": "float"})
    with pytest.raises(ArgumentError, match="fp16"):
        analyze_layers(model, batches, pinned={"stem": "fp16"})


def test_costs_and_the_pareto_front(deep):
    model, batches = deep
    analysis = analyze_layers(
        model, batches, mode="leave-one-out", max_float_layers=3, max_float_share=1, gpu="orin"
    )
    macs = {layer.name: layer.macs for layer in analysis.layers}
    assert macs["stem"] == 4 * 10 * 10 * 16 * 3 * 9
    assert macs["head"] == 4 * 16 * 16
    front = analysis.pareto
    assert [point.cost for point in front] == sorted(point.cost for point in front)
    assert [point.sqnr_db for point in front] == sorted(point.sqnr_db for point in front)
    assert front[0].float_layers == ()
    assert analysis.format_table().splitlines()[-1].split()[1] == f"{front[-1].sqnr_db:.2f}"
    with pytest.raises(ArgumentError, match="a100"):
        analyze_layers(model, batches, gpu="voodoo2")


def test_costs_from_an_engine(deep, tmp_path):
    model, batches = deep
    path = tmp_path / "profile.json"
    path.write_text(json.dumps([{"count": 3}, {"name": "/stem/Conv + /Relu", "averageMs": 0.5}]))
    layers = {layer.name: layer for layer in analyze_layers(model, batches, profile=path).layers}
    assert layers["stem"].cost == pytest.approx(500)
    path.write_text("[]")
    with pytest.raises(DataError, match="no layer"):
        analyze_layers(model, batches, profile=path)
    path.write_text("not json")
    with pytest.raises(DataError, match="not an engine profile"):
        analyze_layers(model, batches, profile=path)


def test_share_drop_and_budget(deep):
    model, batches = deep
    analysis = analyze_layers(model, batches, max_float_layers=9, max_float_share=0.2)
    macs = {layer.name: layer.macs for layer in analysis.layers}
    assert 0 < sum(macs[name] for name in analysis.float_layers) <= 0.2 * sum(macs.values())
    enable_quantization(model)
    reached = analyze_layers(
        model, batches, metric="kl", target_drop=1e9, max_float_layers=3, max_float_share=1
    )
    assert not reached.steps and "worse than the float model" in reached.stopped_by
    short = analyze_layers(model, batches, max_float_layers=3, max_float_share=1, budget=1e-9)
    assert short.images == 4 and len(short.steps) <= 1


def test_options_of_the_command_line_are_arguments():
    """Every option says the same to `analyze_layers` as the argument of its name."""
    parameters = inspect.signature(analyze_layers).parameters
    options = AnalysisOptions()
    names = {field.name for field in dataclasses.fields(options)}
    assert names - {"rank_by"} | {"metric"} < parameters.keys()
    for name, value in options.as_arguments().items():
        default = 4 if name == "max_float_layers" else parameters[name].default
        assert (value or None) == (default or None) or (name, value) == ("metric", "sqnr"), name
    assert AnalysisOptions(groups=("block",)).as_arguments()["groups"] == "block"
    assert AnalysisOptions(groups=("block*", "head")).as_arguments()["groups"] == ["block*", "head"]


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0},
        {"budget": float("nan")},
        {"confirm": -1},
        {"confirm": 1.5},
        {"max_float_share": 1.5},
        {"max_float_share": float("nan")},
        {"max_float_share": 0.5, "max_float_layers": 0},
        {"metric": "accuracy"},
        {"target_drop": 1.0},
        {"target_drop": -1.0, "metric": "kl"},
        {"target_drop": float("nan"), "metric": "kl"},
        {"target_metric": float("inf"), "metric": "kl"},
        {"target_sqnr": float("nan")},
        {"target_sqnr": 20.0, "max_float_layers": 0},
        {"max_float_layers": 2.5},
        {"max_float_layers": True},
        {"gpu": "orin", "profile": "profile.json"},
        {"groups": ["blocks.*", "blocks.1.*"]},
    ],
)
def test_more_bad_input(deep, options):
    options = {"max_float_layers": 2, **options}
    with pytest.raises(ArgumentError):
        analyze_layers(*deep, **options)
    # Patterns are compared with the model; the rest is refused before there is one.
    if "groups" not in options:
        with pytest.raises(ArgumentError):
            check_options(**options)


def test_a_pattern_behind_a_larger_one_says_so(deep):
    with pytest.raises(ArgumentError, match="only layers of the groups before it"):
        analyze_layers(*deep, groups=["blocks.*", "blocks.1.*"])


def test_top1_is_refused_before_the_recipe_begins():
    with pytest.raises(ArgumentError, match="labels"):
        AnalysisOptions(rank_by="top1").check_labels(None)
    AnalysisOptions(rank_by="top1").check_labels([1, 2])
    AnalysisOptions().check_labels(None)


@pytest.mark.parametrize("value", [None, torch.tensor([1.0, 2.0]), float("nan"), "much"])
def test_a_function_that_gives_no_number(deep, value):
    with pytest.raises(StateError, match="have it return a number"):
        analyze_layers(*deep, metric=lambda _: value)


def energies_of(model, batches, units):
    """Error of the outputs with all units in int8, and with each of them alone, of every sample."""
    reference = reference_of(model, batches).astype(np.float64)
    all_of_them = ((outputs(model, batches) - reference) ** 2).sum(1)
    alone = {}
    for unit in units:
        with disable_quantization(model), toggling(unit.quantizers):
            alone[unit.name] = ((outputs(model, batches) - reference) ** 2).sum(1)
    return all_of_them, alone


def test_the_gain_of_a_layer_alone_is_what_sqnr_rises_without_its_error(deep):
    model, batches = deep
    noise, alone = energies_of(model, batches, find_units(model, batches[0]))
    total = max(noise.sum(), sum(alone.values()).sum())
    for layer in analyze_layers(model, batches).layers:
        expected = -10 * np.log10(1 - alone[layer.name].sum() / total)
        assert layer.gain == pytest.approx(expected, rel=1e-6)
        assert layer.gain_low <= layer.gain <= layer.gain_high


def test_both_modes_mean_the_same_by_gain(deep):
    """Of one layer with most of the error the estimate is close to the measurement."""
    model, batches = deep
    model.blocks[1]["a"].weight_quantizer.amax = model.blocks[1]["a"].weight_quantizer.amax * 40
    (estimated, *_), (measured, *_) = (
        analyze_layers(model, batches, mode=mode).layers for mode in MODES
    )
    assert estimated.name == measured.name
    assert estimated.gain == pytest.approx(measured.gain, rel=0.25)
    steps = analyze_layers(model, batches, max_float_layers=1, max_float_share=1)
    assert steps.plan.layers[measured.name].reason == (
        f"step 1 of the search: sqnr {steps.sqnr_db:.4g} -> {steps.steps[0].sqnr_db:.4g}; "
        "one-at-a-time: rank 1 of 8, measured"
    )


@pytest.mark.parametrize("mode", MODES)
def test_one_layer_makes_all_of_the_error(mode):
    model, batches = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval(), [torch.randn(4, 16)]
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    (layer,) = analyze_layers(model, batches, mode=mode).layers
    assert layer.gain == float("inf")
    assert layer.gain_low == layer.gain_high == float("inf")


def test_where_there_is_no_error_nothing_is_gained(deep):
    model, batches = deep
    model.head.weight.data.zero_()
    model.head.bias.data.zero_()
    assert {layer.gain for layer in analyze_layers(model, batches).layers} == {0.0}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_makes_it_worse_is_not_taken(deep, mode):
    model, batches = deep
    reference = torch.tensor(reference_of(model, batches[:1]))

    def distance(model):
        return float((torch.tensor(outputs(model, batches[:1])) - reference).abs().sum())

    # More is "better".
    analysis = analyze_layers(
        model, batches, metric=distance, mode=mode, max_float_layers=8, max_float_share=1
    )
    values = [analysis.metric, *(step.metric for step in analysis.steps)]
    assert values == sorted(values)
    assert len(analysis.steps) < 8
    assert analysis.stopped_by == "no further layer improves the outputs"
    assert distance(model) == values[-1]


def test_top1_without_labels(deep):
    with pytest.raises(DataError, match="label"):
        analyze_layers(*deep, metric="top1")


def test_a_journal_is_read_and_a_torn_line_ignored(deep, tmp_path):
    model, batches = deep
    path = tmp_path / "analysis.jsonl"
    complete = analyze_layers(model, batches, path=path)
    lines = path.read_text().splitlines()
    assert len(lines) == (1 + 1 + 8) * 3
    path.write_text("\n".join(lines[:7]) + "\n" + lines[8][:30])
    assert analyze_layers(model, batches, path=path) == complete
    assert len(path.read_text().splitlines()) == len(lines) + 1
    model.head.bias.data += 1  # another model: nothing that is known holds
    of_another_model = analyze_layers(model, batches, path=path)
    assert of_another_model.sqnr_db != complete.sqnr_db
    with pytest.raises(ArgumentError, match="cannot write"):
        analyze_layers(model, batches, path=tmp_path)


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_analyze import Deep
from qdq import analyze_layers, calibrate_model, rewire_operations, swap_modules
torch.manual_seed(0)
model, data = Deep().eval(), [torch.randn(4, 3, 10, 10) for _ in range(3)]
swap_modules(model, data[0], include=["*"])
rewire_operations(model, data[0])
calibrate_model(model, data, method="max")
path = Path(sys.argv[2])
options = {"mode": "leave-one-out", "max_float_layers": 3, "max_float_share": 1}
analysis = analyze_layers(model, data, path=path / "analysis.jsonl", **options)
analysis.save(path / f"result{sys.argv[3]}.json")
"""


# They share the run that nobody stops.
PROCESSES = pytest.mark.xdist_group("processes of an analysis")


@pytest.fixture
def run_script(processes):
    """Starts the script: folder, rank, environment."""

    def start(folder, rank="", **environment):
        arguments = ("-c", SCRIPT, Path(__file__).parent, folder, rank)
        return processes.start(*arguments, environment=environment, stderr=subprocess.DEVNULL)

    return start


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    """The folder of the script, run once, by one process and to its end."""
    folder = tmp_path_factory.mktemp("whole")
    with Processes() as processes:
        assert processes.start("-c", SCRIPT, Path(__file__).parent, folder, "").wait() == 0
    return folder


@pytest.mark.slow
@PROCESSES
def test_killed_three_times_it_is_the_uninterrupted_one(tmp_path, run_script, complete_run):
    random = np.random.default_rng(0)
    lines = len((complete_run / "analysis.jsonl").read_text().splitlines())
    for stop in sorted(random.integers(1, lines, 3)):
        process = run_script(tmp_path)
        journal = tmp_path / "analysis.jsonl"
        while process.poll() is None and (
            not journal.is_file() or journal.read_bytes().count(b"\n") < stop
        ):
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert run_script(tmp_path).wait() == 0
    assert (tmp_path / "result.json").read_text() == (complete_run / "result.json").read_text()


def run_pair(run_script, folders):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    pair = [
        run_script(folder, str(rank), RANK=str(rank), **address)
        for rank, folder in enumerate(folders)
    ]
    return [process.wait() for process in pair]


@pytest.mark.slow
@PROCESSES
def test_processes_on_two_disks_know_what_either_has_measured(tmp_path, run_script, complete_run):
    first, second = tmp_path / "first", tmp_path / "second"
    lines = (complete_run / "analysis.jsonl").read_text().splitlines(keepends=True)
    first.mkdir()
    # That of a killed run; `second` has none.
    (first / "analysis.jsonl").write_text("".join(lines[: len(lines) // 2]))
    assert run_pair(run_script, [first, second]) == [0, 0]
    expected = (complete_run / "result.json").read_text()
    assert (first / "result0.json").read_text() == (second / "result1.json").read_text() == expected


@pytest.mark.slow
@PROCESSES
def test_two_processes_come_to_the_result_of_one(tmp_path, run_script, complete_run):
    assert run_pair(run_script, [tmp_path, tmp_path]) == [0, 0]
    expected = (complete_run / "result.json").read_text()
    assert (tmp_path / "result0.json").read_text() == expected
    assert (tmp_path / "result1.json").read_text() == expected
    assert (tmp_path / "analysis.1.jsonl").is_file()


class Sentence(nn.Module):
    """Attention of both kinds and a recurrent layer, called by keywords."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.last = nn.Linear(16, 16)

    def forward(self, words, mask):
        x = self.first(words)
        x = x + self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        heads = self.recurrent(x)[0].unflatten(-1, (2, 8)).transpose(1, 2)
        x = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return {"scores": self.last(x.transpose(1, 2).flatten(2)), "length": x.shape[2]}


def make_sentences():
    mask = torch.tensor([[False] * 4 + [True], [False] * 5])
    return [{"words": torch.randn(2, 5, 8), "mask": mask} for _ in range(3)]


def make_convolutions(count=3):
    return nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(count)))


def make_images(count=3):
    return [torch.randn(2, 3, 8, 8) for _ in range(count)]


def quantize(model, batches):
    swap_modules(model.eval(), batches[0], include=["*"])
    rewire_operations(model, batches[0])
    calibrate_model(model, batches, method="max")
    return model


MODES_AND_OPTIONS = [
    {},
    {"mode": "leave-one-out", "max_float_layers": 2, "max_float_share": 1},
    {"confirm": 1, "max_float_layers": 1, "max_float_share": 1},
    {"confirm": 1, "mode": "leave-one-out", "max_float_layers": 1, "max_float_share": 1},
]


@pytest.mark.parametrize("options", MODES_AND_OPTIONS)
@pytest.mark.parametrize(
    ("make", "make_batches"), [(Sentence, make_sentences), (make_convolutions, make_images)]
)
def test_a_gpu_gives_the_scores_of_the_cpu(gpu, make, make_batches, options):
    """TF32, which is on, would change the errors of convolutions."""
    batches = make_batches()
    model = quantize(make(), batches)
    twin = copy.deepcopy(model).to(gpu)
    expected, analysis = (analyze_layers(net, batches, **options) for net in (model, twin))
    assert analysis.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.01)
    assert [layer.name for layer in analysis.layers] == [layer.name for layer in expected.layers]
    assert [layer.sqnr_db for layer in analysis.layers] == pytest.approx(
        [layer.sqnr_db for layer in expected.layers], abs=0.01
    )
    assert analysis.float_layers == expected.float_layers
    assert analysis.full_evaluations == expected.full_evaluations == ""


@pytest.mark.parametrize("options", MODES_AND_OPTIONS)
@pytest.mark.parametrize("metric", [None, "top1"])
def test_waits_for_a_gpu_do_not_grow_with_the_layers(gpu, options, metric):
    num_waits = {}
    for num_layers, num_batches in ((2, 2), (6, 2), (2, 6)):
        batches = [(batch, torch.zeros(2, dtype=torch.int64)) for batch in make_images(num_batches)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        model = quantize(nn.Sequential(make_convolutions(num_layers), *head), batches).to(gpu)
        with watch(gpu) as events:
            analyze_layers(model, batches, metric=metric, **options)
        num_waits[num_layers, num_batches] = len(list_waits(events))
    print(f"analyze_layers {options} {metric}: {num_waits} waits by layers and batches")
    assert num_waits[6, 2] <= num_waits[2, 2] + 8
    assert num_waits[2, 6] <= 4 * num_waits[2, 2]


def test_measurements_of_a_gpu_are_in_the_journal(gpu, tmp_path):
    batches = make_images()
    model = quantize(make_convolutions(), batches).to(gpu)
    first = analyze_layers(model, batches, path=tmp_path / "journal.jsonl")
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 3 * (1 + 1 + 3)  # batches, by states: int8, float, and each layer
    assert analyze_layers(model, batches, path=tmp_path / "journal.jsonl") == first
    assert (tmp_path / "journal.jsonl").read_text().splitlines() == lines


def test_float_outputs_of_a_gpu_go_to_the_host_if_they_are_many(gpu, monkeypatch):
    batches = make_images()
    model = quantize(make_convolutions(), batches).to(gpu)
    expected = analyze_layers(model, batches)
    monkeypatch.setattr(probe, "_REFERENCE_BYTES", 2000)  # one batch of three
    places = []
    prepare = probe.Probe.prepare

    def note(self):
        prepare(self)
        places.extend(reference.device.type for reference in self.references)

    monkeypatch.setattr(probe.Probe, "prepare", note)
    assert analyze_layers(model, batches) == expected
    assert places == [gpu.type, "cpu", "cpu"]
    analyze_layers(model, batches, confirm=1, mode="leave-one-out")


def test_nan_on_a_gpu(gpu):
    batches = make_images()
    model = quantize(make_convolutions(), batches).to(gpu)
    batches[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(StateError, match="contain NaN"):
        analyze_layers(model, batches)


class ShiftedNet(nn.Module):
    """The rounding of `shifted` moves a mean, that of `noisy` does not; each has a path of its own to the output."""

    def __init__(self):
        super().__init__()
        self.shifted = nn.Conv2d(4, 4, 1, bias=False)
        self.noisy = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.shifted(x.abs() + 40) + 40 * self.noisy(x)


@pytest.fixture
def shifted(batches):
    model = ShiftedNet().eval()
    images = [torch.cat([batch, batch[:, :1]], 1) for batch in batches]
    swap_modules(model, images[0], include=["*"])
    calibrate_model(model, images)
    model.shifted.weight_quantizer.amax = 8 * model.shifted.weight_quantizer.amax
    return model, images


@pytest.mark.parametrize("mode", MODES)
def test_a_shift_that_correct_bias_takes_back_is_no_reason_for_float(shifted, mode):
    """The brute force: each layer with b + W E[x] - W' E[x], in the state that the mode says."""
    model, images = shifted
    former = copy.deepcopy(model.state_dict())
    plain = analyze_layers(model, images, mode=mode)
    analysis = analyze_layers(model, images, mode=mode, corrects_bias=True)
    assert plain.layers[0].name == "shifted" and plain.biases == ""
    assert analysis.layers[0].name == "noisy" and analysis.biases == "biases corrected"
    assert analysis.format_table().startswith(f"{mode} on 8 samples; biases corrected\n")
    assert model.state_dict().keys() == former.keys()
    assert all(torch.equal(values, former[name]) for name, values in model.state_dict().items())

    reference = copy.deepcopy(model)
    restore_modules(reference)
    expected = outputs(reference, images)
    joined = torch.cat(images)
    means = {"shifted": (joined.abs() + 40).mean((0, 2, 3)), "noisy": joined.mean((0, 2, 3))}
    for layer in analysis.layers:
        twin = copy.deepcopy(model)
        for name in means:
            if (name == layer.name) is (mode == "leave-one-out"):
                restore_modules(twin.get_submodule(name))
                continue
            swapped = twin.get_submodule(name)
            error = swapped.weight_quantizer(swapped.weight) - swapped.weight
            shift = -error.flatten(1) @ means[name]
            bias = 0 if swapped.bias is None else swapped.bias
            swapped.bias = nn.Parameter((bias + shift).detach())
        assert layer.sqnr_db == pytest.approx(sqnr_db(expected, outputs(twin, images)), abs=0.01)


def test_batches_of_different_sizes_are_averaged_by_their_samples(shifted):
    model, images = shifted
    sizes = [torch.cat(images)[:6], torch.cat(images)[6:, :, :6, :6]]
    analysis = analyze_layers(model, sizes, corrects_bias=True)
    assert analysis.biases == "biases corrected"
    assert analysis.sqnr_db > analyze_layers(model, sizes).sqnr_db + 1


def test_layers_that_cannot_be_corrected_are_counted(batches):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.twice(self.twice(self.once(x)))

    model = Twice().eval()
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches)
    analysis = analyze_layers(model, batches, corrects_bias=True)
    assert analysis.biases == "biases corrected in 1 of 2 layers"
    assert analysis.plan.layers["once"].reason.endswith("with biases corrected in 1 of 2 layers")


def test_biases_that_cannot_be_corrected_are_said(shifted, monkeypatch):
    def refuse(*_):
        raise DataError("no memory\nfor this", "give smaller batches.")

    model, images = shifted
    monkeypatch.setattr("qdq.accuracy.bias.plan_layers", refuse)
    analysis = analyze_layers(model, images, corrects_bias=True)
    assert analysis.biases.startswith("biases not corrected: no memory")
    assert "\n" not in analysis.biases
    assert analysis.sqnr_db == analyze_layers(model, images).sqnr_db


def test_corrected_biases_and_passes_go_together(shifted):
    """An earlier pass is taken back for the search and done again; the corrected biases are only for the search."""
    model, images = shifted
    expected = copy.deepcopy(model)
    correct_bias(expected, images)
    correct_bias(model, images)
    analyze_layers(model, images, corrects_bias=True)
    torch.testing.assert_close(model.shifted.bias, expected.shifted.bias)
    restore_modules(model)
    assert model.shifted.bias is None


def test_an_interrupted_search_gives_the_biases_back(shifted, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    model, images = shifted
    former = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("qdq.analyze.search.Search.run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyze_layers(model, images, corrects_bias=True)
    assert model.state_dict().keys() == former.keys()
    assert all(torch.equal(values, former[name]) for name, values in model.state_dict().items())


def test_a_journal_without_corrected_biases_is_not_used(shifted, tmp_path):
    model, images = shifted
    path = tmp_path / "analysis.jsonl"
    plain = analyze_layers(model, images, path=path)
    analysis = analyze_layers(model, images, path=path, corrects_bias=True)
    assert analysis.sqnr_db > plain.sqnr_db + 1
    assert analysis.sqnr_db == analyze_layers(model, images, corrects_bias=True).sqnr_db


def test_a_journal_does_not_depend_on_the_rounding_of_the_correction(
    shifted, tmp_path, monkeypatch
):
    """Another number of threads sums in another order."""
    model, images = shifted
    path = tmp_path / "analysis.jsonl"
    expected = analyze_layers(model, images, path=path, corrects_bias=True)
    size = path.stat().st_size
    measure = bias._measure_mean_errors

    def measure_elsewhere(*arguments):
        errors = measure(*arguments)
        return errors._replace(
            shifts={name: shift * (1 + 1e-6) for name, shift in errors.shifts.items()}
        )

    monkeypatch.setattr(bias, "_measure_mean_errors", measure_elsewhere)
    assert analyze_layers(model, images, path=path, corrects_bias=True).layers == expected.layers
    assert path.stat().st_size == size  # nothing was measured again


def test_layers_in_fp8_are_corrected_too(batches):
    model = ShiftedNet().eval()
    images = [torch.cat([batch, batch[:, :1]], 1) for batch in batches]
    swap_modules(model, images[0], include=["*"], formats=["fp8"])
    calibrate_model(model, images)
    plain = analyze_layers(model, images)
    analysis = analyze_layers(model, images, corrects_bias=True)
    before = {layer.name: layer.sqnr_db for layer in plain.layers}
    after = {layer.name: layer.sqnr_db for layer in analysis.layers}
    assert after["shifted"] > before["shifted"] + 1
    assert analysis.biases == "biases corrected"
