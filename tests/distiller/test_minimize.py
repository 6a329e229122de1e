"""The search core on functions whose minimum is known."""

import math
import sys

import numpy as np
import pytest

from qdq.analyze.journal import Journal
from qdq.analyze.ranks import Ranks
from qdq.distiller.search.minimize import Listener, Objective, minimize
from qdq.distiller.search.search_options import METHODS, LapqOptions, MinimizeOptions
from qdq.errors import ArgumentError, ArgumentTypeError, DependencyError, StateError

BEST = np.array([0.02, 30.0, -5.0, 0.0])
START = np.array([0.05, 7.0, -9.0, 0.0])


def bowl(numbers):
    """Smallest, 1.5, at BEST; the sizes of the numbers do not matter, but how they depend on each other does."""
    distances = np.log(numbers[:3] / BEST[:3])
    return 1.5 + distances @ distances + distances[0] * distances[1]


def find(loss=bowl, start=START, path=None, fingerprint="", listener=None, **options):
    journal = Journal(path, fingerprint, Ranks())
    objective = Objective(loss, start, journal)
    minimize(objective, MinimizeOptions(**options), listener)
    journal.close()
    return objective


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_minimum(method):
    objective = find(method=method)
    assert objective.start_loss == bowl(START)
    assert objective.best_loss == bowl(objective.best) < 1.51
    np.testing.assert_allclose(objective.best, BEST, rtol=0.1)


def test_no_number_changes_its_sign_or_becomes_zero():
    tried = []

    def towards_zero(numbers):
        tried.append(numbers.copy())
        return float(np.abs(numbers).sum())

    objective = find(towards_zero, maxfev=300)
    assert all(np.array_equal(np.sign(numbers), np.sign(START)) for numbers in tried)
    assert 0 < objective.best_loss < 1e-3 * objective.start_loss


def wells(numbers):
    """Wells at every power of the root of 2, the deepest at 4."""
    x = np.log2(numbers[0])
    return float((x - 2) ** 2 / 10 - math.cos(4 * math.pi * x))


def test_basin_hopping_leaves_a_local_minimum():
    options = {"method": "Nelder-Mead"}
    local = find(wells, np.array([1.0]), **options)
    hopped = find(wells, np.array([1.0]), basinhopping=True, basinhopping_niter=30, **options)
    assert local.best[0] == pytest.approx(1, rel=0.1)
    assert hopped.best[0] == pytest.approx(4, rel=0.1)


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("options", [{}, {"basinhopping": True, "basinhopping_niter": 4}])
@pytest.mark.parametrize("stop_at", [1, 2, 37, 90])
def test_a_stopped_search_goes_on_to_the_same_bits(tmp_path, options, stop_at):
    lines, resumed_lines = [], []
    uninterrupted = find(listener=Recorder(lines), **options)
    measured = []

    def stopping(numbers):
        if len(measured) == stop_at:
            raise Stop
        measured.append(numbers.tolist())
        return bowl(numbers)

    def going_on(numbers):
        assert numbers.tolist() not in measured
        measured.append(numbers.tolist())
        return bowl(numbers)

    path = tmp_path / "journal.jsonl"
    with pytest.raises(Stop):
        find(stopping, path=path, **options)
    resumed = find(going_on, path=path, listener=Recorder(resumed_lines), **options)
    assert len(measured) > stop_at
    assert resumed.best.tolist() == uninterrupted.best.tolist()
    assert resumed.best_loss == uninterrupted.best_loss
    assert resumed.evaluations == uninterrupted.evaluations
    assert resumed_lines == lines


class Recorder(Listener):
    def __init__(self, lines):
        self.lines = lines

    def evaluated(self, *facts):
        self.lines.append(facts)

    def iterated(self, *facts):
        self.lines.append(facts)


def test_the_journal_of_other_data_is_not_used(tmp_path):
    path = tmp_path / "journal.jsonl"
    find(path=path, fingerprint="first", maxfev=20)
    calls = []

    def count(numbers):
        calls.append(numbers)
        return bowl(numbers)

    find(count, path=path, fingerprint="second", maxfev=20)
    assert calls


def test_the_number_of_evaluations_is_limited():
    calls = []

    def count(numbers):
        calls.append(numbers)
        return bowl(numbers)

    for options in ({}, {"basinhopping": True}):
        calls.clear()
        objective = find(count, maxfev=25, **options)
        assert objective.evaluations == 25
        assert len(calls) <= 26  # and the start
        assert objective.best_loss == min(map(bowl, calls))


def test_iterations_are_limited_and_reported():
    lines = []
    find(maxiter=2, listener=Recorder(lines))
    iterations = [facts for facts in lines if len(facts) == 2]
    assert len(iterations) == 2
    assert iterations[0][0] > iterations[1][0] > 1.5


def test_a_loss_that_is_no_number_is_never_the_best():
    def broken_above(numbers):
        return math.nan if abs(numbers[1]) > 12 else bowl(numbers)

    objective = find(broken_above)
    assert abs(objective.best[1]) <= 12
    assert 1.5 < objective.best_loss < objective.start_loss
    with pytest.raises(StateError, match="start of the search is NaN or Inf"):
        find(lambda _: math.inf)


def test_nothing_to_search_is_no_error():
    objective = find(lambda _: 2.0, np.zeros(3))
    assert objective.best.tolist() == [0, 0, 0]


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(DependencyError, match=r"pip install 'qdq\[lapq\]'"):
        find()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"maxiter": 0}, ArgumentError, "maxiter is 0; expected 1 or more"),
        ({"maxfev": -1}, ArgumentError, "maxfev is -1"),
        ({"basinhopping_niter": "100"}, ArgumentTypeError, "basinhopping_niter is '100', a str"),
        ({"basinhopping_niter": True}, ArgumentTypeError, "a bool"),
        ({"method": "BFGS"}, ArgumentError, "method is 'BFGS'; expected Powell, Nelder-Mead"),
        ({"init_method": "powell"}, ArgumentError, "init_method is 'powell'"),
        ({"init_mode": "N_STD"}, ArgumentError, "expected NONE, AVG, LAPLACE, GAUSS, L1, L2, L3"),
        ({"eval_size": 0}, ArgumentError, "eval_size is 0"),
        ({"eval_size": 1.5}, ArgumentError, "eval_size is 1.5"),
        ({"eval_size": "1"}, ArgumentTypeError, "eval_size is '1', a str"),
    ],
)
def test_wrong_options_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        LapqOptions(**options)
