"""Histograms of the inputs and outputs of layers, between the ends that their statistics have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from qdq.batch import require_batches
from qdq.device import copy_to_host
from qdq.distiller.settings.names import find_layers
from qdq.distiller.statistics.collector import require_whole
from qdq.distiller.statistics.records import LayerStatistics, ModelStatistics, TensorRecord
from qdq.distiller.statistics.watch_layers import Slot, watching_layers
from qdq.errors import CalibrationError
from qdq.files import as_path, guard_files, write_atomic
from qdq.forward import call_model, require_model, unwrap_compiled

NUM_BINS = 2048
FILE = "acts_histograms.safetensors"


class Histogram(NamedTuple):
    """The histogram of one tensor.

    Args:
        hist: Number of values in each bin, int64 `[NUM_BINS]`.
        bin_centroids: The middle of each bin, float64 `[NUM_BINS]`.
    """

    hist: torch.Tensor
    bin_centroids: torch.Tensor


def collect_histograms(
    model: nn.Module,
    batches: Iterable[Any],
    statistics: ModelStatistics,
    *,
    num_batches: int | None = None,
) -> dict[Slot, Histogram]:
    """Run batches through a model, and count the values of its layers.

    Args:
        model: The float model, on its device.
        batches: Inputs of the model (see `forward.call_model`), those of the statistics.
        statistics: Statistics of the model, whose min and max are the ends. A value outside is in the last bin there.
        num_batches: Upper limit on the number of batches; None: all.

    Returns:
        The histograms of all layers that ran and have statistics, in the order of these.

    Raises:
        ArgumentTypeError: `batches` is no series of batches.
        CalibrationError: No layer with statistics ran.
        UnsupportedError: The model is data-parallel.
    """
    require_model(model)
    require_batches(batches)
    require_whole(model)
    whole = unwrap_compiled(model)
    records = list_records(statistics)
    counts: dict[Slot, torch.Tensor] = {}

    def count(slot: Slot, values: torch.Tensor) -> None:
        if slot in records:
            counted = _count(values, records[slot])
            counts[slot] = counts[slot] + counted if slot in counts else counted

    with watching_layers(whole, find_layers(whole), _begin, count):
        for batch in tqdm(islice(batches, num_batches), unit="batch", disable=None):
            call_model(model, batch)
    if not counts:
        raise CalibrationError(
            "no layer with statistics ran.", "give batches, and statistics of this model."
        )
    slots = [slot for slot in records if slot in counts]
    on_host = copy_to_host([counts[slot] for slot in slots])
    histograms = {}
    for slot, hist in zip(slots, on_host, strict=True):
        histograms[slot] = Histogram(hist, _find_centroids(records[slot]))
    return histograms


def _begin() -> None:
    """Nothing is remembered between batches."""


def list_records(statistics: ModelStatistics) -> dict[Slot, TensorRecord]:
    """The records of a model in one table: of each layer its inputs, then its output.

    Args:
        statistics: The statistics.
    """
    records: dict[Slot, TensorRecord] = {}
    for name, layer in statistics.items():
        records |= _list_layer(name, layer)
    return records


def _list_layer(name: str, layer: LayerStatistics) -> dict[Slot, TensorRecord]:
    records = {Slot(name, position): record for position, record in layer.inputs.items()}
    records[Slot(name, None)] = layer.output
    return records


@torch.no_grad()
def _count(values: torch.Tensor, record: TensorRecord) -> torch.Tensor:
    """The number of values in each bin, int64 on their device, without waiting for it."""
    width = record.max - record.min
    steps = NUM_BINS / width if width > 0 else 0.0
    values = values if values.dtype == torch.float64 else values.float()
    places = ((values - record.min) * steps).clamp_(0, NUM_BINS - 1).int()
    if places.device.type == "cpu":
        return torch.bincount(places.flatten(), minlength=NUM_BINS)
    # On a GPU, bincount waits for the largest value.
    return torch.histc(places, NUM_BINS, 0, NUM_BINS).long()


def _find_centroids(record: TensorRecord) -> torch.Tensor:
    edges = torch.linspace(record.min, record.max, NUM_BINS + 1, dtype=torch.float64)
    return (edges[1:] + edges[:-1]) / 2


def save_histograms(path: Path | str, histograms: Mapping[Slot, Histogram]) -> Path:
    """Write histograms as safetensors, atomically: `<layer>/inputs/<position>/hist`, `<layer>/output/bin_centroids`.

    Args:
        path: The file.
        histograms: From `collect_histograms`.

    Raises:
        ArgumentError: It cannot be written.
    """
    path = as_path(path, "path")
    guard_files(outputs=[path])
    tensors = {}
    for slot, histogram in histograms.items():
        place = "output" if slot.position is None else f"inputs/{slot.position}"
        for kind, tensor in histogram._asdict().items():
            tensors[f"{slot.layer}/{place}/{kind}"] = tensor.contiguous()
    return write_atomic(path, save(tensors))
