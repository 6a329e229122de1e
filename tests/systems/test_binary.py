"""Binary quantizers against numpy, and their gradients."""

import copy

import numpy as np
import pytest
import torch

from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.systems import BinaryInput, BinaryWeight, sign_at_random

VALUES = torch.tensor([[-2.0, -0.5, 0.0, -0.0], [1.0, 1.5, -1.0, 0.25]])


def test_weights_are_signs_times_the_mean_magnitude_of_their_channel():
    weight = torch.randn(4, 3, 3, 3)
    values = weight.numpy().astype(np.float64)
    alpha = np.abs(values).mean((1, 2, 3), keepdims=True)
    expected = (alpha.astype(np.float32) * np.where(values >= 0, 1, -1)).astype(np.float32)
    assert np.array_equal(BinaryWeight("w").eval()(weight).numpy(), expected)


@pytest.mark.parametrize(("zero", "expected"), [(1, [-1, -1, 1, 1]), (-1, [-1, -1, -1, -1])])
def test_the_sign_of_zero_is_a_choice(zero, expected):
    assert BinaryInput("x", zero)(VALUES[0]).tolist() == expected
    assert BinaryWeight("w", zero, scaled=False)(VALUES[:1]).tolist() == [expected]


def test_gradients_pass_everywhere_for_weights_and_within_one_for_inputs():
    for quantizer, expected in (
        (BinaryWeight("w"), torch.ones(2, 4)),
        (BinaryInput("x"), torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 1]])),
    ):
        values = VALUES.clone().requires_grad_()
        quantizer(values).sum().backward()
        assert torch.equal(values.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quantizer", [BinaryWeight("w"), BinaryInput("x")])
def test_shape_type_and_input_stay_and_two_values_a_channel_remain(quantizer, dtype, device):
    values = (torch.randn(3, 50) * 1e3).to(device, dtype)
    before = values.clone()
    result = quantizer.to(device)(values.requires_grad_())
    assert (result.shape, result.dtype, result.device) == (values.shape, dtype, values.device)
    assert torch.equal(values.detach(), before)
    assert all(len(row.unique()) == 2 for row in result.detach().cpu())
    quantizer.cpu()


def test_large_values_have_a_finite_mean():
    weight = torch.full((1, 1000), 3e38)
    assert torch.equal(BinaryWeight("w")(weight), weight)


@pytest.mark.parametrize("quantizer", [BinaryWeight("conv.weight"), BinaryInput("conv.input")])
def test_bad_input_names_the_layer(quantizer):
    for values, error in (
        (torch.empty(0, 3), ArgumentError),
        (torch.tensor([[1.0, float("nan")]]), ArgumentError),
        (torch.tensor([[1, 2]]), ArgumentTypeError),
    ):
        with pytest.raises(error, match=quantizer.name):
            quantizer(values)


@pytest.mark.parametrize("sampling", ["hard", "logistic"])
def test_drawn_signs_have_the_probability_of_their_sigmoid(sampling):
    for value in (-2.0, -0.6, 0.0, 0.3, 1.0):
        probability = np.clip((value + 1) / 2, 0, 1)
        if sampling == "logistic":
            probability = 1 / (1 + np.exp(-value))
        signs = sign_at_random(torch.full((40000,), value), sampling)
        assert set(signs.tolist()) <= {-1, 1}
        share = float((signs == 1).float().mean())
        assert abs(share - probability) < 4 * np.sqrt(0.25 / 40000)


def test_signs_are_drawn_from_a_generator_and_in_training_only():
    values = torch.randn(1000) / 2
    first, second = (
        sign_at_random(values, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)
    quantizer = BinaryInput("x", sampling="hard")
    assert not torch.equal(quantizer(values), quantizer(values))
    assert torch.equal(quantizer.eval()(values), torch.where(values >= 0, 1.0, -1.0))


@pytest.mark.parametrize("make", [BinaryInput, BinaryWeight])
def test_signs_are_not_drawn_without_gradients(make):
    values = torch.randn(100, 2)
    quantizer = make("x", sampling="hard").train()
    expected = copy.deepcopy(quantizer).eval()(values)
    with torch.no_grad():
        assert torch.equal(quantizer(values), expected)


def test_a_quantizer_draws_from_its_generator():
    values = torch.randn(1000) / 2
    quantizer = BinaryInput("x", sampling="hard")
    quantizer.generator = torch.Generator().manual_seed(3)
    twin = copy.deepcopy(quantizer)
    state = torch.get_rng_state()
    expected = sign_at_random(values, generator=torch.Generator().manual_seed(3))
    assert torch.equal(quantizer(values), expected)
    assert torch.equal(twin(values), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_grids_have_codes_of_one_and_a_scale_above_zero():
    weight = torch.randn(3, 8)
    weight[1] = 0
    quantizer = BinaryWeight("w")
    grid = quantizer.describe(weight)
    assert (grid.lowest, grid.highest, grid.obstacle, grid.on_request) == (-1, 1, "", "")
    assert bool((grid.scale > 0).all())
    codes = quantizer(weight) / grid.scale[:, None]
    assert codes.unique().tolist() == [-1, 0, 1]  # 0 only in the channel of zeros
    grid = BinaryInput("x").describe(None)
    assert float(grid.scale) == 1
    assert "no 1-bit gain" in grid.on_request


def test_a_copy_is_the_same():
    quantizer = copy.deepcopy(BinaryWeight("w", zero=-1, scaled=False))
    assert quantizer(VALUES).tolist() == [[-1, -1, -1, -1], [1, 1, -1, 1]]
