"""Collectives of two processes over gloo; without a group, one process is all of them."""

import subprocess

import pytest
import torch

from qdq.distributed import (
    broadcast_bytes,
    failing_together,
    find_rank,
    gather_bytes,
    joining_processes,
    max_over_ranks,
    shard_batches,
    shard_samples,
    sum_over_ranks,
)

SCRIPT = """
import os
from pathlib import Path

import torch
from torch import distributed

from qdq import CalibrationError, DataError, StateError
from qdq.distributed import *
from qdq.distributed import broadcast_number, read_together

rank = int(os.environ["RANK"])
store = "file://" + os.environ["STORE"]
distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
try:
    assert find_rank() == (rank, 2)
{body}
finally:
    distributed.destroy_process_group()
"""


def run_pair(processes, tmp_path, body):
    """Run the body in two processes of one group; exit codes and outputs."""
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    script = SCRIPT.replace("{body}", indented)
    pair = processes.start_pair(
        [["-c", script]] * 2,
        tmp_path / "store",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    outputs = [process.communicate(timeout=120)[0] for process in pair]
    return [process.returncode for process in pair], outputs


def test_two_processes_exchange_values(processes, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    body = f"""
assert gather_bytes(b"x" * 3 * rank) == [b"", b"xxx"]
assert gather_bytes(b"") == [b"", b""]
assert broadcast_bytes(b"first" if rank == 0 else b"longer than the first") == b"first"
assert broadcast_bytes(b"") == b""
assert broadcast_number(0.1 + rank) == 0.1
assert read_together(Path({str(tmp_path / "file")!r})) == b"content"
tensor = torch.tensor([1.0, 10.0 * rank])
assert sum_over_ranks(tensor) is tensor and tensor.tolist() == [2.0, 10.0]
tensor = torch.tensor([-1.0 - rank, 5.0 * rank])
assert max_over_ranks(tensor) is tensor and tensor.tolist() == [-1.0, 5.0]
assert list(shard_batches(range(5))) == [[0, 2, 4], [1, 3]][rank]
images, labels = torch.arange(10).reshape(5, 2), torch.arange(5)
(shard, shard_labels), size = shard_samples((images, labels))
assert shard.tolist() == images[rank::2].tolist()
assert shard_labels.tolist() == [[0, 2, 4], [1, 3]][rank] and size == [3, 2][rank]
for batch in ((images, labels[:3]), "text", (torch.tensor(1.0),)):
    try:
        shard_samples(batch)
    except DataError:
        continue
    raise AssertionError(batch)
"""
    codes, outputs = run_pair(processes, tmp_path, body)
    assert codes == [0, 0], outputs


def test_an_error_in_one_process_ends_all(processes, tmp_path):
    body = """
try:
    with failing_together(StateError):
        if rank == 1:
            raise ValueError("broken")
except ValueError:
    assert rank == 1
except StateError as error:
    assert rank == 0 and "process 1 failed: ValueError: broken" in str(error)
else:
    raise AssertionError("no error")
with failing_together():
    pass
"""
    codes, outputs = run_pair(processes, tmp_path, body)
    assert codes == [0, 0], outputs


def test_a_process_that_has_gone_is_an_error(processes, tmp_path):
    body = """
if rank == 0:
    try:
        gather_bytes(b"alone")
    except StateError as error:
        assert "the connection to the other processes broke" in str(error)
    else:
        raise AssertionError("no error")
"""
    codes, outputs = run_pair(processes, tmp_path, body)
    assert codes == [0, 0], outputs


def test_one_process_is_all_of_them():
    assert find_rank() == (0, 1)
    assert gather_bytes(b"content") == [b"content"]
    assert broadcast_bytes(b"content") == b"content"
    assert list(shard_batches(range(3))) == [0, 1, 2]
    tensor = torch.ones(2)
    assert sum_over_ranks(tensor) is tensor
    assert max_over_ranks(tensor).tolist() == [1, 1]
    batch = {"images": torch.zeros(4, 2)}
    assert shard_samples(batch) == (batch, 4)
    with joining_processes(torch.device("cpu")):
        assert find_rank() == (0, 1)
    with pytest.raises(ValueError, match="alone"), failing_together():
        raise ValueError("alone")
