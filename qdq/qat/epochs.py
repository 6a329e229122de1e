"""The batches of a run, epoch after epoch, with random numbers that a resumed run draws again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from qdq.batch import require_batches, tensors_of
from qdq.calibrate.collect import digest_tensors
from qdq.errors import DataError
from qdq.qat.checkpoint import keeping_random_state, unpack_random
from qdq.run import set_seed


def iterate_epochs(
    batches: Iterable[Any],
    seed: int,
    position: tuple[int, int],
    random_state: Mapping[str, torch.Tensor],
    device: torch.device,
) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Yield batches without end, each with its epoch and its number in this epoch, counted from 1.

    Every epoch seeds all random numbers, so that a resumed run can start it again and skip the batches that it has
    seen.

    Args:
        batches: The batches of an epoch.
        seed: Seed of the order of the data.
        position: Epoch, and number of its batches that an earlier run took.
        random_state: Random numbers of that run after these batches; empty if there was no such run.
        device: The device of the model.

    Raises:
        DataError: An epoch without a batch.
    """
    epoch, num_skipped = position
    while True:
        begin_epoch(batches, seed, epoch)
        taken = 0
        for batch in batches:
            taken += 1
            if taken > num_skipped:
                yield batch, (epoch, taken)
            elif taken == num_skipped and random_state:
                unpack_random(random_state, device)
        if taken == 0:
            raise _no_batch(epoch)
        epoch += 1
        num_skipped = 0


def _no_batch(epoch: int) -> DataError:
    fault = "there is no batch to train on"
    if epoch > 0:
        fault = "the batches ran out: an iterator gives them once"
    return DataError(
        f"{fault}.", "give batches that can be iterated over again, a list or a DataLoader."
    )


def digest_first_batch(batches: Iterable[Any], seed: int, device: torch.device) -> str:
    """A digest of the first batch and its labels, to tell training sets apart; "" for an iterator."""
    # Looking at the first batch of an iterator would use it up.
    if iter(batches) is batches:
        return ""
    with keeping_random_state(device=device):
        begin_epoch(batches, seed, 0)
        for batch in batches:
            return digest_tensors(tensors_of(batch))
    return ""


def read_held_out(batches: Iterable[Any], seed: int, device: torch.device) -> list[Any]:
    """The batches to measure on; if they are drawn at random, the same ones for the same seed.

    Raises:
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: There is no batch.
    """
    require_batches(batches)
    with keeping_random_state(find_generators(batches), device):
        begin_epoch(batches, seed, 0)
        held_out = list(batches)
    if not held_out:
        raise DataError(
            "there is no batch to measure on.", "give held at least one batch, or leave it out."
        )
    return held_out


def begin_epoch(batches: Any, seed: int, epoch: int) -> None:
    """Seed the global random numbers and the generators of the batches, and tell samplers the epoch."""
    words = np.random.SeedSequence([seed, epoch]).generate_state(2)
    set_seed(int(words[0]))
    for generator in find_generators(batches):
        generator.manual_seed(int(words[1]))
    for sampler in _find_samplers(batches):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def find_generators(batches: Any) -> list[torch.Generator]:
    """The random generators of a DataLoader and of its samplers."""
    generators = []
    for sampler in _find_samplers(batches):
        generator = getattr(sampler, "generator", None)
        if isinstance(generator, torch.Generator):
            generators.append(generator)
    return generators


def _find_samplers(batches: Any) -> list[Any]:
    """The batches themselves, and the objects from which a DataLoader draws its order; each once."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    candidates = [
        batches,
        batch_sampler,
        getattr(batches, "sampler", None),
        getattr(batch_sampler, "sampler", None),
    ]
    unique = {id(candidate): candidate for candidate in candidates}
    return list(unique.values())
