"""Random numbers of torch that depend on a seed alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Seed torch's random numbers on the CPU for a block, and restore their former state after it.

    Args:
        seed: Seed of the block.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every GPU, and nothing would restore those.
        torch.default_generator.manual_seed(seed)
        yield
