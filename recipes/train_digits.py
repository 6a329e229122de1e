"""EMA, DoReFa, PACT and WRPN on scikit-learn's digits, from the YAML files in recipes/distiller; several seeds.

python recipes/train_digits.py
python recipes/train_digits.py --schemes pact --bits 2 --seeds 1 --json figures.json
"""

import copy
import math
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from binary_ternary_digits import describe_export, load_data
from qat_digits import make_network, measure_accuracy, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qdq import distiller
from qdq.cli.main import PositiveInt, run_command
from qdq.files import guard_files, write_json

FILES = Path(__file__).parent / "distiller"


def read_plan(scheme: str, num_bits: int) -> distiller.CompressPlan:
    """The file of a scheme, with other bits."""
    plan = distiller.read_compress_file(FILES / f"{scheme}.yaml")
    assert plan.quantizer is not None  # noqa: S101
    bits = {"bits_activations": num_bits, "bits_weights": num_bits}
    quantizer = replace(plan.quantizer, arguments={**plan.quantizer.arguments, **bits})
    return replace(plan, quantizer=quantizer)


@torch.no_grad()
def fill_range(net: nn.Module) -> None:
    """Scale convolutions so that their largest weight is 1, which the BatchNorm after them undoes.

    WRPN has equal steps from -1 to 1. Of weights of 0.1, nearly all would be 0 with 3 bits.
    """
    for pair in net.modules():
        if isinstance(pair, nn.Sequential) and len(pair) == 2 and isinstance(pair[0], nn.Conv2d):
            layers: list[Any] = list(pair)
            convolution, norm = layers
            largest = convolution.weight.abs().max()
            convolution.weight /= largest
            norm.running_mean /= largest
            norm.running_var /= largest**2


def quantize(
    net: nn.Module, batches: Any, plan: distiller.CompressPlan, options: distiller.TrainOptions
) -> list[float]:
    """Train a float network as a file says, in place; returns the losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    tunings = distiller.train_compressed(net, optimizer, batches, plan, options)
    return [loss for tuning in tunings for loss in tuning.losses]


def train_digits(
    *,
    schemes: tuple[str, ...] = ("ema", "dorefa", "pact", "wrpn"),
    bits: tuple[PositiveInt, ...] = (8, 4, 3),
    seeds: PositiveInt = 3,
    epochs: PositiveInt = 30,
    validate: bool = False,
    folder: Path | None = None,
    json: Path | None = None,
) -> int:
    """Print the accuracy on half of the digits, after training on the other half, and what TensorRT int8 takes.

    Args:
        schemes: Names of the files in recipes/distiller.
        bits: Bits of weights and activations; the first and the last layer keep those of the file.
        seeds: Number of repetitions, each with different weights and a different order of the images.
        epochs: Epochs of the quantized training, at most 30, where the policies end; 4/3 of it in float before.
        validate: Train on three quarters of the training half and measure on the fourth.
        folder: For the states of the runs, from which a killed call resumes.
        json: Also write the figures to this file.
    """
    guard_files(outputs=[json])
    accuracies: defaultdict[str, list[float]] = defaultdict(list)
    losses: defaultdict[str, list[float]] = defaultdict(list)
    exports = {"float": ""}

    for seed in range(seeds):
        images, labels, test_images, test_labels = load_data(seed % 4 if validate else None)
        torch.manual_seed(seed)
        batches = DataLoader(TensorDataset(images, labels), 64, shuffle=True)
        float_net = make_network("resnet")
        train(float_net, batches, math.ceil(epochs * 4 / 3))
        accuracies["float"].append(measure_accuracy(float_net, test_images, test_labels))
        for scheme in schemes:
            for num_bits in bits:
                name = f"{scheme} W{num_bits}A{num_bits}"
                net = copy.deepcopy(float_net)
                if scheme == "wrpn":
                    fill_range(net)
                runs = None if folder is None else folder / name.replace(" ", "-") / f"seed-{seed}"
                options = distiller.TrainOptions(epochs, folder=runs, seed=seed)
                losses[name].append(
                    quantize(net, batches, read_plan(scheme, num_bits), options)[-1]
                )
                accuracies[name].append(measure_accuracy(net, test_images, test_labels))
                exports[name] = describe_export(net)

    for name, values in accuracies.items():
        mean, deviation = statistics.mean(values), statistics.pstdev(values)
        print(f"{name:12}  {mean:6.2f} %  +- {deviation:.2f}  {exports[name]}")
    if json:
        write_json(json, {"accuracies": accuracies, "losses": losses, "exports": exports})
    return 0


if __name__ == "__main__":
    run_command(train_digits)
