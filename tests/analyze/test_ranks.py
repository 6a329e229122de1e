"""Shared work: every process gets the results of all."""

import numpy as np
import pytest

from qdq.analyze import ranks as ranks_module
from qdq.analyze.ranks import Ranks


@pytest.fixture
def three_ranks(monkeypatch):
    """Three processes in one: what each of them gathers is prepared beforehand."""
    gathered = []
    monkeypatch.setattr(ranks_module, "gather_bytes", lambda content: [content, *gathered])
    ranks = [Ranks() for _ in range(3)]
    for number, rank in enumerate(ranks):
        rank.rank, rank.size = number, 3
    return ranks, gathered


NAMES = [None, "a", "b", "c", "d"]


def test_each_item_has_one_process(three_ranks):
    ranks, _ = three_ranks
    shares = [rank.share(NAMES) for rank in ranks]
    assert sorted(map(str, [*shares[0], *shares[1], *shares[2]])) == sorted(map(str, NAMES))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_results_of_any_shape_are_merged_to_the_bit(three_ranks, monkeypatch):
    ranks, _ = three_ranks
    results = {name: np.random.default_rng(0).random((3, 2)) / 3 for name in NAMES}
    results["b"] = np.asarray(0.1)
    packed = []
    for rank in ranks:
        share = {name: results[name] for name in rank.share(NAMES)}
        packed.append(ranks_module._pack(NAMES, share))
    monkeypatch.setattr(ranks_module, "gather_bytes", lambda content: packed)
    merged = ranks[0].merge(NAMES, {})
    assert merged.keys() == results.keys()
    for name, array in results.items():
        assert np.array_equal(merged[name], array)
        assert merged[name].shape == array.shape


def test_a_process_without_a_share_merges_too(three_ranks):
    ranks, gathered = three_ranks
    gathered.append(ranks_module._pack(["a"], {"a": np.ones(2)}))
    merged = ranks[2].merge(["a"], {})
    assert np.array_equal(merged["a"], np.ones(2))


def test_a_flag_of_any_process_counts(three_ranks):
    ranks, gathered = three_ranks
    assert not ranks[0].any(False)
    assert ranks[0].any(True)
    gathered.append(b"set")
    assert ranks[0].any(False)


def test_contents_are_united(three_ranks):
    ranks, gathered = three_ranks
    gathered.append(b'{"b": [1, 2]}')
    assert ranks[0].unite({"a": 0.1}) == {"a": 0.1, "b": [1, 2]}
