"""Collectives of two processes over gloo; without a group, one process is all of them."""

import itertools
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

import qdq.distributed
from qdq.distributed import (
    _find_device,
    _require_separate_gpus,
    _sending_from,
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
from qdq.errors import StateError

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
gather_bytes(b"both")  # a process that ends earlier breaks the connection while it is made
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


class Later:
    """The work of a collective that fails when it is waited for, as those of nccl do."""

    def wait(self):
        raise RuntimeError("NCCL communicator was aborted")


def test_an_error_of_a_collective_that_comes_later(monkeypatch):
    def start(*_, async_op=False, **__):
        return Later() if async_op else None

    monkeypatch.setattr(qdq.distributed, "find_rank", lambda: (0, 2))
    monkeypatch.setattr(qdq.distributed, "_find_device", lambda: torch.device("cpu"))
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(distributed, name, start)
    message = "the connection to the other processes broke: NCCL communicator was aborted"
    for collective in (sum_over_ranks, max_over_ranks):
        with pytest.raises(StateError, match=message):
            collective(torch.ones(2))
    for collective in (gather_bytes, broadcast_bytes):
        with pytest.raises(StateError, match=message):
            collective(b"content")


def make_group(monkeypatch, types, rank=1, bound=None, num_gpus=4, current=0):
    """A group of two processes with backends for these types of device, on a machine with GPUs."""
    devices = [torch.device(kind) for kind in types]
    world = SimpleNamespace(_device_types=devices, bound_device_id=bound)
    monkeypatch.setattr(distributed, "group", SimpleNamespace(WORLD=world))
    monkeypatch.setattr(qdq.distributed, "find_rank", lambda: (rank, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


class TestDeviceOfCollectives:
    @pytest.mark.parametrize("types", [("cuda", "cpu"), ("cpu",), ()])
    def test_is_the_cpu_if_the_group_can_send_from_there(self, monkeypatch, types):
        make_group(monkeypatch, types)
        assert _find_device() == torch.device("cpu")

    def test_is_that_of_the_model(self, monkeypatch):
        make_group(monkeypatch, ["cuda"], current=2)
        with _sending_from(torch.device("cuda", 3)), _sending_from(torch.device("cpu")):
            assert _find_device() == torch.device("cuda", 3)
        assert _find_device() == torch.device("cuda", 2)

    def test_is_that_of_the_local_rank_if_nobody_chose_one(self, monkeypatch):
        make_group(monkeypatch, ["cuda"])
        assert _find_device() == torch.device("cuda", 1)
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert _find_device() == torch.device("cuda", 3)
        make_group(monkeypatch, ["cuda"], num_gpus=1)  # each process sees only its own
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert _find_device() == torch.device("cuda", 0)
        make_group(monkeypatch, ["cuda"], bound=torch.device("cuda", 2))
        assert _find_device() == torch.device("cuda", 2)


class TestSeparateGpus:
    @pytest.fixture
    def store(self, monkeypatch):
        make_group(monkeypatch, ["cuda", "cpu"], rank=0)
        store = distributed.HashStore()
        monkeypatch.setattr(qdq.distributed, "_checks", itertools.count())
        monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: store)
        monkeypatch.setattr(distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
        monkeypatch.setattr("socket.gethostname", lambda: "host")
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"),
        )
        return store

    def test_one_gpu_for_two_is_refused(self, store):
        store.set("qdq GPU 0 1", "host GPU-0")
        with pytest.raises(StateError, match="processes 0 and 1 are on the same GPU") as error:
            _require_separate_gpus(torch.device("cuda", 0))
        assert "LOCAL_RANK" in error.value.fix

    @pytest.mark.parametrize("other", ["host GPU-1", "elsewhere GPU-0", ""])
    def test_others_are_fine(self, store, other):
        store.set("qdq GPU 0 1", other)
        _require_separate_gpus(torch.device("cuda", 0))
        store.set("qdq GPU 1 1", other)
        _require_separate_gpus(torch.device("cpu"))

    def test_gloo_may_share_one(self, store, monkeypatch):
        monkeypatch.setattr(distributed, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
        _require_separate_gpus(torch.device("cuda", 0))
