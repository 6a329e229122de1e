"""A small network on scikit-learn's digits, run in integers alone: one scale for each layer, group or channel.

The network with a scale for each channel is then exported as QDQ ONNX for TensorRT.

python recipes/integer_only.py
python recipes/integer_only.py --scheme symmetric --bits 6
"""

import copy
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qdq
from qdq.cli.main import PositiveInt, run_command
from qdq.systems import IntegerNetwork, holding_ranges, to_tensorrt
from qdq.systems.affine import Scheme

# Axis and groups of the scales of a weight; two groups of output channels divide every layer.
GRANULARITIES: dict[str, tuple[int | None, int | None]] = {
    "layer": (None, None),
    "group": (0, 2),
    "channel": (0, None),
}


def make_network() -> IntegerNetwork:
    """Convolution, convolution with BatchNorm, pooling and a linear layer, for 8 x 8 images and 10 classes."""
    return IntegerNetwork(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def train(net: nn.Module, batches: DataLoader[tuple[torch.Tensor, ...]], epochs: int) -> None:
    """Train in float; a network without quantizers is trained by `finetune` as any other."""
    schedule = qdq.Schedule(epochs=epochs, lr=4e-3, bias_lr=4e-3, tune_batchnorm=0.9)
    qdq.finetune(
        net, batches, loss=qdq.cross_entropy, distillation=None, schedule=schedule, ranges="none"
    )
    net.eval()


def measure_accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Percentage of images whose label is the largest output."""
    return 100 * float((outputs.argmax(1) == labels).float().mean())


@torch.no_grad()
def quantize(
    net: IntegerNetwork, images: torch.Tensor, bits: int, granularity: str, scheme: Scheme
) -> None:
    """Make the integer layers and calibrate them.

    Args:
        net: The float network.
        images: Calibration images.
        bits: Width of the codes.
        granularity: How many scales a weight has.
        scheme: The codes, as for `integer_only`.
    """
    axis, groups = GRANULARITIES[granularity]
    net.quantize(bits, axis=axis, groups=groups, scheme=scheme)
    for batch in torch.split(images, 100):
        net.quantize_forward(batch)


@torch.no_grad()
def integer_only(
    *,
    bits: PositiveInt = 8,
    scheme: Scheme = "unsigned",
    epochs: PositiveInt = 15,
    output: Path = Path("runs/integer_only.onnx"),
) -> int:
    """Print the accuracy on half of the digits: in float, fake-quantized, in integers, and of the exported file.

    Args:
        bits: Width of the codes of weights and activations.
        scheme: unsigned or signed codes with a zero point, which the export converts; symmetric codes, which it keeps.
        epochs: Epochs of the training in float, on the other half.
        output: The ONNX file.
    """
    digits = load_digits()
    images = torch.tensor(digits.images)[:, None].float() / 16
    labels = torch.tensor(digits.target)
    train_images, train_labels = images[::2], labels[::2]
    test_images, test_labels = images[1::2], labels[1::2]

    torch.manual_seed(0)
    float_net = make_network()
    batches = DataLoader(TensorDataset(train_images, train_labels), 64, shuffle=True)
    train(float_net, batches, epochs)
    accuracy = measure_accuracy(float_net(test_images), test_labels)
    print(f"float          {accuracy:6.2f} %")

    for granularity in GRANULARITIES:
        net = copy.deepcopy(float_net)
        quantize(net, train_images, bits, granularity, scheme)
        with holding_ranges(net):
            fake_outputs = net.quantize_forward(test_images)
        net.freeze()
        outputs = net.quantize_inference(test_images)

        fake_accuracy = measure_accuracy(fake_outputs, test_labels)
        accuracy = measure_accuracy(outputs, test_labels)
        scale = net.qlayers[-1].qo.scale
        codes = (outputs - fake_outputs) / scale
        print(
            f"per {granularity:8}   fake-quantized {fake_accuracy:6.2f} %   integers {accuracy:6.2f} %   "
            f"outputs differ by at most {float(codes.abs().max()):.0f} codes"
        )

    print(to_tensorrt(net, convert=scheme != "symmetric").format_table())
    qdq.export_onnx(net, test_images[:2], output)
    onnx_outputs = torch.from_numpy(qdq.predict(output, [test_images]))
    accuracy = measure_accuracy(onnx_outputs, test_labels)
    codes = (onnx_outputs - outputs) / scale
    print(
        f"{output}: {accuracy:.2f} %, outputs differ from the integers by at most {float(codes.abs().max()):.1f} codes"
    )
    return 0


if __name__ == "__main__":
    run_command(integer_only)
