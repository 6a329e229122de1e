"""The mean error that quantization leaves in every output channel, taken out of the bias.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction,
ICCV 2019 (arXiv 1906.04721), section 4.2. With W' the quantized weight and E the mean over positions and samples:

- analytic: b' = b - (W' - W) E[x], x the float input: the error of the weight alone, from the moments of the input;
- empirical: b' = b + E[y] - E[y'], y' the output of the layer behind all layers corrected before it: the error of the
  weight and of everything up to it. Where a ReLU or ReLU6 stands behind the layer, E is the mean over the positions
  that it passes on in one of the models: what it hides is no reason to move the rest.

A bias is added in float, so it costs an engine nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qdq.accuracy.layerwise import (
    LayerPlan,
    Product,
    add_to_bias,
    flatten_outputs,
    plan_layers,
    run_flat,
    sample_outputs,
    visit_products,
)
from qdq.errors import ArgumentError
from qdq.forward import require_model
from qdq.metrics import Array, sqnr_db
from qdq.nn import QuantMixin
from qdq.quantize import fake_quantize
from qdq.quantizer import disable_quantization
from qdq.samples import join_batches

logger = logging.getLogger(__name__)

METHODS = ("empirical", "analytic")


@dataclass(frozen=True)
class CorrectedBias:
    """What became of one bias.

    Args:
        layer: Dotted name.
        shift: Root mean square of what was added, relative to that of the means of the float output.
        reason: Why nothing was added; empty if it was.
    """

    layer: str
    shift: float
    reason: str = ""


@dataclass(frozen=True)
class BiasCorrection:
    """Result of `correct_bias`.

    Args:
        method: "empirical" or "analytic".
        layers: The quantized layers with a weight, in the order in which they run; then those left alone.
        before_db: SQNR of the outputs against the float model's on the given batches, in dB.
        after_db: The same afterwards.
    """

    method: str
    layers: tuple[CorrectedBias, ...]
    before_db: float
    after_db: float

    def format_table(self) -> str:
        """SQNR before and after, then what was left alone and why."""
        done = [layer for layer in self.layers if not layer.reason]
        sqnr = f"SQNR {self.before_db:.2f} to {self.after_db:.2f} dB"
        lines = [f"{self.method} bias correction of {len(done)} layers: {sqnr}"]
        return "\n".join(
            lines + [f"  {layer.layer}: {layer.reason}" for layer in self.layers if layer.reason]
        )


def correct_bias(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "empirical",
    reference: nn.Module | None = None,
) -> BiasCorrection:
    """Shift the bias of every quantized layer so that quantization leaves the mean of its output channels; in place.

    A layer without a bias gets one, which a swapped model takes from a state dict, a float one does not. The batches
    are joined into one, so that one forward can correct the layers in their order; a few dozen images are enough.

    Args:
        model: A calibrated model.
        batches: As for `calibrate_model`; they must be in memory at once.
        method: "empirical" or "analytic", see the module.
        reference: The float model, for instance a copy made before `round_weights` changed the weights. None: the
            model itself with its quantizers off.

    Returns:
        What was done, with the SQNR before and after.

    Raises:
        ArgumentError: An unknown method, or a reference with other layers.
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: No batch, or batches that differ in shape.
        StateError: No layer is quantized, one has no range, or the outputs hold NaN or Inf.
    """
    if method not in METHODS:
        raise ArgumentError(
            f"method is {method!r}; known are {', '.join(METHODS)}.", "use 'empirical'."
        )
    require_model(model)
    inputs = join_batches(batches)
    plan = plan_layers(model, inputs)
    before = run_flat(model, inputs)
    correct = _correct_empirically if method == "empirical" else _correct_analytically
    done, expected, after = correct(model, reference or model, plan, inputs)
    done += [CorrectedBias(name, 0.0, reason) for name, reason in plan.left.items()]
    return BiasCorrection(method, tuple(done), sqnr_db(expected, before), sqnr_db(expected, after))


_Corrected = tuple[
    list[CorrectedBias], Array, Array
]  # what was done; outputs of the reference, and those afterwards


def _correct_empirically(
    model: nn.Module, reference: nn.Module, plan: LayerPlan, inputs: Any
) -> _Corrected:
    """Outputs of the float model first; then each layer in turn is corrected while it runs."""
    samples, expected = sample_outputs(reference, plan, inputs)
    done: list[CorrectedBias] = []
    with tqdm(total=len(plan.layers), desc="correct bias", unit="layer", disable=None) as progress:

        def correct(name: str, layer: nn.Module, product: Product) -> torch.Tensor:
            sample = samples.pop(name)
            rows = product.rows_of(product.compute())[sample.positions].float()
            weight = sample.weigh(rows).double()
            shift = (weight * (sample.rows - rows)).sum(0)
            add_to_bias(layer, shift)
            done.append(CorrectedBias(name, _relative(shift, (weight * sample.rows).sum(0))))
            progress.update()
            return product.compute(bias=layer.bias)

        after = flatten_outputs(visit_products(model, plan.layers, inputs, correct))
    return done, expected, after


def _correct_analytically(
    model: nn.Module, reference: nn.Module, plan: LayerPlan, inputs: Any
) -> _Corrected:
    """One float forward; the product being linear, the mean of the input over samples gives that of the output."""
    done: list[CorrectedBias] = []
    shifts: dict[str, torch.Tensor] = {}
    modules = dict(reference.named_modules())

    def measure(name: str, _: nn.Module, product: Product) -> torch.Tensor:
        layer, output, weight = plan.layers[name], product.compute(), product.arguments["weight"]
        error = _quantized_weight(layer) - weight
        mean = product.arguments["input"].mean(0, keepdim=True)
        shifts[name] = -_channel_means(
            product, product.compute(input=mean, weight=error, bias=None)
        )
        done.append(CorrectedBias(name, _relative(shifts[name], _channel_means(product, output))))
        return output

    with disable_quantization(reference):
        layers = {name: modules[name] for name in plan.layers}
        expected = flatten_outputs(visit_products(reference, layers, inputs, measure))
    for name, shift in shifts.items():
        add_to_bias(plan.layers[name], shift)
    return done, expected, run_flat(model, inputs)


def _quantized_weight(layer: QuantMixin) -> torch.Tensor:
    quantizer = layer.weight_quantizer
    assert quantizer.amax is not None  # noqa: S101  # plan_layers has looked
    weight = layer._parameters["weight"]
    assert weight is not None  # noqa: S101
    return fake_quantize(weight.detach(), quantizer.amax, quantizer.format, quantizer.axis)


def _channel_means(product: Product, output: torch.Tensor) -> torch.Tensor:
    return product.rows_of(output).double().mean(0)


def _relative(shift: torch.Tensor, means: torch.Tensor) -> float:
    return float(shift.norm() / means.norm().clamp_min(torch.finfo(torch.float32).tiny))
