"""Statistics of a model in two passes over the same data: ranges and means first, then deviations about the means."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch import nn
from tqdm import tqdm

from qdq.batch import require_batches
from qdq.distiller.command.log import PASSES
from qdq.distiller.statistics.collector import StatisticsCollector
from qdq.distiller.statistics.records import ModelStatistics
from qdq.errors import ArgumentError, ArgumentTypeError, StateError
from qdq.forward import call_model, require_model
from qdq.systems.wrapper import SystemWrapper
from qdq.text import printable

logger = logging.getLogger(__name__)


def collect_quant_stats(
    model: nn.Module, batches: Iterable[Any], *, num_batches: int | None = None
) -> ModelStatistics:
    """Run the same batches through a model twice, and collect the statistics of its layers.

    Args:
        model: The float model, on its device.
        batches: Inputs of the model (see `forward.call_model`); iterated twice.
        num_batches: Upper limit on the number of batches; None: all.

    Returns:
        The statistics of every layer that runs, in the order of `named_modules`. A layer is a module without children
        whose output is a floating-point tensor.

    Raises:
        ArgumentError: `num_batches` is below 1.
        ArgumentTypeError: `batches` can be iterated once only, or is no series of batches.
        CalibrationError: No batch, NaN or Inf, or another amount of data in the second pass.
        StateError: The model is quantized, or a layer changes its input in place.
        UnsupportedError: The model is data-parallel.
    """
    require_model(model)
    for name, module in model.named_modules():
        if isinstance(module, SystemWrapper):
            raise StateError(
                f"the model is quantized: {printable(name)} is a {type(module).__name__}, and statistics are those of "
                "float layers.",
                "collect them before prepare_model; in a command, leave out --resume-from or --qe-calibration.",
            )
    return read_twice(model, batches, num_batches)


def read_twice(
    model: nn.Module, batches: Iterable[Any], num_batches: int | None = None
) -> ModelStatistics:
    """As `collect_quant_stats`, also for a model of which some layers are quantized.

    Args:
        model: The model.
        batches: As for `collect_quant_stats`.
        num_batches: Likewise.
    """
    require_rereadable(batches)
    if num_batches is not None and num_batches < 1:
        raise ArgumentError(f"num_batches is {num_batches}.", "give 1 or more, or None for all.")
    collector = StatisticsCollector(model)
    passes = (collector.first_pass, collector.second_pass)
    for text, collecting in zip(PASSES, passes, strict=True):
        logger.info(text)
        with collecting():
            for batch in tqdm(islice(batches, num_batches), unit="batch", disable=None):
                call_model(model, batch)
    return collector.statistics()


def require_rereadable(batches: Any) -> None:
    """Refuse batches that end after one pass.

    Args:
        batches: The batches.

    Raises:
        ArgumentTypeError: It is an iterator, or no series of batches.
    """
    require_batches(batches)
    if isinstance(batches, Iterator):
        raise ArgumentTypeError(
            f"batches is a {type(batches).__name__}, which can be read once; statistics need two passes.",
            "pass a list of batches, or a DataLoader.",
        )
