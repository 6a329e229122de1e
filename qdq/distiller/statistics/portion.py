"""The part of a data set that statistics are collected on: a fraction, and always the same samples."""

from __future__ import annotations

import torch

from qdq.errors import ArgumentError

MOST_PER_BATCH = 128
"""Largest number of samples in a batch while statistics are collected."""


def choose_portion(num_samples: int, portion: float, seed: int = 0) -> list[int]:
    """The samples of a portion, drawn once: a smaller portion is a part of a larger one.

    Args:
        num_samples: Number of all samples.
        portion: A fraction, above 0 and at most 1.
        seed: Of the draw.

    Returns:
        Indices in ascending order, at least one.

    Raises:
        ArgumentError: No samples, or another portion.
    """
    if num_samples < 1:
        raise ArgumentError("the data set is empty.", "give one with samples.")
    if not 0 < portion <= 1:
        raise ArgumentError(
            f"the portion of the data is {portion}; it must be above 0 and at most 1.",
            "give a fraction, such as 0.05.",
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_samples, generator=generator)
    size = max(1, round(portion * num_samples))
    return sorted(order[:size].tolist())
