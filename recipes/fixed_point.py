"""Fixed point: a trained classifier whose parameters and activations have few bits, and its accuracy.

python recipes/fixed_point.py --type efficientnet_lite0 --bn_bits 10
python recipes/fixed_point.py --type digits --param_bits 6 --fwd_bits 6
python recipes/fixed_point.py --type vgg16 --model_root ~/.torch/models --data_dir /data/imagenet
"""

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qdq
from qdq.cli.main import NonNegativeInt, Parameter, PositiveInt, UInt32, run_command
from qdq.cli.recipes import load_recipe
from qdq.errors import ArgumentError, DataError, ModelError
from qdq.metrics import top_k
from qdq.systems import duplicate_model_with_quant, quantize_parameters
from qdq.systems.parameters import QuantMethod
from qdq.systems.settings import FLOAT_BITS, require_bits, require_rate

PACKAGED = ("digits", "efficientnet_lite0")
TORCHVISION_NAMES = {
    "alexnet": "alexnet",
    "vgg16": "vgg16",
    "vgg16_bn": "vgg16_bn",
    "vgg19": "vgg19",
    "vgg19_bn": "vgg19_bn",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "squeezenet_v0": "squeezenet1_0",
    "squeezenet_v1": "squeezenet1_1",
    "inception_v3": "inception_v3",
}
UNAVAILABLE = ("mnist", "svhn", "cifar10", "cifar100", "stl10")
CALIBRATION_BATCH = 10
EVALUATION_CROPS = 500  # of the packaged photographs
RESULT_FILE = "acc1_acc5.txt"
RESULT_LINE = (
    "type={}, quant_method={}, param_bits={}, bn_bits={}, fwd_bits={}, overflow_rate={}, "
    "acc1={:.4f}, acc5={:.4f}"
)


@dataclass
class Task:
    """A trained network and its data.

    Args:
        net: The float network.
        calibration: Batches of 10 images.
        images: Batches to evaluate on.
        labels: Class of each of these images.
    """

    net: nn.Module
    calibration: Iterable[Any]
    images: Iterable[Any]
    labels: torch.Tensor


class Shortcut(nn.Module):
    """A block whose input is added to its output."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to the same shape."""
        result: torch.Tensor = self.body(x) + x
        return result


def make_sequential(net: Any) -> nn.Sequential:
    """EfficientNet-Lite0 with all its layers in Sequentials, because only there they get quantizers."""
    blocks = [make_sequential_block(block) for block in net._blocks]
    return nn.Sequential(
        OrderedDict(
            conv_stem=net._conv_stem,
            bn0=net._bn0,
            relu0=nn.ReLU6(),
            blocks=nn.Sequential(*blocks),
            conv_head=net._conv_head,
            bn1=net._bn1,
            relu1=nn.ReLU6(),
            avg_pooling=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=net._fc,
        )
    ).eval()


def make_sequential_block(block: Any) -> nn.Module:
    """Expand, depthwise and project, as in the forward of the package."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if hasattr(block, "_expand_conv"):
        layers.update(expand_conv=block._expand_conv, bn0=block._bn0, relu0=nn.ReLU6())
    layers.update(depthwise_conv=block._depthwise_conv, bn1=block._bn1, relu1=nn.ReLU6())
    layers.update(project_conv=block._project_conv, bn2=block._bn2)
    body = nn.Sequential(layers)
    expand, project = next(iter(layers.values())), block._project_conv
    keeps_shape = (expand.in_channels, block._block_args.stride) == (project.out_channels, 1)
    return Shortcut(body) if keeps_shape and block.id_skip else body


def load_digits_task(batch_size: int, seed: int) -> Task:
    """A small ResNet, trained for some seconds on half of scikit-learn's digits; the other half is evaluated."""
    from sklearn.datasets import load_digits

    small = load_recipe("qat_digits")
    digits = load_digits()
    images = torch.tensor(digits.images)[:, None].float() / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(seed)
    net: nn.Module = small.make_network("resnet")
    small.train(
        net, DataLoader(TensorDataset(images[::2], labels[::2]), 64, shuffle=True), epochs=10
    )
    return Task(
        net,
        torch.split(images[::2], CALIBRATION_BATCH),
        torch.split(images[1::2], batch_size),
        labels[1::2],
    )


def load_image_task(
    type: str,
    data_dir: Path | None,
    model_root: Path,
    input_size: int,
    num_calibration: int,
    batch_size: int,
    seed: int,
) -> Task:
    """EfficientNet-Lite0 or a network of torchvision, on a folder of images or on packaged photographs."""
    if type in PACKAGED:
        loaded = qdq.load_model(type)
        net: nn.Module = make_sequential(loaded.module)
    else:
        loaded = qdq.load_model(TORCHVISION_NAMES[type], str(find_weights(type, model_root)))
        net = loaded.module
    num_images = EVALUATION_CROPS
    if data_dir is not None:  # as many as there are, and no warning about fewer
        num_files = sum(path.is_file() for path in data_dir.rglob("*"))
        num_images = max(num_files - num_calibration, 1)
    size = loaded.preprocess
    resize = round(size.resize_size * input_size / size.crop_size)
    loaded = replace(loaded, preprocess=replace(size, resize_size=resize, crop_size=input_size))
    calibration, images = qdq.load_images(
        data_dir, loaded, num_calibration, num_images, batch_size, seed
    )
    if images.labels is None:
        raise DataError(
            f"the accuracy cannot be measured: {images.label_note}.", "give labelled images."
        )
    calibration = replace(calibration, batch_size=CALIBRATION_BATCH)
    return Task(net, calibration, images, torch.tensor(images.labels))


def find_weights(type: str, model_root: Path) -> Path:
    """The checkpoint of a network in a folder, such as `resnet18-5c106cde.pth`."""
    folder = model_root.expanduser()
    pattern = re.compile(rf"{TORCHVISION_NAMES[type]}(_google)?(-\w+)*\.pth")
    for path in sorted(folder.glob("*.pth")):
        if pattern.fullmatch(path.name):
            return path
    raise ModelError(
        f"there are no weights of {type} in {model_root}; only those of {' and '.join(PACKAGED)} are packaged.",
        f"put {TORCHVISION_NAMES[type]}-XXXXXXXX.pth of torchvision there and give --data_dir, "
        f"or pass --type {PACKAGED[1]}.",
    )


def require_type(type: str, data_dir: Path | None) -> None:
    """Refuse a network whose weights or images cannot be had."""
    if type in UNAVAILABLE:
        raise ModelError(
            f"the network, weights and images of {type} are not packaged.",
            f"pass --type {' or --type '.join(PACKAGED)}, which are.",
        )
    if type not in {*PACKAGED, *TORCHVISION_NAMES}:
        names = ", ".join([*PACKAGED, *TORCHVISION_NAMES])
        raise ArgumentError(f"type is {type!r}; expected {names}.", "choose one of them.")
    if type == "digits" and data_dir is not None:
        raise ArgumentError("digits has images of its own.", "leave out --data_dir.")


def choose_device(gpu: str | None, ngpu: int) -> torch.device:
    """The CPU, or the first GPU of a list such as "0,1"."""
    if ngpu == 0:
        return qdq.choose_device("cpu")
    if gpu is None:
        return qdq.choose_device()
    return qdq.choose_device(f"cuda:{gpu.split(',')[0]}")


def fixed_point(
    *,
    type: str = "cifar10",
    quant_method: QuantMethod = "linear",
    param_bits: int = 8,
    fwd_bits: int = 8,
    bn_bits: int = 32,
    overflow_rate: float = 0.0,
    n_sample: Annotated[PositiveInt, Parameter(alias=("--n_samples",))] = 20,
    batch_size: PositiveInt = 100,
    input_size: PositiveInt = 224,
    data_dir: Annotated[Path | None, Parameter(alias=("--data_root",))] = None,
    model_root: Path = Path("~/.torch/models/"),
    seed: UInt32 = 117,
    gpu: str | None = None,
    ngpu: NonNegativeInt = 8,
    logdir: Path = Path("log/default"),
) -> int:
    """Quantize the parameters of a classifier, then its activations, and append its accuracy to acc1_acc5.txt.

    Args:
        type: digits or efficientnet_lite0, which are packaged, or alexnet, vgg16, vgg16_bn, vgg19, vgg19_bn, resnet18,
            resnet34, resnet50, resnet101, resnet152, squeezenet_v0, squeezenet_v1 or inception_v3, with weights in
            model_root. Nothing of mnist, svhn, cifar10, cifar100 and stl10 is packaged.
        quant_method: How tensors are quantized.
        param_bits: Bits of weights and biases; 32 leaves them in float.
        fwd_bits: Bits of activations; 32 leaves them in float.
        bn_bits: Bits of the running statistics of BatchNorm; 32 leaves them in float.
        overflow_rate: Fraction of the elements that may saturate, with linear.
        n_sample: Batches of 10 images to calibrate on.
        batch_size: Images per batch of the evaluation.
        input_size: Side of the images in pixels; 299 for inception_v3. The digits have 8.
        data_dir: A folder with one folder per class, with or without train and val above them; packaged photographs
            if left out.
        model_root: Folder of checkpoints.
        seed: Seed of training, crops and the choice of images.
        gpu: Number of the GPU. By default a GPU if there is one.
        ngpu: 0 to run on the CPU. Otherwise one GPU is enough.
        logdir: Nothing is written there; it is an option of older scripts.
    """
    flags = dict(locals())
    for name in ("param_bits", "fwd_bits", "bn_bits"):
        require_bits(flags[name], name)
    require_rate(overflow_rate, "fixed_point")
    require_type(type, data_dir)
    device = choose_device(gpu, ngpu)
    print("=================FLAGS==================")
    for name, value in flags.items():
        print(f"{name}: {value}")
    print("========================================")

    if type == "digits":
        task = load_digits_task(batch_size, seed)
    else:
        size = 299 if "inception" in type else input_size
        task = load_image_task(
            type, data_dir, model_root, size, n_sample * CALIBRATION_BATCH, batch_size, seed
        )
    net = task.net.to(device)

    report = quantize_parameters(net, param_bits, bn_bits, overflow_rate, quant_method)
    print(report.format_table())
    if fwd_bits < FLOAT_BITS:
        net = duplicate_model_with_quant(net, fwd_bits, overflow_rate, n_sample, quant_method)
        print(net)
        batches = itertools.islice(itertools.cycle(task.calibration), n_sample)
        qdq.predict(net, list(batches))

    logits = qdq.predict(net, task.images)
    acc1 = top_k(logits, task.labels.numpy(), 1)
    acc5 = top_k(logits, task.labels.numpy(), 5)
    print(net)
    line = RESULT_LINE.format(
        type, quant_method, param_bits, bn_bits, fwd_bits, overflow_rate, acc1, acc5
    )
    print(line)
    with open(RESULT_FILE, "a") as file:
        file.write(line + "\n")
    return 0


if __name__ == "__main__":
    run_command(fixed_point)
