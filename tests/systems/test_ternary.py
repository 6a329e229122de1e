"""The ternary projection against brute force, and ADMM on a small task."""

import itertools

import numpy as np
import pytest
import torch
from small_task import make_net, make_trained, measure_accuracy, train

from qdq.errors import ArgumentError
from qdq.systems import project_ternary
from qdq.systems.grid import find_grid


def project_slowly(row, alpha=None):
    """alpha and codes of one row, in plain Python."""
    scale = sum(abs(value) for value in row) / len(row) if alpha is None else alpha
    codes = [int(np.sign(value)) * (abs(value) > scale / 2) for value in row]
    for _ in range(20 if alpha is None else 0):
        dot = sum(value * code for value, code in zip(row, codes, strict=True))
        scale = dot / max(sum(code * code for code in codes), 1)
        former = codes
        codes = [int(np.sign(value)) * (abs(value) > scale / 2) for value in row]
        if codes == former:
            break
    return scale, codes


def test_projection_by_channel_is_that_of_each_row():
    weight = torch.randn(5, 3, 2, 2)
    weight[3] = 0
    scale, codes = project_ternary(weight)
    assert scale.shape == (5, 1, 1, 1)
    for channel in range(5):
        expected, expected_codes = project_slowly(weight[channel].flatten().tolist())
        assert float(scale[channel]) == pytest.approx(expected, rel=1e-6)
        assert codes[channel].flatten().tolist() == expected_codes
    assert float(scale[3]) == 0
    assert not codes[3].any()


def test_projection_of_a_whole_tensor_and_with_a_constant_alpha():
    weight = torch.randn(4, 6)
    scale, codes = project_ternary(weight, per_channel=False)
    expected, expected_codes = project_slowly(weight.flatten().tolist())
    assert float(scale) == pytest.approx(expected, rel=1e-6)
    assert codes.flatten().tolist() == expected_codes
    scale, codes = project_ternary(torch.tensor([[0.5, -0.51, 3.0, 0.0]]), alpha=1)
    assert (float(scale), codes.tolist()) == (1, [[0, -1, 1, 0]])


def test_the_projection_is_nearly_the_nearest_of_all_ternary_tensors():
    generator = torch.Generator().manual_seed(1)
    codes = np.array(list(itertools.product((-1, 0, 1), repeat=6)))[:, None]
    for row in torch.randn(20, 6, generator=generator).double().numpy():
        products = (codes[:, 0] * row).sum(1)
        counts = np.maximum((codes[:, 0] ** 2).sum(1), 1)
        best = ((codes[:, 0] * (products / counts)[:, None] - row) ** 2).sum(1).min()
        scale, chosen = project_ternary(torch.tensor(row[None]))
        error = float((scale * chosen - torch.tensor(row)).square().sum())
        assert best - 1e-12 <= error <= 1.5 * best + 1e-12


def test_extreme_values_stay_finite():
    for value in (3e38, 1e-45, 0.0):
        scale, codes = project_ternary(torch.full((2, 300), value))
        assert torch.equal(scale * codes, torch.full((2, 300), value))


def test_admm_comes_nearer_every_round_and_ends_ternary():
    net = make_trained()
    before = measure_accuracy(net)
    training = train("ternary", net, epochs=10, lr=3e-3, rounds=5, rho=1.0)
    distances = [row.distance for row in training.rounds]
    assert distances == sorted(distances, reverse=True)
    assert len(set(distances)) == 5
    assert measure_accuracy(net) > before - 0.05
    assert list(training.selection.layers) == ["3", "6"]
    zeros = 0
    for name in ("3", "6"):
        layer = net.get_submodule(name)
        grid = find_grid(layer, "weight")
        codes = layer.weight / grid.scale[:, None]
        assert set(codes.unique().tolist()) <= {-1, 0, 1}
        assert (grid.lowest, grid.highest) == (-1, 1)
        zeros += int((codes == 0).sum())
    assert training.rounds[-1].zeros == zeros / (32 * 32 + 32 * 24)
    assert len(training.format_table().splitlines()) == 6


def test_a_growing_penalty_lets_codes_change_first():
    net = make_trained()
    weight = net[3].weight.detach().clone()
    training = train("ternary", net, epochs=10, lr=1e-2, rounds=5, rho=1e-3, growth=6.0)
    distances = [row.distance for row in training.rounds]
    assert distances == sorted(distances, reverse=True)
    _, before = project_ternary(weight)
    _, after = project_ternary(net[3].weight)
    assert float((before != after).float().mean()) > 0.01


def test_the_first_distance_is_that_of_the_projection():
    net = make_net()
    training = train("ternary", net, lr=1e-12, rounds=1)
    weights = [make_net().get_submodule(name).weight.detach() for name in ("3", "6")]
    differences, norms = 0.0, 0.0
    for weight in weights:
        scale, codes = project_ternary(weight)
        differences += float((weight - scale * codes).double().square().sum())
        norms += float(weight.double().square().sum())
    assert training.rounds[0].distance == pytest.approx((differences / norms) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rho": 0.0}, {"growth": 0.5}, {"alpha": -1.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        train("ternary", make_net(), **options)
