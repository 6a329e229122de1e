"""Small models and folders of images, and what batches hold."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn

from qdq.workloads.classification.batches import ImageBatches
from qdq.workloads.classification.models import LoadedModel, Preprocess

CATEGORIES = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]


def make_model(num_classes=1000, categories=None, crop_size=32) -> LoadedModel:
    """A model that is small where only its preprocessing and its classes matter."""
    preprocess = Preprocess(crop_size + 8, crop_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return LoadedModel("tiny", nn.Identity(), "none", preprocess, num_classes, categories)


def make_folder(root: Path, **classes: int) -> Path:
    """Class folders of images, each of another colour all over the dataset."""
    number = sum(1 for path in root.rglob("*.png")) if root.exists() else 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            number += 1
            colour = (number % 250, number // 250 + 100 * ("val" in root.name), 7)
            Image.new("RGB", (48, 40), colour).save(root / name / f"{number}.png")
    return root


def all_images(batches: ImageBatches) -> torch.Tensor:
    return torch.cat([images for images, _ in batches])


def all_labels(batches: ImageBatches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def colours(batches: ImageBatches) -> set[tuple[float, ...]]:
    return {tuple(pixel.tolist()) for pixel in all_images(batches)[:, :, 0, 0]}
