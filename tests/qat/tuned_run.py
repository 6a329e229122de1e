"""A small run of fine-tuning in a process of its own: python tuned_run.py FOLDER OUT [crash-at-step [tensorboard]].

It kills itself in the step after crash-at-step; with a minus before it waits there forever, and makes OUT.waiting.RANK.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import distributed, nn

import qdq
import qdq.qat.record
import qdq.qat.trainer
import qdq.qat.watch
from qdq.quantizer import named_quantizers


def make_model(bits=4):
    """Calibrated; with 4-bit weights there is something to win."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()
    qdq.swap_modules(model, weight_desc=qdq.QuantDescriptor(bits, axis=0))
    qdq.calibrate_model(model, [make_images(8, 5)])
    return model


class Switch(nn.Module):
    """One of two layers, as the batch has it."""

    def __init__(self):
        super().__init__()
        self.stem, self.low, self.high = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return (self.high if x.mean() > 10 else self.low)(self.stem(x).relu())


def make_switched():
    """A model and batches of which each takes another way through it."""
    torch.manual_seed(0)
    model, batches = (
        Switch().eval(),
        [torch.randn(size, 16) + 20 * (n % 2) for n, size in enumerate((8, 7, 5, 3))],
    )
    qdq.swap_modules(model)
    qdq.calibrate_model(model, batches)
    return model, batches


def make_images(count, seed):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


class Noisy(torch.utils.data.Dataset):
    """Images with noise from the global generators, as augmentation has it."""

    def __init__(self):
        self.images = make_images(39, 6)  # the last batch is uneven

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] + 0.1 * torch.randn(3, 12, 12)


@patch.object(qdq.qat.record, "_SAVE_SECONDS", -1.0)
@patch.object(qdq.qat.trainer, "_WATCHED", 0.8)
@patch.object(qdq.qat.watch, "_MIN_OSCILLATING", -1.0)  # every layer is reported
def run(folder, die_at=None, bits=4, tensorboard=False, waiting=None):
    """20 steps of 8 images, the state saved after each; perhaps killed while it runs."""
    model = make_model(bits)
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True)
    if die_at is not None:
        calls = []

        def die(*_):
            calls.append(torch.is_grad_enabled())
            if sum(calls) > abs(die_at):
                if die_at > 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                waiting.touch()
                signal.pause()

        model.register_forward_pre_hook(die)
    held = make_images(16, 7)
    tuning = qdq.finetune(
        model,
        loader,
        loss=lambda outputs, _: (outputs - 1).square().mean(),
        ranges="lsq",
        schedule=qdq.Schedule(steps=20, lr=1e-4, range_lr=1e-3),
        metric=lambda model: -float((model(held) - 1).square().mean().detach()),
        folder=folder,
        tensorboard=tensorboard,
    )
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    ranges_found = {name: q.amax.tolist() for name, q in named_quantizers(model)}
    curve = [(m.step, m.metric, m.loss, m.lr) for m in tuning.curve]
    return {
        "losses": tuning.losses,
        "curve": curve,
        "best": tuning.best_step,
        "weights": weights,
        "amax": ranges_found,
        "oscillating": [(each.layer, each.share) for each in tuning.oscillating],
    }


@contextlib.contextmanager
def joined_group():
    """The group that a test asks for; destroyed also after an error: gloo may abort a process that ends in one."""
    if "STORE" not in os.environ:  # finetune joins what torchrun announces
        yield
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group(
        "gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=size
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def main():
    torch.set_num_threads(1)
    rank, out = os.environ.get("RANK", "0"), Path(sys.argv[2])
    die_at = int(sys.argv[3]) if len(sys.argv) > 3 else None
    folder = None if sys.argv[1] == "-" else Path(sys.argv[1])
    waiting = out.with_name(f"{out.name}.waiting.{rank}")
    with joined_group():
        result = run(
            folder, die_at, bits=4 if folder else 8, tensorboard=len(sys.argv) > 4, waiting=waiting
        )
    if rank == "0":
        out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
