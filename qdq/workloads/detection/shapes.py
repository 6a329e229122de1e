"""Generated pictures of circles, squares and triangles, for detectors without a data set of their own.

A picture depends on its seed and index alone. Train and validation pictures have different seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from qdq.errors import ArgumentError, DependencyError
from qdq.files import write_atomic
from qdq.workloads.detection.pictures import Picture, Target

Array = NDArray[np.float64]

SHAPE_NAMES = ("circle", "square", "triangle")
"""The classes of the pictures, in the order of their indices."""

_MOST_SHAPES = 4
_RADIUS = (0.07, 0.22)  # half the side of a shape, as a fraction of the picture
_MIN_CONTRAST = (
    0.35  # largest difference of a channel between a shape and the grey of the background
)
_TRIES = 20  # to place a shape that overlaps no other
_SAMPLES = 3  # rays for each pixel and direction, so that edges are smooth


@dataclass(frozen=True)
class ShapePictures:
    """Pictures that are drawn when they are needed.

    Args:
        count: Number of pictures.
        size: Their side in pixels.
        seed: Seed of all of them.

    Raises:
        ArgumentError: `count` is below 1, or `size` below 32.
    """

    count: int
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ArgumentError(f"{self.count} pictures are wanted.", "draw 1 or more.")
        if self.size < 32:
            raise ArgumentError(
                f"the pictures have a side of {self.size} pixels.", "draw 32 or more."
            )

    @property
    def description(self) -> str:
        """What the pictures show."""
        return f"generated pictures of shapes ({self.size} pixels, seed {self.seed})"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Picture:
        return draw_picture(self.size, self.seed, index)


def draw_picture(size: int, seed: int, index: int) -> Picture:
    """Draw one picture: 1 to 4 shapes that hardly overlap, on stripes, blotches and noise.

    Args:
        size: Side in pixels.
        seed: Seed of a set of pictures.
        index: Index in that set.
    """
    draw = np.random.default_rng([seed, index])
    canvas = _draw_background(draw, size)
    grey = canvas.mean(axis=(1, 2))
    boxes: list[Array] = []
    labels: list[int] = []
    for _ in range(int(draw.integers(1, _MOST_SHAPES + 1))):
        box = _place(draw, size, boxes)
        if box is None:
            continue
        label = int(draw.integers(len(SHAPE_NAMES)))
        _paint(canvas, SHAPE_NAMES[label], box, _choose_colour(draw, grey))
        boxes.append(box)
        labels.append(label)
    canvas += draw.normal(0, 0.03, canvas.shape)
    image = torch.from_numpy((canvas.clip(0, 1) * 255).round().astype(np.uint8))
    return Picture(image, Target(torch.tensor(np.array(boxes)).float(), torch.tensor(labels)))


def _draw_background(draw: np.random.Generator, size: int) -> Array:
    """Stripes and blotches around a grey, `[3, size, size]`."""
    base = draw.uniform(0.25, 0.75, (3, 1, 1))
    rows, columns = np.mgrid[0:size, 0:size] / size
    angle, phase = draw.uniform(0, np.pi), draw.uniform(0, 2 * np.pi)
    waves = draw.uniform(2, 8)
    ramp = rows * np.sin(angle) + columns * np.cos(angle)
    stripes = np.sin(2 * np.pi * waves * ramp + phase)
    cells = draw.normal(0, 1, (3, 8, 8))
    repeats = -(-size // 8)
    blotches = np.kron(cells, np.ones((1, repeats, repeats)))[:, :size, :size]
    background: Array = base + 0.08 * stripes + 0.06 * blotches
    return background


def _place(draw: np.random.Generator, size: int, boxes: list[Array]) -> Array | None:
    """A box that overlaps no other; None if none was found."""
    for _ in range(_TRIES):
        radius = draw.uniform(*_RADIUS) * size
        x, y = draw.uniform(radius, size - radius, 2)
        box = np.array([x - radius, y - radius, x + radius, y + radius])
        if not any(_overlap(box, other) for other in boxes):
            return box
    return None


def _overlap(first: Array, second: Array) -> bool:
    starts = np.maximum(first[:2], second[:2])
    ends = np.minimum(first[2:], second[2:])
    return bool((starts < ends).all())


def _choose_colour(draw: np.random.Generator, grey: Array) -> Array:
    """A colour of which one channel differs clearly from the background."""
    while True:
        colour = draw.uniform(0, 1, 3)
        if np.abs(colour - grey).max() >= _MIN_CONTRAST:
            return colour


def _in_circle(x: Array, y: Array) -> NDArray[np.bool_]:
    return x**2 + y**2 <= 1


def _in_square(x: Array, y: Array) -> NDArray[np.bool_]:
    return np.maximum(np.abs(x), np.abs(y)) <= 1


def _in_triangle(x: Array, y: Array) -> NDArray[np.bool_]:
    return (np.abs(x) <= (y + 1) / 2) & (y <= 1)


_SHAPES: dict[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
    "circle": _in_circle,
    "square": _in_square,
    "triangle": _in_triangle,
}


def _paint(canvas: Array, name: str, box: Array, colour: Array) -> None:
    """Paint a shape that touches all sides of its box; a pixel takes colour as far as the shape covers it."""
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.ceil(box[2:]).astype(int)
    centre_x, centre_y = (box[:2] + box[2:]) / 2
    radius = (box[2] - box[0]) / 2
    x = (_list_samples(left, right) - centre_x) / radius
    y = (_list_samples(top, bottom) - centre_y) / radius
    inside = _SHAPES[name](x[None, :], y[:, None]).astype(np.float64)
    blocks = inside.reshape(bottom - top, _SAMPLES, right - left, _SAMPLES)
    cover = blocks.mean(axis=(1, 3))
    part = canvas[:, top:bottom, left:right]
    part += cover * (colour[:, None, None] - part)


def draw_classes(target: Target, size: int) -> NDArray[np.int64]:
    """The class of every pixel of a picture: 0 is the background, the others are the indices of `SHAPE_NAMES` plus 1.

    A pixel belongs to a shape if its centre does.

    Args:
        target: The objects of a picture that `draw_picture` drew.
        size: Side of the picture in pixels.

    Returns:
        int64 `[size, size]`.
    """
    classes = np.zeros((size, size), dtype=np.int64)
    centres = np.arange(size) + 0.5
    for box, label in zip(target.boxes.double().numpy(), target.labels.tolist(), strict=True):
        radius = (box[2] - box[0]) / 2
        x = (centres - (box[0] + box[2]) / 2) / radius
        y = (centres - (box[1] + box[3]) / 2) / radius
        inside = _SHAPES[SHAPE_NAMES[label]](x[None, :], y[:, None])
        classes[inside] = label + 1
    return classes


def _list_samples(start: int, end: int) -> Array:
    """The positions of the rays between two pixel edges."""
    return start + (np.arange((end - start) * _SAMPLES) + 0.5) / _SAMPLES


def write_shapes(folder: Path, train: int, val: int, size: int, seed: int = 0) -> Path:
    """Write pictures as a data set of YOLO: images/train, images/val, labels beside them, and shapes.yaml.

    Args:
        folder: Where to write; it must be empty or new.
        train: Number of training pictures; their seed is `2 * seed`.
        val: Number of validation pictures; their seed is `2 * seed + 1`.
        size: Side of the pictures in pixels.
        seed: Seed of the data set.

    Returns:
        The file shapes.yaml.

    Raises:
        ArgumentError: The folder has contents, or as for `ShapePictures`.
        DependencyError: Pillow is not installed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"{folder} is not an empty folder.", "choose another folder.")
    for part, count, part_seed in (("train", train, 2 * seed), ("val", val, 2 * seed + 1)):
        pictures = ShapePictures(count, size, part_seed)
        for index in range(count):
            _write_picture(folder, part, index, pictures[index])
    names = dict(enumerate(SHAPE_NAMES))
    # Without a path, qdq and ultralytics both start at the folder of the file.
    content = {"train": "images/train", "val": "images/val", "names": names}
    return write_atomic(folder / "shapes.yaml", yaml.safe_dump(content, sort_keys=False))


def _write_picture(folder: Path, part: str, index: int, picture: Picture) -> None:
    images, labels = folder / "images" / part, folder / "labels" / part
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    _write_image(images / f"{index:05}.png", picture.image)
    write_atomic(labels / f"{index:05}.txt", _format_labels(picture))


def _write_image(path: Path, image: Tensor) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise DependencyError(
            "Pillow, which writes the pictures, is not installed.", "pip install 'qdq[demo]'"
        ) from error
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def _format_labels(picture: Picture) -> str:
    """A line for each object: class, centre, width and height as fractions of the picture."""
    height, width = picture.image.shape[-2:]
    lines = []
    for box, label in zip(
        picture.target.boxes.tolist(), picture.target.labels.tolist(), strict=True
    ):
        left, top, right, bottom = box
        numbers = (
            (left + right) / 2 / width,
            (top + bottom) / 2 / height,
            (right - left) / width,
            (bottom - top) / height,
        )
        fields = [str(label), *(f"{number:.6f}" for number in numbers)]
        lines.append(" ".join(fields) + "\n")
    return "".join(lines)
