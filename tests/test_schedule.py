"""Rates and lengths of fine-tuning, against their closed forms."""

import math

import pytest

from qdq import ArgumentError, ArgumentTypeError, Schedule


def test_rate_rises_linearly_then_falls_along_half_a_cosine():
    schedule = Schedule(warm_up=0.25)
    rates = [schedule.rate_at(step, 16) for step in range(16)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1
    assert rates[10] == pytest.approx(0.5)  # the middle of the fall
    assert rates[7] == pytest.approx((1 + math.sqrt(0.5)) / 2)  # a quarter of it
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("warm_up", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
def test_every_step_has_a_positive_rate(warm_up, total):
    schedule = Schedule(warm_up=warm_up)
    rates = [schedule.rate_at(step, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)


def test_length():
    assert Schedule(steps=5, epochs=3).count_steps(iter([])) == 5
    assert Schedule(epochs=3).count_steps([1, 2]) == 6
    with pytest.raises(ArgumentError, match="no batch to train on"):
        Schedule().count_steps([])
    with pytest.raises(ArgumentError, match="have no length") as caught:
        Schedule().count_steps(iter([1]))
    assert "steps=" in caught.value.fix


@pytest.mark.parametrize("name", ["steps", "epochs", "patience"])
def test_counts(name):
    Schedule(**{name: 1})
    with pytest.raises(ArgumentError, match=f"{name} is 0; it must be 1 or more"):
        Schedule(**{name: 0})
    for value in (1.0, True, "3"):
        with pytest.raises(ArgumentTypeError, match=f"{name} is {value!r}"):
            Schedule(**{name: value})


@pytest.mark.parametrize("name", ["lr", "bias_lr", "range_lr", "max_norm"])
def test_positive_numbers(name):
    Schedule(**{name: 1})
    for value in (0.0, -1e-3, math.inf, math.nan):
        with pytest.raises(ArgumentError, match=f"{name} is .*above 0 and finite"):
            Schedule(**{name: value})
    for value in (None, True, "1e-3"):
        with pytest.raises(ArgumentTypeError, match=f"{name} is {value!r}"):
            Schedule(**{name: value})


@pytest.mark.parametrize("name", ["warm_up", "tune_ranges", "tune_batchnorm", "grow"])
def test_fractions(name):
    Schedule(**{name: 0})
    Schedule(**{name: 1.0})
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match=f"{name} is .*fraction of the steps"):
            Schedule(**{name: value})
