import copy
import json

import pytest
import torch

from qdq import ArgumentError, DataError, StateError, analyze_layers, swap_modules
from qdq.metrics import sqnr_db
from qdq.quantizer import disable_quantization, named_quantizers
from qdq.swap import quantized_layers, restore_modules


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
    assert analysis.sqnr_db == pytest.approx(sqnr_db(expected, outputs(quantized, batches)), abs=1e-6)
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
    assert not any(q._disabled for _, q in named_quantizers(quantized))


def test_switches_the_worst_off(quantized, batches):
    analysis = analyze_layers(quantized, batches, max_float_layers=2)
    assert len(analysis.float_layers) == 2
    assert analysis.float_layers[0] == analysis.layers[0].name
    for name, layer in quantized_layers(quantized).items():
        assert layer.input_quantizer._disabled == (name in analysis.float_layers)
        assert layer.weight_quantizer._disabled == (name in analysis.float_layers)
    assert analysis.steps[-1].sqnr_db > analysis.sqnr_db


def test_all_layers_off_is_the_float_model(quantized, batches):
    analysis = analyze_layers(quantized, batches, max_float_layers=10)
    assert len(analysis.steps) == 3
    assert analysis.steps[-1].sqnr_db == float("inf")


def test_stops_at_the_target(quantized, batches):
    base = analyze_layers(quantized, batches)
    target = base.sqnr_db + 0.01
    analysis = analyze_layers(quantized, batches, target_sqnr=target, max_float_layers=3)
    assert len(analysis.steps) == 1
    assert "reaches the target" in analysis.stopped_by


def test_target_reached_before_the_first_step(quantized, batches):
    analysis = analyze_layers(quantized, batches, target_sqnr=1.0, max_float_layers=3)
    assert analysis.float_layers == []


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_metric_of_the_caller_ranks(quantized, batches, mode):
    def metric(model):
        # a metric that likes float "head" best, whatever the SQNR says
        return float(model.head.input_quantizer._disabled)

    options = {"metric": metric, "target_metric": 1.0, "max_float_layers": 3, "mode": mode}
    analysis = analyze_layers(quantized, batches, **options)
    assert analysis.layers[0].name == "head"
    assert analysis.float_layers == ["head"]
    assert analysis.metric == 0


def test_disabled_layers_stay_so_and_are_not_ranked(quantized, batches):
    disable_quantization(quantized.conv)
    analysis = analyze_layers(quantized, batches)
    assert {layer.name for layer in analysis.layers} == {"stem", "head"}
    assert quantized.conv.input_quantizer._disabled


def test_disabled_quantizer_of_a_layer_stays_so(quantized, batches):
    quantized.conv.input_quantizer.disable()
    analyze_layers(quantized, batches)
    assert quantized.conv.input_quantizer._disabled
    assert not quantized.conv.weight_quantizer._disabled


def test_interruption_leaves_the_model_as_it_was(quantized, batches):
    calls = []

    def metric(model):
        calls.append(1)
        if len(calls) == 6:  # all int8, three layers, then the second step of the search
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        analyze_layers(quantized, batches, metric=metric, max_float_layers=3)
    assert not any(q._disabled for _, q in named_quantizers(quantized))


def test_table_and_json(quantized, batches, tmp_path):
    analysis = analyze_layers(quantized, batches, max_float_layers=1)
    table = analysis.format_table(rows=2)
    assert analysis.layers[0].name in table
    assert "1 less sensitive" in table
    content = json.loads(analysis.save(tmp_path / "analysis.json").read_text())
    assert [layer["name"] for layer in content["layers"]] == [layer.name for layer in analysis.layers]


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
