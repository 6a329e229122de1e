"""Products of layers as matrix products, and the layers that can be corrected one after another."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq import calibrate_model, swap_modules
from qdq.accuracy.layerwise import Product, plan_layers, visit_products


@pytest.mark.parametrize(
    ("function", "arguments", "shape", "weight"),
    [
        (
            F.conv2d,
            {"stride": 2, "padding": (1, 2), "dilation": (2, 1)},
            (2, 4, 9, 8),
            (6, 4, 3, 3),
        ),
        (F.conv2d, {"padding": "same", "groups": 4}, (2, 4, 7, 8), (8, 1, 3, 5)),
        (F.conv1d, {"padding": 1, "groups": 2}, (2, 4, 9), (6, 2, 3)),
        (F.conv3d, {"padding": "valid"}, (1, 2, 4, 5, 4), (3, 2, 2, 3, 2)),
        (F.linear, {}, (2, 5, 4), (3, 4)),
    ],
)
def test_patches_times_weight_are_the_output(function, arguments, shape, weight):
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(weight, dtype=torch.float64)
    product = Product(function, {"input": x, "weight": w, "bias": None, **arguments})
    output = product.compute()
    rows = product.rows_of(output)
    positions = torch.randperm(len(rows))[:7]
    patches = product.patches_at(positions, output.shape)
    products = patches @ w.reshape(product.groups, -1, patches.shape[-1]).transpose(1, 2)
    torch.testing.assert_close(
        products.transpose(0, 1).reshape(len(positions), -1), rows[positions]
    )


@pytest.fixture
def clamped():
    """A layer before a ReLU6, one before a ReLU, one that runs twice, and one behind nothing."""
    twice = nn.Linear(16, 16)
    layers = [nn.Linear(16, 16), nn.ReLU6(), nn.Linear(16, 16), nn.ReLU(), twice, twice]
    model = nn.Sequential(*layers, nn.Linear(16, 16)).eval()
    data = torch.randn(8, 16)
    swap_modules(model, data, include=["*"])
    calibrate_model(model, [data], method="max")
    return model, data


def test_a_plan_says_what_is_passed_on_and_what_is_skipped(clamped):
    model, data = clamped
    plan = plan_layers(model, data)
    assert list(plan.layers) == ["0", "2", "6"]
    assert plan.intervals == {
        "0": (0.0, 6.0),
        "2": (0.0, float("inf")),
        "6": (-float("inf"), float("inf")),
    }
    assert plan.skipped == {"4": "it runs 2 times in one forward"}


def test_the_result_of_a_visit_is_the_output_of_the_layer(clamped):
    model, data = clamped

    def double(name, layer, product):
        return 2 * product.compute()

    with torch.no_grad():
        expected = model[:6](data)
        expected = 2 * model[6](expected)
    outputs = visit_products(model, {"6": model[6]}, data, double)
    assert torch.equal(outputs, expected)
