"""Collecting: resumed after kill -9, merged from halves, shared by processes; always what one pass would have found."""

import json
import signal
import subprocess
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import save
from small_model import make_batches, make_model
from torch import nn

import qdq
from qdq import (
    ArgumentError,
    CalibrationError,
    DataError,
    Statistics,
    collect_statistics,
    solve_ranges,
    swap_modules,
)
from qdq.calibrate.collect import bytes_of, digest_tensors
from qdq.observers.solve import SOLVERS

METHODS = [*SOLVERS, "best"]


def assert_same(first, second):
    assert first.to_bytes() == second.to_bytes()


def all_ranges(model, statistics, held_out):
    return {
        method: solve_ranges(model, statistics, method=method, held=held_out) for method in METHODS
    }


def test_saved_and_loaded(tmp_path):
    statistics = collect_statistics(make_model(), make_batches(3))
    path = statistics.save(tmp_path / "calibration.safetensors")
    assert_same(Statistics.load(path), statistics)
    summary = json.loads(path.with_suffix(".json").read_text())
    entry = summary["tensors"]["0._input_quantizer"]
    values = np.concatenate([batch.numpy().ravel() for batch in make_batches(3)])
    assert entry["count"] == values.size
    assert entry["absmax"] == np.abs(values).max()
    assert entry["mean"] == pytest.approx(values.mean(dtype=np.float64))
    assert entry["amax"].keys() == SOLVERS.keys()
    assert summary["batches"] == 3


def test_solving_again_needs_no_data(tmp_path):
    model, batches = make_model(), make_batches(4)
    statistics = collect_statistics(model, batches)
    for method in SOLVERS:
        expected = qdq.calibrate_model(make_model(), batches, method=method)
        assert solve_ranges(model, statistics, method=method) == expected


def test_halves_merge_to_one_pass():
    model, batches = make_model(), make_batches(5)
    expected = collect_statistics(model, batches)
    first, second = collect_statistics(model, batches[:2]), collect_statistics(model, batches[2:])
    assert_same(first.merge(second), expected)
    assert all_ranges(model, first.merge(second), batches[:1]) == all_ranges(
        model, expected, batches[:1]
    )


def test_merge_of_other_models(residual):
    swap_modules(residual)
    foreign = collect_statistics(residual, [torch.randn(1, 3, 12, 12)])
    with pytest.raises(ArgumentError, match="different models"):
        collect_statistics(make_model(), make_batches(1)).merge(foreign)
    with pytest.raises(ArgumentError, match="another model"):
        solve_ranges(make_model(), foreign)


class TestFile:
    def test_kill_in_the_middle_and_resume(self, tmp_path, processes):
        path = tmp_path / "calibration.safetensors"
        script = textwrap.dedent(
            """
            import os, signal, sys
            import qdq.calibrate.pass_file
            from small_model import make_batches, make_model

            def batches():
                for i, batch in enumerate(make_batches(6)):
                    if i == 4:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield batch

            qdq.calibrate.pass_file._SAVE_SECONDS = 0
            qdq.collect_statistics(make_model(), batches(), statistics=sys.argv[1])
            """
        )
        assert processes.start("-c", script, path).wait() == -signal.SIGKILL
        begun = Statistics.load(path)
        assert (begun.batches, begun.complete) == (4, False)
        model, batches = make_model(), make_batches(6)
        calls = []
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        resumed = collect_statistics(model, batches, statistics=path)
        assert len(calls) == 2
        expected = collect_statistics(make_model(), batches)
        assert_same(resumed, expected)
        assert_same(Statistics.load(path), expected)
        assert all_ranges(make_model(), resumed, batches[:1]) == all_ranges(
            make_model(), expected, batches[:1]
        )

    def test_a_finished_file_is_only_solved(self, tmp_path):
        path, batches = tmp_path / "calibration.safetensors", make_batches(3)
        first = qdq.calibrate_model(make_model(), batches, statistics=path)
        model = make_model()
        model.forward = None  # nothing may call it
        assert qdq.calibrate_model(model, iter(batches), statistics=path) == first
        assert qdq.calibrate_model(model, [], statistics=path) == first

    def test_more_batches_than_before(self, tmp_path):
        path, batches = tmp_path / "calibration.safetensors", make_batches(5)
        assert (
            collect_statistics(make_model(), batches, num_batches=2, statistics=path).batches == 2
        )
        expected = collect_statistics(make_model(), batches, statistics=path)
        assert_same(expected, collect_statistics(make_model(), batches))
        with pytest.raises(ArgumentError, match="holds 5 batches, but 2 were requested"):
            collect_statistics(make_model(), batches, num_batches=2, statistics=path)

    def test_another_model(self, tmp_path, residual):
        path, batches = tmp_path / "calibration.safetensors", make_batches(2)
        collect_statistics(make_model(), batches, statistics=path)
        swap_modules(residual)
        with pytest.raises(ArgumentError, match="another model"):
            collect_statistics(residual, batches, statistics=path)

    @pytest.mark.parametrize("complete", [True, False])
    def test_other_data(self, tmp_path, complete):
        path, batches = tmp_path / "calibration.safetensors", make_batches(4)
        collect_statistics(
            make_model(), batches, num_batches=None if complete else 2, statistics=path
        )
        with pytest.raises(ArgumentError, match="other weights or other data"):
            collect_statistics(make_model(), batches[::-1], statistics=path)

    def test_fewer_batches_than_before(self, tmp_path):
        path, batches = tmp_path / "calibration.safetensors", make_batches(3)
        collect_statistics(make_model(), batches, num_batches=2, statistics=path)
        with pytest.raises(ArgumentError, match="processed 2 batches, but now there are only 1"):
            collect_statistics(make_model(), batches[:1], statistics=path)

    @pytest.mark.parametrize("complete", [True, False])
    def test_other_weights(self, tmp_path, complete):
        path, batches = tmp_path / "calibration.safetensors", make_batches(4)
        collect_statistics(
            make_model(), batches, num_batches=None if complete else 2, statistics=path
        )
        changed_model = make_model()
        next(changed_model.parameters()).data *= 1.001
        with pytest.raises(ArgumentError, match="other weights or other data"):
            collect_statistics(changed_model, batches, statistics=path)

    def test_no_statistics(self, tmp_path):
        with pytest.raises(ArgumentError, match=r"does not end in \.safetensors"):
            collect_statistics(make_model(), make_batches(1), statistics=tmp_path / "ranges.json")
        path = tmp_path / "calibration.safetensors"
        path.write_bytes(content := save({"a": torch.ones(1)}))  # somebody's weights
        with pytest.raises(DataError, match=r"calibration\.safetensors"):
            collect_statistics(make_model(), make_batches(1), statistics=path)
        assert path.read_bytes() == content
        expected = collect_statistics(make_model(), make_batches(1)).to_bytes()
        for cut in (7, 100, len(expected) // 2, len(expected) - 1):
            path.write_bytes(expected[:cut])
            with pytest.raises(DataError):
                Statistics.load(path)
        with pytest.raises(DataError, match="No such file"):
            Statistics.load(tmp_path / "missing.safetensors")

    @pytest.mark.parametrize("damage", ["empty", "nonsense", "zeros", "cut", "flipped"])
    def test_a_damaged_file_is_set_aside(self, tmp_path, caplog, damage):
        path = tmp_path / "calibration.safetensors"
        expected = collect_statistics(make_model(), make_batches(2), statistics=path).to_bytes()
        flipped = expected.replace(b"batches", b"batcheS", 1)
        contents = {
            "empty": b"",
            "nonsense": b"nonsense",
            "zeros": bytes(64),
            "cut": expected[:-1],
            "flipped": flipped,
        }
        path.write_bytes(contents[damage])
        assert (
            collect_statistics(make_model(), make_batches(2), statistics=path).to_bytes()
            == expected
        )
        assert path.read_bytes() == expected
        assert (tmp_path / "calibration.damaged.safetensors").read_bytes() == contents[damage]
        assert (
            "It was renamed to calibration.damaged.safetensors, and everything is collected again"
            in caplog.text
        )

    def test_the_json_of_somebody_else_is_not_replaced(self, tmp_path):
        path, report = tmp_path / "report.safetensors", tmp_path / "report.json"
        for content in ('{"format": "qdq report 1"}', "[]", "3"):
            report.write_text(content)
            with pytest.raises(ArgumentError, match=r"report\.json is not a summary of statistics"):
                collect_statistics(make_model(), make_batches(1), statistics=path)
            assert report.read_text() == content
        report.write_text("{")  # damaged: it blocks nothing
        collect_statistics(make_model(), make_batches(1), statistics=path)
        collect_statistics(make_model(), make_batches(1)).save(path)
        assert json.loads(report.read_text())["batches"] == 1

    def test_nan_keeps_what_was_saved(self, tmp_path, monkeypatch):
        monkeypatch.setattr("qdq.calibrate.pass_file._SAVE_SECONDS", 0)
        path, batches = tmp_path / "calibration.safetensors", make_batches(3)
        batches[2][0] = float("nan")
        with pytest.raises(
            CalibrationError, match=r"batch 2: the input of quantizer 0\._input_quantizer: 432 of"
        ):
            collect_statistics(make_model(), batches, statistics=path)
        assert Statistics.load(path).batches == 2


class TestFileOfAGpu:
    """Statistics of a GPU are those of the CPU but for the rounding of sums, and either goes on with the other's."""

    def test_equals_that_of_the_cpu(self, tmp_path, gpu):
        batches = make_batches(3)
        expected = collect_statistics(
            make_model(), batches, statistics=tmp_path / "cpu.safetensors"
        )
        collect_statistics(make_model().to(gpu), batches, statistics=tmp_path / "gpu.safetensors")
        statistics = Statistics.load(tmp_path / "gpu.safetensors")
        assert (statistics.model, statistics.data) == (expected.model, expected.data)
        for name, tensor in expected.tensors.items():
            moved = statistics.tensors[name]
            assert (moved.exponent, moved.low, moved.high) == (
                tensor.exponent,
                tensor.low,
                tensor.high,
            )
            assert np.array_equal(moved.counts, tensor.counts)
            assert np.array_equal(moved.channel_absmax, tensor.channel_absmax)
            np.testing.assert_allclose(moved.records, tensor.records, rtol=1e-6, atol=1e-3)

    @pytest.mark.parametrize("is_first_on_gpu", [True, False])
    def test_goes_on_where_the_other_stopped(self, tmp_path, gpu, is_first_on_gpu, monkeypatch):
        monkeypatch.setattr("qdq.calibrate.pass_file._SAVE_SECONDS", 0)
        path, batches = tmp_path / "calibration.safetensors", make_batches(4)
        devices = [gpu, torch.device("cpu")] if is_first_on_gpu else [torch.device("cpu"), gpu]

        def interrupted():
            yield from batches[:2]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            collect_statistics(make_model().to(devices[0]), interrupted(), statistics=path)
        assert Statistics.load(path).batches == 2
        model = make_model().to(devices[1])
        expected = collect_statistics(make_model(), batches)
        resumed = collect_statistics(model, batches, statistics=path)
        for method in ("max", "mse", "entropy", "percentile"):
            assert resumed.solve_all(method) == expected.solve_all(method)
            assert solve_ranges(model, resumed, method=method) == solve_ranges(
                make_model(), expected, method=method
            )

    def test_nan_keeps_what_was_saved(self, tmp_path, gpu, monkeypatch):
        monkeypatch.setattr("qdq.calibrate.pass_file._SAVE_SECONDS", 0)
        path, batches = tmp_path / "calibration.safetensors", make_batches(3)
        batches[2][0] = float("nan")
        with pytest.raises(CalibrationError, match=r"0\._input_quantizer: batch 2: 432 of"):
            collect_statistics(make_model().to(gpu), batches, statistics=path)
        assert Statistics.load(path).batches == 2


PROCESS = """
import sys
import qdq
from small_model import make_batches, make_model
from qdq.observers.solve import SOLVERS
from torch import distributed

def run(rank, path, out):
    model, batches = make_model(), make_batches(5)
{body}

rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=size)
try:
    run(rank, *sys.argv[4:])
finally:  # also after an error: gloo may abort a process that ends in a group
    distributed.destroy_process_group()
"""


def run_processes(processes, tmp_path, body, size=2):
    """Exit codes and outputs, each process with a file of its own for them."""
    script = PROCESS.format(body=textwrap.indent(textwrap.dedent(body).strip(), "    "))
    running = []
    for rank in range(size):
        arguments = [
            rank,
            size,
            tmp_path / "store",
            tmp_path / "calibration.safetensors",
            tmp_path / f"{rank}",
        ]
        with (tmp_path / f"{rank}.txt").open("w") as output:
            running.append(
                processes.start("-c", script, *arguments, stdout=output, stderr=subprocess.STDOUT)
            )
    codes = [process.wait() for process in running]
    return codes, [(tmp_path / f"{rank}.txt").read_text() for rank in range(size)]


class TestProcesses:
    def test_two_are_one(self, tmp_path, processes):
        codes, outputs = run_processes(
            processes,
            tmp_path,
            """
found = qdq.collect_statistics(model, qdq.shard_batches(batches), statistics=path)
open(out, "wb").write(found.to_bytes())
solved = {m: qdq.solve_ranges(model, found, method=m, held=batches[:1] if rank == 0 else batches[1:2])
          for m in [*SOLVERS, "best"]}
open(out + ".json", "w").write(repr(solved))
with qdq.Calibration(model, "moving_average") as calibration:
    for batch in qdq.shard_batches(batches):
        model(batch)
assert calibration.ranges == solved["moving_average"]
""",
        )
        assert codes == [0, 0], outputs
        whole = collect_statistics(make_model(), make_batches(5))
        for rank in range(2):
            assert (tmp_path / str(rank)).read_bytes() == whole.to_bytes()
        assert_same(Statistics.load(tmp_path / "calibration.safetensors"), whole)
        assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
            "calibration.safetensors"
        ]
        expected = repr(all_ranges(make_model(), whole, make_batches(5)[:2]))
        assert [(tmp_path / f"{rank}.json").read_text() for rank in range(2)] == [expected] * 2

    def test_uneven_shares_and_one_without_data(self, tmp_path, processes):
        codes, outputs = run_processes(
            processes,
            tmp_path,
            """
mine = [batches, [], batches[:1]][rank]
ranges = qdq.calibrate_model(model, mine, method="best")
open(out, "w").write(repr(ranges))
""",
            size=3,
        )
        assert codes == [0, 0, 0], outputs
        assert len({(tmp_path / str(rank)).read_text() for rank in range(3)}) == 1
        assert "note=''" in (tmp_path / "0").read_text()

    def test_an_error_in_one_stops_all(self, tmp_path, processes):
        codes, outputs = run_processes(
            processes,
            tmp_path,
            """
if rank == 1:
    batches[3][0] = float("nan")
qdq.calibrate_model(model, qdq.shard_batches(batches))
""",
        )
        assert codes == [1, 1]
        assert (
            "process 1 failed: CalibrationError: batch 3: the input of quantizer 0._input_quantizer"
            in outputs[0]
        )
        assert "values are NaN or Inf" in outputs[1]


def test_shards():
    assert list(qdq.shard_batches(range(4))) == [0, 1, 2, 3]


@pytest.mark.parametrize("wrap", [lambda b: (b, None), lambda b: [b], lambda b: {"input": b}])
def test_any_kind_of_batch(wrap, tmp_path):
    path = tmp_path / "calibration.safetensors"
    batches = make_batches(3)
    expected = collect_statistics(make_model(), batches)
    statistics = collect_statistics(make_model(), map(wrap, batches), statistics=path)
    assert {n: t.counts.tobytes() for n, t in statistics.tensors.items()} == {
        n: t.counts.tobytes() for n, t in expected.tensors.items()
    }


def test_an_endless_loader():
    def endless():
        while True:
            yield from make_batches(2)

    assert collect_statistics(make_model(), endless(), num_batches=5).batches == 5
    with pytest.raises(ArgumentError, match="num_batches is 0"):
        collect_statistics(make_model(), endless(), num_batches=0)


def test_nothing_is_left_behind():
    model = make_model()
    states = {
        name: module._calibrator
        for name, module in model.named_modules()
        if hasattr(module, "_calibrator")
    }
    collect_statistics(model, make_batches(2))
    final_states = {
        name: module._calibrator
        for name, module in model.named_modules()
        if hasattr(module, "_calibrator")
    }
    assert all(final_states[name] is states[name] for name in states)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Twice(nn.Module):
    """One layer that runs twice: two calls, one batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(self.layer(x) * 2)


def test_a_layer_that_runs_twice():
    model = Twice()
    x = torch.randn(3, 16)
    with torch.no_grad():
        inputs = torch.cat([x, model.layer(x) * 2])
    swap_modules(model)
    statistics = collect_statistics(model, [x, x]).tensors["layer._input_quantizer"]
    assert statistics.num_batches == 2
    assert statistics.count == 2 * inputs.numel()
    assert statistics.batch_maxima().tolist() == [inputs.abs().max()] * 2


def test_the_digest_is_that_of_the_cpu(gpu, monkeypatch):
    monkeypatch.setattr("qdq.calibrate.collect._COPIED_BYTES", 1000)
    tensors = [torch.randn(100), torch.arange(9), torch.empty(0), torch.randn(4, 3, 5).half()]
    tensors += [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.tensor(True)]
    tensors.append(torch.randn(6, 5).t())
    assert digest_tensors(tensor.to(gpu) for tensor in tensors) == digest_tensors(tensors)


def test_bytes_are_the_values_in_the_order_of_their_indices():
    images = torch.randn(2, 3, 4, 5)
    for view in (images, images.to(memory_format=torch.channels_last), nn.Parameter(images)):
        assert bytes(bytes_of(view)) == images.numpy().tobytes()
    assert bytes(bytes_of(torch.tensor(1.0, dtype=torch.bfloat16))) == b"\x80\x3f"
    assert not bytes(bytes_of(torch.empty(0)))


class NamedModulesCounter:
    """Counts the outermost calls of `nn.Module.named_modules` in the block."""

    def __init__(self, monkeypatch):
        self.count = 0
        self._depth = 0
        self._named_modules = nn.Module.named_modules
        monkeypatch.setattr(nn.Module, "named_modules", self._make_counting())

    def _make_counting(self):
        def named_modules(module, *args, **kwargs):
            self.count += self._depth == 0
            return self._iterate(self._named_modules(module, *args, **kwargs))

        return named_modules

    def _iterate(self, modules):
        while True:
            self._depth += 1
            try:
                item = next(modules, None)
            finally:
                self._depth -= 1
            if item is None:
                return
            yield item


@pytest.mark.parametrize(("method", "most"), [("max", 7), ("mse", 7), ("best", 8)])
def test_a_deeper_model_is_not_searched_more_often(monkeypatch, method, most):
    counts = []
    for num_layers in (2, 20):
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(num_layers)])
        swap_modules(model)
        with monkeypatch.context() as context:
            counter = NamedModulesCounter(context)
            qdq.calibrate_model(model, [torch.randn(4, 16)] * 2, method=method)
        counts.append(counter.count)
    assert counts[0] == counts[1] <= most
