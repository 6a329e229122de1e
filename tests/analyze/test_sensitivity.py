"""Measures of outputs, against closed forms in numpy."""

import numpy as np
import pytest
import torch

from qdq.analyze.sensitivity import (
    METRICS,
    collect,
    count_columns,
    count_rows,
    draw_sums,
    reduce_rows,
)

SAMPLES, CLASSES = 6, 5


@pytest.fixture
def pair():
    reference = torch.randn(SAMPLES, CLASSES)
    return reference, reference + 0.1 * torch.randn(SAMPLES, CLASSES)


@pytest.mark.parametrize("name", METRICS)
def test_columns_are_as_many_as_the_metric_says(pair, name):
    reference, outputs = pair
    batch = (torch.zeros(SAMPLES, 3), torch.arange(SAMPLES) % CLASSES)
    rows = collect(METRICS[name], batch, reference, outputs)
    assert rows.shape == (SAMPLES, count_columns(METRICS[name]))
    assert rows.dtype == np.float64


def test_sqnr_is_signal_over_error_in_db(pair):
    reference, outputs = (tensor.double().numpy() for tensor in pair)
    expected = 10 * np.log10((reference**2).sum() / ((reference - outputs) ** 2).sum())
    sqnr, metric = reduce_rows(
        METRICS["sqnr"], collect(METRICS["sqnr"], torch.zeros(SAMPLES, 3), *pair)
    )
    assert sqnr == metric == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("reference", "outputs", "expected"),
    [
        ([[0.0, 0.0]], [[0.0, 0.0]], 1.0),
        ([[0.0, 0.0]], [[1.0, 0.0]], 0.0),
        ([[3.0, 4.0]], [[6.0, 8.0]], 1.0),
        ([[1.0, 0.0]], [[-2.0, 0.0]], -1.0),
        ([[1.0, 0.0]], [[1.0, 1.0]], 0.5**0.5),
    ],
)
def test_cosine(reference, outputs, expected):
    rows = collect(
        METRICS["cosine"], torch.zeros(1, 3), torch.tensor(reference), torch.tensor(outputs)
    )
    assert reduce_rows(METRICS["cosine"], rows)[1] == pytest.approx(expected)


def test_no_error_is_infinite_and_no_divergence(pair):
    reference, _ = pair
    batch = torch.zeros(SAMPLES, 3)
    rows = collect(METRICS["kl"], batch, reference, reference)
    assert reduce_rows(METRICS["kl"], rows) == (float("inf"), 0.0)


def test_pixels_of_a_sample_are_in_its_row():
    """Of `[B, C, H, W]` the classes are the second dimension; each pixel has its hit."""
    scores = torch.zeros(2, 3, 1, 2)
    scores[0, 1] = 1.0
    scores[1, 2, :, 0] = 1.0
    rows = collect(METRICS["kl"], torch.zeros(2, 3), scores, scores)
    assert rows[:, 3].tolist() == [2.0, 2.0]  # pixels


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (torch.zeros(SAMPLES, 2), SAMPLES),
        (torch.zeros(SAMPLES + 1, 2), 1),
        (torch.tensor(0.0), 1),
        ({"a": torch.zeros(SAMPLES, 2), "b": torch.zeros(1)}, 1),
    ],
)
def test_outputs_without_an_axis_of_samples_are_one_row(reference, expected):
    batch = torch.zeros(SAMPLES, 3)
    assert count_rows(batch, reference) == expected
    assert len(collect(METRICS["sqnr"], batch, reference, reference)) == expected


def test_drawn_sums_have_the_mean_of_the_rows():
    rows = np.random.default_rng(1).random((50, 3))
    sums = draw_sums(rows)
    assert np.allclose(sums.mean(0), rows.sum(0), rtol=0.02)
    assert np.array_equal(sums, draw_sums(rows))
