"""Compares the tensors of a file with those of torch, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from qdq.diverge.distances import (
    Grid,
    grid_of_values,
    largest_rounding,
    make_grid,
    measure_cell_steps,
    measure_code_steps,
    measure_lsb,
)
from qdq.diverge.file_run import FileRun
from qdq.diverge.places import PlacePair, split_name
from qdq.diverge.record import Recording, Site, record_forward
from qdq.diverge.result import TensorDistance
from qdq.metrics import Array
from qdq.quantizer import TensorQuantizer

ENGINE_ROUNDING = 2.0**-8
"""What the arithmetic of an engine may leave, as a fraction of the largest value: eight roundings to float16."""

BFLOAT16_ROUNDING = 2.0**-5
"""Likewise eight roundings to bfloat16."""

_LEAST_NEAR_TIE = 2e-3  # LSB
_PERCENTILE_OF_DUMPS = (
    99  # a code that its dump does not tell may be one off, and moves a few values
)


@dataclass
class _Sums:
    """What is known of a site after some batches."""

    tensor: str
    distances: list[Array] = field(default_factory=list)
    signal: float = 0.0
    noise: float = 0.0
    tie_noise: float = 0.0
    differing_codes: int = 0
    excess: float = 0.0
    limit: float = 0.0
    codes_excess: float | None = None
    misfit: str = ""


@dataclass
class Last:
    """The tensors of the last batch, for the causes."""

    site_of: dict[TensorDistance, Site] = field(default_factory=dict)
    values_of: dict[Site, tuple[Array, Array]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Aligned:
    """The tensors of a file around a quantizer, in the layout of torch; None if they are not known."""

    tensor: str
    before: Array | None
    after: Array


class Comparison:
    """Compares batch by batch.

    Args:
        model: The torch model.
        file: The file, or the engine.
        dumps: The tensors that are known of the engine; None: all are known.
        rounding: What arithmetic alone may leave, as a fraction of the largest value of a tensor.

    Attributes:
        last: The tensors of the last batch.
        outputs_not_compared: Output -> the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        file: FileRun,
        dumps: Mapping[str, Array] | None,
        rounding: float,
    ) -> None:
        self.last = Last()
        self.outputs_not_compared: dict[str, str] = {}
        self._model = model
        self._file = file
        self._dumps = dumps
        self._rounding = rounding
        self._percentile = 100 if dumps is None else _PERCENTILE_OF_DUMPS
        self._sums: dict[Site, _Sums] = {}

    def add(self, batch: Any) -> None:
        """Compare one batch."""
        free = record_forward(self._model, batch, self._file.outputs)
        values = self._file(batch)
        aligned = self._align(free, values)
        pins = _Pins(aligned)
        following = record_forward(self._model, batch, self._file.outputs, pins)
        self.outputs_not_compared |= free.unpaired
        for site in free.tensors:
            if site in aligned:
                self._add_quantizer(site, free, following, aligned[site])
            elif site.kind == "quantizer":
                self._add_misplaced(site, free, values)
            else:
                self._add_float(site, free, following, values)

    def conclude(self) -> list[TensorDistance]:
        """The rows, in order of execution."""
        rows = []
        for site, sums in self._sums.items():
            distances = np.concatenate([np.empty(0, np.float32), *sums.distances])
            if not distances.size and not sums.misfit:
                continue
            row = _make_row(site, sums, distances, self._find_module(site))
            self.last.site_of[row] = site
            rows.append(row)
        return rows

    def _find_module(self, site: Site) -> str:
        """The module of the node that computes the tensor of a site."""
        node = self._file.places.nodes[site]
        if site.kind == "quantizer":
            value = node.inputs[0]
            producer = None if value is None else value.producer()
            return "" if producer is None else split_name(producer)[0]
        return split_name(node)[0]

    def _is_known(self, *names: str) -> bool:
        return self._dumps is None or any(name in self._dumps for name in names)

    def _align(self, free: Recording, values: Mapping[str, Array]) -> dict[Site, _Aligned]:
        """The tensors of the file around each quantizer, as torch has them."""
        aligned = {}
        for site, places in self._file.places.quantizers.items():
            if site not in free.quantizers or not places:
                continue
            first = places[0]
            if not self._is_known(first.before, first.codes, first.after):
                continue
            has_input = self._is_known(first.before)
            place = _choose_place(free, site, places, values)
            if place is not None:
                before = values[place.before] if has_input else None
                aligned[site] = _Aligned(first.before, before, values[place.after])
        return aligned

    def _add_quantizer(
        self, site: Site, free: Recording, following: Recording, aligned: _Aligned
    ) -> None:
        expected = _to_array(free.tensors[site])
        from_codes = _to_array(following.tensors[site])
        grid = _grid_of(free, site)
        sums = self._sums.setdefault(site, _Sums(aligned.tensor))
        actual = aligned.after if aligned.before is None else aligned.before
        self._add_distances(sums, grid, expected, actual, from_codes)
        if aligned.before is None:
            steps = measure_cell_steps(grid, from_codes, aligned.after)
        else:
            steps = measure_lsb(grid, from_codes, aligned.before)
            near_tie = max(_LEAST_NEAR_TIE, sums.limit)
            code_steps = measure_code_steps(grid, aligned.before, aligned.after, near_tie)
            largest = float(code_steps.max(initial=0.0))
            sums.codes_excess = max(sums.codes_excess or 0.0, largest)
        self._add_excess(sums, steps)
        codes = grid.round(grid.clip(expected))
        written = grid.round(np.nan_to_num(aligned.after.astype(np.float64) / grid.scale))
        sums.differing_codes += int(np.count_nonzero(codes != written))
        self.last.values_of[site] = from_codes, actual

    def _add_misplaced(self, site: Site, free: Recording, values: Mapping[str, Array]) -> None:
        """Note a quantizer whose tensor has another size in the file."""
        places = self._file.places.quantizers.get(site, [])
        if not places or _is_called_twice(site, free):
            return
        first = places[0]
        if not self._is_known(first.before, first.codes, first.after):
            return
        size = free.tensors[site].numel()
        if any(place.after in values and values[place.after].size == size for place in places):
            return  # the same tensor in another layout
        self._add_misfit(site, first.before, free, values[first.after])

    def _add_float(
        self, site: Site, free: Recording, following: Recording, values: Mapping[str, Array]
    ) -> None:
        """Compare the output of a layer or of the network."""
        name = site.name if site.kind == "output" else self._file.places.layers.get(site, "")
        if name not in values or _is_called_twice(site, free):
            return
        expected, actual = _to_array(free.tensors[site]), values[name]
        reason = self._explain_omission(site, name, actual)
        if reason:
            if site.kind == "output":
                self.outputs_not_compared[name] = reason
            return
        if expected.shape != actual.shape:
            self._add_misfit(site, name, free, actual)
            return
        from_codes = _to_array(following.tensors[site])
        grid = grid_of_values(expected)
        sums = self._sums.setdefault(site, _Sums(name))
        self._add_distances(sums, grid, expected, actual, from_codes)
        steps = measure_lsb(grid, from_codes, actual)
        self._add_excess(sums, steps)
        self.last.values_of[site] = from_codes, actual

    def _explain_omission(self, site: Site, name: str, actual: Array) -> str:
        """Why a tensor without a quantizer cannot be compared; "" if it can."""
        if not self._is_known(name):
            return "it was not dumped"
        if site not in self._file.places.nodes:
            return "it is an input of the network"
        if not np.issubdtype(actual.dtype, np.floating):
            return f"its type is {actual.dtype}"
        return ""

    def _add_misfit(self, site: Site, tensor: str, free: Recording, actual: Array) -> None:
        """Note a tensor that has another shape than that of torch."""
        expected = _to_array(free.tensors[site])
        sums = self._sums.setdefault(site, _Sums(tensor))
        sums.misfit = f"has shape {list(actual.shape)}, torch has {list(expected.shape)}"
        self.last.values_of[site] = expected, actual

    def _add_excess(self, sums: _Sums, steps: Array) -> None:
        if steps.size:
            sums.excess = max(sums.excess, float(np.percentile(steps, self._percentile)))

    def _add_distances(
        self, sums: _Sums, grid: Grid, expected: Array, actual: Array, from_codes: Array
    ) -> None:
        sums.distances.append(measure_lsb(grid, expected, actual).astype(np.float32))
        sums.signal += _sum_squares(expected)
        sums.noise += _measure_noise(expected, actual)
        sums.tie_noise += _measure_noise(expected, from_codes)
        limit = largest_rounding(grid, from_codes, self._rounding)
        sums.limit = max(sums.limit, limit)


class _Pins:
    """Gives torch the codes of a file. Called after each quantizer, see `record_forward`.

    Args:
        aligned: The tensors of the file.
    """

    def __init__(self, aligned: Mapping[Site, _Aligned]) -> None:
        self._aligned = aligned
        self._pinned: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def __call__(
        self, site: Site, inputs: torch.Tensor, quantizer: TensorQuantizer
    ) -> torch.Tensor | None:
        amax = quantizer.amax
        if site in self._aligned:
            after = torch.from_numpy(np.array(self._aligned[site].after))
            pinned = after.to(inputs.device, inputs.dtype)
            self._pinned.append((inputs, pinned, amax))
            return pinned
        return self._find_view(inputs, amax)

    def _find_view(self, inputs: torch.Tensor, amax: torch.Tensor | None) -> torch.Tensor | None:
        """The codes of a tensor that an earlier quantizer with the same range read: the file has one pair for both."""
        for former, pinned, former_amax in reversed(self._pinned):
            if not _is_equal(amax, former_amax):
                continue
            if former.shape == inputs.shape and torch.equal(former, inputs):
                return pinned
            view = _view_alike(former, inputs, pinned)
            if view is not None:
                return view
        return None


def _view_alike(
    former: torch.Tensor, view: torch.Tensor, pinned: torch.Tensor
) -> torch.Tensor | None:
    """The view of a tensor, of other values; None if it is no view of it.

    Args:
        former: The tensor.
        view: Perhaps a view of it, such as its transpose or a slice.
        pinned: The values, of the shape of the tensor.
    """
    if former.untyped_storage().data_ptr() != view.untyped_storage().data_ptr():
        return None
    offset = view.storage_offset() - former.storage_offset()
    is_dense = _count_span(former) == former.numel()
    if not is_dense or offset < 0 or offset + _count_span(view) > former.numel():
        return None
    arranged = torch.empty_strided(
        former.size(), former.stride(), dtype=pinned.dtype, device=pinned.device
    )
    arranged.copy_(pinned)
    return arranged.as_strided(view.size(), view.stride(), offset).clone()


def _count_span(tensor: torch.Tensor) -> int:
    """Number of elements from the first to the last one in memory."""
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def _is_equal(amax: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if amax is None or other is None:
        return False
    return amax.numel() == other.numel() and bool((amax.ravel() == other.ravel()).all())


def _is_called_twice(site: Site, free: Recording) -> bool:
    """Whether the module of a site runs more than once in a forward."""
    return site.call > 0 or Site(site.name, site.call + 1, site.kind) in free.tensors


def _choose_place(
    free: Recording, site: Site, places: list[PlacePair], values: Mapping[str, Array]
) -> PlacePair | None:
    """The place whose tensor has the shape of torch's; of several, the nearest one."""
    expected = _to_array(free.tensors[site])
    fitting = []
    for place in places:
        if place.after in values and values[place.after].shape == expected.shape:
            fitting.append(place)
    if len(fitting) < 2:
        return next(iter(fitting), None)
    grid = _grid_of(free, site)

    def distance_of(place: PlacePair) -> float:
        return float(measure_lsb(grid, expected, values[place.after]).mean())

    return min(fitting, key=distance_of)


def _grid_of(recording: Recording, site: Site) -> Grid:
    quantizer = recording.quantizers[site]
    scale = quantizer.leader.scale.detach().cpu().numpy().ravel()
    dimensions = recording.tensors[site].dim()
    return make_grid(scale, quantizer.format, quantizer.range_axis, dimensions)


def _to_array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().cpu().float().numpy()
    return array


def _sum_squares(values: Array) -> float:
    """Sum of the squares of the finite values."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return float(np.sum(finite**2))


def _measure_noise(expected: Array, actual: Array) -> float:
    """Sum of the squares of the differences; infinite if a value is NaN or infinite in one array only."""
    first, second = expected.astype(np.float64), actual.astype(np.float64)
    is_different = (first != second) & ~(np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        differences = np.where(is_different, first - second, 0.0)
    if not np.isfinite(differences).all():
        return math.inf
    return float(np.sum(differences**2))


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)


def _make_row(site: Site, sums: _Sums, distances: Array, module: str) -> TensorDistance:
    median = p99 = most = math.nan
    codes_differ = None
    if distances.size:
        median, p99, most = np.percentile(distances, [50, 99, 100])
        if site.kind == "quantizer":
            codes_differ = sums.differing_codes / distances.size
    return TensorDistance(
        tensor=sums.tensor,
        name=site.name,
        kind=site.kind,
        module=module,
        median_lsb=float(median),
        p99_lsb=float(p99),
        max_lsb=float(most),
        sqnr_db=_decibels(sums.signal, sums.noise) if distances.size else math.nan,
        codes_differ=codes_differ,
        tie_floor_db=_decibels(sums.signal, sums.tie_noise) if distances.size else math.nan,
        excess_lsb=sums.excess,
        limit_lsb=sums.limit,
        codes_excess=sums.codes_excess,
        misfit=sums.misfit,
    )
