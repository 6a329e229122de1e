"""Several processes calibrate or fine-tune one model, each on a part of the data (`torchrun`, gloo or nccl)."""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.utils._pytree import tree_map_only

from qdq.batch import tensors_of
from qdq.errors import CalibrationError, DataError, QdqError, StateError
from qdq.files import read_file
from qdq.run import find_announced


def find_rank() -> tuple[int, int]:
    """The rank of this process and the number of processes: (0, 1) if torch.distributed is not initialized."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


_groups = itertools.count()  # the processes join and leave each group together, so they count alike


@functools.cache
def _open_store() -> Any:
    """The store of the processes that torchrun announces; cached, because the first process may be its server."""
    from torch.distributed.rendezvous import rendezvous  # some builds of torch lack it

    return next(iter(rendezvous("env://")))[0]


@contextmanager
def joining_processes(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun announces into one group for the block; do nothing if there is a group already.

    The group uses gloo, and nccl for tensors on a GPU if the model is on one. It may be joined and left repeatedly.

    Args:
        device: The device of the model; on GPUs, each process needs a separate one.

    Raises:
        StateError: The other processes cannot be reached.
    """
    rank, size = find_announced()
    if size == 1 or not distributed.is_available() or distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        # Each group has its own names: those of the previous group still exist, with addresses of processes that left.
        store = distributed.PrefixStore(f"qdq {next(_groups)}", _open_store())  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise StateError(
            f"WORLD_SIZE announces {size} processes, but they cannot be joined: {error}",
            "start the script with torchrun, or unset WORLD_SIZE.",
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


def shard_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Every n-th batch, a different one in each of n processes; all batches if there is one process.

    Together the processes take the batches of a single process, in its order. Each process iterates over all of them;
    if loading is expensive, give each process a loader of its part instead.
    """
    rank, size = find_rank()
    return itertools.islice(batches, rank, None, size)


def gather_bytes(content: bytes) -> list[bytes]:
    """The content from each process, in the order of ranks; all processes must call it. It does not use pickle.

    Raises:
        StateError: Another process has ended.
    """
    _, size = find_rank()
    if size == 1:
        return [content]
    with _connected():
        length = torch.tensor([len(content)], device=_find_device())
        lengths = [torch.zeros_like(length) for _ in range(size)]
        distributed.all_gather(lengths, length)
        padded = _to_tensor(content, max(1, *map(int, lengths)))
        gathered = [torch.empty_like(padded) for _ in range(size)]
        distributed.all_gather(gathered, padded)
    contents = []
    for tensor, num_bytes in zip(gathered, lengths, strict=True):
        contents.append(tensor[: int(num_bytes)].cpu().numpy().tobytes())
    return contents


def broadcast_bytes(content: bytes) -> bytes:
    """The content from the first process, in all processes; all must call it.

    Raises:
        StateError: Another process has ended.
    """
    if find_rank()[1] == 1:
        return content
    with _connected():
        length = torch.tensor([len(content)], device=_find_device())
        distributed.broadcast(length, 0)
        tensor = _to_tensor(content[: int(length)], int(length))
        distributed.broadcast(tensor, 0)
    return tensor.cpu().numpy().tobytes()


def broadcast_number(number: float) -> float:
    """The number of the first process, exact and also NaN, in all processes; all must call it."""
    return float(broadcast_bytes(repr(float(number)).encode()))


def read_together(path: Path) -> bytes:
    """The content of a file that the first process reads for all; all must call it.

    Raises:
        OSError: In the first process, if it cannot read the file.
        StateError: In the other processes, if the first cannot read the file.
    """
    with failing_together(StateError):
        content = read_file(path) if find_rank()[0] == 0 else b""
    return broadcast_bytes(content)


def _find_device() -> torch.device:
    """The device of tensors that the backend of the group can send."""
    if "gloo" in distributed.get_backend():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _to_tensor(content: bytes, length: int) -> torch.Tensor:
    """The bytes as uint8 `[length]`, followed by zeros."""
    padded = torch.zeros(length, dtype=torch.uint8, device=_find_device())
    if content:
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        padded[: len(content)] = values.to(padded.device)
    return padded


@contextmanager
def _connected() -> Iterator[None]:
    """A block of collectives; turns the errors that they raise when another process has ended into one that says so."""
    try:
        yield
    except RuntimeError as error:
        # The frames of torch hold the group. While they do, its threads continue after it is destroyed, until the
        # interpreter ends, where gloo may abort the process.
        traceback.clear_frames(error.__traceback__)
        raise StateError(
            f"the connection to the other processes broke: {error}",
            "see the output of the one that ended first.",
        ) from error


@contextmanager
def failing_together(kind: type[QdqError] = CalibrationError) -> Iterator[None]:
    """End the block with an error in every process if it fails in one, so that no process waits forever.

    Args:
        kind: Class of the error in the processes whose block did not fail.

    Raises:
        QdqError: Of that class, with the message of a process whose block failed.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    raise_together(failure, kind)


def raise_together(failure: Exception | None, kind: type[QdqError]) -> None:
    """Raise an error in every process if one has failed; all must call it.

    Args:
        failure: The error of this process, which is raised again; None: it did not fail.
        kind: Class of the error if another process has failed.

    Raises:
        QdqError: Of that class, with the message of the process that failed.
    """
    local_message = ""
    if failure is not None:
        local_message = f"{type(failure).__name__}: {failure}"
    try:
        messages = gather_bytes(local_message.encode())
    except StateError:
        if failure is None:
            raise
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message:
            raise kind(
                f"process {rank} failed: {message.decode(errors='replace')}",
                "see the output of that process.",
            )


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors of all processes, in place; all must call it with the same shape.

    Raises:
        StateError: Another process has ended.
    """
    if find_rank()[1] > 1:
        with _connected():
            distributed.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The largest of the tensors of all processes, element by element and in place; all must call it."""
    if find_rank()[1] > 1:
        with _connected():
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def shard_samples(batch: Any) -> tuple[Any, int]:
    """Every n-th sample of a batch, different ones in each of n processes, and their number.

    Args:
        batch: Tensors `[B, ...]` with the same B, in tuples, lists or dictionaries.

    Raises:
        DataError: Several processes, and no tensor, or tensors that differ in their first size.
    """
    rank, size = find_rank()
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors_of(batch)}
    if size == 1:  # the number only tells whether there is any
        return batch, max(lengths, default=1)
    if len(lengths) != 1 or lengths == {0}:
        raise DataError(
            f"a batch cannot be split among {size} processes: its tensors have the first sizes {sorted(lengths)}.",
            "give batches whose tensors all have one row per sample, or run one process.",
        )
    shard = tree_map_only(torch.Tensor, lambda tensor: tensor[rank::size], batch)
    return shard, len(range(rank, lengths.pop(), size))
