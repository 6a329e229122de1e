"""Passes in any order, and the float model behind them."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qdq import (
    ArgumentError,
    Calibration,
    CalibrationError,
    analyze_layers,
    apply_plan,
    calibrate_model,
    correct_bias,
    disable_quantization,
    export_onnx,
    finetune,
    fold_batchnorm,
    predict,
    reconstruct_blocks,
    restore_modules,
    rewire_operations,
    round_weights,
    swap_modules,
    tune_weights,
)
from qdq.accuracy import bias
from qdq.corrections import list_passes, undo_passes
from qdq.metrics import sqnr_db
from qdq.plan import Plan, PlanEntry
from qdq.qat.losses import Distillation, relative_error
from qdq.qat.trainer import copy_float
from qdq.schedule import Schedule


class Net(nn.Module):
    """Narrow enough that every pass gains something."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mix = nn.Conv2d(16, 32, 1, bias=False)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        x = F.relu6(self.norm(self.stem(x)))
        x = F.relu6(self.depthwise(x) + x)
        return self.head(torch.relu(self.mix(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    return torch.rand(24, 3, 12, 12), torch.rand(32, 3, 12, 12)


@pytest.fixture(scope="module")
def swapped(data):
    """A calibrated network, and the outputs of its float model for the evaluation images."""
    torch.manual_seed(1)
    model = Net().eval()
    model.norm.running_mean.normal_()
    model.norm.weight.data.uniform_(0.2, 3)
    images, held = data
    fold_batchnorm(model, images)
    expected = predict(model, [held])
    swap_modules(model, images, include=["*"])
    rewire_operations(model, images)
    calibrate_model(model, [images])
    return model, expected


def list_steps(images):
    return {
        "calibrate": lambda model: calibrate_model(model, [images]),
        "analyze": lambda model: analyze_layers(
            model, [images], max_float_layers=1, max_float_share=1
        ),
        "correct": lambda model: correct_bias(model, [images]),
        "round": lambda model: round_weights(model, [images]),
    }


def test_every_order_of_the_passes_gives_the_same_model(swapped, data):
    model, expected = swapped
    images, held = data
    steps = list_steps(images)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    reached = {}
    for order in itertools.permutations(steps):
        candidate = copy.deepcopy(model)
        for name in order:
            steps[name](candidate)
        reached[order] = sqnr_db(expected, predict(candidate, [held]))
        with disable_quantization(candidate):
            assert sqnr_db(expected, predict(candidate, [held])) == math.inf
        restore_modules(candidate)
        assert sqnr_db(expected, predict(candidate, [held])) == math.inf
        assert dict(candidate.named_parameters()).keys() == before.keys()
    assert max(reached.values()) - min(reached.values()) < 0.3
    alone = copy.deepcopy(model)
    steps["analyze"](alone)
    assert min(reached.values()) > sqnr_db(expected, predict(alone, [held])) + 0.5


def test_fine_tuning_is_done_again_in_every_order(swapped, data):
    model, expected = swapped
    images, held = data
    steps = list_steps(images)
    steps["tune"] = lambda model: tune_weights(model, [images], steps=4, lr=1e-3)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    states = []
    for order in itertools.permutations(("analyze", "correct", "tune")):
        candidate = copy.deepcopy(model)
        for name in order:
            steps[name](candidate)
        names = [entry.name for entry in list_passes(candidate)]
        assert names == ["correct_bias", "tune_weights"]
        states.append(candidate.state_dict())
        with disable_quantization(candidate):
            assert sqnr_db(expected, predict(candidate, [held])) == math.inf
        restore_modules(candidate)
        after = dict(candidate.named_parameters())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    for state in states[1:]:
        torch.testing.assert_close(dict(state), dict(states[0]), rtol=0, atol=0)


@pytest.mark.parametrize("order", [["tune", "round", "correct"], ["correct", "tune", "round"]])
def test_fine_tuning_comes_after_the_other_passes(order, swapped, data):
    model = copy.deepcopy(swapped[0])
    images = data[0]
    steps = list_steps(images)
    steps["tune"] = lambda model: tune_weights(model, [images], steps=4, lr=1e-3)
    by_hand = copy.deepcopy(model)
    for name in order:
        steps[name](model)
    for name in ("round", "correct", "tune"):
        steps[name](by_hand)
    torch.testing.assert_close(dict(model.state_dict()), dict(by_hand.state_dict()), rtol=0, atol=0)


def test_a_layer_in_float_has_its_own_bias_again(swapped, data, tmp_path):
    model = copy.deepcopy(swapped[0])
    images, held = data
    head = model.head.bias.clone()
    correct_bias(model, [images])
    corrected = model.mix.bias.clone()
    assert not torch.equal(model.head.bias, head)
    plan = Plan({"head": PlanEntry("float")})
    assert apply_plan(model, plan, images) == ["head"]
    assert torch.equal(model.head.bias, head)
    assert model.head.keeps_float is False
    assert torch.equal(model.mix.bias, corrected)  # nothing before it has changed
    exported = export_onnx(model, images, tmp_path / "net.onnx").path
    assert sqnr_db(predict(model, [held]), predict(exported, [held])) > 40


def test_a_pass_that_fails_leaves_the_model_as_it_was(swapped, data, monkeypatch):
    model = copy.deepcopy(swapped[0])
    images, held = data
    correct_bias(model, [images])
    before = predict(model, [held])
    state = copy.deepcopy(model.state_dict())

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bias, "visit_products", fail)
    with pytest.raises(KeyboardInterrupt):
        analyze_layers(model, [images])
    monkeypatch.undo()
    assert sqnr_db(before, predict(model, [held])) == math.inf
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert [entry.name for entry in list_passes(model)] == ["correct_bias"]
    with disable_quantization(model):
        assert sqnr_db(swapped[1], predict(model, [held])) == math.inf


def test_rounding_that_fails_leaves_the_corrected_model(swapped, data):
    model = copy.deepcopy(swapped[0])
    images, held = data
    correct_bias(model, [images])
    before = predict(model, [held])
    with pytest.raises(ArgumentError):
        round_weights(model, [images], outputs={"a": "absent"})
    assert sqnr_db(before, predict(model, [held])) == math.inf
    assert [entry.name for entry in list_passes(model)] == ["correct_bias"]


def test_a_block_of_calibration_does_the_passes_again(swapped, data):
    model = copy.deepcopy(swapped[0])
    images, held = data
    correct_bias(model, [images])
    before = predict(model, [held])
    with Calibration(model), torch.no_grad():
        model(images)
    assert sqnr_db(before, predict(model, [held])) > 40
    assert [entry.name for entry in list_passes(model)] == ["correct_bias"]
    with pytest.raises(CalibrationError), Calibration(model), torch.no_grad():
        model(images * math.nan)
    assert [entry.name for entry in list_passes(model)] == ["correct_bias"]
    assert sqnr_db(before, predict(model, [held])) > 40


def test_training_starts_from_the_corrected_model_and_makes_it_the_own_one(swapped, data):
    model = copy.deepcopy(swapped[0])
    images = data[0]
    expected = copy_float(model)(images[:8])
    correct_bias(model, [images])
    with torch.no_grad():
        error = relative_error(model(images[:8]), expected)
    schedule = Schedule(steps=2)
    tuning = finetune(
        model, [images[:8]], distillation=Distillation(kl=0, features=0), schedule=schedule
    )
    assert tuning.losses[0] == pytest.approx(float(error), rel=1e-5)
    assert list_passes(model) == []
    trained = {name: tensor.clone() for name, tensor in model.named_parameters()}
    calibrate_model(model, [images])
    assert all(torch.equal(model.get_parameter(name), trained[name]) for name in trained)


def correct_and_reconstruct(model, images):
    correct_bias(model, [images])
    reconstruct_blocks(model, [images], steps=4, drop=0.5)


def check_equal(model, expected):
    for name, values in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], values), name


def check_passes_are_kept(model, corrected, calibrated):
    """The model is the corrected one, and without its passes the one that was only calibrated."""
    check_equal(model, corrected)
    names = [entry.name for entry in list_passes(model)]
    assert names == ["reconstruct_blocks", "correct_bias"]
    undone = copy.deepcopy(calibrated)
    undo_passes(model)
    check_equal(model, undone)
    restore_modules(undone)
    restore_modules(model)
    check_equal(model, undone)


@pytest.mark.parametrize("ranges", ["frozen", "lsq", "ema"])
def test_training_without_a_better_step_leaves_the_passes(ranges, swapped, data, tmp_path):
    model = copy.deepcopy(swapped[0])
    images, held = data
    correct_and_reconstruct(model, images)
    corrected = copy.deepcopy(model)
    options = {
        "schedule": Schedule(steps=3, lr=10.0, bias_lr=10.0),  # destroys the weights
        "ranges": ranges,
        "held": [held],
        "folder": tmp_path / "tuning",
    }
    tuning = finetune(model, [images[:8]], **options)
    assert tuning.best_step == 0
    check_equal(model, corrected)
    read_back = finetune(model, [images[:8]], **options)  # a finished run
    assert read_back.losses == tuning.losses
    check_passes_are_kept(model, corrected, swapped[0])


def fail_to_measure(model):
    raise ValueError("no metric")


class Stopping(list):
    """Batches that end in Ctrl-C."""

    def __iter__(self):
        yield from super().__iter__()
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"train": "weights"}, ArgumentError),
        ({"layers": ["nope"]}, ArgumentError),
        ({"tensorboard": True}, ArgumentError),
        ({"metric": fail_to_measure}, ValueError),
        ({"metric": lambda model: -1.0}, KeyboardInterrupt),
    ],
    ids=["option", "layers", "no folder", "metric", "ctrl-c"],
)
def test_training_that_fails_before_a_better_step_leaves_the_passes(options, error, swapped, data):
    model = copy.deepcopy(swapped[0])
    images = data[0]
    correct_and_reconstruct(model, images)
    corrected = copy.deepcopy(model)
    with pytest.raises(error):
        finetune(model, Stopping([images[:8]] * 2), schedule=Schedule(steps=4), **options)
    check_passes_are_kept(model, corrected, swapped[0])


def test_kept_weights_are_not_in_the_state(swapped, data):
    model = copy.deepcopy(swapped[0])
    names = set(model.state_dict())
    correct_bias(model, [data[0]])
    assert set(model.state_dict()) - names == {"stem.bias", "mix.bias"} - names
    fresh = copy.deepcopy(swapped[0])
    fresh.load_state_dict(model.state_dict())
    assert sqnr_db(predict(model, [data[1]]), predict(fresh, [data[1]])) == math.inf
