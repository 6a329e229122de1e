"""A float teacher for a network that is quantized in training (Hinton et al., arXiv 1503.02531).

loss = student_wt * cross entropy + distill_wt * T^2 * KL(teacher / T, student / T)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdq.errors import ArgumentError
from qdq.qat import Distillation, cross_entropy


@dataclass(frozen=True)
class KnowledgeDistillation:
    """A teacher, and how much it counts.

    Args:
        teacher: The float model.
        temperature: T, above 0.
        distill_wt: Above 0.
        student_wt: At least 0.
        start_epoch: The epoch from which on there is a teacher.

    Raises:
        ArgumentError: A number out of range.
    """

    teacher: nn.Module
    temperature: float = 1.0
    distill_wt: float = 0.5
    student_wt: float = 0.5
    start_epoch: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.student_wt < float("inf") or self.start_epoch < 0:
            raise ArgumentError(
                f"student_wt is {self.student_wt}, start_epoch is {self.start_epoch}; both must be at least 0.",
                "leave them out.",
            )
        self.make_distance()

    def make_distance(self) -> Distillation:
        """The part of the loss that compares the two models."""
        return Distillation(mse=0, kl=self.distill_wt, features=0, temperature=self.temperature)


class WeightedCrossEntropy:
    """The loss of a classifier times a weight.

    Args:
        weight: The weight.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.__qualname__ = (
            f"{weight} * cross_entropy"  # by which a run is compared when it resumes
        )

    def __call__(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """The loss of a batch, see `qdq.cross_entropy`."""
        return self.weight * cross_entropy(outputs, batch)
