"""Ranges of one tensor against golden values."""

import pytest
import torch
from golden import read_golden

from qdq import distiller
from qdq.errors import QdqError

GOLDEN = read_golden("distiller_tensor_stats")
DIMENSION = {"get_tensor_avg_min_max": "across_dim", "get_tensor_avg_max_abs": "across_dim"}


def call(case, values):
    function = getattr(distiller, case["function"])
    if "n_stds" in case:
        return function(values, n_stds=case["n_stds"])
    return function(values, **{DIMENSION.get(case["function"], "per_dim"): case["dim"]})


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_golden_tensor_statistics(case):
    values = torch.tensor(GOLDEN["values"]).reshape(case["shape"])
    if case["expected"] == "ValueError":
        with pytest.raises(ValueError, match=r"dim is \d|must be above 0"):
            call(case, values)
        return
    result = call(case, values)
    ends = result if isinstance(result, tuple) else (result,)
    expected = case["expected"] if isinstance(result, tuple) else [case["expected"]]
    for end, value in zip(ends, expected, strict=True):
        torch.testing.assert_close(end, torch.tensor(value), rtol=1e-5, atol=1e-5)


def test_averages_are_those_of_the_extrema():
    values = torch.tensor([[1.0, 5.0], [-3.0, 7.0]])
    assert distiller.get_tensor_avg_min_max(values, 0) == (-1, 6)
    assert distiller.get_tensor_avg_min_max(values) == (-3, 7)
    assert distiller.get_tensor_avg_max_abs(-values, 0) == 6


def test_the_larger_end_of_the_window():
    values = torch.tensor([0.0, 0.0, 0.0, -8.0])
    low, high = distiller.get_tensor_mean_n_stds_min_max(values, n_stds=1)
    assert (low, high) == (-6, 0)
    assert distiller.get_tensor_mean_n_stds_max_abs(values, n_stds=1) == 6


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (torch.tensor([float("nan"), 1.0]), "1 of 2 values are not finite, the first is nan"),
        (torch.tensor([1, 2]), "only float tensors"),
        ([1.0, 2.0], "a list"),
    ],
)
@pytest.mark.parametrize("name", [name for name in distiller.__all__ if "get_tensor_" in name])
def test_values_without_a_range_are_refused(name, values, text):
    with pytest.raises(QdqError, match=text) as error:
        getattr(distiller, name)(values)
    assert isinstance(error.value, ValueError)


def test_empty_tensors_are_refused():
    with pytest.raises(ValueError, match="is empty"):
        distiller.get_tensor_min_max(torch.zeros(0, 3))
