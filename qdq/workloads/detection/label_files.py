"""Label files of YOLO: a line for each object, with its class and its box as fractions of the image."""

from __future__ import annotations

from pathlib import Path

from qdq.errors import DataError
from qdq.text import printable

_SLACK = 1e-3  # rounding of the fractions in a file
_FIX = "write `class centre-x centre-y width height`, with fractions of the image from 0 to 1."


def find_label_file(image: Path) -> Path:
    """The label file of an image: the last folder `images` in its path becomes `labels`.

    Args:
        image: Path of the image.
    """
    parts = list(image.parts)
    for position in reversed(range(len(parts) - 1)):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def read_label_file(path: Path, names: tuple[str, ...]) -> tuple[list[list[float]], list[int]]:
    """The objects of an image; none if there is no file.

    A line with more than two points is the outline of an object, and its box is around all points.

    Args:
        path: The label file.
        names: The classes, in the order of their indices.

    Returns:
        The boxes (left, top, right, bottom as fractions of the image), and the index of the class of each.

    Raises:
        DataError: A line has another form, a class that does not exist, or a box outside of the image.
    """
    boxes: list[list[float]] = []
    labels: list[int] = []
    if not path.is_file():
        return boxes, labels
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        place = f"line {number} of {path}"
        values = _read_numbers(line, place)
        labels.append(_read_class(values[0], len(names), place))
        boxes.append(_read_box(values[1:], place))
    return boxes, labels


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as text: {printable(error)}.", "write a label file."
        ) from error


def _read_numbers(line: str, place: str) -> list[float]:
    try:
        values = [float(text) for text in line.split()]
    except ValueError as error:
        raise DataError(f"{place} is {printable(line)!r}, which is not numbers.", _FIX) from error
    if len(values) < 5 or len(values) % 2 == 0:
        raise DataError(f"{place} has {len(values)} numbers; expected 5.", _FIX)
    return values


def _read_class(value: float, count: int, place: str) -> int:
    if value not in range(count):
        raise DataError(
            f"{place} has the class {value:g}; the data set has {count} classes, from 0 to {count - 1}.",
            "correct the class, or add its name to names.",
        )
    return int(value)


def _read_box(values: list[float], place: str) -> list[float]:
    """The box of a centre and a size, or around the points of an outline."""
    if len(values) == 4:
        x, y, width, height = values
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    else:
        xs, ys = values[0::2], values[1::2]
        box = [min(xs), min(ys), max(xs), max(ys)]
    is_inside = all(-_SLACK <= value <= 1 + _SLACK for value in box)
    if not is_inside or box[0] >= box[2] or box[1] >= box[3]:
        shown = ", ".join(f"{value:g}" for value in box)
        raise DataError(
            f"{place} has a box from left, top to right, bottom of {shown}, which is empty or not in the image.",
            _FIX,
        )
    return box
