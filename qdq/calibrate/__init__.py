"""Ranges from data: `Calibration`, a with-block around any forwards, and `calibrate_model`, the usual loop.

Collecting statistics and computing ranges are separate steps. `collect_statistics` runs the model. `solve_ranges`
computes amax from the statistics, and may do so again with another method. `calibrate_model` does both.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qdq.batch import require_batches
from qdq.calibrate.collect import Collection, collect_and_hold_out, format_of
from qdq.calibrate.selection import select_methods
from qdq.calibrate.weights import KEEP, require_weight_method, solve_weights
from qdq.corrections import redoing_passes
from qdq.device import without_tf32
from qdq.distributed import failing_together, find_rank, gather_bytes
from qdq.errors import ArgumentError, ArgumentTypeError, CalibrationError
from qdq.forward import require_model
from qdq.observers.methods import DEFAULT_PERCENTILE
from qdq.observers.solve import SOLVERS, list_methods
from qdq.observers.tensor_statistics import TensorStatistics
from qdq.quantizer import TensorQuantizer
from qdq.statistics import Statistics, merge_parts
from qdq.text import list_names

logger = logging.getLogger(__name__)

_Amaxes = np.ndarray[Any, np.dtype[np.float32]]

BEST = "best"
CALIB_METHODS = (*SOLVERS, BEST)


@dataclass(frozen=True)
class Range:
    """The result of calibration for one quantizer.

    Args:
        name: Dotted name of the quantizer.
        amax: The range: one number, or one for each channel. None if there is none.
        method: The method that gave the range.
        batches: Number of batches that reached the quantizer; 0 for weights, which are read directly.
        note: Empty, or the reason why the layer was left in float.
    """

    name: str
    amax: float | list[float] | None
    method: str
    batches: int
    note: str = ""


@dataclass(frozen=True)
class _Options:
    """The methods that compute ranges, and the percentile.

    Args:
        method: As for `calibrate_model`.
        percentile: As for `calibrate_model`.
        weight_method: As for `calibrate_model`.

    Raises:
        ArgumentError: An unknown method, or a percentile out of range.
    """

    method: str
    percentile: float
    weight_method: str

    def __post_init__(self) -> None:
        if self.method not in CALIB_METHODS:
            raise ArgumentError(
                f"unknown calibration method {self.method!r}; known are {', '.join(CALIB_METHODS)}.",
                "choose one of them with --calib-method (or method=).",
            )
        if not isinstance(self.percentile, int | float) or not 0 < self.percentile <= 100:
            raise ArgumentError(
                f"percentile is {self.percentile!r}; it must be above 0 and at most 100.",
                f"{DEFAULT_PERCENTILE} is the usual choice.",
            )
        require_weight_method(self.weight_method)

    def solver_options(self, method: str) -> dict[str, float]:
        """The keyword arguments that a method takes."""
        return {"percentile": self.percentile} if method == "percentile" else {}


class Calibration:
    """Collects statistics while the block runs, and sets the ranges when it ends.

    Inside the block the model is in evaluation mode, without gradients, and computes in float. Every enabled input
    quantizer collects. At the end, `amax` is computed, weights get the maximum of each channel, and all states are
    restored. If the block raises, no range changes. Every call of the model is a batch.

    A layer whose quantizer saw no batch, or zeros only, has no usable range. It is left in float: its quantizers are
    disabled, and `ranges` and a warning say so.

    Args:
        model: A swapped model.
        method: As for `calibrate_model`, except "best", which needs separate batches (see `solve_ranges`).
        percentile: 0 to 100, for "percentile".
        weight_method: "max" or "mse".

    Attributes:
        ranges: One `Range` for each quantizer, after the block.
        statistics: The collected statistics, after the block.

    Raises:
        ArgumentError: An unknown method, a percentile out of range, or nothing to calibrate.
        CalibrationError: NaN or Inf in the data or in a weight, with the layer and the batch; or no data at all.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "mse",
        percentile: float = DEFAULT_PERCENTILE,
        *,
        weight_method: str = "max",
    ) -> None:
        if method == BEST:
            raise ArgumentError(
                "a with-block has no batch to compare methods on.",
                "use calibrate_model, or solve_ranges(model, calibration.statistics, method='best', held=...).",
            )
        require_model(model)
        self._options = _Options(method, percentile, weight_method)
        self._model = model
        self._collection = Collection(model)
        self._batch_numbers: Iterator[int] | None = None
        self.ranges: list[Range] = []
        self.statistics: Statistics | None = None

    def __enter__(self) -> Calibration:
        if self._batch_numbers is None:  # the count continues when the block runs again
            rank, size = find_rank()
            self._batch_numbers = itertools.count(rank, size)
        batch_numbers = self._batch_numbers

        def begin_batch(*_: Any) -> None:
            self._collection.begin_batch(next(batch_numbers))

        self._exits = ExitStack()
        self._exits.enter_context(failing_together())
        self._exits.enter_context(without_tf32())
        self._exits.enter_context(self._collection)
        hook = self._model.register_forward_pre_hook(begin_batch)
        self._exits.callback(hook.remove)
        self._passes = redoing_passes(self._model)
        self._passes.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._compute(*error)
        except BaseException:
            self._passes.__exit__(*sys.exc_info())
            raise
        self._passes.__exit__(*error)

    def _compute(self, *error: Any) -> None:
        """Stop collecting, and compute the ranges if there was no error."""
        self._exits.__exit__(*error)
        if error[0] is not None:
            return
        with failing_together():
            local = self._collection.statistics()
        parts = gather_bytes(local.to_bytes())
        self.statistics = merge_parts(map(Statistics.from_bytes, parts))
        self.ranges = _compute_ranges(self._collection, self.statistics, self._options, [])


def calibrate_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "mse",
    percentile: float = DEFAULT_PERCENTILE,
    weight_method: str = "max",
    num_batches: int | None = None,
    statistics: Path | str | None = None,
    held: Iterable[Any] | None = None,
) -> list[Range]:
    """Run the batches through the model and give every enabled quantizer its range.

    A warning says how many ranges of another number system are replaced, unless weights keep theirs.

    Args:
        model: A swapped model, on its device.
        batches: Inputs of the model (see `forward.call_model`): tensors `[B, ...]`, `(inputs, labels)` or
            dictionaries. About a hundred images are enough.
        method: For inputs: "max", "percentile", "entropy", "mse", "average_max", "mean_std", "laplace", "gauss",
            "moving_average", or "best": for each range the method with the smallest error of the layer's output.
        percentile: 0 to 100, for "percentile".
        weight_method: "max" or "mse", for each channel or for the whole weight, depending on the axis of its quantizer;
            "keep" leaves weights the ranges that they have.
        num_batches: As for `collect_statistics`.
        statistics: As for `collect_statistics`: a file from which a killed run continues.
        held: Held-out batches on which "best" compares methods; None: the last batch is held out.

    Returns:
        One `Range` for each quantizer; `note` is set for those left in float.

    Raises:
        ArgumentError: An unknown method, an option out of range, nothing to calibrate; a file of another pass.
        CalibrationError: As for `Calibration`.
        DataError: As for `collect_statistics`.
    """
    options = _Options(method, percentile, weight_method)
    if held is not None:
        require_batches(held)
    hold_out = method == BEST and held is None
    with redoing_passes(model):
        collected = collect_and_hold_out(model, batches, num_batches, statistics, hold_out=hold_out)
        held_out = collected.held_out if held is None else list(held)
        if weight_method != KEEP:
            _warn_of_replaced(collected.collection.quantizers)
        return _compute_ranges(collected.collection, collected.statistics, options, held_out)


def _warn_of_replaced(quantizers: Mapping[str, TensorQuantizer]) -> None:
    """Name the call that keeps the ranges which another function has set, such as those of a number system."""
    calls: dict[str, list[str]] = {}
    for name, quantizer in quantizers.items():
        is_foreign = quantizer.calibration_call != TensorQuantizer.calibration_call
        if is_foreign and quantizer.is_enabled and quantizer.amax is not None:
            calls.setdefault(quantizer.calibration_call, []).append(name)
    for call, names in calls.items():
        logger.warning(
            "calibrate_model replaces %d ranges of another number system (%s); %s keeps them",
            len(names),
            list_names(names, 3),
            call,
        )


def solve_ranges(
    model: nn.Module,
    statistics: Statistics,
    *,
    method: str = "mse",
    percentile: float = DEFAULT_PERCENTILE,
    weight_method: str = "max",
    held: Iterable[Any] = (),
) -> list[Range]:
    """Compute the range of every enabled quantizer from statistics, without data.

    Args:
        model: The model that the statistics belong to; quantizers may have been disabled since.
        statistics: From `collect_statistics` or `Statistics.load`.
        method: As for `calibrate_model`.
        percentile: As for `calibrate_model`.
        weight_method: As for `calibrate_model`.
        held: Held-out batches on which "best" compares methods.

    Returns:
        As for `calibrate_model`.

    Raises:
        ArgumentError: As for `calibrate_model`; statistics of another model; "best" without a batch.
        CalibrationError: NaN or Inf in a weight; statistics without any batch.
    """
    require_model(model)
    if not isinstance(statistics, Statistics):
        raise ArgumentTypeError(
            f"statistics is of type {type(statistics).__name__}; expected Statistics.",
            "pass the result of collect_statistics or Statistics.load.",
        )
    options = _Options(method, percentile, weight_method)
    collection = Collection(model)
    if statistics.model != collection.fingerprint:
        raise ArgumentError(
            "the statistics are of another model: names, formats or shapes differ.",
            "swap and rewire the model as it was when they were collected, or collect them again.",
        )
    require_batches(held)
    if not statistics.complete:
        logger.warning(
            "the statistics are of a pass that was cut off after %d batches", statistics.batches
        )
    with redoing_passes(model):
        return _compute_ranges(collection, statistics, options, list(held))


def _compute_ranges(
    collection: Collection, statistics: Statistics, options: _Options, held_out: list[Any]
) -> list[Range]:
    """Set all ranges, or none if anything is wrong.

    Args:
        collection: The quantizers, the layers, and which quantizers share a range.
        statistics: Statistics of every range in the collection.
        options: The methods.
        held_out: Batches to compare methods on; for "best" only.

    Returns:
        One `Range` for each enabled quantizer.

    Raises:
        ArgumentError: "best" without a batch; statistics of a quantizer are missing.
        CalibrationError: NaN or Inf in a weight or in a held-out output; no data.
    """
    _require_data(collection, statistics, options, held_out)
    _require_statistics(collection, statistics)
    _log_disabled(collection)

    weight_amaxes = _compute_weight_ranges(collection, options.weight_method)
    for name, site in collection.weights.items():
        collection.quantizers[name].to(site.weight.device)
    float_notes = _find_float_notes(collection, statistics)
    for name in float_notes:
        weight_amaxes.pop(name, None)

    quantizers = collection.quantizers
    ranges = []
    with _all_or_none(quantizers.values()):
        for name, amax in weight_amaxes.items():
            quantizers[name].amax = amax
        methods = _choose_methods(collection, statistics, options, held_out)
        for name, leader in collection.leaders.items():
            if name not in float_notes:
                tensor = statistics.tensors[leader]
                ranges.append(_set_range(quantizers[name], name, tensor, methods[leader], options))

    for name, amax in weight_amaxes.items():
        ranges.append(_describe_range(quantizers[name], name, amax, options.weight_method, 0))
    return ranges + _leave_in_float(collection, float_notes, options.method)


def _require_data(
    collection: Collection, statistics: Statistics, options: _Options, held_out: list[Any]
) -> None:
    """Refuse statistics without any batch, and "best" without a held-out batch."""
    has_data = any(tensor.num_batches for tensor in statistics.tensors.values())
    if collection.collecting and not has_data:
        raise CalibrationError(
            "no batch reached any quantizer.",
            "give at least one batch that the model can run on.",
        )
    if options.method == BEST and not _has_any_process(held_out):
        raise ArgumentError(
            "method 'best' compares methods on held-out data, and got no batch.",
            "pass held=[batch].",
        )


def _has_any_process(held_out: list[Any]) -> bool:
    """Whether any process has a held-out batch; some processes may have none."""
    return any(gather_bytes(b"held" if held_out else b""))


def _require_statistics(collection: Collection, statistics: Statistics) -> None:
    """Refuse statistics that lack a quantizer of the collection."""
    missing = []
    for name, leader in collection.leaders.items():
        if leader not in statistics.tensors:
            missing.append(name)
    if missing:
        raise ArgumentError(
            f"there are no statistics of {', '.join(missing[:3])}: it was off while they were collected.",
            "collect the statistics again, or disable the quantizer.",
        )


def _log_disabled(collection: Collection) -> None:
    """Name the quantizers that get no range because they are disabled."""
    disabled = [name for name, q in collection.quantizers.items() if not q.is_enabled]
    if disabled:
        logger.info(
            "%d quantizers are off and get no range: %s", len(disabled), ", ".join(disabled)
        )


def _compute_weight_ranges(collection: Collection, method: str) -> dict[str, _Amaxes]:
    """The amax of each weight by the name of its quantizer; nothing is stored."""
    amaxes = solve_weights(collection.weights, collection.quantizers, method)
    return {name: amax.numpy() for name, amax in amaxes.items()}


def _set_range(
    quantizer: TensorQuantizer, name: str, tensor: TensorStatistics, method: str, options: _Options
) -> Range:
    """Compute and store one range.

    Args:
        quantizer: Gets the range.
        name: Its dotted name.
        tensor: Statistics of the tensor that it quantizes.
        method: The method; without an integer format the maximum is used.
        options: The options of the method.
    """
    amax: float | _Amaxes = tensor.absmax
    if format_of(quantizer) is not None:
        amax = quantizer.solve_range(tensor, method, **options.solver_options(method))
    quantizer.amax = amax
    return _describe_range(quantizer, name, amax, method, tensor.num_batches)


def _describe_range(
    quantizer: TensorQuantizer, name: str, amax: float | _Amaxes, method: str, batches: int
) -> Range:
    """The `Range` of a quantizer; its buffer is not read, which would wait for the device."""
    amaxes = np.asarray(amax, dtype=np.float32).flatten().tolist()
    return Range(name, amaxes[0] if quantizer.axis is None else amaxes, method, batches)


def _leave_in_float(collection: Collection, notes: Mapping[str, str], method: str) -> list[Range]:
    """Disable the quantizers without a usable range, and warn about those of inputs."""
    ranges = []
    for name, note in notes.items():
        collection.quantizers[name].disable()
        ranges.append(Range(name, None, method, 0, f"left in float: {note}"))
    if notes:
        causes = [f"{name} ({note})" for name, note in notes.items() if name in collection.leaders]
        logger.warning(
            "some quantizers have no usable range; their layers are left in float: %s",
            "; ".join(causes),
        )
    return ranges


# -- method of each range --------------------------------------------------------------------------------------------


def _choose_methods(
    collection: Collection, statistics: Statistics, options: _Options, held_out: list[Any]
) -> dict[str, str]:
    """The method of each range, by the name of the quantizer that holds it.

    A quantizer with an axis, or without an integer format, uses the maximum whatever the method.
    """
    searched = []
    maxima = []
    for name in dict.fromkeys(collection.leaders.values()):
        quantizer = collection.quantizers[name]
        if quantizer.axis is None and format_of(quantizer) is not None:
            searched.append(name)
        else:
            maxima.append(name)

    if maxima and options.method != "max":
        logger.info(
            "%d quantizers have a range for each index of an axis and use the maximum, not %s: %s",
            len(maxima),
            options.method,
            ", ".join(maxima),
        )
    methods = dict.fromkeys(maxima, "max") | dict.fromkeys(searched, options.method)
    if options.method != BEST:
        return methods
    return methods | _choose_best(collection, statistics, options, held_out, searched)


def _choose_best(
    collection: Collection,
    statistics: Statistics,
    options: _Options,
    held_out: list[Any],
    names: Iterable[str],
) -> dict[str, str]:
    """The best method of each range that saw data; "mse" if no held-out batch reaches it."""
    candidates: dict[str, dict[str, float]] = {}
    for name in names:
        tensor = statistics.tensors[name]
        if tensor.num_batches:
            candidates[name] = _list_candidates(collection.quantizers[name], tensor, options)
    chosen = select_methods(collection, candidates, held_out)

    unreached = [name for name in candidates if name not in chosen]
    if unreached:
        logger.warning("no held-out batch reached %s; it uses mse", ", ".join(unreached))
    return chosen | dict.fromkeys(unreached, "mse")


def _list_candidates(
    quantizer: TensorQuantizer, tensor: TensorStatistics, options: _Options
) -> dict[str, float]:
    """The range by each method; the quantizer has no axis."""
    amaxes = {}
    for method in list_methods(quantizer.format):
        amaxes[method] = float(
            quantizer.solve_range(tensor, method, **options.solver_options(method))
        )
    return amaxes


# -- quantizers without a usable range -------------------------------------------------------------------------------


def _find_float_notes(collection: Collection, statistics: Statistics) -> dict[str, str]:
    """Why quantizers stay off, by name: those without a usable range, and the others of their layer (R-CONV-2)."""
    notes = {}
    for name, leader in collection.leaders.items():
        note = _reason_against_range(statistics, leader)
        if note:
            notes[name] = note

    float_notes = dict(notes)
    for layer in collection.layers.values():
        names = [collection.names[quantizer] for quantizer in layer.quantizers().values()]
        causes = [name for name in names if name in notes]
        if not causes:
            continue
        _, _, kind = causes[0].rpartition(".")
        note = f"the {kind} of its layer has no range: {notes[causes[0]]}"
        for name in names:
            if name in collection.weights or name in collection.leaders:
                float_notes.setdefault(name, note)
    return float_notes


def _reason_against_range(statistics: Statistics, leader: str) -> str:
    """Why statistics give no usable range; "" if they give one."""
    tensor, fmt = statistics.tensors[leader], statistics.formats[leader]
    if not tensor.num_batches:
        return "it saw no batch: the layer did not run, or another module reads its weight directly"
    if not tensor.absmax:
        return "it saw zeros only"
    if fmt and fmt.unsigned and tensor.high <= 0:
        return "it saw no value above 0, and its format is unsigned"
    return ""


@contextmanager
def _all_or_none(quantizers: Iterable[TensorQuantizer]) -> Iterator[None]:
    """Restore all ranges if the block raises."""
    with ExitStack() as exits:
        for quantizer in quantizers:
            exits.enter_context(quantizer.restoring_range_on_error())
        yield
