"""Runs that are killed and resumed, between rounds and inside of one, and folders of other runs."""

import signal
from pathlib import Path

import pytest
import torch
from small_task import make_batches, make_net, make_trained, train

import qdq
from qdq import systems
from qdq.errors import ArgumentError, DataError
from qdq.systems.round_file import RoundFile

SCRIPT = Path(__file__).with_name("small_task.py")
STEPS = len(make_batches())  # of an epoch, which is a round here


def run(system, folder=None):
    """The log and the weights."""
    net = make_net()
    options = {"sampling": "hard"} if system == "binary" else {}
    training = train(system, net, folder, **options)
    log = training.losses if system == "binary" else training.rounds
    return log, {name: tensor.tolist() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize(
    ("system", "deaths"),
    [
        # in the first step of the second round, and in its third step
        ("ternary", (STEPS + 1, 3)),
        ("incremental", (STEPS + 1, 3)),
        ("binary", (3,)),  # one round; its signs are drawn
    ],
)
def test_killed_anywhere_and_resumed_is_identical(system, deaths, tmp_path, processes):
    expected = run(system)
    for number in deaths:
        process = processes.start(SCRIPT, system, tmp_path, number)
        assert process.wait() == -signal.SIGKILL
    assert run(system, tmp_path) == expected
    assert run(system, tmp_path) == expected  # finished: read, not run


@pytest.mark.parametrize("system", ["ternary", "incremental"])
@pytest.mark.parametrize("is_written", [False, True])
def test_stopped_between_two_rounds_and_resumed_is_identical(
    system, is_written, tmp_path, monkeypatch
):
    expected = run(system)
    write = RoundFile.write

    def stop(file, model, tensors, rows):
        if is_written:
            write(file, model, tensors, rows)
        if len(rows) == 2:
            raise KeyboardInterrupt
        write(file, model, tensors, rows)

    monkeypatch.setattr(RoundFile, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(system, tmp_path)
    monkeypatch.setattr(RoundFile, "write", write)
    assert run(system, tmp_path) == expected


def test_the_folder_of_another_run_is_refused(tmp_path):
    train("ternary", make_net(), tmp_path, rounds=1)
    for changed, net, options in (
        ("rho", make_net(), {"rho": 0.5}),
        ("rounds", make_net(), {"rounds": 2}),
        ("schedule", make_net(), {"lr": 1e-3}),
        ("weights", make_trained(epochs=1), {}),
        ("layers", make_net(), {"float_layers": ["3"]}),
    ):
        with pytest.raises(ArgumentError, match=f"other settings: {changed}[.]"):
            train("ternary", net, tmp_path, **{"rounds": 1, **options})
    with pytest.raises(ArgumentError, match=r"other settings: .*system"):
        train("incremental", make_net(), tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    train("incremental", make_net(), tmp_path)
    path = tmp_path / "rounds.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"rounds\.safetensors"):
        train("incremental", make_net(), tmp_path)


def test_a_teacher_is_the_float_model_in_every_round(tmp_path):
    batches = make_batches()
    results = []
    for teacher in (None, make_net()):
        net = make_net()
        options = systems.RoundOptions(
            distillation=qdq.Distillation(features=0),
            teacher=teacher,
            schedule=qdq.Schedule(epochs=1, lr=1e-3),
            folder=tmp_path / str(teacher is None),
        )
        systems.train_incremental(net, batches, batches[0], options)
        results.append(net.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name])


def test_a_loss_of_the_model_itself_is_refused():
    with pytest.raises(ArgumentError, match="no place for a penalty"):
        systems.RoundOptions(loss="own")
