"""Published speed-ups of int8 beside those that qdq predicts; nothing in the prediction is fitted to them.

python tools/judge_payoff.py --output runs/payoff [--only "resnet*"] [--json rows.json]

Each network is built with random weights, quantized with the defaults of qdq and exported; the files are kept in the
folder and used again. A row of which the publication does not say something has an assumption in its note.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from torch import nn

import qdq
from qdq.check.payoff import Payoff, predict_payoff
from qdq.cli.main import run_command
from qdq.files import write_json
from qdq.graph.shapes import complete_shapes

SEED = 0


@dataclass(frozen=True)
class Network:
    """A network and how it is quantized.

    Args:
        build: Makes the module.
        height: Height of its images.
        width: Their width.
        exclude: Layers that stay in float.
    """

    build: Callable[[], nn.Module]
    height: int
    width: int
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A published comparison of int8 with fp16.

    Args:
        title: What was published.
        network: A key of `NETWORKS`.
        gpu: The GPU.
        ratio: How many times as fast as fp16 int8 was; of a range, its ends.
        rest: Type of the float part of the int8 engine.
        note: Assumptions.
    """

    title: str
    network: str
    gpu: str
    ratio: tuple[float, ...]
    rest: Literal["fp32", "fp16"]
    note: str = ""


@dataclass(frozen=True)
class Judged:
    """A published row and its prediction.

    Args:
        published: The row.
        int8_microseconds: Predicted time of int8, of one sample.
        fp16_microseconds: Likewise of fp16.
        predicted: Their ratio.
        has_right_sign: Whether both say that int8 is faster, or both that it is not.
        payoff: The prediction, with the layers that decide.
    """

    published: Published
    int8_microseconds: float
    fp16_microseconds: float
    predicted: float
    has_right_sign: bool
    payoff: Payoff


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module: nn.Module = getattr(importlib.import_module("torchvision.models"), name)()
        return module

    return build


def _timm(name: str, **options: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module: nn.Module = importlib.import_module("timm").create_model(name, **options)
        return module

    return build


def _yolo(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        tasks = importlib.import_module("ultralytics.nn.tasks")
        module: nn.Module = tasks.DetectionModel(f"{name}.yaml", verbose=False)
        return module

    return build


NETWORKS = {
    "resnet18": Network(_torchvision("resnet18"), 224, 224),
    "resnet50": Network(_torchvision("resnet50"), 224, 224),
    "mobilenet_v2": Network(_torchvision("mobilenet_v2"), 224, 224),
    "yolov8n": Network(_yolo("yolov8n"), 640, 640),
    "yolo26m": Network(_yolo("yolo26m"), 416, 416),
    "yolo26m-float-head": Network(_yolo("yolo26m"), 416, 416, ("model.23.*",)),
    "vit_b": Network(_timm("vit_base_patch16_224"), 224, 224),
    "vit_l": Network(_timm("vit_large_patch16_224"), 224, 224),
    "vovnet99": Network(_timm("ese_vovnet99b", num_classes=0), 640, 960),
    "dinov2_s": Network(_timm("vit_small_patch14_dinov2", img_size=560), 560, 560),
}

ROWS = (
    Published("ResNet-50, L4", "resnet50", "l4", (1.20,), "fp16"),
    Published("ResNet-18, Orin Nano", "resnet18", "orinnano", (1.5, 1.8), "fp16"),
    Published("ResNet-50, Orin Nano", "resnet50", "orinnano", (1.5, 1.8), "fp16"),
    Published("MobileNetV2, Orin Nano", "mobilenet_v2", "orinnano", (1.09,), "fp16"),
    Published("YOLOv8n, A100", "yolov8n", "a100", (1.21,), "fp16", "640 x 640"),
    Published("YOLO26m@416 PTQ, fp32 rest", "yolo26m", "rtxpro6000", (1.03,), "fp32"),
    Published("YOLO26m@416 QAT, fp32 head", "yolo26m-float-head", "rtxpro6000", (0.91,), "fp32"),
    Published("YOLO26m@416 QAT, fp16 head", "yolo26m-float-head", "rtxpro6000", (1.04,), "fp16"),
    Published("ViT", "vit_b", "l4", (1.37,), "fp16", "B/16 at 224 on an L4 is assumed"),
    Published("ViT-L, T4, strongly typed", "vit_l", "t4", (0.5,), "fp32", "L/16 at 224 is assumed"),
    Published(
        "FAR3D encoder", "vovnet99", "orin", (1.83,), "fp16", "one camera; an AGX Orin is assumed"
    ),
    Published(
        "RF-DETR, best int8",
        "dinov2_s",
        "t4",
        (0.88,),
        "fp16",
        "only its backbone, without windows; a T4 is assumed",
    ),
)


def judge_payoff(*, output: Path, only: tuple[str, ...] = ("*",), json: Path | None = None) -> int:
    """Print the published rows with their predictions. The exit code is 0.

    Args:
        output: Folder for the exported networks.
        only: Patterns of networks.
        json: Also write the rows, with the layers that decide, to this file.
    """
    output.mkdir(parents=True, exist_ok=True)
    judged = []
    for published in ROWS:
        if any(fnmatch.fnmatch(published.network, pattern) for pattern in only):
            judged.append(_judge(published, output))
    print(f"{'published':28}{'GPU':>11}{'rest':>6}{'fp16 ms':>9}{'int8 ms':>9}", end="")
    print(f"{'predicted':>11}{'published':>11}  sign")
    for row in judged:
        _print_row(row)
    right = sum(row.has_right_sign for row in judged)
    print(f"right sign: {right} of {len(judged)}")
    if json is not None:
        write_json(json, judged)
    return 0


def _print_row(row: Judged) -> None:
    published = row.published
    ratio = "-".join(f"{ratio:.2f}" for ratio in published.ratio)
    print(
        f"{published.title:28}{published.gpu:>11}{published.rest:>6}"
        f"{row.fp16_microseconds / 1000:9.3f}{row.int8_microseconds / 1000:9.3f}"
        f"{row.predicted:11.2f}{ratio:>11}  {'right' if row.has_right_sign else 'WRONG'}"
        f"{'; ' if published.note else ''}{published.note}"
    )


def _judge(row: Published, folder: Path) -> Judged:
    """Predict the ratio of a row."""
    path = folder / f"{row.network}.onnx"
    if not path.is_file():
        _export(NETWORKS[row.network], path)
    model = ir.load(path)
    complete_shapes(model)
    payoff = predict_payoff(model, row.gpu)
    assert payoff is not None  # noqa: S101 - the shapes are in the file
    int8 = payoff.int8 if row.rest == "fp32" else payoff.int8_half_rest
    predicted = payoff.float16 / int8
    is_faster = min(row.ratio) > 1
    return Judged(row, int8, payoff.float16, predicted, (predicted > 1) == is_faster, payoff)


def _export(network: Network, path: Path) -> None:
    """Quantize a network with random weights and write it in float32."""
    torch.manual_seed(SEED)
    module = network.build().eval()
    image = torch.rand(1, 3, network.height, network.width)
    qdq.fold_batchnorm(module, image)
    qdq.swap_modules(module, image, exclude=network.exclude)
    qdq.rewire_operations(module, image, exclude=network.exclude)
    qdq.calibrate_model(module, [image], method="max")
    qdq.export_onnx(module, image, path, dynamic_batch=False)


if __name__ == "__main__":
    run_command(judge_payoff)
