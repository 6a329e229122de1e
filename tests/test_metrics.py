"""Metrics against closed forms, and against the same formulas written in another way."""

import math

import numpy as np
import pytest

from qdq import ArgumentError
from qdq.metrics import agreement, cosine, max_abs_difference, sqnr_db, top_k


@pytest.fixture
def pair():
    random = np.random.default_rng(0)
    reference = random.normal(size=(50, 7)).astype(np.float32)
    return reference, reference + 0.3 * random.normal(size=(50, 7)).astype(np.float32)


def test_sqnr_closed_forms():
    reference = np.ones((2, 3))
    assert sqnr_db(reference, reference * 1.1) == pytest.approx(20)  # an error of a tenth
    assert sqnr_db(reference, reference * 1.001) == pytest.approx(60)
    assert sqnr_db(reference, -reference) == pytest.approx(10 * math.log10(1 / 4))
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(np.zeros(3), np.ones(3)) == -math.inf
    assert sqnr_db(np.zeros(3), np.zeros(3)) == math.inf
    assert math.isnan(sqnr_db(np.array([1.0, math.nan]), np.ones(2)))


def test_sqnr_sums_in_double_precision():
    # In float32 the sum of 10^8 squares of 1 would stop at 2^24.
    many = np.ones(2**25, np.float32)
    assert sqnr_db(many, many * np.float32(0.5)) == pytest.approx(20 * math.log10(2))


def test_against_plain_loops(pair):
    reference, outputs = pair
    a, b = reference.ravel().tolist(), outputs.ravel().tolist()
    signal, noise = sum(x * x for x in a), sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    assert sqnr_db(reference, outputs) == pytest.approx(10 * math.log10(signal / noise))
    product = sum(x * y for x, y in zip(a, b, strict=True))
    assert cosine(reference, outputs) == pytest.approx(
        product / math.sqrt(signal * sum(y * y for y in b))
    )
    assert max_abs_difference(reference, outputs) == max(
        abs(x - y) for x, y in zip(a, b, strict=True)
    )
    rows = zip(reference.tolist(), outputs.tolist(), strict=True)
    agreements = [
        row.index(max(row)) == counterpart.index(max(counterpart)) for row, counterpart in rows
    ]
    assert agreement(reference, outputs) == pytest.approx(sum(agreements) / 50)


def test_cosine_closed_forms():
    assert cosine(np.array([1.0, 0]), np.array([0, 5.0])) == 0
    assert cosine(np.array([1.0, 2]), np.array([-2.0, -4])) == pytest.approx(-1)
    assert cosine(np.zeros(2), np.zeros(2)) == 1
    assert cosine(np.zeros(2), np.ones(2)) == 0


def test_max_abs_of_nothing():
    assert max_abs_difference(np.zeros((0, 3)), np.zeros((0, 3))) == 0


@pytest.mark.parametrize("k", [1, 2, 5, 7, 100])
def test_top_k_against_sorting(pair, k):
    logits, _ = pair
    labels = np.random.default_rng(1).integers(0, 7, 50)
    hits = [label in np.argsort(-row)[:k] for row, label in zip(logits, labels, strict=True)]
    assert top_k(logits, labels, k) == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("metric", [sqnr_db, cosine, max_abs_difference, agreement])
def test_other_shapes_are_refused(metric):
    with pytest.raises(ArgumentError, match=r"\(2, 3\) and \(3, 2\)"):
        metric(np.ones((2, 3)), np.ones((3, 2)))
