"""Images of histograms, drawn by matplotlib if it is there."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdq.distiller.statistics.histograms import Histogram
from qdq.distiller.statistics.watch_layers import Slot
from qdq.errors import ArgumentError, DependencyError
from qdq.files import as_path, guard_files, write_atomic
from qdq.text import printable

FOLDER = "histogram_imgs"
_FORMATS = (".png", ".svg", ".pdf")
_MOST_CHARACTERS = 120  # of the name of a layer in the name of a file
_UNSAFE = re.compile(r"[^\w.-]")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save_histogram_images(
    folder: Path | str, histograms: Mapping[Slot, Histogram], ext: str = ".png"
) -> list[Path]:
    """Draw a file for each histogram: `<3 digits>-<layer>-<tensor>.png`.

    Args:
        folder: Where the folder `histogram_imgs` is made.
        histograms: From `collect_histograms`.
        ext: Format of the images: .png, .svg or .pdf.

    Raises:
        ArgumentError: Another format, or a file that cannot be written.
        DependencyError: matplotlib is not installed.
    """
    if ext not in _FORMATS:
        raise ArgumentError(
            f"the format of images is {printable(ext)}; expected {', '.join(_FORMATS)}.",
            "give one.",
        )
    if not can_draw():
        raise DependencyError(
            "matplotlib is not installed; it draws the histograms.", "pip install matplotlib."
        )
    paths = []
    for number, slot in enumerate(histograms):
        paths.append(as_path(folder, "folder") / FOLDER / _name_file(number, slot, ext))
    guard_files(outputs=paths)
    for path, (slot, histogram) in zip(paths, histograms.items(), strict=True):
        write_atomic(path, _draw(slot, histogram, ext.removeprefix(".")))
    return paths


def _name_file(number: int, slot: Slot, ext: str) -> str:
    layer = _UNSAFE.sub("_", slot.layer)[:_MOST_CHARACTERS]
    tensor = "output" if slot.position is None else f"input_{slot.position}"
    return f"{number:03d}-{layer}-{tensor}{ext}"


def _draw(slot: Slot, histogram: Histogram, kind: str) -> bytes:
    from matplotlib.figure import Figure  # takes half a second, and few users have it

    figure: Any = Figure(layout="constrained")
    axes = figure.subplots()
    centroids = histogram.bin_centroids.numpy()
    axes.fill_between(centroids, histogram.hist.numpy(), step="mid")
    axes.set_yscale("symlog")  # the bin of 0 would hide all others
    axes.set_xlabel("value")
    axes.set_ylabel("count")
    axes.set_title(slot.label, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()
