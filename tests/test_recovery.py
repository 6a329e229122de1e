"""Accuracy passes that are killed at any place end with the model of a call that was not."""

import copy
import itertools
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

import qdq
from qdq import recover, recovery
from qdq.corrections import list_passes
from qdq.files import write_atomic
from qdq.judge import Judge

PASSES = ("round_weights", "reconstruct_blocks", "correct_bias", "tune_weights")


class Killed(BaseException):
    """The process ends: what it had in memory is lost."""


class Started(NamedTuple):
    """What a script has before it calls `recover_accuracy`."""

    model: nn.Module
    judge: Judge
    samples: torch.Tensor

    def recover(self, path, **options):
        return qdq.recover_accuracy(
            self.model,
            [self.samples[16:]],
            self.judge,
            effort="best",
            refit=[self.samples],
            path=path,
            **options,
        )

    def export(self, path):
        return qdq.export_onnx(self.model, self.samples[:2], path).path.read_bytes()


def start(seed=1):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 5),
    ).eval()  # fmt: skip
    samples = torch.randn(48, 3, 6, 6)
    judge = Judge(model, [samples[:16]])
    qdq.swap_modules(model, samples[:2])
    qdq.calibrate_model(model, [samples])
    with torch.no_grad():  # coarse ranges, so that passes are worth something
        for module in model.modules():
            if isinstance(module, qdq.TensorQuantizer) and module.axis is not None:
                module.amax = module.amax * 12
    judge.measure("calibrated", model)
    return Started(model, judge, samples)


@pytest.fixture(scope="module", autouse=True)
def _short():
    """A few large steps of fine-tuning."""
    tuning = ("weights fine-tuned", partial(qdq.tune_weights, steps=5, lr=1e-3, bias_lr=1e-3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover, "_PASSES", {**recover._PASSES, "tune_weights": tuning})
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The table and the file of a call that nothing interrupts and that keeps no state."""
    started = start()
    steps = started.recover(None)
    return steps, started.export(tmp_path_factory.mktemp("whole") / "model.onnx")


@pytest.fixture
def calls(monkeypatch):
    """The calls of passes, in order."""
    calls = []

    def counting(name, run):
        def call(model, batches, **options):
            calls.append(name)
            return run(model, batches, **options)

        return call

    counted = {}
    for name, (title, run) in recover._PASSES.items():
        counted[name] = (title, counting(name, run))
    monkeypatch.setattr(recover, "_PASSES", counted)
    return calls


def kill_at_write(monkeypatch, number, *, is_written):
    """The process ends before or after it has written the state for the nth time."""
    numbers = itertools.count(1)

    def write(path, content):
        is_last = next(numbers) == number
        if is_last and not is_written:
            raise Killed
        write_atomic(path, content)
        if is_last:
            raise Killed

    monkeypatch.setattr(recovery, "write_atomic", write)


@pytest.mark.parametrize(
    ("number", "is_written"), [(1, True), (2, False), (2, True), (3, True), (4, True), (5, True)]
)
def test_killed_after_any_pass(number, is_written, whole, calls, monkeypatch, tmp_path):
    path = tmp_path / "recovery.safetensors"
    killed = start()
    with monkeypatch.context() as patch:
        kill_at_write(patch, number, is_written=is_written)
        with pytest.raises(Killed):
            killed.recover(path)
    calls.clear()

    again = start()
    steps = again.recover(path)
    remaining = list(PASSES[number - 1 + is_written :])
    assert calls[: len(remaining)] == remaining  # those of the last fit come after them
    expected_steps, expected_file = whole
    assert steps == expected_steps
    assert again.export(tmp_path / "model.onnx") == expected_file


def test_ctrl_c_in_a_pass(whole, monkeypatch, tmp_path):
    path = tmp_path / "recovery.safetensors"

    def interrupt(*_):
        raise KeyboardInterrupt

    stopped = start()
    with monkeypatch.context() as patch:
        patch.setattr("qdq.accuracy.blocks._reconstruct", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stopped.recover(path)
    again = start()
    steps = again.recover(path)
    expected_steps, expected_file = whole
    assert steps == expected_steps
    assert again.export(tmp_path / "model.onnx") == expected_file


def test_passes_are_recorded_as_if_they_had_run(tmp_path):
    path = tmp_path / "recovery.safetensors"
    first, second = start(), start()
    reference = copy.deepcopy(first.model)
    with torch.no_grad():
        next(reference.parameters()).mul_(1.1)
    for started in (first, second):
        qdq.round_weights(started.model, [started.samples], reference=reference)
        started.judge.measure("rounded", started.model)
        started.recover(path)
    assert [entry.name for entry in list_passes(second.model)] == [
        entry.name for entry in list_passes(first.model)
    ]
    for started in (first, second):  # takes them back and does them again
        qdq.calibrate_model(started.model, [2 * started.samples])
    expected = first.model.state_dict()
    for name, values in second.model.state_dict().items():
        assert torch.equal(values, expected[name]), name


def test_a_pass_before_the_call_keeps_its_samples(monkeypatch, tmp_path):
    """Passes that are done again after a kill are those of a call that was not killed."""
    path = tmp_path / "recovery.safetensors"

    def begin():
        started = start()
        qdq.correct_bias(started.model, [started.samples[:8]])
        started.judge.measure("corrected", started.model)
        return started

    def recover(started, file):
        samples = [started.samples[16:]]
        qdq.recover_accuracy(started.model, samples, started.judge, effort="best", path=file)

    uninterrupted, killed, resumed = begin(), begin(), begin()
    recover(uninterrupted, None)
    with monkeypatch.context() as patch:
        kill_at_write(patch, 1, is_written=True)
        with pytest.raises(Killed):
            recover(killed, path)
    recover(resumed, path)
    for started in (uninterrupted, resumed):
        qdq.calibrate_model(started.model, [2 * started.samples])
    expected = uninterrupted.model.state_dict()
    for name, values in resumed.model.state_dict().items():
        assert torch.equal(values, expected[name]), name


def test_passes_keep_the_samples_that_they_were_fitted_to(monkeypatch, tmp_path):
    """Also in a call that continues after the last fit has failed."""
    path = tmp_path / "recovery.safetensors"

    def recover(started, file):
        joined = [started.samples[:16], started.samples[:16, :, :4]]  # cannot be joined
        qdq.recover_accuracy(
            started.model, [started.samples[16:]], started.judge, refit=joined, path=file
        )

    uninterrupted, killed, resumed = start(), start(), start()
    recover(uninterrupted, None)
    with monkeypatch.context() as patch:
        kill_at_write(patch, 2, is_written=True)
        with pytest.raises(Killed):
            recover(killed, path)
    recover(resumed, path)
    for started in (uninterrupted, resumed):
        qdq.calibrate_model(started.model, [2 * started.samples])
    expected = uninterrupted.model.state_dict()
    for name, values in resumed.model.state_dict().items():
        assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_another_file_is_not_used(content, whole, calls, tmp_path):
    path = tmp_path / "recovery.safetensors"
    if content is None:
        start(seed=2).recover(path)  # of another model
    else:
        path.write_bytes(content)
    calls.clear()
    again = start()
    assert again.recover(path) == whole[0]
    assert calls[: len(PASSES)] == list(PASSES)
