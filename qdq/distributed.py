"""Several processes calibrate or fine-tune one model, each on a part of the data (`torchrun`, gloo or nccl)."""

from __future__ import annotations

import functools
import itertools
import os
import socket
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from qdq.batch import map_tensors, tensors_of
from qdq.errors import CalibrationError, DataError, QdqError, StateError, is_out_of_memory
from qdq.files import read_file
from qdq.run import find_announced
from qdq.text import printable


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
        StateError: The other processes cannot be reached, or two of them have their models on one GPU.
    """
    with _joined(device), _sending_from(device):
        _require_separate_gpus(device)
        yield


@contextmanager
def _joined(device: torch.device) -> Iterator[None]:
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


_model_devices: list[torch.device] = []  # of the blocks that run, see `_find_device`


@contextmanager
def _sending_from(device: torch.device) -> Iterator[None]:
    _model_devices.append(device)
    try:
        yield
    finally:
        _model_devices.pop()


_checks = itertools.count()  # names in the store, like `_groups`


def _require_separate_gpus(device: torch.device) -> None:
    """Refuse two processes with their models on one GPU where nccl connects them.

    They talk through the store: nccl itself would end with an error about its own state, or wait forever.

    Args:
        device: The device of the model of this process.

    Raises:
        StateError: In all processes.
    """
    rank, size = find_rank()
    is_on_gpu = device.type == "cuda"
    if size == 1 or "cuda:nccl" not in distributed.get_backend_config():
        return
    gpu = (
        f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
        if is_on_gpu
        else ""
    )
    number = next(_checks)
    with connected():
        store = distributed.distributed_c10d._get_default_store()
        store.set(f"qdq GPU {number} {rank}", gpu)
        gpus = [store.get(f"qdq GPU {number} {other}").decode() for other in range(size)]
    ranks: dict[str, list[int]] = {}
    for other, name in enumerate(gpus):
        ranks.setdefault(name, []).append(other)
    for name, sharing in ranks.items():
        if name and len(sharing) > 1:
            numbers = " and ".join(map(str, sharing))
            raise StateError(
                f"the models of the processes {numbers} are on the same GPU.",
                "give each process its own: model.to(f\"cuda:{os.environ['LOCAL_RANK']}\").",
            )


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
    with connected():
        length = torch.tensor([len(content)], device=_find_device())
        all_lengths = torch.zeros(size, 1, dtype=length.dtype, device=length.device)
        _wait(distributed.all_gather(list(all_lengths), length, async_op=True))
        lengths = all_lengths.flatten().tolist()
        padded = _to_tensor(content, max(1, *lengths))
        gathered = padded.new_empty(size, len(padded))
        _wait(distributed.all_gather(list(gathered), padded, async_op=True))
        rows = gathered.cpu().numpy()
    return [row[:num_bytes].tobytes() for row, num_bytes in zip(rows, lengths, strict=True)]


def broadcast_bytes(content: bytes) -> bytes:
    """The content from the first process, in all processes; all must call it.

    Raises:
        StateError: Another process has ended.
    """
    if find_rank()[1] == 1:
        return content
    with connected():
        length = torch.tensor([len(content)], device=_find_device())
        _wait(distributed.broadcast(length, 0, async_op=True))
        num_bytes = int(length)
        tensor = _to_tensor(content[:num_bytes], num_bytes)
        _wait(distributed.broadcast(tensor, 0, async_op=True))
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
    """The device of tensors that the backend of the group can send, if possible the CPU.

    For a group of nccl alone it is the device of the model if that is known. Else it is the device that the group or
    the process is bound to, and else that of the local rank: without `torch.cuda.set_device` the current one is GPU 0
    in every process, and nccl refuses that.
    """
    group = distributed.group.WORLD
    types = [device.type for device in group._device_types]  # type: ignore[union-attr]
    if "cpu" in types or not types:  # a backend in Python has none
        return torch.device("cpu")
    kind = types[0]
    for device in reversed(_model_devices):
        if device.type == kind:
            return device
    bound = group.bound_device_id  # type: ignore[union-attr]
    if bound is not None:
        return torch.device(bound)
    module = torch.get_device_module(kind)
    index = module.current_device()
    local_rank = int(os.environ.get("LOCAL_RANK", find_rank()[0] % module.device_count()))
    if index == 0 and local_rank < module.device_count():
        index = local_rank
    return torch.device(kind, index)


def _to_tensor(content: bytes, length: int) -> torch.Tensor:
    """The bytes as uint8 `[length]`, followed by zeros."""
    padded = torch.zeros(length, dtype=torch.uint8, device=_find_device())
    if content:
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        padded[: len(content)] = values.to(padded.device)
    return padded


def _wait(work: Any) -> None:
    """Wait for a collective where its error can be caught; on a GPU the error may come when a result is read."""
    if work is not None:
        work.wait()


@contextmanager
def connected() -> Iterator[None]:
    """A block of collectives that also reads their results.

    Raises:
        StateError: Another process has ended, or there is not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # The frames of torch hold the group. While they do, its threads continue after it is destroyed, until the
        # interpreter ends, where gloo may abort the process.
        traceback.clear_frames(error.__traceback__)
        if is_out_of_memory(error):
            raise _explain_memory(error, StateError) from None
        raise StateError(
            f"the connection to the other processes broke: {error}",
            "see the output of the one that ended first.",
        ) from error


def free_memory(error: BaseException) -> None:
    """Free what the calls that raised an error still hold, so that the processes can talk about it.

    Args:
        error: The error. Its traceback keeps the lines, but not the variables.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _explain_memory(error: BaseException, kind: type[QdqError]) -> QdqError:
    """The error of a process that ran out of memory, in one line."""
    cause = printable(str(error) or type(error).__name__, 120)
    return kind(
        f"there is not enough memory in process {find_rank()[0]}: {cause}",
        "give smaller batches, or free memory.",
    )


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
        failure: The error of this process, which is raised again; None: it did not fail. If there are several
            processes and it had too little memory, one of `kind` says so.
        kind: Class of the error if another process has failed.

    Raises:
        QdqError: Of that class, with the message of the process that failed.
    """
    is_alone = find_rank()[1] == 1
    if failure is not None and not is_alone:
        free_memory(failure)
        if is_out_of_memory(failure) and not isinstance(failure, QdqError):
            failure = _explain_memory(failure, kind)
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
            problem, _, fix = message.decode(errors="replace").partition(" Fix: ")
            raise kind(
                f"process {rank} failed: {problem}", fix or "see the output of that process."
            )


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors of all processes, in place; all must call it with the same shape.

    Raises:
        StateError: Another process has ended.
    """
    if find_rank()[1] > 1:
        with connected():
            _wait(distributed.all_reduce(tensor, async_op=True))
    return tensor


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The largest of the tensors of all processes, element by element and in place; all must call it."""
    if find_rank()[1] > 1:
        with connected():
            _wait(distributed.all_reduce(tensor, distributed.ReduceOp.MAX, async_op=True))
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
    shard = map_tensors(lambda tensor: tensor[rank::size], batch)
    return shard, len(range(rank, lengths.pop(), size))
