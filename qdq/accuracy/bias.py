"""Bias correction: subtracts the mean error that quantization leaves in every output channel.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction,
ICCV 2019 (arXiv 1906.04721), section 4.2. With W' the quantized weight and E the mean over positions and samples:

- analytic: b' = b - (W' - W) E[x], x the float input: the error of the weight alone, from the means of the input;
- empirical: b' = b + E[y] - E[y'], y' the output of the layer after all layers before it were corrected: the error of
  the weight and of everything before it. If a ReLU or ReLU6 follows the layer, E is the mean over the positions that it
  passes on in one of the models: values that it hides should not shift the others.

A bias is added in float, so it costs an engine nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from qdq.accuracy.layerwise import (
    FlatArrays,
    LayerPlan,
    Product,
    add_to_bias,
    flatten_outputs,
    format_change,
    measure_change,
    plan_layers,
    run_flat,
    sample_outputs,
    visit_products,
)
from qdq.batch import count_samples, join_batches
from qdq.corrections import (
    AccuracyPass,
    Snapshot,
    list_passes,
    record_pass,
    redo_passes,
    undo_passes,
    undoing_passes,
)
from qdq.device import read_numbers, without_tf32
from qdq.errors import ArgumentError, DataError, StateError
from qdq.forward import require_model
from qdq.nn import QuantMixin
from qdq.nn.scaling import is_shifted, shift_of_mean
from qdq.outputs import Mask, OutputView, Selection, is_masked, keep_rows
from qdq.quantize import fake_quantize
from qdq.quantizer import disable_quantization
from qdq.text import printable

logger = logging.getLogger(__name__)

METHODS = ("empirical", "analytic")
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CorrectedBias:
    """Result for one bias.

    Args:
        layer: Dotted name.
        shift: Root mean square of the added values, relative to the root mean square of the means of the float output.
        reason: Why nothing was added; empty if something was.
    """

    layer: str
    shift: float
    reason: str = ""


@dataclass(frozen=True)
class BiasCorrection:
    """Result of `correct_bias`.

    Args:
        method: "empirical" or "analytic".
        layers: The quantized layers with a weight, in the order in which they run; then the skipped ones.
        before_db: SQNR of the outputs against the float model on the same batches, before the correction, in dB; of
            several outputs, that of the worst.
        after_db: The same after the correction.
        outputs: Name -> SQNR before and after, if there are several outputs.
    """

    method: str
    layers: tuple[CorrectedBias, ...]
    before_db: float
    after_db: float
    outputs: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def format_table(self) -> str:
        """SQNR before and after, then the skipped layers and the reasons."""
        skipped = [layer for layer in self.layers if layer.reason]
        count = len(self.layers) - len(skipped)
        sqnr = f"SQNR {self.before_db:.2f} to {self.after_db:.2f} dB"
        lines = [f"{self.method} bias correction of {count} layers: {sqnr}"]
        lines += format_change(self.outputs)
        for layer in skipped:
            lines.append(f"  {layer.layer}: {layer.reason}")
        return "\n".join(lines)


@without_tf32()
def correct_bias(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "empirical",
    reference: nn.Module | None = None,
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> BiasCorrection:
    """Shift the bias of every quantized layer so that quantization does not change the mean of its output channels.

    The model changes in place. A layer without a bias gets one, which a swapped model accepts in a state dict and a
    float model does not. The batches are joined into one, so that one forward can correct the layers in their order; a
    few dozen images are enough. On a GPU, everything runs without TF32.

    The layers keep their float biases, and use them while they are not quantized. If ranges or the choice of float
    layers change later, the correction is done again (`qdq.corrections`).

    Args:
        model: A calibrated model.
        batches: As for `calibrate_model`; they must fit in memory together.
        method: "empirical" or "analytic", see the module.
        reference: The float model. None: the model itself with its quantizers off and its float weights.
        outputs: Parts of the outputs to report, as for `predictor.predict`; None for all.
        mask: What leaves padding out, as for `predictor.predict`: out of these figures, and out of the outputs of each
            layer that the mask fits.

    Returns:
        The corrected and the skipped layers, with the SQNR before and after.

    Raises:
        ArgumentError: An unknown method or output, or a reference with other layers.
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: No batch, or batches that differ in shape.
        StateError: No layer is quantized, one has no range, or the outputs hold NaN or Inf.
    """
    if method not in METHODS:
        raise ArgumentError(
            f"method is {method!r}; expected one of {', '.join(METHODS)}.", "use 'empirical'."
        )
    require_model(model)
    inputs = join_batches(batches)
    view = OutputView(outputs, mask)
    again = partial(
        correct_bias,
        batches=[inputs],
        method=method,
        reference=reference,
        outputs=outputs,
        mask=mask,
    )
    with undoing_passes(model, "correct_bias", adds_up=True) as later:
        plan = plan_layers(model, inputs)
        outputs_before = run_flat(model, inputs, view)
        former = Snapshot(model)
        if method == "analytic":
            _take_back(model)
        for layer in plan.layers.values():
            layer.keep_float()
        correct = _correct_empirically if method == "empirical" else _correct_analytically
        try:
            correction = correct(model, reference or model, plan, inputs, view)
        except BaseException:  # half of the biases may be corrected
            former.restore(model)
            raise
        record_pass(model, AccuracyPass("correct_bias", again))
        redo_passes(model, later)
    layers = list(correction.layers)
    for name, reason in plan.skipped.items():
        layers.append(CorrectedBias(name, 0.0, reason))
    change = measure_change(correction.expected, outputs_before, correction.outputs)
    return BiasCorrection(method=method, layers=tuple(layers), **vars(change))


@contextmanager
def expecting_correction(model: nn.Module, batches: list[Any], view: OutputView) -> Iterator[str]:
    """In the block, each quantized layer has the bias of the analytic correction; after it, that of before.

    The analytic correction of a layer depends on its own weight and on the float model only. So it is right for any
    choice of float layers, and tells what `correct_bias` will leave of the error of each.

    Args:
        model: A calibrated model without passes (`corrections.redoing_passes`).
        batches: As for `correct_bias`, but they are not joined.
        view: Its mask leaves padding out.

    Yields:
        Which layers have another bias now, as a short phrase, or why none has.
    """
    shifts: dict[str, torch.Tensor] = {}
    try:
        plan = plan_layers(model, join_batches(batches[:1]))
        shifts = _average_shifts(model, plan, batches, view)
        state = "biases corrected"
        if plan.skipped:
            state += f" in {len(shifts)} of {len(shifts) + len(plan.skipped)} layers"
    except (DataError, StateError) as error:
        state = f"biases not corrected: {printable(error.message)}"
    try:
        for name, shift in shifts.items():
            plan.layers[name].keep_float()
            add_to_bias(plan.layers[name], shift)
        yield state
    finally:
        undo_passes(model)


def _average_shifts(
    model: nn.Module, plan: LayerPlan, batches: list[Any], view: OutputView
) -> dict[str, torch.Tensor]:
    """Layer -> what its bias needs for the means over all batches, float64 `[Cout]`."""
    shifts: dict[str, torch.Tensor] = {}
    num_samples = sum(count_samples(batch) for batch in batches)
    for batch in batches:
        share = count_samples(batch) / num_samples
        errors = _measure_mean_errors(model, plan, join_batches([batch]), view)
        for name, shift in errors.shifts.items():
            shifts[name] = shifts.get(name, torch.zeros_like(shift)) + share * shift
    return shifts


def _take_back(model: nn.Module) -> None:
    """Take an earlier correction back: the analytic one is relative to the float biases.

    Raises:
        StateError: A pass has learned other weights, whose biases have their best value already.
    """
    learned = [entry.name for entry in list_passes(model) if entry.name != "correct_bias"]
    if learned:
        raise StateError(
            f"{learned[-1]} has learned the weights, and the analytic correction is for the nearest codes.",
            "use method 'empirical', or correct the biases without that pass.",
        )
    undo_passes(model)


class _Correction(NamedTuple):
    """The layers that one method corrected.

    Args:
        layers: The layers.
        expected: Outputs of the reference.
        outputs: Outputs of the corrected model.
    """

    layers: list[CorrectedBias]
    expected: FlatArrays
    outputs: FlatArrays


def _correct_empirically(
    model: nn.Module, reference: nn.Module, plan: LayerPlan, inputs: Any, view: OutputView
) -> _Correction:
    """Compute the outputs of the float model first; then correct each layer while it runs."""
    samples, expected = sample_outputs(reference, plan, inputs, view)
    shifts: dict[str, torch.Tensor] = {}
    with tqdm(total=len(plan.layers), desc="correct bias", unit="layer", disable=None) as progress:

        def correct(name: str, layer: nn.Module, product: Product) -> torch.Tensor:
            sample = samples.pop(name)
            rows = product.rows_of(product.compute())[sample.positions].float()
            weight = sample.weigh(rows).double()
            shift = (weight * (sample.rows - rows)).sum(0)
            moved = None
            if is_shifted(layer):  # the bias of the product is not the parameter then
                moved = (product.arguments["bias"] + shift).to(rows.dtype)
            add_to_bias(layer, shift)
            means = (weight * sample.rows).sum(0)
            shifts[name] = _relative(shift, means)
            progress.update()
            return product.compute(bias=layer.bias if moved is None else moved)

        outputs = visit_products(model, plan.layers, inputs, correct)
    flat = flatten_outputs(outputs, inputs, view)
    return _Correction(_describe_shifts(shifts), expected, flat)


def _correct_analytically(
    model: nn.Module, reference: nn.Module, plan: LayerPlan, inputs: Any, view: OutputView
) -> _Correction:
    """Run one float forward, then correct all layers."""
    errors = _measure_mean_errors(reference, plan, inputs, view)
    for name, shift in errors.shifts.items():
        add_to_bias(plan.layers[name], shift)
    corrected = run_flat(model, inputs, view)
    expected = flatten_outputs(errors.outputs, inputs, view)
    return _Correction(_describe_shifts(errors.relative_shifts), expected, corrected)


class _MeanErrors(NamedTuple):
    """What the rounding of each weight takes away from the means of the outputs of its layer.

    Args:
        shifts: Layer -> what its bias needs, float64 `[Cout]`.
        relative_shifts: Layer -> the norm of that, relative to the norm of the means.
        outputs: Outputs of the float model.
    """

    shifts: dict[str, torch.Tensor]
    relative_shifts: dict[str, torch.Tensor]
    outputs: Any


def _measure_mean_errors(
    reference: nn.Module, plan: LayerPlan, inputs: Any, view: OutputView
) -> _MeanErrors:
    """Run one float forward; a product is linear, so the mean of its inputs gives the mean of its outputs."""
    shifts: dict[str, torch.Tensor] = {}
    relative_shifts: dict[str, torch.Tensor] = {}
    modules = dict(reference.named_modules())
    mask = view.find_mask(inputs)

    def measure(name: str, _: nn.Module, product: Product) -> torch.Tensor:
        output = product.compute()
        quantized = _quantized_weight(plan.layers[name])
        error = quantized - product.arguments["weight"]
        mean_error = product.compute(input=_mean_input(product, mask), weight=error, bias=None)
        shift = -product.rows_of(mean_error).double().mean(0)
        if is_shifted(plan.layers[name]):  # the bias follows the rounding of the weight already
            shift -= shift_of_mean(plan.layers[name], quantized)
        shifts[name] = shift
        means = product.rows_of(output)[product.list_positions(output, mask)].double().mean(0)
        relative_shifts[name] = _relative(shift, means)
        return output

    with disable_quantization(reference):
        measured = {name: modules[name] for name in plan.layers}
        outputs = visit_products(reference, measured, inputs, measure)
    return _MeanErrors(shifts, relative_shifts, outputs)


def _describe_shifts(shifts: Mapping[str, torch.Tensor]) -> list[CorrectedBias]:
    """The results of the corrected layers, from the relative shift of each."""
    return list(map(CorrectedBias, shifts, read_numbers(list(shifts.values()))))


def _quantized_weight(layer: QuantMixin) -> torch.Tensor:
    quantizer = layer.weight_quantizer
    assert quantizer.amax is not None  # noqa: S101  # plan_layers has checked
    weight = layer._parameters["weight"]
    assert weight is not None  # noqa: S101
    return fake_quantize(weight.detach(), quantizer.amax, quantizer.format, quantizer.axis)


def _mean_input(product: Product, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of the input over the samples, `[1, ...]`; that of a linear function over all that is not padding."""
    inputs: torch.Tensor = product.arguments["input"]
    if mask is not None and product.function is F.linear and is_masked(inputs, mask):
        inputs = keep_rows(inputs, mask)
    return inputs.mean(0, keepdim=True)


def _relative(shift: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    relative: torch.Tensor = shift.norm() / means.norm().clamp_min(_TINY)
    return relative
