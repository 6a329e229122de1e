"""Image files: reading one, drawing a random crop of it, and the photographs that installed packages contain."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from qdq.errors import DataError, DependencyError
from qdq.files import read_mode
from qdq.weights import describe_content

if TYPE_CHECKING:
    from PIL import Image

# torchvision and Pillow are imported where they are used. qdq.workloads.classification.models reports it if they are
# missing.

CROP_AREA = (0.25, 1.0)
"""Fraction of a photograph's area that a random crop covers; smaller crops often miss the labelled object."""

_CROP_ASPECT = (3 / 4, 4 / 3)  # width to height, as in training on ImageNet


@dataclass(frozen=True)
class PhotographSource:
    """Photographs inside an installed package.

    Args:
        package: Name of the package as pip knows it.
        module: Name of the package as Python imports it.
        folder: Folder below the module.
        patterns: Globs of the files, in the order of use.
    """

    package: str
    module: str
    folder: str
    patterns: tuple[str, ...]

    @property
    def description(self) -> str:
        """The package with its version."""
        return f"{self.package} {metadata.version(self.package)}"

    def find_files(self) -> list[Path]:
        """List the photographs, without importing the package (foolbox and scikit-learn take seconds).

        Raises:
            DependencyError: The package or one of the files is missing.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise DependencyError(
                f"the sample photographs need {self.package}, which is not installed.",
                "pip install 'qdq[demo]', or pass --data with images of your own.",
            )
        root = Path(spec.submodule_search_locations[0], self.folder)
        files: list[Path] = []
        for pattern in self.patterns:
            matches = sorted(root.glob(pattern))
            if not matches:
                raise DependencyError(
                    f"{self.description} lacks the sample photograph {self.folder}/{pattern}.",
                    "pip install 'qdq[demo]', or pass --data with images of your own.",
                )
            files += matches
        return files


# Natural photographs in colour: textures, microscope, telescope and text images have other statistics.
CALIBRATION_PHOTOGRAPHS = (
    PhotographSource(
        package="scikit-image",
        module="skimage",
        folder="data",
        patterns=(
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "rocket.jpg",
            "motorcycle_left.png",
            "motorcycle_right.png",
        ),
    ),
    PhotographSource(
        package="scikit-learn",
        module="sklearn",
        folder="datasets/images",
        patterns=("china.jpg", "flower.jpg"),
    ),
)
"""Photographs to calibrate and to train on, without labels."""

LABELLED_PHOTOGRAPHS = PhotographSource(
    package="foolbox", module="foolbox", folder="data", patterns=("imagenet_*.jpg",)
)
"""Photographs to evaluate on; the number at the end of each file name is its ImageNet class."""


def find_photographs(sources: Iterable[PhotographSource]) -> list[Path]:
    """List the photographs of all sources, in their order.

    Raises:
        DependencyError: A package or one of its files is missing.
    """
    files: list[Path] = []
    for source in sources:
        files += source.find_files()
    return files


def read_image(path: Path) -> Image.Image:
    """Decode an image file as RGB.

    Its EXIF orientation is not applied, as in training with torchvision.

    Raises:
        DataError: The file cannot be read, or is not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        read_mode(path)
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's readers of the many formats can raise anything
        content = describe_content(path) if path.is_file() else "no such file"
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(
            f"{path}: expected an image, found {content}{reason}.",
            "remove the file, or replace it by an image.",
        ) from error


@functools.lru_cache(maxsize=16)
def read_cached_image(path: Path) -> Image.Image:
    """Decode an image file as RGB and cache it: the packaged photographs are few and are cropped many times."""
    return read_image(path)


def draw_crop(image: Image.Image) -> tuple[int, int, int, int]:
    """Draw a random part of an image from torch's global generator, as `RandomResizedCrop` does.

    Returns:
        top, left, height and width in pixels.
    """
    from torchvision.transforms import RandomResizedCrop

    top, left, height, width = RandomResizedCrop.get_params(
        image, list(CROP_AREA), list(_CROP_ASPECT)
    )
    return top, left, height, width
