"""A small network with a task, and a search that kills itself: search_task.py lapq|greedy FOLDER EVALUATION."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from qdq.distiller.layers.modules import EltwiseAdd
from qdq.distiller.post_training.quantizer import PostTrainLinearQuantizer
from qdq.distiller.search.greedy import ptq_greedy_search
from qdq.distiller.search.lapq import ptq_coordinate_search
from qdq.distiller.search.search_options import LapqOptions


class Net(nn.Module):
    """BatchNorm, a ReLU behind it, a shortcut, and a function call."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.add = EltwiseAdd()
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(6, 4)

    def forward(self, images):
        x = self.relu1(self.bn1(self.conv1(images)))
        x = self.relu2(self.add(self.conv2(x), x))
        return self.fc(x.mean((2, 3)))


def make_net():
    torch.manual_seed(0)
    net = Net().eval()
    net.bn1.running_var.uniform_(0.5, 2)
    nn.init.normal_(net.fc.weight, std=8)
    return net


def make_batches():
    """48 images in two batches, whose labels are the answers of the float network."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 1, 6, 6, generator=generator)
    images[:, :, 0, 0] *= 6  # outliers, so that it matters where ranges are cut
    with torch.no_grad():
        labels = make_net()(images).argmax(1)
    return list(zip(images.split(32), labels.split(32), strict=True))


def make_quantizer(net=None, bits=3, **arguments):
    return PostTrainLinearQuantizer(net or make_net(), bits, bits, **arguments)


def run_lapq(quantizer=None, path=None, **options):
    batches = make_batches()
    quantizer = quantizer or make_quantizer()
    options = LapqOptions(**{"maxfev": 60, **options})
    return ptq_coordinate_search(quantizer, batches[0], batches, options, path=path)


def run_greedy(folder, quantizer=None):
    batches = make_batches()
    return ptq_greedy_search(quantizer or make_quantizer(), batches[0], batches, folder)


def main():
    torch.set_num_threads(1)
    kind, folder, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    from qdq.analyze.journal import Journal

    add = Journal.add
    keys = []

    def die(journal, key, value):
        if journal._file is not None:  # not that of one layer
            keys.append(key)
        if len(keys) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        add(journal, key, value)

    Journal.add = die
    if kind == "lapq":
        run_lapq(path=folder / "lapq.jsonl", init_mode="L2")
    else:
        run_greedy(folder)


if __name__ == "__main__":
    main()
