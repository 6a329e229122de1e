"""The lines of a training: which epoch, which step, which scores."""

import logging
import math

import pytest
import torch
from torch import nn

from qdq.distiller import TrainingLog


class Fixed(nn.Module):
    """Always the same two logits, with a gradient."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([2.0, 0.0]))

    def forward(self, images):
        return self.logits.expand(len(images), 2)


def make_batches(*labels):
    return [(torch.zeros(len(batch), 1), torch.tensor(batch)) for batch in labels]


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="qdq")
    return lambda: [record.getMessage() for record in caplog.records]


def test_scores_are_means_over_the_samples_of_the_epoch(lines):
    model = Fixed()
    right = math.log(1 + math.exp(-2))  # the negative logarithm of the probability of class 0
    wrong = math.log(1 + math.exp(2))
    with TrainingLog(make_batches([0, 0, 0], [1]), model, 1) as batches:
        assert len(batches) == 2
        batches.begin_phase(3)
        for epoch in range(2):
            batches.set_epoch(epoch)
            assert not batches.has_begun
            for images, _ in batches:
                model(images)
                with torch.no_grad():
                    model(images)  # a measurement
            assert batches.has_begun and batches.epoch == 3 + epoch
        mean = (3 * right + wrong) / 4
        assert lines() == [
            f"Epoch: [3][    1/    2]    Loss {right:.6f}    Top1 100.000000    Top5 100.000000",
            f"Epoch: [3][    2/    2]    Loss {mean:.6f}    Top1 75.000000    Top5 100.000000",
            f"Epoch: [4][    1/    2]    Loss {right:.6f}    Top1 100.000000    Top5 100.000000",
            f"Epoch: [4][    2/    2]    Loss {mean:.6f}    Top1 75.000000    Top5 100.000000",
        ]


def test_lines_come_every_few_batches_and_end_with_the_block(lines):
    model = Fixed()
    with TrainingLog(make_batches([0], [0], [0], [0], [0]), model, 2) as batches:
        for images, _ in batches:
            model(images)
    for images, _ in batches:
        model(images)
    assert [line.partition("]    ")[0] for line in lines()] == [
        "Epoch: [0][    2/    5",
        "Epoch: [0][    4/    5",
    ]
