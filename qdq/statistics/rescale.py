"""Puts ranges from saved statistics into an exported file: another method, without model, data or torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qdq.check.load import load_onnx, require_whole
from qdq.errors import ArgumentError
from qdq.files import as_path, guard_files
from qdq.formats import Format, scale_from_amax
from qdq.graph.raise_scales import RaiseWeightScales
from qdq.graph.save import save_model
from qdq.graph.scales import list_scales, number_of, reason_against, set_scale
from qdq.graph.tensors import list_data_files
from qdq.statistics import Statistics

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rescaling:
    """Result of `rescale_onnx`.

    Args:
        path: The file that was written.
        method: The method that computed the ranges.
        changed: Quantizer -> its former and its new scale.
        unchanged: Quantizers that had this scale already.
        refused: Quantizer -> why its scale was not changed.
        missing: Names of statistics without a scale in the file: left in float, or one pair serves several quantizers.
        unknown: Quantizers of the file that are not in the statistics; their scale was not changed.
    """

    path: Path
    method: str
    changed: dict[str, tuple[float, float]]
    unchanged: tuple[str, ...]
    refused: dict[str, str]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every activation of the file has its range from the statistics."""
        return not self.refused and not self.unknown

    def format_table(self) -> str:
        """The counts, each change, and the quantizers that were not matched."""
        lines = [
            f"{self.path}: {len(self.changed)} scales changed, {len(self.unchanged)} were the same ({self.method})"
        ]
        width = max(map(len, self.changed), default=0)
        for name, (former, new) in self.changed.items():
            lines.append(f"  {name:{width}}  {former:.6g} -> {new:.6g}")
        for name, reason in self.refused.items():
            lines.append(f"  not changed: {name}: {reason}")
        for name in self.unknown:
            lines.append(f"  not changed: {name}: the statistics do not have it")
        for name in self.missing:
            lines.append(
                f"  not in the file: {name} (in float there, or another quantizer's pair serves it)"
            )
        return "\n".join(lines)


def rescale_onnx(
    path: Path | str,
    output: Path | str,
    statistics: Statistics,
    *,
    method: str = "mse",
    **options: Any,
) -> Rescaling:
    """Write a copy of a file that `export_onnx` made, with activation ranges computed from statistics.

    The scales are those that `solve_ranges` and a new export would give. Weights do not change, unless a bias needs a
    larger scale (`graph.raise_scales`). The metadata names the new method; the fingerprint of the ranges, which
    includes weights, is left out.

    Args:
        path: The file.
        output: The file to write; may be `path`. It is written completely or not at all.
        statistics: The statistics of the exported model.
        method: As for `observers.solve.solve_amax`.
        **options: As for `observers.solve.solve_amax`.

    Raises:
        ArgumentError: As for `solve_amax`; no scale of the file belongs to the statistics; `output` cannot be written.
        CheckError: The file cannot be read, or has content that would be lost.
    """
    path, output = as_path(path, "path"), as_path(output, "output")
    guard_files(inputs=[path, *list_data_files(path)], outputs=[output], in_place=[(output, path)])
    loaded = load_onnx(path)
    require_whole(loaded)
    model = loaded.model
    scales = list_scales(model.graph)
    leaders = {}
    unknown = []
    for name in scales:
        leader = statistics.shared.get(name, name)
        if leader in statistics.tensors:
            leaders[name] = leader
        else:
            unknown.append(name)
    if not leaders:
        raise ArgumentError(
            f"none of the {len(scales)} scales of activations in {path} belongs to a quantizer of the statistics.",
            "give a file that qdq exported from the model that was calibrated.",
        )
    ranges = statistics.solve_all(method, **options)
    changed, refused = _set_scales(statistics, scales, leaders, ranges)
    unchanged = [name for name in leaders if name not in changed and name not in refused]
    used = set(leaders.values())
    missing = [name for name in statistics.tensors if name not in used]
    rescaling = Rescaling(
        path=output,
        method=method,
        changed=changed,
        unchanged=tuple(unchanged),
        refused=refused,
        missing=tuple(missing),
        unknown=tuple(unknown),
    )
    _update_origin(model, statistics, rescaling)
    RaiseWeightScales()(model)  # a bias may not fit the new scale of its input
    # So that the copy may be in another folder, or replace the file.
    ir.external_data.load_to_model(model)
    save_model(model, output)
    return rescaling


def scale_of(amax: npt.ArrayLike, fmt: Format) -> Floats:
    """`quantize.compute_scale` without torch; the same to the last bit."""
    ranges = np.asarray(amax, np.float32)
    scale: Floats = scale_from_amax(ranges.reshape(-1), fmt)
    return scale.reshape(ranges.shape)


def _set_scales(
    statistics: Statistics,
    scales: Mapping[str, list[ir.Value]],
    leaders: Mapping[str, str],
    ranges: Mapping[str, float],
) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """Set scales in place.

    Args:
        statistics: The statistics.
        scales: Quantizer -> its scales in the graph.
        leaders: Quantizer -> the name that holds its range in the statistics.
        ranges: The ranges by the names in the statistics.

    Returns:
        The former and the new scale of each quantizer whose scale changed, and why other scales could not be set.
    """
    changed: dict[str, tuple[float, float]] = {}
    refused: dict[str, str] = {}
    for name, leader in leaders.items():
        values = scales[name]
        former = number_of(values[0])
        fmt = statistics.formats[leader]
        if former.shape or fmt is None:
            refused[name] = "it has several scales, or no integer format in the statistics"
            continue
        if not ranges[leader]:
            refused[name] = "the statistics saw no value above 0 there"
            continue
        scale = scale_of(ranges[leader], fmt)
        reason = reason_against(values, scale)
        if reason:
            refused[name] = reason
        elif set_scale(values, scale):
            changed[name] = (float(former), float(number_of(values[0])))
    return changed, refused


def _update_origin(model: ir.Model, statistics: Statistics, rescaling: Rescaling) -> None:
    """Update the calibration in the metadata, see `export.export_onnx`."""
    model.metadata_props.pop("qdq.ranges_sha256", None)
    methods = {rescaling.method}
    try:
        facts = dict(json.loads(model.metadata_props["qdq.calibration"]))
        if not rescaling.is_whole:
            methods |= set(facts["methods"])
    except (KeyError, TypeError, ValueError, RecursionError):  # the metadata of another tool
        return
    facts["methods"] = sorted(methods)
    facts["batches"] = max(tensor.num_batches for tensor in statistics.tensors.values())
    model.metadata_props["qdq.calibration"] = json.dumps(facts, sort_keys=True)
