"""Images to calibrate, to evaluate and to train on: the packaged photographs, or an image folder."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from qdq.errors import ArgumentError, DataError, DependencyError
from qdq.files import read_mode
from qdq.models import LoadedModel, Preprocess, seeded_rng
from qdq.weights import describe_content

if TYPE_CHECKING:
    from PIL import Image

# torchvision and Pillow are imported where they are used, after qdq.models has said so if they are missing.

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 128
"""How many images the loaders take for calibration where nothing else is said."""

EVALUATION_IMAGES = 500
"""How many images the loaders take for evaluation where nothing else is said."""

CACHE_BYTES = 2**30
"""Sets of float32 images up to this size are preprocessed once and held, larger ones anew in every pass."""

_MOST_CROPS = 10**6  # of the packaged photographs; their places are drawn at once
_SAMPLE_CROPS = 1024  # of the packaged photographs in a pass of training
_CROP_SCALE = (
    0.25,
    1.0,
)  # share of a photograph's area; smaller parts often miss what the label names
_CROP_RATIO = (3 / 4, 4 / 3)  # width to height, as in training on ImageNet

# Natural photographs in colour: textures, microscope, telescope and text images have other statistics.
_CALIBRATION_FILES = {
    ("scikit-image", "skimage", "data"): (
        *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
        "motorcycle_right.png",
    ),
    ("scikit-learn", "sklearn", "datasets/images"): ("china.jpg", "flower.jpg"),
}
_IMAGENET_CLASSES = 1000


class _Images(Protocol):
    """What batches are cut from: a slice of images as float32 `[n, 3, H, W]`."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """A set of images as batches; every pass gives the same ones in the same order.

    Iterating gives `(images, labels)`: float32 `[B, 3, H, W]` and int64 `[B]`, or None where labels are not
    known. The last batch may be smaller. `len` is the number of batches, as of a DataLoader.

    Args:
        images: A float32 tensor `[N, 3, H, W]`, or anything whose slices are such tensors.
        labels: Class index of each image, or None.
        batch_size: Images a batch.
        num_images: N.
        description: Source, number and seed, for the report.
        label_note: How labels were found, or why there are none.

    Raises:
        ArgumentError: `batch_size` below 1.
    """

    images: _Images = field(repr=False)
    labels: list[int] | None = field(repr=False)
    batch_size: int
    num_images: int
    description: str
    label_note: str

    def __post_init__(self) -> None:
        _check_positive(batch_size=self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, self.num_images, self.batch_size):
            part = slice(start, min(start + self.batch_size, self.num_images))
            # A clone, so that a model that works in place cannot change what the next pass sees.
            yield (
                self.images[part].clone(),
                None if self.labels is None else torch.tensor(self.labels[part]),
            )

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def subset(self, n: int) -> ImageBatches:
        """The first `n` images, sharing memory with this set; all where there are no more than `n`.

        Raises:
            ArgumentError: `n` below 1.
        """
        _check_positive(n=n)
        if n >= self.num_images:
            return self
        labels = None if self.labels is None else self.labels[:n]
        return replace(
            self, labels=labels, num_images=n, description=f"the first {n} of: {self.description}"
        )


class _LazyImages:
    """Images that are preprocessed when they are asked for, by several threads (Pillow frees the GIL)."""

    def __init__(self, load: Callable[[int], Tensor], count: int, size: int) -> None:
        self._load = load
        self._count = count
        self._size = size

    def __getitem__(self, part: slice, /) -> Tensor:
        wanted = range(*part.indices(self._count))
        stacked = torch.empty(len(wanted), 3, self._size, self._size)
        with ThreadPoolExecutor() as pool:
            for index, image in enumerate(pool.map(self._load, wanted)):
                stacked[index] = image
        return stacked


@dataclass(frozen=True, eq=False)
class CropBatches:
    """Random-resized crops of images, half of them mirrored, as batches to train on; every pass draws others.

    Without labels half of the crops are blended with another one of the batch (mixup; Zhang, Cisse, Dauphin, Lopez-Paz,
    ICLR 2018, arXiv 1710.09412): whoever is taught by outputs needs no label for that, and few photographs go further.
    Iterating gives `(images, labels)` as `ImageBatches` does. Order and crops are drawn from torch's global generator.

    Args:
        files: The images.
        labels: Class index of each, or None.
        preprocess: Gives crop size and normalization.
        batch_size: Crops a batch.
        num_images: Crops in a pass; they go through the images in turn.
        description: Source and number, for the report.

    Raises:
        ArgumentError: A number below 1.
    """

    files: list[Path] = field(repr=False)
    labels: list[int] | None = field(repr=False)
    preprocess: Preprocess
    batch_size: int
    num_images: int
    description: str

    def __post_init__(self) -> None:
        _check_positive(batch_size=self.batch_size, num_images=self.num_images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        order = torch.randperm(self.num_images) % len(self.files)
        for chosen in torch.split(order, self.batch_size):
            labels = (
                None
                if self.labels is None
                else torch.tensor([self.labels[index] for index in chosen.tolist()])
            )
            yield self._crop([self.files[index] for index in chosen.tolist()]), labels

    def _crop(self, files: list[Path]) -> Tensor:
        from torchvision.transforms import RandomResizedCrop

        with (
            ThreadPoolExecutor() as pool
        ):  # decoding frees the GIL; what is random is drawn here, in one order
            photographs = list(pool.map(_read_cached, files))
            boxes = [
                RandomResizedCrop.get_params(image, list(_CROP_SCALE), list(_CROP_RATIO))
                for image in photographs
            ]
            crops = torch.stack(list(pool.map(self.preprocess.crop, photographs, boxes)))
        is_mirrored = torch.rand(len(crops), 1, 1, 1) < 0.5
        crops = torch.where(is_mirrored, crops.flip(-1), crops)
        return (_blend(crops) if self.labels is None else crops).contiguous(
            memory_format=torch.channels_last
        )

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)


def _blend(crops: Tensor) -> Tensor:
    """Half of the crops as they are, the others each a random share of one and the rest of another."""
    shape = (len(crops), 1, 1, 1)
    share = torch.where(torch.rand(shape) < 0.5, torch.rand(shape), 1.0)
    return torch.lerp(crops[torch.randperm(len(crops))], crops, share)


def load_training_images(
    data_dir: str | Path | None,
    model: LoadedModel,
    num_images: int | None = None,
    calibration: int = CALIBRATION_IMAGES,
    evaluation: int = EVALUATION_IMAGES,
    batch_size: int = 32,
    seed: int = 0,
) -> CropBatches:
    """Images to train on, none of which `load_images` evaluates on when it is called with the same arguments.

    Without a folder these are the photographs that `load_images` calibrates on, without labels. With `data_dir`/train
    and `data_dir`/val they are all images of the first; with a single folder all but those to evaluate on.

    Args:
        data_dir: The folder, or None for the packaged photographs.
        model: Gives crop size, normalization and classes.
        num_images: Crops in a pass; None: one of each image, or 1024 of the packaged photographs.
        calibration: As for `load_images`.
        evaluation: As for `load_images`.
        batch_size: Crops a batch.
        seed: As for `load_images`.

    Raises:
        ArgumentError: As for `load_images`.
        DataError: As for `load_images`.
        DependencyError: As for `load_images`.
    """
    _check_positive(calibration=calibration, evaluation=evaluation, batch_size=batch_size)
    if data_dir is None:
        files = _find_calibration_photographs()
        count = _SAMPLE_CROPS if num_images is None else num_images
        description = (
            f"random crops of the {len(files)} photographs that are calibrated on, {count} a pass"
        )
        return CropBatches(files, None, model.preprocess, batch_size, count, description)
    folders, label_of, _ = _open_folder(data_dir, model)
    images = _shuffle_folders(Path(data_dir), folders, calibration, evaluation, seed)
    chosen = images[0] if len(folders) > 1 else [*images[0], *images[1][evaluation:]]
    labels = None if label_of is None else [label_of[name] for _, name in chosen]
    count = len(chosen) if num_images is None else num_images
    description = f"random crops of {len(chosen)} images in {folders[0].path}, {count} a pass"
    return CropBatches(
        [file for file, _ in chosen], labels, model.preprocess, batch_size, count, description
    )


def load_images(
    data_dir: str | Path | None,
    model: LoadedModel,
    calibration: int = CALIBRATION_IMAGES,
    evaluation: int = EVALUATION_IMAGES,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[ImageBatches, ImageBatches]:
    """Images to calibrate and to evaluate on: `load_image_folder`, or `load_sample_images` without a folder.

    Args:
        data_dir: The folder, or None for the packaged photographs.
        model: Gives the transform and the classes.
        calibration: Number of images to calibrate on.
        evaluation: Number of images to evaluate on.
        batch_size: Images a batch.
        seed: Of the choice and the crops.

    Raises:
        ArgumentError: As for the two.
        DataError: As for the two.
        DependencyError: As for the two.
    """
    if data_dir is None:
        return load_sample_images(model, calibration, evaluation, batch_size, seed)
    return load_image_folder(data_dir, model, calibration, evaluation, batch_size, seed)


def load_sample_images(
    model: LoadedModel,
    calibration: int = CALIBRATION_IMAGES,
    evaluation: int = EVALUATION_IMAGES,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[ImageBatches, ImageBatches]:
    """Random-resized crops of the photographs that scikit-image, scikit-learn and foolbox bring along.

    The first two packages' are for calibration, foolbox's 20 labelled ones for evaluation. Crops go through
    the photographs in turn, so that the numbers of crops of any two differ by at most one. They depend on the
    seed alone: more images or another batch size change none of them.

    Args:
        model: Gives crop size and normalization.
        calibration: Number of crops, without labels.
        evaluation: Number of crops, with the ImageNet class that foolbox gives in the file name.
        batch_size: Images a batch.
        seed: Of the crops. The global random state stays as it was.

    Returns:
        The sets to calibrate and to evaluate on; no photograph is in both.

    Raises:
        ArgumentError: A number below 1 or above a million.
        DependencyError: One of the three packages is not installed.
    """
    _check_positive(calibration=calibration, evaluation=evaluation, batch_size=batch_size)
    if max(calibration, evaluation) > _MOST_CROPS:
        raise ArgumentError(
            f"{max(calibration, evaluation)} crops of a few photographs are asked for.",
            f"ask for {_MOST_CROPS} or fewer, or pass --data-dir with images of your own.",
        )
    files = _find_calibration_photographs()
    crops = f"random-resized crops (area {_CROP_SCALE[0]:.0%} to {_CROP_SCALE[1]:.0%}, seed {seed})"
    sources = " and ".join(
        f"{package} {metadata.version(package)}" for package, _, _ in _CALIBRATION_FILES
    )
    calibration_set = ImageBatches(
        images=_crop_photographs(files, model.preprocess, calibration, seed),
        labels=None,
        batch_size=batch_size,
        num_images=calibration,
        description=f"{calibration} {crops} of {len(files)} photographs in {sources}",
        label_note="none: calibration needs no labels",
    )

    files = _find_packaged("foolbox", "foolbox", "data", ("imagenet_*.jpg",))
    source = f"foolbox {metadata.version('foolbox')}"
    labels, label_note = (
        None,
        f"none: the photographs have ImageNet's labels, {model.name} other classes",
    )
    if model.num_classes == _IMAGENET_CLASSES:
        of_file = [int(file.stem.rpartition("_")[2]) for file in files]
        labels = [of_file[index % len(files)] for index in range(evaluation)]
        label_note = "ImageNet classes in foolbox's file names"
    evaluation_set = ImageBatches(
        images=_crop_photographs(files, model.preprocess, evaluation, seed),
        labels=labels,
        batch_size=batch_size,
        num_images=evaluation,
        description=f"{evaluation} {crops} of {len(files)} labelled ImageNet photographs in {source}",
        label_note=label_note,
    )
    return calibration_set, evaluation_set


def load_image_folder(
    data_dir: str | Path,
    model: LoadedModel,
    calibration: int = CALIBRATION_IMAGES,
    evaluation: int = EVALUATION_IMAGES,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[ImageBatches, ImageBatches]:
    """Images of a folder that holds one folder a class, through the model's own evaluation transform.

    With `data_dir`/train and `data_dir`/val, calibration images come from the first and evaluation images
    from the second; otherwise both come from `data_dir`, no image in both. The seed decides which ones. Where
    there are fewer than asked for, all are used, a single folder being shared in the proportion asked for.

    Args:
        data_dir: The folder.
        model: Gives the transform, and the classes that the names of the folders are matched with.
        calibration: Number of images to calibrate on.
        evaluation: Number of images to evaluate on.
        batch_size: Images a batch.
        seed: Of the choice of images.

    Returns:
        The sets to calibrate and to evaluate on. A file that is no image raises a DataError here or, in a
        set larger than CACHE_BYTES, when its batch is reached.

    Raises:
        ArgumentError: A number below 1.
        DataError: A folder that is missing, unreadable or empty, or a file that is no image.
    """
    _check_positive(calibration=calibration, evaluation=evaluation, batch_size=batch_size)
    folders, label_of, label_note = _open_folder(data_dir, model)
    if label_of is None:
        logger.warning("labels: %s", label_note)
    shuffled = _shuffle_folders(Path(data_dir), folders, calibration, evaluation, seed)
    sets = []
    for folder, images, asked in zip(
        (folders * 2)[-2:], shuffled, (calibration, evaluation), strict=True
    ):
        chosen = images[:asked]
        description = (
            f"{len(chosen)} of {len(folder.images)} images in {folder.path}, drawn with seed {seed}"
        )
        if len(chosen) < asked:
            description += f" ({asked} were asked for)"
            logger.warning("%s", description)
        files = [file for file, _ in chosen]
        labels = None if label_of is None else [label_of[name] for _, name in chosen]
        images_of_set = _cache(_load_files(files, model.preprocess), len(files), model.preprocess)
        sets.append(
            ImageBatches(images_of_set, labels, batch_size, len(files), description, label_note)
        )
    return sets[0], sets[1]


def is_image_of(data_dir: Path | None, path: Path | None) -> bool:
    """Whether a file is there and `load_image_folder` would take it for one of its images."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if data_dir is None or path is None or not path.is_file():
        return False
    return path.suffix.lower() in IMG_EXTENSIONS and path.resolve().is_relative_to(
        data_dir.resolve()
    )


def _open_folder(
    data_dir: str | Path, model: LoadedModel
) -> tuple[list[_Folder], dict[str, int] | None, str]:
    """The one or two folders of images, the class of each class folder, and how that was found."""
    root = Path(data_dir)
    if not root.is_dir():
        found = "is a file" if root.is_file() else "does not exist"
        raise DataError(f"{root} {found}; expected a folder of class folders.", "check --data-dir.")
    try:
        folders = _find_splits(root)
    except OSError as error:
        raise DataError(
            f"cannot read {root}: {error}.", "check the permissions of the folder."
        ) from error
    classes = sorted({name for folder in folders for name in folder.classes})
    return folders, *_match_classes(classes, model)


def _shuffle_folders(
    root: Path, folders: list[_Folder], calibration: int, evaluation: int, seed: int
) -> list[list[tuple[Path, str]]]:
    """Images to calibrate and to evaluate on, more of both than are used; no image is in both."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [_shuffle(folder.images, generator) for folder in folders]
    return _share(root, shuffled[0], calibration, evaluation) if len(folders) == 1 else shuffled


@functools.lru_cache(maxsize=16)
def _read_cached(path: Path) -> Image.Image:
    """The packaged photographs are few, and each is cropped over and over."""
    return read_image(path)


def read_image(path: Path) -> Image.Image:
    """Decode an image file as RGB; its EXIF orientation is not applied, as in training with torchvision.

    Raises:
        DataError: The file cannot be read, or holds no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        read_mode(path)
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's readers of the many formats raise whatever comes to them
        found = describe_content(path) if path.is_file() else "no such file"
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(
            f"{path}: expected an image, found {found}{reason}.",
            "remove the file, or replace it by an image.",
        ) from error


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ArgumentError(
                f"{name} is {number}; it must be 1 or more.", f"pass a positive {name}."
            )


def _cache(load: Callable[[int], Tensor], count: int, preprocess: Preprocess) -> _Images:
    """All images at once if they fit in CACHE_BYTES, otherwise images that are made in every pass."""
    images = _LazyImages(load, count, preprocess.crop_size)
    size = count * 3 * preprocess.crop_size**2 * torch.float32.itemsize
    return images[:] if size <= CACHE_BYTES else images


def _load_files(files: list[Path], preprocess: Preprocess) -> Callable[[int], Tensor]:
    return lambda index: preprocess(read_image(files[index]))


def _find_packaged(package: str, module: str, folder: str, patterns: tuple[str, ...]) -> list[Path]:
    """Files inside an installed package, without importing it (foolbox and scikit-learn take seconds).

    Raises:
        DependencyError: The package or one of the files is not there.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(
            f"the sample photographs need {package}, which is not installed.",
            "pip install 'qdq[demo]', or pass --data-dir with images of your own.",
        )
    root = Path(spec.submodule_search_locations[0], folder)
    files = []
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if not found:
            raise DependencyError(
                f"{package} {metadata.version(package)} lacks the sample photograph {folder}/{pattern}.",
                "pip install 'qdq[demo]', or pass --data-dir with images of your own.",
            )
        files += found
    return files


def _find_calibration_photographs() -> list[Path]:
    return [
        file
        for (package, module, folder), names in _CALIBRATION_FILES.items()
        for file in _find_packaged(package, module, folder, names)
    ]


def _crop_photographs(
    files: list[Path],
    preprocess: Preprocess,
    count: int,
    seed: int,
) -> _Images:
    """`count` random-resized crops of photographs that are taken in turn."""
    from torchvision.transforms import RandomResizedCrop

    photographs = [read_image(file) for file in files]
    with seeded_rng(seed):  # torchvision draws from the global generator only
        boxes = [
            RandomResizedCrop.get_params(
                photographs[index % len(files)], list(_CROP_SCALE), list(_CROP_RATIO)
            )
            for index in range(count)
        ]
    return _cache(
        lambda index: preprocess.crop(photographs[index % len(files)], boxes[index]),
        count,
        preprocess,
    )


@dataclass(frozen=True)
class _Folder:
    """What an ImageFolder holds: its class folders, and each image with the name of its class."""

    path: Path
    classes: list[str]
    images: list[tuple[Path, str]]


def _find_splits(root: Path) -> list[_Folder]:
    """`root`/train and `root`/val, or else `root` itself.

    Raises:
        DataError: Only one of train and val is there, or there are no images.
    """
    splits = [root / name for name in ("train", "val") if _class_folders(root / name)]
    if len(splits) == 1:
        absent = root / ("val" if splits[0].name == "train" else "train")
        raise DataError(
            f"{splits[0]} has class folders and {absent} has none; expected both or neither.",
            f"add {absent}, or pass --data-dir {splits[0]} to share its images between both uses.",
        )
    return [_scan(folder) for folder in splits or [root]]


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _scan(folder: Path) -> _Folder:
    """Images and classes of a folder, as torchvision's ImageFolder finds them.

    Raises:
        DataError: No class folders, or no images in them.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    suffixes = ", ".join(IMG_EXTENSIONS)
    if not _class_folders(folder):
        images = [path for path in folder.iterdir() if path.suffix.lower() in IMG_EXTENSIONS]
        found = (
            f"{len(images)} images but no class folders"
            if images
            else "neither class folders nor images"
        )
        raise DataError(
            f"{folder} holds {found}; expected one folder a class, with images ({suffixes}) in it.",
            f"move the images to {folder / 'CLASS'}/, or check --data-dir.",
        )
    dataset = ImageFolder(folder, allow_empty=True)
    samples = [
        (Path(file), dataset.classes[index])
        for file, index in dataset.samples
        if os.path.isfile(file)
    ]
    if len(samples) < len(dataset.samples):
        skipped = [file for file, _ in dataset.samples if not os.path.isfile(file)]
        logger.warning("no files, and left out: %s", _some(skipped))
    if not samples:
        raise DataError(
            f"the {len(dataset.classes)} class folders of {folder} ({_some(dataset.classes)}) hold no image; "
            f"expected files named {suffixes}.",
            "add images, or check --data-dir.",
        )
    used = {name for _, name in samples}
    empty = [name for name in dataset.classes if name not in used]
    if empty:
        logger.warning("class folders without an image in %s: %s", folder, _some(empty))
    return _Folder(folder, dataset.classes, samples)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _shuffle(images: list[tuple[Path, str]], generator: torch.Generator) -> list[tuple[Path, str]]:
    return [images[index] for index in torch.randperm(len(images), generator=generator).tolist()]


def _share(
    root: Path, images: list[tuple[Path, str]], calibration: int, evaluation: int
) -> list[list[tuple[Path, str]]]:
    """Two disjoint parts of one folder's images; in the proportion asked for where there are too few.

    Raises:
        DataError: A single image, which cannot be shared.
    """
    if len(images) < 2:
        raise DataError(
            f"{root} holds 1 image; expected 2 or more: one to calibrate on and another to evaluate on.",
            "add images.",
        )
    if len(images) < calibration + evaluation:
        proportional = round(len(images) * calibration / (calibration + evaluation))
        calibration = min(max(proportional, 1), len(images) - 1)
    return [images[:calibration], images[calibration:]]


def _match_classes(folders: list[str], model: LoadedModel) -> tuple[dict[str, int] | None, str]:
    """Class index of each class folder, and in words how it was found or why not."""
    if all(name.isdecimal() and int(name) < model.num_classes for name in folders):
        return {name: int(name) for name in folders}, "class folders are named by class index"
    categories = {name: index for index, name in enumerate(model.categories or [])}
    spaced = {name: name.replace("_", " ") for name in folders}
    if all(name in categories for name in spaced.values()):
        return {
            name: categories[spaced[name]] for name in folders
        }, "class folders are named by category"
    if len(folders) == model.num_classes:
        in_order = {name: index for index, name in enumerate(folders)}
        return in_order, "class folders in sorted order are the classes"
    unknown = [name for name in folders if spaced[name] not in categories]
    return None, (
        f"none, so top-1 cannot be measured: {model.name} has {model.num_classes} classes, the data "
        f"{len(folders)} class folders, of which these are neither index nor category: {_some(unknown)}"
    )
