"""Trains a small detector on generated pictures of circles, squares and triangles, on a CPU in minutes.

python recipes/train_shapes.py --model yolo11n --output yolo11n.pt
python recipes/train_shapes.py --model ssdlite320_mobilenet_v3_large --output ssdlite.pt --steps 600

The name of a YAML file of ultralytics, such as yolo11n, needs ultralytics, whose licence is AGPL-3.0. Its file is then
the model `yolo/yolo11n.pt`. Any other name is a detector of torchvision, whose file is a checkpoint of weights.
"""

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import qdq
from qdq.cli.main import PositiveInt, run_command
from qdq.files import guard_files, write_atomic, write_json
from qdq.seeds import seeded_rng
from qdq.workloads.detection import YOLO_PREFIX, load_detector
from qdq.workloads.detection.pictures import Target, letterbox
from qdq.workloads.detection.shapes import SHAPE_NAMES, ShapePictures
from qdq.workloads.detection.torchvision_detectors import build_detector
from qdq.workloads.detection.yolo import import_ultralytics

Loss = Callable[[Tensor, Sequence[Target]], Tensor]
WARM_UP = 0.05  # part of the training in which the learning rate rises


def make_yolo(model: str) -> tuple[nn.Module, Loss]:
    """A network of ultralytics with random weights, and its loss."""
    tasks = import_ultralytics("ultralytics.nn.tasks")
    network = tasks.DetectionModel(f"{model}.yaml", nc=len(SHAPE_NAMES), verbose=False)
    network.args = import_ultralytics("ultralytics.cfg").get_cfg()  # the weights of the losses
    network.names = dict(enumerate(SHAPE_NAMES))

    def loss(images: Tensor, targets: Sequence[Target]) -> Tensor:
        corners = torch.cat([target.boxes for target in targets]) / images.shape[-1]
        starts, ends = corners[:, :2], corners[:, 2:]
        counts = torch.tensor([len(target.labels) for target in targets])
        batch = {
            "img": images,
            "bboxes": torch.cat([(starts + ends) / 2, ends - starts], dim=1),
            "cls": torch.cat([target.labels for target in targets])[:, None].float(),
            "batch_idx": torch.arange(len(targets)).repeat_interleave(counts).float(),
        }
        losses: Tensor = network.loss(batch)[0]
        return losses.sum() / len(images)

    return network, loss


def make_torchvision(model: str, size: int) -> tuple[nn.Module, Loss]:
    """A detector of torchvision with random weights, and its loss."""
    detector = build_detector(model, 1 + len(SHAPE_NAMES), size)

    def loss(images: Tensor, targets: Sequence[Target]) -> Tensor:
        objects = [{"boxes": target.boxes, "labels": target.labels + 1} for target in targets]
        losses: dict[str, Tensor] = detector(list(images), objects)
        return torch.stack(list(losses.values())).sum()

    return detector, loss


def draw_pictures(count: int, size: int, seed: int) -> tuple[Tensor, list[Target]]:
    """Pictures in memory: float32 `[count, 3, size, size]` from 0 to 1, and their objects."""
    pictures = ShapePictures(count, size, seed)
    squares = []
    for index in tqdm(range(count), "drawing", disable=None):
        squares.append(letterbox(pictures[index], size))
    images, targets = zip(*squares, strict=True)
    return torch.stack(images), list(targets)


def mirror(images: Tensor, targets: Sequence[Target]) -> tuple[Tensor, list[Target]]:
    """The pictures and their objects with left and right exchanged."""
    size = images.shape[-1]
    mirrored = []
    for target in targets:
        left, top, right, bottom = target.boxes.unbind(1)
        boxes = torch.stack([size - right, top, size - left, bottom], dim=1)
        mirrored.append(Target(boxes, target.labels))
    return images.flip(-1), mirrored


def train(
    network: nn.Module,
    loss: Loss,
    images: Tensor,
    targets: list[Target],
    steps: int,
    batch_size: int,
    rate: float,
) -> list[float]:
    """Train with AdamW; the learning rate rises, then falls as a cosine. Returns the losses."""
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=5e-4)
    network.train()
    losses: list[float] = []
    for step in tqdm(range(steps), "training", disable=None):
        part = step / steps
        for group in optimizer.param_groups:
            group["lr"] = (
                rate * min((part + 1 / steps) / WARM_UP, 1) * (1 + math.cos(math.pi * part)) / 2
            )
        indices = torch.randint(len(images), (batch_size,)).tolist()
        batch, objects = images[indices], [targets[index] for index in indices]
        if torch.rand(()) < 0.5:
            batch, objects = mirror(batch, objects)
        optimizer.zero_grad()
        value = loss(batch, objects)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        losses.append(float(value.detach()))
    network.eval()
    return losses


def save(network: nn.Module, output: Path, size: int) -> None:
    """Save a network of ultralytics as its own files are, and any other as a state_dict."""
    content: dict[str, Any] = dict(network.state_dict())
    if hasattr(network, "yaml"):
        vars(network).pop("criterion", None)  # the loss, which a loaded file makes anew
        content = {"model": network, "train_args": {"imgsz": size}}
    buffer = BytesIO()
    torch.save(content, buffer)
    write_atomic(output, buffer.getvalue())


def train_shapes(
    *,
    output: Path,
    model: str = "yolo11n",
    size: PositiveInt = 160,
    steps: PositiveInt = 400,
    pictures: PositiveInt = 1000,
    batch_size: PositiveInt = 16,
    rate: float = 2e-3,
    evaluation: PositiveInt = 200,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Train a detector from random weights, save it and print its mAP on pictures that it has not seen.

    Args:
        output: File to write, `.pt`.
        model: Name of a YAML file of ultralytics that starts with yolo, or of a detector of torchvision.
        size: Side of the pictures in pixels, for YOLO a multiple of 32.
        steps: Number of steps of the training.
        pictures: Number of pictures to train on.
        batch_size: Pictures in a step.
        rate: Largest learning rate.
        evaluation: Number of pictures to evaluate on.
        seed: Seed of weights, pictures and their order.
        json: Also write the figures to this file.
    """
    guard_files(outputs=[output, json])
    is_yolo = model.startswith("yolo")
    with seeded_rng(seed):
        network, loss = make_yolo(model) if is_yolo else make_torchvision(model, size)
        images, targets = draw_pictures(pictures, size, 2 * seed)
        losses = train(network, loss, images, targets, steps, batch_size, rate)
    save(network, output, size)

    name, weights = (f"{YOLO_PREFIX}{output}", "DEFAULT") if is_yolo else (model, str(output))
    options = qdq.WorkloadOptions(
        name, weights, eval_samples=evaluation, image_size=size, seed=seed
    )
    workload = load_detector(options)
    figures = workload.measure(workload.module)
    print(f"{steps} steps, mAP {figures['mAP']:.3f}, mAP50 {figures['mAP50']:.3f}: {output}")
    if json:
        write_json(json, {"steps": steps, "losses": losses, **figures})
    return 0


if __name__ == "__main__":
    run_command(train_shapes)
