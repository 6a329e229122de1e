"""Statistics after preparation, as published."""

import copy
from collections import OrderedDict

import pytest
import torch
from golden import read_cases
from torch import nn

from qdq.distiller import PostTrainLinearQuantizer, TensorRecord, collect_quant_stats
from qdq.distiller.post_training.fusion import cut_record

CASES = read_cases("distiller_stats_fusion")
MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
IMAGES = torch.randn(4, 10, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))


class Sequential(nn.Module):
    """A convolution, BatchNorm, an activation that is a module or a function, and pooling."""

    def __init__(self, activation, as_module):
        super().__init__()
        self.conv = nn.Conv2d(10, 20, 3)
        self.bn = nn.BatchNorm2d(20)
        self.act = MODULES[activation]() if as_module else getattr(torch, activation)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.act(self.bn(self.conv(x))))


class Split(nn.Module):
    """A linear layer whose halves have activations of their own."""

    def __init__(self, first, second):
        super().__init__()
        self.linear = nn.Linear(10, 40)
        self.bn = nn.BatchNorm1d(40)
        self.act1, self.act2 = MODULES[first](), MODULES[second]()

    def forward(self, x):
        first, second = self.bn(self.linear(x)).chunk(2, dim=1)
        return self.act1(first) + self.act2(second)


def collect(model, batch):
    return collect_quant_stats(model.eval(), [batch])


def prepare(model, statistics, batch, **options):
    quantizer = PostTrainLinearQuantizer(
        copy.deepcopy(model), model_activation_stats=statistics, **options
    )
    quantizer.prepare_model(batch)
    return quantizer.model_activation_stats


def cases_of(test):
    return [case for case in CASES if case["test"] == test]


def check(record, expected):
    for key, value in expected.items():
        assert getattr(record, key) == value, key


@pytest.mark.parametrize("case", cases_of("sequential"), ids=lambda case: case["id"])
def test_published_ranges_before_activations(case):
    model = Sequential(case["act_type"], case["act_as_module"])
    statistics = collect(model, IMAGES)
    statistics["bn"].output = TensorRecord(**case["bn_out_stats"])
    if case["act_as_module"]:
        statistics["act"].inputs[0] = TensorRecord(**case["bn_out_stats"])
    prepared = prepare(model, statistics, IMAGES)
    assert "bn" not in prepared
    check(prepared["conv"].output, case["conv_out_expected_stats"])
    if case["act_as_module"]:
        check(prepared["act"].inputs[0], case["conv_out_expected_stats"])


@pytest.mark.parametrize("case", cases_of("split_act"), ids=lambda case: case["id"])
def test_published_ranges_before_activations_of_parts(case):
    model = Split(case["act1_type"], case["act2_type"])
    statistics = collect(model, ROWS)
    statistics["bn"].output = TensorRecord(**case["bn_out_stats"])
    prepared = prepare(model, statistics, ROWS)
    assert "bn" not in prepared
    check(prepared["linear"].output, case["linear_out_expected_stats"])


def test_batchnorm_alone():
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(10, 4, 3), bn=nn.BatchNorm2d(4)))
    model.add_module("pool", nn.MaxPool2d(2))
    statistics = collect(model, IMAGES)
    prepared = prepare(model, statistics, IMAGES)
    assert prepared["conv"].output == statistics["bn"].output
    assert "bn" not in prepared
    assert prepared["pool"] == statistics["pool"]


def test_nothing_to_fuse():
    unfolded = nn.BatchNorm2d(4, track_running_stats=False)
    for second in (unfolded, nn.MaxPool2d(2)):
        model = nn.Sequential(OrderedDict(conv=nn.Conv2d(10, 4, 3), second=second))
        statistics = collect(model, IMAGES)
        assert prepare(model, statistics, IMAGES) == statistics


class Branched(nn.Module):
    """A convolution that a ReLU and an addition read."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(10, 10, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) + y


def test_two_readers_prevent_a_cut():
    model = Branched()
    statistics = collect(model, IMAGES)
    assert prepare(model, statistics, IMAGES) == statistics


def test_a_float_output_is_not_cut():
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(10, 4, 3), relu=nn.ReLU()))
    statistics = collect(model, IMAGES)
    assert prepare(model, statistics, IMAGES, bits_activations=None) == statistics
    overrides = OrderedDict(conv={"bits_activations": None})
    assert prepare(model, statistics, IMAGES, overrides=overrides) == statistics


def test_a_model_that_returns_the_layer_is_not_cut():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(10, 4, 3)
            self.relu = nn.ReLU()

        def forward(self, x):
            y = self.conv(x)
            return y, self.relu(y)

    statistics = collect(Both(), IMAGES)
    assert prepare(Both(), statistics, IMAGES)["conv"] == statistics["conv"]


def test_a_window_outside_collapses():
    record = TensorRecord(min=-5.0, max=-1.0, avg_min=-4.0, avg_max=-2.0, mean=-3.0, std=1.0, b=0.5)
    assert cut_record(record, (0.0, float("inf"))) == TensorRecord(
        min=0.0, max=0.0, avg_min=0.0, avg_max=0.0, mean=-3.0, std=1.0, b=0.5
    )


def test_clamps_cut_to_their_bounds():
    for activation, ends in ((nn.ReLU6(), (0.0, 6.0)), (nn.Hardtanh(-0.5, 0.25), (-0.5, 0.25))):
        model = nn.Sequential(OrderedDict(conv=nn.Conv2d(10, 4, 3), act=activation))
        statistics = collect(model, IMAGES)
        statistics["conv"].output = TensorRecord(-9.0, 9.0, -8.0, 8.0, 0.0, 1.0, 1.0)
        record = prepare(model, statistics, IMAGES)["conv"].output
        assert (record.min, record.max, record.avg_min, record.avg_max) == (*ends, *ends)
