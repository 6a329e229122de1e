"""A small classifier with something to learn, and a run that kills itself: small_task.py SYSTEM FOLDER STEP."""

import os
import signal
import sys

import torch
from torch import nn

import qdq
from qdq import systems


def make_net():
    """Three layers of which only the middle one is not first or last, with BatchNorm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32),
        nn.BatchNorm1d(32),
        nn.Hardtanh(),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.Hardtanh(),
        nn.Linear(32, 24, bias=False),
        nn.BatchNorm1d(24),
        nn.Hardtanh(),
        nn.Linear(24, 4),
    )


def make_batches():
    """256 points in 4 classes."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(256, 16, generator=generator)
    labels = (points @ torch.randn(16, 4, generator=generator)).argmax(1)
    return list(zip(points.split(64), labels.split(64), strict=True))


def make_trained(epochs=20):
    """The net after training in float."""
    net = make_net()
    qdq.finetune(
        net,
        make_batches(),
        loss=qdq.cross_entropy,
        distillation=None,
        ranges="none",
        schedule=qdq.Schedule(epochs=epochs, lr=3e-3, bias_lr=3e-3),
    )
    return net


def measure_accuracy(net):
    """Fraction of right answers on the training points."""
    right = 0
    for points, labels in make_batches():
        right += int((qdq.predict(net, [points]).argmax(1) == labels.numpy()).sum())
    return right / 256


def train(system, net, folder=None, epochs=1, lr=3e-3, **options):
    """Train in a system, with the state of a run in a folder."""
    schedule = qdq.Schedule(epochs=epochs, lr=lr, bias_lr=lr, max_norm=1e3)
    batches = make_batches()
    if system in ("ternary", "incremental"):
        method = getattr(systems, f"train_{system}")
        rounds = systems.RoundOptions(loss=qdq.cross_entropy, schedule=schedule, folder=folder)
        return method(net, batches, batches[0], rounds, **options)
    systems.binarize_model(net, batches[0], inputs=True, **options)
    with systems.clipping_weights(net):
        return qdq.finetune(
            net,
            batches,
            loss=qdq.cross_entropy,
            distillation=None,
            ranges="none",
            schedule=schedule,
            folder=folder,
        )


def die_in_step(net, number):
    """Kill this process in a step, counted from 1."""
    calls = []

    def die(*_):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    net.register_forward_pre_hook(die)


def main():
    torch.set_num_threads(1)
    import qdq.qat.record

    qdq.qat.record._SAVE_SECONDS = -1.0  # the state is saved after each step
    net = make_net()
    die_in_step(net, int(sys.argv[3]))
    options = {"sampling": "hard"} if sys.argv[1] == "binary" else {}
    train(sys.argv[1], net, sys.argv[2], **options)


if __name__ == "__main__":
    main()
