"""Batches of any kind: their number of samples, and their first ones."""

import pytest
import torch

from qdq import ArgumentError, Labelled, SampleBatches
from qdq.batch import count_samples, drop_samples, take_samples, tensors_of
from qdq.workloads.sample_batches import DrawnBatches, ShuffledBatches

IMAGES = torch.arange(5 * 3 * 20 * 20, dtype=torch.float32).reshape(5, 3, 20, 20)
TABLE = torch.arange(7)  # not by sample


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, torch.arange(5)),
        (IMAGES, None),
        [IMAGES, torch.arange(5)],
        {"x": IMAGES, "table": TABLE},
        Labelled((IMAGES, TABLE), torch.arange(5)),
        Labelled(IMAGES, [{"boxes": torch.zeros(index, 4)} for index in range(5)]),
        list(IMAGES),
        Labelled(list(IMAGES), [{"label": index} for index in range(5)]),
    ],
    ids=[
        "tensor",
        "pair",
        "unlabelled",
        "list",
        "dict",
        "labelled",
        "targets",
        "images",
        "detector",
    ],
)
def test_first_samples_of_every_form(batch):
    cut = take_samples(batch, 2)
    assert type(cut) is type(batch)
    rest = drop_samples(batch, 2)
    assert type(rest) is type(batch)
    assert count_samples(rest) == 3
    for first, last, whole in zip(*map(tensors_of, (cut, rest, batch)), strict=False):
        if whole is not TABLE and len(whole) == 5:
            assert torch.equal(torch.cat([first, last]), whole)
    assert count_samples(batch) == 5
    assert count_samples(cut) == 2
    assert take_samples(batch, 5) is batch
    assert take_samples(batch, 9) is batch
    if isinstance(batch, dict):
        assert cut["table"] is TABLE
    if isinstance(batch, Labelled):
        assert len(cut.labels) == 2
    if isinstance(batch, tuple) and batch[1] is not None:
        assert cut[1].tolist() == [0, 1]


def test_subset_cuts_the_last_batch_and_the_labels():
    batches = [torch.zeros(3, 2), torch.ones(3, 2), torch.full((3, 2), 2.0)]
    samples = SampleBatches(batches, "nine rows", list(range(9)), "made up")
    assert samples.num_samples == 9
    subset = samples.subset(5)
    assert [len(batch) for batch in subset] == [3, 2]
    assert len(subset) == 2
    assert subset.labels == [0, 1, 2, 3, 4]
    assert subset.description == "the first 5 of: nine rows"
    assert samples.subset(9) is samples
    assert samples.subset(100) is samples
    rest = samples.without_first(5)
    assert [len(batch) for batch in rest] == [1, 3]
    assert rest.labels == [5, 6, 7, 8]
    assert rest.description == "all but the first 5 of: nine rows"
    assert samples.without_first(0).num_samples == 9
    with pytest.raises(ArgumentError, match="no batch in all but the first 9"):
        samples.without_first(9)
    with pytest.raises(ArgumentError, match="n is 0"):
        samples.subset(0)
    with pytest.raises(ArgumentError, match="no batch in nothing"):
        SampleBatches([], "nothing")


def test_every_pass_of_a_training_has_another_order():
    batches = ShuffledBatches([torch.tensor([index]) for index in range(20)], "twenty")
    torch.manual_seed(0)
    first, second = ([int(batch) for batch in batches] for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_sample_is_refused(n):
    with pytest.raises(ArgumentError, match=f"n is {n}"):
        SampleBatches([IMAGES], "images").subset(n)
    with pytest.raises(ArgumentError, match=f"n is {n}"):
        DrawnBatches(range(5), range(5), 2, "numbers").subset(n)
