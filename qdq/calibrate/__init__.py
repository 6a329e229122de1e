"""Ranges from data: `Calibration`, a with-block around any forwards, and `calibrate_model`, the usual loop.

Collecting and solving are two things: `collect_statistics` runs the model, `solve_ranges` turns what it found into amax
and may do so again by another method. `calibrate_model` is both.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qdq.calibrate.collect import Collection, collect_and_hold_out, fingerprint_model, format_of
from qdq.calibrate.selection import select_methods
from qdq.calibrate.weights import require_weight_method, solve_weight
from qdq.distributed import failing_together, find_rank, gather_bytes
from qdq.errors import ArgumentError, ArgumentTypeError, CalibrationError
from qdq.forward import require_batches, require_model
from qdq.observers.solve import SOLVERS
from qdq.observers.tensor_statistics import TensorStatistics
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.statistics import Statistics, merge_parts
from qdq.swap import quantized_layers

logger = logging.getLogger(__name__)

BEST = "best"
CALIB_METHODS = (*SOLVERS, BEST)


@dataclass(frozen=True)
class Range:
    """What calibration decided for one quantizer.

    Args:
        name: Dotted name of the quantizer.
        amax: The range; one number, or one for each channel. None if there is none.
        method: How it was solved.
        batches: How many batches it saw; 0 for weights, which are read directly.
        note: Empty, or why the layer was left in float.
    """

    name: str
    amax: float | list[float] | None
    method: str
    batches: int
    note: str = ""


@dataclass(frozen=True)
class _Options:
    """How ranges are solved; the arguments of `calibrate_model`.

    Raises:
        ArgumentError: Unknown methods, or a percentile out of range.
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
                "99.99 is the usual choice.",
            )
        require_weight_method(self.weight_method)


class Calibration:
    """Collects ranges while the block runs and stores them when it ends.

    Inside the block the model is in evaluation mode, without gradients, and computes in float; every enabled input
    quantizer collects. At the end `amax` is solved, weights get the maximum of each channel, and all states are
    as before. If the block raises, no range is touched. Every call of the model is a batch.

    A layer whose quantizer saw no batch, or zeros only, has no usable range. It is left in float: its quantizers are
    disabled, and `ranges` and a warning say so.

    Args:
        model: A swapped model.
        method: As for `calibrate_model`, but for "best", which needs batches of its own (see `solve_ranges`).
        percentile: 0 to 100, for "percentile".
        weight_method: "max" or "mse".

    Attributes:
        ranges: One `Range` for each quantizer, after the block.
        statistics: What was collected, after the block.

    Raises:
        ArgumentError: Unknown method, percentile out of range, or nothing to calibrate.
        CalibrationError: NaN or Inf in the data or in a weight, with the layer and the batch; no data at all.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "mse",
        percentile: float = 99.99,
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
        self._numbers: Iterator[int] | None = None
        self.ranges: list[Range] = []
        self.statistics: Statistics | None = None

    def __enter__(self) -> Calibration:
        self._numbers = numbers = self._numbers or itertools.count(
            *find_rank()
        )  # goes on when the block runs again
        self._exits = ExitStack()
        self._exits.enter_context(failing_together())
        self._exits.enter_context(self._collection)
        hook = self._model.register_forward_pre_hook(
            lambda *_: self._collection.begin_batch(next(numbers))
        )
        self._exits.callback(hook.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)
        if error[0] is None:
            with failing_together():
                own = self._collection.statistics()
            self.statistics = merge_parts(map(Statistics.from_bytes, gather_bytes(own.to_bytes())))
            self.ranges = _solve(self._model, self._collection, self.statistics, self._options, [])


def calibrate_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "mse",
    percentile: float = 99.99,
    weight_method: str = "max",
    num_batches: int | None = None,
    statistics: Path | str | None = None,
    held: Iterable[Any] | None = None,
) -> list[Range]:
    """Run the batches through the model and give every enabled quantizer its range.

    Args:
        model: A swapped model, on its device.
        batches: What the model is called with (see `trace.call_model`): tensors `[B, ...]`, `(inputs, labels)` or
            dictionaries. A hundred images or so are enough.
        method: For inputs: "max", "percentile", "entropy", "mse", "average_max", "mean_std", "laplace", "gauss",
            "moving_average", or "best": for each range the one that costs the output of its layer least.
        percentile: 0 to 100, for "percentile".
        weight_method: "max" or "mse", of each channel or of the weight, as the axis of its quantizer says.
        num_batches: As for `collect_statistics`.
        statistics: As for `collect_statistics`: a file from which a killed run goes on.
        held: Batches to compare on for "best"; None: the last batch is held out for it.

    Returns:
        One `Range` for each quantizer; `note` names those left in float.

    Raises:
        ArgumentError: Unknown method, an option out of range, nothing to calibrate; a file of something else.
        CalibrationError: As for `Calibration`.
        DataError: As for `collect_statistics`.
    """
    options = _Options(method, percentile, weight_method)
    if held is not None:
        require_batches(held)
    needs_held = method == BEST and held is None
    found, last = collect_and_hold_out(model, batches, num_batches, statistics, hold_out=needs_held)
    return _solve(model, Collection(model), found, options, last if held is None else list(held))


def solve_ranges(
    model: nn.Module,
    statistics: Statistics,
    *,
    method: str = "mse",
    percentile: float = 99.99,
    weight_method: str = "max",
    held: Iterable[Any] = (),
) -> list[Range]:
    """Give every enabled quantizer its range from statistics that were collected before; no data are needed.

    Args:
        model: The model that the statistics are of; quantizers may have been disabled since.
        statistics: From `collect_statistics` or `Statistics.load`.
        method: As for `calibrate_model`.
        percentile: As for `calibrate_model`.
        weight_method: As for `calibrate_model`.
        held: Batches to compare on; for "best" only.

    Returns:
        As `calibrate_model`.

    Raises:
        ArgumentError: As for `calibrate_model`; statistics of another model; "best" without a batch.
        CalibrationError: NaN or Inf in a weight; statistics without any batch.
    """
    require_model(model)
    if not isinstance(statistics, Statistics):
        raise ArgumentTypeError(
            f"statistics is of type {type(statistics).__name__}; expected Statistics.",
            "pass what collect_statistics or Statistics.load gives.",
        )
    options = _Options(method, percentile, weight_method)
    if statistics.model != fingerprint_model(model):
        raise ArgumentError(
            "the statistics are of another model: names, formats or shapes differ.",
            "swap and rewire the model as it was when they were collected, or collect them anew.",
        )
    require_batches(held)
    if not statistics.complete:
        logger.warning(
            "the statistics are of a pass that was cut off after %d batches", statistics.batches
        )
    return _solve(model, Collection(model), statistics, options, list(held))


def _solve(
    model: nn.Module,
    collection: Collection,
    statistics: Statistics,
    options: _Options,
    held: list[Any],
) -> list[Range]:
    """Set all ranges, or none if anything is wrong."""
    if collection.collecting and not any(
        tensor.num_batches for tensor in statistics.tensors.values()
    ):
        raise CalibrationError(
            "no batch reached any quantizer.",
            "give at least one batch, and one that the model runs on.",
        )
    if options.method == BEST and not any(
        gather_bytes(b"held" if held else b"")
    ):  # one process may have none
        raise ArgumentError(
            "method 'best' compares methods on data, and got no batch.", "pass held=[batch]."
        )
    if unknown := [
        name for name, leader in collection.leaders.items() if leader not in statistics.tensors
    ]:
        raise ArgumentError(
            f"there are no statistics of {', '.join(unknown[:3])}: it was off while they were collected.",
            "collect anew, or disable it.",
        )
    quantizers = dict(named_quantizers(model))
    if off := [name for name, quantizer in quantizers.items() if not quantizer.is_enabled]:
        logger.info("%d quantizers are off and get no range: %s", len(off), ", ".join(off))
    weights = {}
    for name, (layer, module, parameter) in collection.weights.items():
        label, weight = f"{layer or 'the model'}.{parameter}", module._parameters[parameter]
        assert weight is not None  # noqa: S101
        weights[name] = solve_weight(label, weight, quantizers[name], options.weight_method)
    left = _without_range(model, collection, statistics)
    with _all_or_none(model):
        for name, amax in weights.items():
            if name not in left:
                quantizers[name].amax = amax.cpu().numpy()
        methods = _choose_methods(model, collection, statistics, options, held)
        ranges = [
            _set_range(quantizer, name, statistics.tensors[leader], methods[leader], options)
            for name, quantizer in collection.collecting.items()
            if name not in left and (leader := collection.leaders[name])
        ]
    ranges += [
        _record(quantizers[name], name, options.weight_method, 0)
        for name in weights
        if name not in left
    ]
    for name, note in left.items():
        quantizers[name].disable()
        ranges.append(Range(name, None, options.method, 0, f"left in float: {note}"))
    if left:
        names = "; ".join(
            f"{name} ({note})" for name, note in left.items() if name in collection.collecting
        )
        logger.warning(
            "some quantizers have no usable range, what they belong to is left in float: %s", names
        )
    return ranges


def _choose_methods(
    model: nn.Module,
    collection: Collection,
    statistics: Statistics,
    options: _Options,
    held: list[Any],
) -> dict[str, str]:
    """Name of the quantizer that has the range -> method; those with an axis, or no integer format, take maxima."""
    quantizers = dict(named_quantizers(model))
    plain = {
        name: statistics.tensors[name]
        for name in dict.fromkeys(collection.leaders.values())
        if quantizers[name].axis is None and format_of(quantizers[name]) is not None
    }
    maxima = [name for name in dict.fromkeys(collection.leaders.values()) if name not in plain]
    if maxima and options.method != "max":
        logger.info(
            "%d quantizers have a range for each index of an axis and take its maximum, not %s: %s",
            len(maxima),
            options.method,
            ", ".join(maxima),
        )
    methods = dict.fromkeys(maxima, "max") | dict.fromkeys(plain, options.method)
    if options.method != BEST:
        return methods
    candidates = {
        name: {
            method: quantizers[name].solve_range(tensor, method, **_solver_options(method, options))
            for method in SOLVERS
        }
        for name, tensor in plain.items()
        if tensor.num_batches
    }
    chosen = select_methods(model, collection, candidates, held)  # type: ignore[arg-type]
    if unreached := [name for name in candidates if name not in chosen]:
        logger.warning("no batch held out reached %s; mse is taken there", ", ".join(unreached))
    return methods | dict.fromkeys(unreached, "mse") | chosen


def _set_range(
    quantizer: TensorQuantizer, name: str, tensor: TensorStatistics, method: str, options: _Options
) -> Range:
    if format_of(quantizer) is None:
        quantizer.amax = tensor.absmax
    else:
        quantizer.amax = quantizer.solve_range(tensor, method, **_solver_options(method, options))
    return _record(quantizer, name, method, tensor.num_batches)


def _solver_options(method: str, options: _Options) -> dict[str, float]:
    return {"percentile": options.percentile} if method == "percentile" else {}


def _record(quantizer: TensorQuantizer, name: str, method: str, batches: int) -> Range:
    assert quantizer.amax is not None  # noqa: S101
    values = quantizer.amax.flatten().tolist()
    return Range(name, values[0] if quantizer.axis is None else values, method, batches)


def _without_range(
    model: nn.Module, collection: Collection, statistics: Statistics
) -> dict[str, str]:
    """Quantizers that stay off and why: those that saw nothing, with all others of their layer (R-CONV-2)."""
    left = {
        name: note
        for name, leader in collection.leaders.items()
        if (note := _reason_without_range(statistics, leader))
    }
    notes = {id(collection.collecting[name]): note for name, note in left.items()}
    names = {id(q): name for name, q in named_quantizers(model)}
    for layer in quantized_layers(model).values():
        own = [id(quantizer) for quantizer in layer.quantizers().values()]
        if note := next((notes[identity] for identity in own if identity in notes), ""):
            enabled = (names[identity] for identity in own)
            left |= {
                n: left.get(n, note)
                for n in enabled
                if n in collection.weights or n in collection.collecting
            }
    return left


def _reason_without_range(statistics: Statistics, leader: str) -> str:
    tensor, fmt = statistics.tensors[leader], statistics.formats[leader]
    if not tensor.num_batches:
        return "it saw no batch: the layer did not run, or another module reads its weight directly"
    if not tensor.absmax:
        return "it saw zeros only"
    return (
        "it saw no value above 0, and its format is unsigned"
        if fmt and fmt.unsigned and tensor.high <= 0
        else ""
    )


@contextmanager
def _all_or_none(model: nn.Module) -> Iterator[None]:
    """Put all ranges back if the block raises."""
    before = [
        (quantizer, None if (amax := quantizer._buffers.get("_amax")) is None else amax.clone())
        for _, quantizer in named_quantizers(model)
    ]
    try:
        yield
    except BaseException:
        for quantizer, amax in before:
            if amax is not None:
                quantizer._buffers["_amax"] = amax
            else:
                quantizer._buffers.pop("_amax", None)
        raise
