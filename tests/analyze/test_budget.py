"""What a budget leaves out is said, and what is compared is of the same samples."""

import pytest
import torch
from torch import nn

from qdq import analyze as analyze_module
from qdq import analyze_layers, calibrate_model, swap_modules
from qdq.quantizer import named_quantizers


class Clock:
    """Time that passes only where a layer of the model runs, a second for each."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def pass_one(self, *_):
        self.now += 1


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(analyze_module.time, "monotonic", clock.monotonic)
    return clock


@pytest.fixture
def timed(clock):
    """Five layers, batches of growing scale, and a second for each forward of the model."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))).eval()
    batches = [torch.randn(4, 16) * (3**index) for index in range(4)]
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    model.register_forward_pre_hook(clock.pass_one)
    return model, batches


MODES = ["one-at-a-time", "leave-one-out"]


def count_enabled(model):
    return float(sum(quantizer.is_enabled for _, quantizer in named_quantizers(model)))


@pytest.mark.parametrize("mode", MODES)
def test_gains_are_those_of_the_batches_that_were_used(timed, mode):
    model, batches = timed
    cut = analyze_layers(model, batches, mode=mode, budget=25)
    assert cut.images in (8, 12)
    fewer_batches = analyze_layers(model, batches[: cut.images // 4], mode=mode)
    assert cut.unmeasured == ()
    assert (cut.layers, cut.sqnr_db) == (fewer_batches.layers, fewer_batches.sqnr_db)


@pytest.mark.parametrize("mode", MODES)
def test_what_there_was_no_time_for_has_no_gain(timed, mode):
    model, batches = timed
    expected = {
        layer.name: layer.sqnr_db for layer in analyze_layers(model, batches[:1], mode=mode).layers
    }
    cut = analyze_layers(model, batches[:1], mode=mode, budget=8)
    assert 0 < len(cut.layers) < 5
    assert all(layer.sqnr_db == pytest.approx(expected[layer.name]) for layer in cut.layers)
    assert sorted([*cut.unmeasured, *(layer.name for layer in cut.layers)]) == sorted(expected)
    assert cut.plan.layers[cut.unmeasured[0]].reason == "not measured: the budget was used up"
    assert cut.unmeasured[0] in cut.format_table()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", [None, count_enabled])
def test_the_time_is_kept(timed, clock, mode, metric):
    """At most a forward, its two recordings and what is always measured: twice the model as it is, once in float."""
    model, batches = timed
    for budget in (0.5, 5, 20, 50):
        start = clock.now
        analysis = analyze_layers(
            model,
            batches,
            mode=mode,
            metric=metric,
            budget=budget,
            max_float_layers=3,
            max_float_share=1,
        )
        assert clock.now - start <= budget + 8
        assert all(layer.gain is not None for layer in analysis.layers)
        for _, quantizer in named_quantizers(model):
            quantizer.enable()


def test_a_function_gets_its_part_of_the_time(timed, clock):
    model, batches = timed

    def slow(model):
        clock.now += 10
        return 0.0

    analysis = analyze_layers(model, batches, metric=slow, budget=60, mode="leave-one-out")
    assert 1 <= len(analysis.layers) < 5
    assert len(analysis.layers) + len(analysis.unmeasured) == 5


def test_a_step_that_is_not_finished_is_not_taken(timed):
    model, batches = timed
    steps = len(
        analyze_layers(model, batches, budget=60, max_float_layers=5, max_float_share=1).steps
    )
    quantizers = len(list(named_quantizers(model)))
    assert quantizers - count_enabled(model) == 2 * steps
    for _, quantizer in named_quantizers(model):
        quantizer.enable()
    short = analyze_layers(model, batches, budget=9, max_float_layers=5, max_float_share=1)
    assert len(short.steps) < 5
    assert "budget of 9 s" in short.stopped_by
    assert quantizers - count_enabled(model) == 2 * len(short.steps)


@pytest.mark.parametrize("mode", MODES)
def test_the_screen_keeps_the_time_too(timed, clock, mode):
    model, batches = timed
    start = clock.now
    analysis = analyze_layers(model, batches * 4, mode=mode, confirm=1, budget=6)
    assert clock.now - start <= 6 + 8
    assert len(analysis.layers) == 5
    assert analysis.unmeasured == ()  # each has its estimate
