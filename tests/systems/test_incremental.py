"""Powers of two against a table of thresholds, and the rounds of INQ."""

import itertools
import math

import pytest
import torch
from small_task import make_net, make_trained, measure_accuracy, train

from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.systems import PowerLevels
from qdq.systems.grid import find_grid


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("maximum", [0.7499, 0.75, 1.0, 1.4999, 3.7, 1e-3])
def test_levels_are_those_of_the_paper(bits, maximum):
    levels = PowerLevels.of(torch.tensor([0.1 * maximum, -maximum]), bits)
    maximum = float(torch.tensor(maximum))
    largest = next(k for k in range(10, -40, -1) if 4 * maximum >= 3 * 2.0**k)
    assert levels.largest == largest
    assert levels.smallest == largest + 1 - 2 ** (bits - 1) // 2


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_values_go_to_the_level_whose_interval_they_are_in(bits):
    torch.manual_seed(1)
    weight = torch.cat([torch.randn(500) / 4, torch.tensor([0.75, 0.375, -0.1875, 0.0625, 0.0])])
    levels = PowerLevels.of(weight, bits)
    betas = [2.0**k for k in range(levels.smallest, levels.largest + 1)]
    expected = []
    for value in weight.tolist():
        result = math.copysign(betas[-1], value)  # beyond the last interval
        if abs(value) < betas[0] / 2:
            result = 0.0
        for alpha, beta in zip([0.0, *betas], betas, strict=False):
            if (alpha + beta) / 2 <= abs(value) < 3 * beta / 2:
                result = math.copysign(beta, value)
        expected.append(result)
    assert levels.quantize(weight).tolist() == expected
    assert torch.equal(levels.quantize(levels.quantize(weight)), levels.quantize(weight))


@pytest.mark.parametrize("value", [3.3e38, 1e-40, 0.0])
def test_extreme_values_stay_finite(value):
    weight = torch.full((3, 4), value)
    levels = PowerLevels.of(weight, 4)
    quantized = levels.quantize(weight)
    assert bool(torch.isfinite(quantized).all())
    assert bool((levels.describe(quantized).scale > 0).all())


def test_grids_of_four_bits_are_exact_and_of_five_only_without_the_smallest_level():
    for bits, values, lowest, highest, exponent in (
        (4, [8.0, 1.0, -2.0], -2, 8, 0),
        (4, [8.0, 4.0], 4, 8, 0),
        (5, [128.0, -1.0], -1, 128, 0),
        (5, [128.0, -2.0], -1, 64, 1),
        (5, [64.0, 1.0, 120.0], 1, 128, 0),
    ):
        weight = torch.tensor(values)
        levels = PowerLevels.of(weight, bits)
        assert levels.smallest == 0
        quantized = levels.quantize(weight)
        grid = levels.describe(quantized)
        assert (grid.lowest, grid.highest, float(grid.scale)) == (lowest, highest, 2.0**exponent)


def test_the_largest_weights_are_quantized_first_and_do_not_change_any_more(monkeypatch):
    net = make_net()
    layers = [net.get_submodule(name) for name in ("3", "6")]
    seen = []
    from qdq.systems.incremental import _Freezing
    from qdq.systems.rounds import Rounds

    save = Rounds.save

    def watch(rounds, row, masks):
        seen.append(([layer.weight.detach().clone() for layer in layers], dict(masks)))
        save(rounds, row, masks)

    freeze = _Freezing.freeze

    def check(freezing, name, portion):
        weight = net.get_submodule(name).weight.detach().clone()
        free = ~freezing.masks[name]
        freeze(freezing, name, portion)
        chosen = freezing.masks[name] & free
        left = ~freezing.masks[name]
        if left.any():
            assert float(weight[chosen].abs().min()) >= float(weight[left].abs().max())
        count = math.ceil(portion * weight.numel())
        assert int(freezing.masks[name].sum()) == count

    monkeypatch.setattr(Rounds, "save", watch)
    monkeypatch.setattr(_Freezing, "freeze", check)
    training = train("incremental", net)
    assert [row.portion for row in training.rounds] == [0.5, 0.75, 0.875, 1.0]
    for (weights, masks), (later, _) in itertools.pairwise(seen):
        for weight, mask, after in zip(weights, masks.values(), later, strict=True):
            assert torch.equal(weight[mask], after[mask])
            assert not torch.equal(weight[~mask], after[~mask])
    assert len(training.format_table().splitlines()) == 5


@pytest.mark.parametrize("by_layer", [False, True])
def test_the_result_has_only_powers_of_two_and_stays_accurate(by_layer):
    net = make_trained()
    before = measure_accuracy(net)
    training = train("incremental", net, epochs=5, lr=1e-3, by_layer=by_layer)
    assert len(training.rounds) == (2 if by_layer else 4)
    assert training.rounds[-1].portion == 1
    assert measure_accuracy(net) > before - 0.05
    for name in ("3", "6"):
        weight = net.get_submodule(name).weight.detach()
        grid = find_grid(net.get_submodule(name), "weight")
        codes = (weight / grid.scale).unique().abs().tolist()
        assert set(codes) <= {0, 1, 2, 4, 8}
        assert (grid.lowest >= -8, grid.highest <= 8) == (True, True)
    assert net[0].weight.unique().numel() > 100  # the first layer is float


def test_bad_options_are_refused():
    for options in ({"portions": (0.5, 0.5, 1.0)}, {"portions": (0.5,)}, {"portions": ()}):
        with pytest.raises(ArgumentError, match="rise to 1"):
            train("incremental", make_net(), **options)
    with pytest.raises(ArgumentError, match="3: bits is 1"):
        train("incremental", make_net(), bits=1)
    with pytest.raises(ArgumentTypeError, match=r"bits is 4\.0"):
        train("incremental", make_net(), bits=4.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_largest_numbers_of_a_type_have_levels(bits, dtype):
    values = torch.tensor([torch.finfo(dtype).max, -1.0], dtype=dtype)
    levels = PowerLevels.of(values, bits)
    assert levels.smallest <= levels.largest
    assert torch.isfinite(levels.quantize(values)).all()
