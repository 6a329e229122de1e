"""Sensitivity of every layer, and which ones to leave in float.

Every layer is measured alone, in one of two modes; then the worst are switched off until a target is met.

- "one-at-a-time": only this layer in int8, all others in float. The SQNR is that of this layer's own error, and
  errors of different layers add up, so the ranking holds for sets of layers too.
- "leave-one-out": only this layer in float, all others in int8. What one more float layer would gain right now. The
  error of the worst layer hides that of the others here, so a set chosen by it is often a poor one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from qdq.errors import ArgumentError, DataError, StateError
from qdq.metrics import Array, sqnr_db
from qdq.nn import QuantInputMixin
from qdq.quantizer import disable_quantization
from qdq.run import write_json
from qdq.swap import quantized_layers
from qdq.trace import call_model, evaluating, require_batches

MODES = ("one-at-a-time", "leave-one-out")
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer measured alone.

    Args:
        name: Dotted name of the layer.
        sqnr_db: SQNR of the model's outputs against the float model's, in dB, with only this layer in int8
            ("one-at-a-time": low is sensitive) or only this layer in float ("leave-one-out": high is sensitive).
        metric: The caller's metric in the same state, None if there is none.
    """

    name: str
    sqnr_db: float
    metric: float | None


@dataclass(frozen=True)
class Step:
    """One step of leaving layers in float.

    Args:
        layer: The layer that joined the float ones in this step.
        sqnr_db: SQNR with all layers up to this one in float, in dB.
        metric: The caller's metric in the same state, None if there is none.
    """

    layer: str
    sqnr_db: float
    metric: float | None


@dataclass(frozen=True)
class Analysis:
    """Result of `analyze_layers`.

    Args:
        mode: "one-at-a-time" or "leave-one-out".
        images: How many samples were used.
        sqnr_db: SQNR with every layer quantized, in dB.
        metric: The caller's metric with every layer quantized.
        layers: Every layer, most sensitive first.
        steps: What was left in float, in order; disabled in the model now.
        stopped_by: Why the search ended.
    """

    mode: str
    images: int
    sqnr_db: float
    metric: float | None
    layers: tuple[LayerSensitivity, ...]
    steps: tuple[Step, ...]
    stopped_by: str

    @property
    def float_layers(self) -> list[str]:
        """The layers left in float."""
        return [step.layer for step in self.steps]

    def format_table(self, rows: int = 8) -> str:
        """The most sensitive layers and the steps taken, as text."""
        alone = "only this in int8" if self.mode == "one-at-a-time" else "only this in float"
        names = [layer.name for layer in self.layers[:rows]] + [f"+ {step.layer} in float" for step in self.steps]
        width = max(len(name) for name in [*names, "all layers in int8"])
        lines = [
            f"{self.mode} on {self.images} images",
            f"{alone:{width}}   SQNR dB" + ("" if self.metric is None else "    metric"),
            *(_row(layer.name, width, layer.sqnr_db, layer.metric) for layer in self.layers[:rows]),
        ]
        if len(self.layers) > rows:
            lines.append(f"... and {len(self.layers) - rows} less sensitive ones")
        lines.append(_row("all layers in int8", width, self.sqnr_db, self.metric))
        lines += [_row(f"+ {step.layer} in float", width, step.sqnr_db, step.metric) for step in self.steps]
        return "\n".join([*lines, f"stopped: {self.stopped_by}"])

    def save(self, path: Path) -> Path:
        """Write the analysis as JSON."""
        return write_json(path, self)


def analyze_layers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: str = "one-at-a-time",
    metric: Metric | None = None,
    target_sqnr: float | None = None,
    target_metric: float | None = None,
    max_float_layers: int = 0,
) -> Analysis:
    """Rank the layers by what they cost, and switch the worst off until a target is met or enough are off.

    The ranking is by SQNR of the outputs; with a metric, by the metric first (higher is better). Layers that are
    chosen are disabled in the model; nothing else about it changes.

    Args:
        model: A calibrated model. Layers that are disabled already stay so and are not ranked.
        batches: Iterated once and kept; see `trace.call_model`.
        mode: "one-at-a-time" or "leave-one-out", see above.
        metric: `model -> float`, higher is better, e.g. top-1. Called once a layer.
        target_sqnr: Stop when the SQNR reaches this many dB.
        target_metric: Stop when the metric reaches this value.
        max_float_layers: At most so many layers are switched off; 0 only ranks.

    Raises:
        ArgumentError: An unknown mode, a target for a metric that is not given, or a negative number of layers.
        DataError: No batch.
        StateError: No layer is quantized, or one has no amax.
    """
    if mode not in MODES:
        raise ArgumentError(f"mode is {mode!r}; known are {', '.join(MODES)}.", "use 'one-at-a-time'.")
    if target_metric is not None and metric is None:
        raise ArgumentError("target_metric is given, but no metric.", "pass metric= as well.")
    if max_float_layers < 0:
        raise ArgumentError(f"max_float_layers is {max_float_layers}.", "give 0 (rank only) or more.")
    require_batches(batches)
    layers = _active_layers(model)
    kept = list(batches)
    if not kept:
        raise DataError("there is no batch to analyze on.", "give at least one, for instance of the calibration data.")
    probe = _Probe(model, kept, metric)
    base_sqnr, base_metric = probe.measure()
    ranked = _rank(model, layers, probe, mode)
    steps: list[Step] = []
    reached = _reached(base_sqnr, base_metric, target_sqnr, target_metric)
    with ExitStack() as undo:  # an interrupted search leaves the model as it was
        for entry in tqdm(ranked[:max_float_layers], desc="leave in float", unit="layer", disable=None):
            if reached:
                break
            undo.push(disable_quantization(layers[entry.name]))
            sqnr, value = probe.measure()
            steps.append(Step(entry.name, sqnr, value))
            reached = _reached(sqnr, value, target_sqnr, target_metric)
        undo.pop_all()
    stopped_by = reached or f"{len(steps)} of at most {max_float_layers} layers are in float"
    return Analysis(mode, probe.images, base_sqnr, base_metric, tuple(ranked), tuple(steps), stopped_by)


def _rank(model: nn.Module, layers: dict[str, QuantInputMixin], probe: _Probe, mode: str) -> list[LayerSensitivity]:
    """Every layer measured alone, most sensitive first."""
    measured = []
    for name, layer in tqdm(layers.items(), desc="analyze", unit="layer", disable=None):
        if mode == "leave-one-out":
            with disable_quantization(layer):
                measured.append(LayerSensitivity(name, *probe.measure()))
            continue
        active = [quantizer for quantizer in layer.quantizers().values() if not quantizer._disabled]
        with disable_quantization(model):
            for quantizer in active:
                quantizer.enable()
            measured.append(LayerSensitivity(name, *probe.measure()))
    measured.sort(key=lambda entry: (entry.metric or 0.0, entry.sqnr_db), reverse=mode == "leave-one-out")
    return measured


def _active_layers(model: nn.Module) -> dict[str, QuantInputMixin]:
    layers = {
        name: layer
        for name, layer in quantized_layers(model).items()
        if any(not quantizer._disabled for quantizer in layer.quantizers().values())
    }
    if not layers:
        raise StateError("no layer of the model is quantized.", "call swap_modules and calibrate_model first.")
    for name, layer in layers.items():
        for attribute, quantizer in layer.quantizers().items():
            if quantizer.amax is None and not quantizer._disabled:
                raise StateError(f"{name}.{attribute} has no amax.", "call calibrate_model first.")
    return layers


def _reached(sqnr: float, metric: float | None, target_sqnr: float | None, target_metric: float | None) -> str:
    if target_sqnr is not None and sqnr >= target_sqnr:
        return f"SQNR {sqnr:.2f} dB reaches the target of {target_sqnr:g} dB"
    if target_metric is not None and metric is not None and metric >= target_metric:
        return f"metric {metric:g} reaches the target of {target_metric:g}"
    return ""


class _Probe:
    """Measures the model in whatever state it is against its float outputs."""

    def __init__(self, model: nn.Module, batches: list[Any], metric: Metric | None) -> None:
        self._model = model
        self._batches = batches
        self._metric = metric
        with disable_quantization(model):
            self._reference = self._outputs()
        self.images = sum(_rows(batch) for batch in batches)

    def measure(self) -> tuple[float, float | None]:
        sqnr = sqnr_db(self._reference, self._outputs())
        if math.isnan(sqnr):
            raise StateError(
                "the outputs of the model hold NaN.",
                "check the float model on the same batches: it must be finite.",
            )
        with evaluating(self._model) if self._metric else nullcontext():
            return sqnr, self._metric(self._model) if self._metric else None

    def _outputs(self) -> Array:
        """All floating-point outputs of all batches as one flat array."""
        with evaluating(self._model):
            return np.concatenate(
                [
                    output.detach().float().cpu().numpy().ravel()
                    for batch in self._batches
                    for output in _floats(call_model(self._model, batch))
                ]
            )


def _rows(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor that has one."""
    return next((leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()), 1)


def _floats(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _row(name: str, width: int, sqnr: float, metric: float | None) -> str:
    return f"{name:{width}}  {sqnr:8.2f}" + ("" if metric is None else f"  {metric:8.4f}")
