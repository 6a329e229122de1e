"""A small training as a file describes it, and a run that kills itself: compress_run.py CLASS FOLDER STEP."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from qdq.distiller import KnowledgeDistillation, TrainOptions, read_compress_file, train_compressed

TEXT = """\
version: 1
quantizers:
  few_bits:
    class: {name}
    bits_activations: {bits}
    bits_weights: {bits}
    overrides:
      "0": {{bits_weights: null}}
lr_schedulers:
  decay:
    class: MultiStepLR
    milestones: [2]
    gamma: 0.1
policies:
  - quantizer: {{instance_name: few_bits}}
    starting_epoch: {start}
    ending_epoch: 100
    frequency: 1
  - lr_scheduler: {{instance_name: decay}}
    starting_epoch: 0
    ending_epoch: 100
    frequency: 1
"""


def write_file(folder, name, bits=4, start=1):
    path = Path(folder) / f"{name}.yaml"
    path.write_text(TEXT.format(name=name, bits=bits, start=start))
    return path


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


def make_batches():
    """256 points in 4 classes."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(256, 16, generator=generator)
    labels = (points @ torch.randn(16, 4, generator=generator)).argmax(1)
    return list(zip(points.split(64), labels.split(64), strict=True))


def run(path, folder=None, epochs=4, net=None, **options):
    net = make_net() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    settings = TrainOptions(epochs, folder=folder, **options)
    tunings = train_compressed(net, optimizer, make_batches(), read_compress_file(path), settings)
    return net, tunings


def make_teaching():
    """From the third epoch on."""
    return KnowledgeDistillation(make_net(1).eval(), temperature=2.0, start_epoch=2)


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
    run(sys.argv[1], sys.argv[2], net=net, teaching=make_teaching())


if __name__ == "__main__":
    main()
