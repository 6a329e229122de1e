"""The loss on a part of the batches, against torch's own loss of all samples at once."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qdq.distiller.search.subset_loss import SubsetLoss
from qdq.errors import ArgumentTypeError, DataError

IMAGES = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 3


def make_batches(size=4):
    return list(zip(IMAGES.split(size), LABELS.split(size), strict=True))


def loss_of(net, count):
    with torch.no_grad():
        return float(nn.functional.cross_entropy(net(IMAGES[:count]), LABELS[:count]))


@pytest.mark.parametrize("memoize", [False, True])
@pytest.mark.parametrize(("fraction", "count"), [(1.0, 10), (0.5, 8), (0.01, 4)])
def test_the_mean_is_that_of_the_samples(memoize, fraction, count):
    net = nn.Linear(4, 3)
    loss = SubsetLoss(make_batches(), fraction=fraction, memoize=memoize)
    for _ in range(2):
        assert loss(net) == pytest.approx(loss_of(net, count), rel=1e-6)


def test_the_state_of_the_model_stays():
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    loss = SubsetLoss(make_batches())
    assert loss(net) == loss(net)
    assert net.training


def test_an_empty_batch_counts_nothing():
    net = nn.Linear(4, 3)
    empty = (IMAGES[:0], LABELS[:0])
    assert SubsetLoss([empty, *make_batches()])(net) == pytest.approx(loss_of(net, 10), rel=1e-6)
    for batches in ([], [empty]):
        with pytest.raises(DataError, match="no batch with samples"):
            SubsetLoss(batches)


def test_batches_that_change_are_refused_unless_in_memory():
    net = nn.Linear(4, 3)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 4, shuffle=True)
    with pytest.raises(DataError, match=r"batch 0 differs from that of the first pass.*memoize"):
        SubsetLoss(loader)(net)
    with pytest.raises(DataError, match="there were 3 batches, and now there are 0"):
        SubsetLoss(iter(make_batches()))(net)
    for batches in (loader, iter(make_batches())):
        loss = SubsetLoss(batches, memoize=True)
        assert loss(net) == loss(net) == pytest.approx(loss_of(net, 10), rel=1e-6)


def test_a_fraction_needs_a_length():
    with pytest.raises(DataError, match=r"a fraction of 0\.5 .* no length"):
        SubsetLoss(iter(make_batches()), fraction=0.5)
    with pytest.raises(ArgumentTypeError, match="expected something that yields batches"):
        SubsetLoss(IMAGES)


def test_the_digest_tells_data_apart():
    first = SubsetLoss(make_batches())
    assert first.digest() == SubsetLoss(make_batches(), memoize=True).digest()
    others = [
        SubsetLoss(make_batches(5)),
        SubsetLoss(make_batches(), fraction=0.5),
        SubsetLoss([(IMAGES, LABELS.flip(0))]),
        SubsetLoss(make_batches(), criterion=lambda outputs, _: outputs.mean()),
    ]
    assert len({first.digest(), *(loss.digest() for loss in others)}) == 5
