"""Random numbers that depend on a seed alone."""

import torch

from qdq.seeds import seeded_rng


def test_a_block_draws_the_numbers_of_its_seed_and_restores_the_state():
    state = torch.get_rng_state()
    with seeded_rng(5):
        drawn = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, expected)
