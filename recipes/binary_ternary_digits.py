"""UINT8 training, and binary, ternary and power-of-two weights, on scikit-learn's digits; several seeds.

python recipes/binary_ternary_digits.py
python recipes/binary_ternary_digits.py --seeds 1 --json figures.json --output runs/digits
"""

import copy
import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from qat_digits import make_network, measure_accuracy, train
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qdq
from qdq import systems
from qdq.cli.main import PositiveInt, run_command
from qdq.files import guard_files, write_json


@dataclass(frozen=True)
class Task:
    """What a float network is trained further on.

    Args:
        batches: Images and labels.
        example: Some images.
        epochs: Epochs of the training in float.
        seed: Seed of the order of the images.
        folder: Of the runs of a system, from which a killed one resumes; None: no files.
    """

    batches: DataLoader[tuple[torch.Tensor, ...]]
    example: torch.Tensor
    epochs: int
    seed: int
    folder: Path | None


def train_uint8(net: nn.Module, task: Task) -> tuple[Any, ...]:
    """UINT8: codes with a zero point for weights and inputs, whose ranges follow the training."""
    systems.prepare_uint8_training(net, task.example)
    with systems.moving_ranges(net):
        tune(net, task, task.epochs / 4, 1e-4)
    return ()


def binarize_weights(net: nn.Module, task: Task) -> tuple[Any, ...]:
    """BWN: a sign for each weight, and a scale for each output channel."""
    selection = systems.binarize_model(net, task.example)
    print(selection.format_table())
    tune_binary(net, task, task.epochs / 2)
    return ()


def binarize_all(net: nn.Module, task: Task) -> tuple[Any, ...]:
    """BNN: signs of inputs too. A ReLU has one sign only, so Hardtanh takes its place."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.ReLU):
            net.set_submodule(name, nn.Hardtanh())
    systems.binarize_model(net, task.example, inputs=True)
    tune_binary(net, task, task.epochs * 2)
    return ()


def tune_binary(net: nn.Module, task: Task, epochs: float) -> None:
    """Train the float weights behind the binary ones, then keep the binary ones."""
    with systems.clipping_weights(net):
        tune(net, task, epochs, 3e-3)
    systems.replace_weights(net)


def tune(net: nn.Module, task: Task, epochs: float, lr: float) -> None:
    """Train on the labels."""
    qdq.finetune(
        net,
        task.batches,
        loss=qdq.cross_entropy,
        distillation=None,
        schedule=make_schedule(epochs, lr),
        ranges="none",
        folder=task.folder,
        seed=task.seed,
    )


def make_ternary(net: nn.Module, task: Task) -> tuple[Any, ...]:
    """ADMM: a penalty pulls the weights to alpha * {-1, 0, 1}, round by round."""
    schedule = make_schedule(task.epochs / 5, 5e-3)
    options = make_options(schedule, task)
    training = systems.train_ternary(
        net, task.batches, task.example, options, rounds=6, rho=1e-3, growth=4
    )
    print(training.format_table())
    return tuple(training.rounds)


def make_powers(net: nn.Module, task: Task) -> tuple[Any, ...]:
    """INQ: 0 and four powers of two, the largest weights first."""
    schedule = make_schedule(task.epochs / 8, 1e-3)
    options = make_options(schedule, task)
    training = systems.train_incremental(net, task.batches, task.example, options, bits=4)
    print(training.format_table())
    return tuple(training.rounds)


def make_options(schedule: qdq.Schedule, task: Task) -> systems.RoundOptions:
    """How each round is trained."""
    return systems.RoundOptions(
        loss=qdq.cross_entropy, schedule=schedule, folder=task.folder, seed=task.seed
    )


def make_schedule(epochs: float, lr: float) -> qdq.Schedule:
    """BatchNorm, which is not folded, adapts almost to the end."""
    return qdq.Schedule(epochs=math.ceil(epochs), lr=lr, bias_lr=lr, tune_batchnorm=0.9)


SYSTEMS = {
    "UINT8": train_uint8,
    "BWN": binarize_weights,
    "BNN": binarize_all,
    "ADMM ternary": make_ternary,
    "INQ 4 bits": make_powers,
}


def describe_export(net: nn.Module) -> str:
    """What TensorRT int8 takes of a network, which becomes a quantized one."""
    transfer = systems.to_tensorrt(net, convert=True)
    verdicts: Counter[str] = Counter()
    for layer in transfer.layers:
        verdicts.update(f"{tensor.place}s {tensor.verdict}" for tensor in layer.tensors)
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


def load_data(
    fold: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and labels to train on, and to measure on: the other half, or a quarter of the training half."""
    digits = load_digits()
    images = torch.tensor(digits.images)[:, None].float() / 16
    labels = torch.tensor(digits.target)
    if fold is None:
        return images[::2], labels[::2], images[1::2], labels[1::2]
    images, labels = images[::2], labels[::2]
    is_measured = torch.arange(len(labels)) % 4 == fold
    return images[~is_measured], labels[~is_measured], images[is_measured], labels[is_measured]


def binary_ternary_digits(
    *,
    seeds: PositiveInt = 3,
    epochs: PositiveInt = 40,
    validate: bool = False,
    json: Path | None = None,
    output: Path | None = None,
) -> int:
    """Print the accuracy on half of the digits, after training on the other half.

    All layers have 8 bits in UINT8 training; in the other systems, the first and the last one stay in float.

    Args:
        seeds: Number of repetitions, each with different weights and a different order of the images.
        epochs: Epochs of the training in float; UINT8 takes a quarter of them, BWN and INQ a half, ADMM 7/5,
            BNN twice as many.
        validate: Train on three quarters of the training half and measure on the fourth, another one for each of four
            seeds. The rates and epochs of this recipe were chosen so, not on the other half.
        json: Also write the figures to this file.
        output: Folder for the runs. A killed recipe that is called again in the same way resumes in it.
    """
    guard_files(outputs=[json])
    accuracies: defaultdict[str, list[float]] = defaultdict(list)
    rounds: defaultdict[str, list[Any]] = defaultdict(list)
    exports = {"float": ""}

    for seed in range(seeds):
        fold = seed % 4 if validate else None
        train_images, train_labels, test_images, test_labels = load_data(fold)
        torch.manual_seed(seed)
        batches = DataLoader(TensorDataset(train_images, train_labels), 64, shuffle=True)
        float_net = make_network("resnet")
        train(float_net, batches, epochs)
        accuracies["float"].append(measure_accuracy(float_net, test_images, test_labels))
        for name, quantize in SYSTEMS.items():
            print(f"seed {seed}: {name}")
            folder = output / f"seed-{seed}" / name.replace(" ", "-") if output else None
            task = Task(batches, train_images[:32], epochs, seed, folder)
            net = copy.deepcopy(float_net)
            rounds[name].append(quantize(net, task))
            accuracies[name].append(measure_accuracy(net, test_images, test_labels))
            exports[name] = describe_export(net)

    for name, values in accuracies.items():
        mean = statistics.mean(values)
        deviation = statistics.pstdev(values)
        print(f"{name:12}  {mean:6.2f} %  +- {deviation:.2f}  {exports[name]}")
    if json:
        write_json(json, {"accuracies": accuracies, "rounds": rounds, "exports": exports})
    return 0


if __name__ == "__main__":
    run_command(binary_ternary_digits)
