"""The curves of a run, read back with TensorBoard's own reader."""

import json
import signal
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tuned_run import make_images, make_model

import qdq
import qdq.qat.record
from qdq.errors import ArgumentError, DependencyError

SCRIPT = Path(__file__).with_name("tuned_run.py")


def read_scalars(folder):
    """Name -> [(step, value)], in the order in which they stand, as TensorBoard shows them."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in reader.Scalars(name)]
        for name in reader.Tags()["scalars"]
    }


def single(pairs):
    """Scalars are stored as float32."""
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]


def test_what_is_written_is_what_tensorboard_reads(tmp_path):
    model, batches = make_model(8), [make_images(8, seed) for seed in range(3)]
    ranges = []

    def metric(model):
        ranges.append(float(model[0].input_quantizer.amax.max()))
        return len(ranges) / 7

    tuning = qdq.finetune(
        model,
        batches,
        schedule=qdq.Schedule(steps=4, lr=1e-3),
        ranges="ema",
        metric=metric,
        measure_every=2,
        folder=tmp_path,
        tensorboard=True,
    )
    found = read_scalars(tmp_path)
    assert found["loss"] == single(enumerate(tuning.losses, 1))
    assert found["metric"] == single([(0, 1 / 7), (2, 2 / 7), (4, 3 / 7)])
    assert [step for step, _ in found["lr"]] == [1, 2, 3, 4]
    assert found["lr"][1::2] == single([(m.step, m.lr) for m in tuning.curve[1:]])
    assert len(set(ranges)) == 3
    assert found["amax/0._input_quantizer"] == single(zip((0, 2, 4), ranges, strict=True))
    assert "amax/2._weight_quantizer" in found


def test_a_killed_run_that_is_resumed_shows_every_step_once(tmp_path, processes):
    """What the state has behind it is on the disk."""

    def start(*arguments):
        return processes.start(SCRIPT, *arguments).wait()

    assert start(tmp_path, tmp_path / "none", 11, "tensorboard") == -signal.SIGKILL
    assert start(tmp_path, tmp_path / "found.json", 99, "tensorboard") == 0
    losses = json.loads((tmp_path / "found.json").read_text())["losses"]
    curve = json.loads((tmp_path / "found.json").read_text())["curve"]
    found = read_scalars(tmp_path)
    assert found["loss"] == single(enumerate(losses, 1))
    assert [step for step, _ in found["lr"]] == list(range(1, 21))
    assert found["metric"] == single([(step, metric) for step, metric, *_ in curve])


def test_steps_after_the_state_that_a_run_goes_on_from_are_replaced(tmp_path, monkeypatch):
    """Killed after seven steps with the state of three; what comes then has other values."""
    model, batches = make_model(8), [make_images(8, seed) for seed in range(3)]
    options = {"schedule": qdq.Schedule(steps=9, lr=1e-3), "folder": tmp_path, "tensorboard": True}
    monkeypatch.setattr(qdq.qat.record, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(qdq.qat.record.Record, "abandon", lambda self: None)
    factors = []

    def loss(outputs, _):
        factors.append(3 if len(factors) in range(3, 7) else 1)
        if len(factors) == 4:
            monkeypatch.setattr(qdq.qat.record, "_SAVE_SECONDS", float("inf"))
        if len(factors) == 8:
            raise KeyboardInterrupt
        return factors[-1] * outputs.square().mean()

    with pytest.raises(KeyboardInterrupt):
        qdq.finetune(model, batches, loss=loss, **options)
    before = read_scalars(tmp_path)["loss"]
    assert [step for step, _ in before] == list(range(1, 8))
    tuning = qdq.finetune(make_model(8), batches, loss=loss, **options)
    found = read_scalars(tmp_path)["loss"]
    assert found == single(enumerate(tuning.losses, 1))
    assert found[:3] == before[:3]
    assert found[3][1] < before[3][1] / 1.5
    qdq.finetune(make_model(8), batches, loss=loss, **options)  # finished: read, not run
    assert read_scalars(tmp_path)["loss"] == found


def test_a_file_in_the_place_of_its_folder_is_refused_at_once(tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(ArgumentError, match=r"cannot write .*tensorboard"):
        qdq.finetune(make_model(), [make_images(8, 6)], folder=tmp_path, tensorboard=True)
    assert (tmp_path / "tensorboard").read_text() == "mine"


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DependencyError, match="tensorboard is not installed") as error:
        qdq.finetune(make_model(), [make_images(8, 6)], folder=tmp_path, tensorboard=True)
    assert "qdq[tensorboard]" in error.value.fix
