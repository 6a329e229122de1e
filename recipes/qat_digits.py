"""Small networks with few bits on scikit-learn's digits: float, calibrated (PTQ) and fine-tuned (QAT), several seeds.

python recipes/qat_digits.py
python recipes/qat_digits.py --network mobilenet --bits 4,4 --seeds 1
"""

import copy
import math
import statistics
from collections import defaultdict
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qdq
from qdq.cli.main import PositiveInt, run_command


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            make_convolution(width, out, 3, stride),
            nn.ReLU(),
            make_convolution(out, out, 3),
        )
        self.skip = make_shortcut(width, out, stride)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, width, H, W]` to `[N, out, H / stride, W / stride]`."""
        result: torch.Tensor = self.relu(self.body(x) + self.skip(x))
        return result


class InvertedBlock(nn.Module):
    """Expand, depthwise and project, and a shortcut, as in MobileNetV2."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        inner = 4 * width
        self.body = nn.Sequential(
            make_convolution(width, inner, 1),
            nn.ReLU(),
            make_convolution(inner, inner, 3, stride, groups=inner),
            nn.ReLU(),
            make_convolution(inner, out, 1),
        )
        self.skip = make_shortcut(width, out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, width, H, W]` to `[N, out, H / stride, W / stride]`."""
        result: torch.Tensor = self.body(x) + self.skip(x)
        return result


def make_convolution(
    width: int, out: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution and BatchNorm."""
    convolution = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out))


def make_shortcut(width: int, out: int, stride: int) -> nn.Sequential:
    """A convolution, or nothing if the block keeps the shape."""
    if width == out and stride == 1:
        return nn.Sequential()
    return make_convolution(width, out, 1, stride)


def make_network(network: str) -> nn.Sequential:
    """A small ResNet or MobileNet for 8 x 8 images and 10 classes."""
    block = {"resnet": ResidualBlock, "mobilenet": InvertedBlock}[network]
    return nn.Sequential(
        make_convolution(1, 16, 3),
        nn.ReLU(),
        block(16, 16, 1),
        block(16, 32, 2),
        block(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def train(net: nn.Module, batches: DataLoader[tuple[torch.Tensor, ...]], epochs: int) -> None:
    """Train in float, with Adam and a cosine schedule."""
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    net.eval()


def measure_accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Percentage of images whose label is the largest output."""
    answers = qdq.predict(net, [images]).argmax(1)
    return 100 * float((answers == labels.numpy()).mean())


def qat_digits(
    *,
    network: Literal["resnet", "mobilenet"] = "resnet",
    bits: tuple[str, ...] = ("8,8", "4,8", "4,4"),
    seeds: PositiveInt = 3,
    epochs: PositiveInt = 40,
) -> int:
    """Print the accuracy on half of the digits, after training on the other half; fewer than 8 bits are simulated.

    Args:
        network: Which small network.
        bits: Pairs of bit widths: of the weights and of the inputs.
        seeds: Number of repetitions, each with different weights and a different order of the images.
        epochs: Epochs of the training in float; fine-tuning takes a quarter of them.
    """
    digits = load_digits()
    images = torch.tensor(digits.images)[:, None].float() / 16
    labels = torch.tensor(digits.target)
    train_images, train_labels = images[::2], labels[::2]
    test_images, test_labels = images[1::2], labels[1::2]
    example = test_images[:2]
    accuracies: defaultdict[str, list[float]] = defaultdict(list)

    for seed in range(seeds):
        torch.manual_seed(seed)
        batches = DataLoader(TensorDataset(train_images, train_labels), 64, shuffle=True)
        float_net = make_network(network)
        train(float_net, batches, epochs)
        qdq.fold_batchnorm(float_net, example)
        accuracy = measure_accuracy(float_net, test_images, test_labels)
        accuracies["float"].append(accuracy)

        for pair in bits:
            weight_bits, input_bits = map(int, pair.split(","))
            net = copy.deepcopy(float_net)
            qdq.swap_modules(
                net,
                example,
                weight_desc=qdq.QuantDescriptor(weight_bits, axis=0),
                input_desc=qdq.QuantDescriptor(input_bits),
            )
            qdq.calibrate_model(net, [train_images])
            accuracy = measure_accuracy(net, test_images, test_labels)
            accuracies[f"W{weight_bits}A{input_bits} calibrated"].append(accuracy)

            schedule = qdq.Schedule(
                epochs=math.ceil(epochs / 4),
                lr=1e-5 if pair == "8,8" else 1e-3,
                bias_lr=1e-3,
                range_lr=1e-2,
            )
            qdq.finetune(
                net, batches, loss=qdq.cross_entropy, ranges="lsq", schedule=schedule, seed=seed
            )
            accuracy = measure_accuracy(net, test_images, test_labels)
            accuracies[f"W{weight_bits}A{input_bits} fine-tuned"].append(accuracy)

    for name, values in accuracies.items():
        mean = statistics.mean(values)
        deviation = statistics.pstdev(values)
        print(f"{network:9} {name:16}  {mean:6.2f} %  +- {deviation:.2f}")
    return 0


if __name__ == "__main__":
    run_command(qat_digits)
