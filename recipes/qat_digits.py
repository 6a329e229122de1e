"""Small networks on scikit-learn's digits with few bits: float, calibrated (PTQ) and fine-tuned (QAT), several seeds.

python recipes/qat_digits.py
python recipes/qat_digits.py --network mobilenet --bits 4,4 --seeds 1
"""

import copy
import statistics
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import nn

import qdq
from qdq.cli.main import PositiveInt, run_command


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or expand, depthwise and project as in MobileNetV2."""

    def __init__(self, width: int, out: int, stride: int, depthwise: bool) -> None:
        super().__init__()
        inner, groups = (4 * width, 4 * width) if depthwise else (out, 1)
        first = conv(width, inner, 1) if depthwise else conv(width, inner, 3, stride)
        middle = (
            (nn.ReLU(), conv(inner, inner, 3, stride, groups), nn.ReLU())
            if depthwise
            else (nn.ReLU(),)
        )
        self.body = nn.Sequential(first, *middle, conv(inner, out, 1 if depthwise else 3))
        self.skip = nn.Sequential() if (width, stride) == (out, 1) else conv(width, out, 1, stride)
        self.end = nn.Identity() if depthwise else nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, width, H, W]` to `[N, out, H / stride, W / stride]`."""
        result: torch.Tensor = self.end(self.body(x) + self.skip(x))
        return result


def conv(width: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm."""
    layer = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out))


def make_network(depthwise: bool) -> nn.Sequential:
    """A small ResNet or MobileNet for 8 x 8 images and 10 classes."""
    blocks = (
        Block(w, out, stride, depthwise)
        for w, out, stride in ((16, 16, 1), (16, 32, 2), (32, 32, 1))
    )
    return nn.Sequential(
        conv(1, 16, 3), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


def train(
    net: nn.Module, batches: torch.utils.data.DataLoader[tuple[torch.Tensor, ...]], epochs: int
) -> None:
    """As one trains in float: Adam, cosine."""
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net.train()(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


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
        bits: Pairs of bits of weights and of inputs.
        seeds: How many times, each with other weights and order.
        epochs: Of the training in float; fine-tuning takes a quarter.
    """
    digits = load_digits()
    images, labels = torch.tensor(digits.images)[:, None].float() / 16, torch.tensor(digits.target)
    test_images, test_labels = images[1::2], labels[1::2]
    accuracies: dict[str, list[float]] = {}

    def note(name: str, net: nn.Module) -> None:
        right = qdq.predict(net, [test_images]).argmax(1) == test_labels.numpy()
        accuracies.setdefault(name, []).append(100 * float(right.mean()))

    for seed in range(seeds):
        torch.manual_seed(seed)
        batches = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images[::2], labels[::2]), 64, shuffle=True
        )
        trained = make_network(network == "mobilenet")
        train(trained, batches, epochs)
        qdq.fold_batchnorm(trained.eval(), test_images[:2])
        note("float", trained)
        for pair in bits:
            weight_bits, input_bits = map(int, pair.split(","))
            net = copy.deepcopy(trained)
            weights, inputs = (
                qdq.QuantDescriptor(weight_bits, axis=0),
                qdq.QuantDescriptor(input_bits),
            )
            qdq.swap_modules(net, test_images[:2], weight_desc=weights, input_desc=inputs)
            qdq.calibrate_model(net, [images[::2]])
            note(f"W{weight_bits}A{input_bits} calibrated", net)
            schedule = qdq.Schedule(
                epochs=-(-epochs // 4),
                lr=1e-5 if pair == "8,8" else 1e-3,
                bias_lr=1e-3,
                range_lr=1e-2,
            )
            qdq.finetune(
                net, batches, loss=qdq.cross_entropy, ranges="lsq", schedule=schedule, seed=seed
            )
            note(f"W{weight_bits}A{input_bits} fine-tuned", net)
    for name, values in accuracies.items():
        print(
            f"{network:9} {name:16}  {statistics.mean(values):6.2f} %  +- {statistics.pstdev(values):.2f}"
        )
    return 0


if __name__ == "__main__":
    run_command(qat_digits)
