"""Several processes that calibrate one model, each on its share of the data (`torchrun`, gloo or nccl)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.utils._pytree import tree_map_only

from qdq.errors import CalibrationError, DataError
from qdq.trace import tensors_of


def find_rank() -> tuple[int, int]:
    """The number of this process and how many there are: (0, 1) where torch.distributed is not initialized."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def shard_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Every n-th batch, a different one in each of n processes; all of them where there is one process.

    The batches of all processes are those of one, in its order. Each process iterates over all of them; where loading
    is dear, give each a loader of its own share instead.
    """
    rank, size = find_rank()
    return itertools.islice(batches, rank, None, size)


def gather_bytes(content: bytes) -> list[bytes]:
    """What each process gave, in the order of their ranks; all must call it. No pickle is involved."""
    _, size = find_rank()
    if size == 1:
        return [content]
    device = "cpu" if "gloo" in distributed.get_backend() else torch.device("cuda", torch.cuda.current_device())
    length = torch.tensor([len(content)], device=device)
    lengths = [torch.zeros_like(length) for _ in range(size)]
    distributed.all_gather(lengths, length)
    longest = max(1, max(int(other) for other in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    if content:
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(padded) for _ in range(size)]
    distributed.all_gather(gathered, padded)
    return [other[: int(n)].cpu().numpy().tobytes() for other, n in zip(gathered, lengths, strict=True)]


@contextmanager
def failing_together() -> Iterator[None]:
    """A block that ends in every process with an error if it does in one, so that none waits for another forever.

    Raises:
        CalibrationError: In the processes whose own block was fine, with the message of one that was not.
    """
    try:
        yield
    except Exception as error:
        gather_bytes(f"{type(error).__name__}: {error}".encode())
        raise
    for rank, message in enumerate(gather_bytes(b"")):
        if message:
            raise CalibrationError(
                f"process {rank} failed: {message.decode(errors='replace')}", "see the output of that process."
            )


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors of all processes, in place; all must call it with the same shape."""
    if find_rank()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The largest of the tensors of all processes, element by element and in place; all must call it."""
    if find_rank()[1] > 1:
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def shard_samples(batch: Any) -> tuple[Any, int]:
    """Every n-th sample of a batch, different ones in each of n processes, and how many these are.

    Args:
        batch: Tensors `[B, ...]` of one B, in tuples, lists or dictionaries.

    Raises:
        DataError: Several processes, and no tensor, or tensors that differ in their first size.
    """
    rank, size = find_rank()
    tensors = tensors_of(batch)
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if size == 1:
        return batch, max(lengths, default=1)
    if len(lengths) != 1 or lengths == {0}:
        raise DataError(
            f"a batch cannot be shared among {size} processes: its tensors have the first sizes {sorted(lengths)}.",
            "give batches whose tensors all have one row a sample, or run one process.",
        )
    own = tree_map_only(torch.Tensor, lambda tensor: tensor[rank::size], batch)
    return own, len(range(rank, lengths.pop(), size))
