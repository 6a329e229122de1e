"""How many samples a batch has, which batches have any, and several batches as one."""

import pytest
import torch

from qdq.batch import count_samples, join_batches, list_filled_batches
from qdq.errors import ArgumentTypeError, DataError

IMAGES = torch.arange(24.0).reshape(4, 3, 2)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (IMAGES, 4),
        ((IMAGES, torch.zeros(9)), 4),  # labels do not count
        ({"scale": torch.tensor(2.0), "ids": torch.zeros(5, 7)}, 5),
        (([torch.zeros(3, 8, 8), torch.zeros(3, 6, 6)], None), 2),  # images of a detector
        (torch.tensor(1.0), 1),
        ({"name": "text"}, 1),
        (torch.zeros(0, 3), 0),
        (([torch.zeros(5, 8), torch.zeros(5, 9)], None), 5),  # a model whose input is a list
        (([torch.zeros(6, 7, 8), torch.zeros(6, 9, 8)], None), 6),
    ],
    ids=[
        "tensor",
        "pair",
        "dictionary",
        "images",
        "number",
        "text",
        "empty",
        "list",
        "list of sequences",
    ],
)
def test_count(batch, expected):
    assert count_samples(batch) == expected


def test_batches_without_samples_are_left_out():
    batches = [torch.zeros(0, 3), IMAGES, (torch.zeros(0, 3), torch.zeros(0))]
    assert [batch is IMAGES for batch in list_filled_batches(iter(batches))] == [True]


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "there is no batch"), ([torch.zeros(0, 3)] * 2, "all 2 batches are empty")],
    ids=["none", "empty"],
)
def test_no_samples_at_all(batches, message):
    with pytest.raises(DataError, match=message):
        list_filled_batches(batches)


def test_one_tensor_is_not_batches():
    with pytest.raises(ArgumentTypeError, match=r"pass \[batch\]"):
        list_filled_batches(IMAGES)


def test_an_empty_input_beside_others_does_not_empty_a_batch():
    batch = {"x": IMAGES, "extra": torch.zeros(8, 0)}
    assert list_filled_batches([batch]) == [batch]


def test_inputs_in_a_list_are_joined_one_by_one():
    batches = [([torch.ones(size, 3), torch.zeros(size, 2)], size) for size in (2, 3)]
    ((first, second),) = join_batches(batches)
    assert first.shape == (5, 3)
    assert second.shape == (5, 2)


def test_join_is_concatenation():
    (joined,) = join_batches([(IMAGES, 1), (IMAGES[:1], 2)])
    assert torch.equal(joined, torch.cat([IMAGES, IMAGES[:1]]))


def test_what_has_no_row_a_sample_is_held_once():
    positions = torch.arange(7)
    batches = [{"ids": torch.zeros(size, 7), "positions": positions} for size in (2, 3)]
    joined = join_batches(batches)
    assert joined["ids"].shape == (5, 7)
    assert torch.equal(joined["positions"], positions)


def test_other_differences_are_refused():
    batches = [{"ids": torch.zeros(2, 3), "scale": scale} for scale in (1.0, 2.0)]
    with pytest.raises(DataError, match=r"scale.* differs between batches"):
        join_batches(batches)
    with pytest.raises(DataError, match="cannot be joined"):
        join_batches([torch.zeros(2, 3), torch.zeros(2, 4)])
