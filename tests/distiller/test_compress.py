"""Training as a file describes it: rates, phases, teacher, and runs that are killed."""

import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compress_run import make_batches, make_net, make_teaching, run, write_file
from torch import nn

import qdq
from qdq.distiller import (
    KnowledgeDistillation,
    QuantizedCheckpoint,
    QuantizerMetadata,
    TrainOptions,
    read_checkpoint,
    read_compress_file,
    rebuild_model,
    save_checkpoint,
)
from qdq.distiller.training.learning_rates import EpochRates
from qdq.errors import ArgumentError
from qdq.systems.layer import SystemLayer

SCRIPT = Path(__file__).with_name("compress_run.py")
CLASSES = [
    "QuantAwareTrainRangeLinearQuantizer",
    "DorefaQuantizer",
    "PACTQuantizer",
    "WRPNQuantizer",
]


@pytest.fixture(params=CLASSES)
def file(request, tmp_path):
    return write_file(tmp_path, request.param)


# PACT has most state. Four steps an epoch: in the float phase, with the quantizer, and with the teacher.
DEATHS = dict.fromkeys(CLASSES, (6,)) | {"PACTQuantizer": (2, 4, 6)}


@pytest.mark.parametrize("name", CLASSES)
def test_a_killed_training_resumes_with_identical_losses(name, tmp_path, processes):
    file = write_file(tmp_path, name)
    net, whole = run(file, tmp_path / "whole", teaching=make_teaching())
    assert [len(tuning.losses) for tuning in whole] == [4, 4, 8]
    for die_at in DEATHS[name]:
        process = processes.start(SCRIPT, file, tmp_path / "killed", die_at)
        assert process.wait() == -signal.SIGKILL
    resumed_net, resumed = run(file, tmp_path / "killed", teaching=make_teaching())
    assert [tuning.losses for tuning in resumed] == [tuning.losses for tuning in whole]
    for key, tensor in net.state_dict().items():
        assert torch.equal(resumed_net.state_dict()[key], tensor), key
    _, again = run(file, tmp_path / "killed", teaching=make_teaching())
    assert [tuning.losses for tuning in again] == [tuning.losses for tuning in whole]


def test_the_network_learns_and_is_quantized(file):
    net, (before, after) = run(file, epochs=8)
    assert before.losses[0] > after.losses[-1]
    assert isinstance(net[3], SystemLayer)
    assert type(net[0]) is nn.Linear
    assert len(net[3].weight_system(net[3].weight).unique()) <= 16


def test_a_quantizer_from_the_first_epoch_has_one_phase(tmp_path):
    net, tunings = run(write_file(tmp_path, "DorefaQuantizer", start=0))
    assert [len(tuning.losses) for tuning in tunings] == [16]
    assert isinstance(net[3], SystemLayer)


def test_the_steps_are_those_of_the_optimizer_of_the_user(tmp_path):
    """Against a loop with torch's own optimizer and scheduler, in float: a file without a quantizer."""
    path = tmp_path / "rates.yaml"
    path.write_text(
        "lr_schedulers: {decay: {class: StepLR, step_size: 2, gamma: 0.5}}\n"
        "policies:\n"
        "  - {lr_scheduler: {instance_name: decay}, starting_epoch: 0, ending_epoch: 9, frequency: 1}\n"
    )
    net, (tuning,) = run(path, epochs=5)
    expected = make_net().train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    losses = []
    for _ in range(5):
        for points, labels in make_batches():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(expected(points), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
    np.testing.assert_allclose(tuning.losses, losses, rtol=1e-4)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_loss_with_a_teacher():
    teaching = KnowledgeDistillation(make_net(1).eval(), 3.0, distill_wt=0.7, student_wt=0.2)
    student = make_net().eval()
    points, labels = make_batches()[0]
    tuning = qdq.finetune(
        student,
        [(points, labels)],
        loss=lambda outputs, batch: 0.2 * qdq.cross_entropy(outputs, batch),
        distillation=teaching.make_distance(),
        teacher=teaching.teacher,
        ranges="none",
        schedule=qdq.Schedule(steps=1, tune_batchnorm=0),
    )
    with torch.no_grad():
        logits = make_net().eval()(points).double().numpy()
        targets = teaching.teacher(points).double().numpy() / 3
    p = np.exp(targets) / np.exp(targets).sum(1, keepdims=True)
    q = np.exp(logits / 3) / np.exp(logits / 3).sum(1, keepdims=True)
    log_likelihood = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    task = -log_likelihood[np.arange(64), labels.numpy()].mean()
    expected = 0.2 * task + 0.7 * 9 * (p * np.log(p / q)).sum(1).mean()
    assert tuning.losses[0] == pytest.approx(expected, rel=1e-4)


def test_another_weight_of_the_student_is_another_run(tmp_path):
    file = write_file(tmp_path, "WRPNQuantizer", start=0)
    teaching = replace(make_teaching(), start_epoch=0)
    run(file, tmp_path / "run", epochs=1, teaching=teaching)
    with pytest.raises(ArgumentError, match="other settings: loss"):
        run(file, tmp_path / "run", epochs=1, teaching=replace(teaching, student_wt=0.3))
    with pytest.raises(ArgumentError, match="other settings: distillation"):
        run(file, tmp_path / "run", epochs=1, teaching=replace(teaching, temperature=5.0))


def test_the_best_epoch_of_the_last_phase_is_taken(tmp_path):
    scores = iter([1, 5, 2, 4, 3, 9])
    file = write_file(tmp_path, "DorefaQuantizer", start=0)
    _, (tuning,) = run(file, epochs=4, metric=lambda _: next(scores))
    assert [point.step for point in tuning.curve] == [0, 4, 8, 12, 16]
    assert tuning.best_step == 4


@pytest.mark.parametrize(
    ("epochs", "start", "reason"),
    [(101, 1, "from epoch 1 to 100, of 101"), (4, 4, "from epoch 4 to 100, of 4")],
)
def test_a_quantizer_that_does_not_act_in_the_last_epoch_is_refused(
    epochs, start, reason, tmp_path
):
    with pytest.raises(ArgumentError, match=reason):
        run(write_file(tmp_path, "DorefaQuantizer", start=start), epochs=epochs)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"distill_wt": 0.0}, {"student_wt": -1.0}, {"start_epoch": -1}],
)
def test_impossible_teachers_are_refused(options):
    with pytest.raises(ArgumentError):
        KnowledgeDistillation(make_net(), **options)


def test_no_epochs_are_refused():
    with pytest.raises(ArgumentError, match="epochs is 0"):
        TrainOptions(0)


def test_the_checkpoint_of_a_trained_network_builds_it_again(file, tmp_path):
    net, _ = run(file)
    config = read_compress_file(file).quantizer
    checkpoint = QuantizedCheckpoint(
        net.state_dict(), QuantizerMetadata(config.class_name, config.arguments)
    )
    path = save_checkpoint(tmp_path / "quantized_checkpoint.pth.tar", checkpoint)
    rebuilt = rebuild_model(make_net(5), read_checkpoint(path)).eval()
    points = make_batches()[0][0]
    assert torch.equal(rebuilt(points), net.eval()(points))


def test_the_rate_of_an_epoch():
    schedule = EpochRates(epochs=3, rates=(1.0, 0.5, 0.25))
    rates = [schedule.rate_at(step, 12) for step in range(12)]
    assert rates == [1.0] * 4 + [0.5] * 4 + [0.25] * 4
    assert math.isclose(sum(rates), 7)
