"""Weights rounded up or down so that the output of each layer, not each weight, comes out nearest: AdaRound.

Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020
(arXiv 2004.10568). Layer by layer, with asymmetric reconstruction (their equation 25 without activation function): the
target is the output of the float model, the input comes from the quantized layers before. With d the error of the
codes of one filter in steps of its scale s, x the quantized input of its patches, and r what the error of the input
leaves of the target:

    L(d) = E (r - s d x)^2 = s^2 d G d' - 2 s d c' + const,   G = E[x x'], c = E[r x]

so one pass of the data gives G and c, and the search needs no data. The bias is float and takes its best value for any
d: G and c are covariances, and what the means leave goes to the bias. The search is theirs: rectified sigmoids, pushed
to 0 or 1 by a regularizer whose exponent is annealed. Single codes that still lower L are then flipped until none does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qdq.accuracy.layerwise import (
    Product,
    Sample,
    add_to_bias,
    flatten_outputs,
    plan_layers,
    run_flat,
    sample_outputs,
    visit_products,
)
from qdq.errors import StateError
from qdq.forward import require_model
from qdq.metrics import Array, sqnr_db
from qdq.nn import QuantMixin
from qdq.quantizer import TensorQuantizer
from qdq.samples import join_batches

logger = logging.getLogger(__name__)

_GAMMA, _ZETA = -0.1, 1.1  # the sigmoid is stretched to this interval, then clamped to 0..1
_LEARNING_RATE = 3e-2
_WEIGHT = 0.1  # of the regularizer; 1 is the loss of random rounding
_WARM_UP = 0.2  # share of the steps without regularizer
_BETA = (20.0, 2.0)
_FIXED = 1e-3  # a weight this near to a code keeps it


@dataclass(frozen=True)
class RoundedLayer:
    """What became of the weight of one layer.

    Args:
        layer: Dotted name.
        changed: Share of the codes that are not the nearest, 0..1.
        error: Mean squared error of the output by that of nearest rounding, both with their best bias.
        reason: Why it was left alone; empty if it was not.
    """

    layer: str
    changed: float
    error: float
    reason: str = ""


@dataclass(frozen=True)
class Rounding:
    """Result of `round_weights`.

    Args:
        layers: The quantized layers with a weight, in the order in which they run; then those left alone.
        before_db: SQNR of the outputs against the float model's on the given batches, in dB.
        after_db: The same afterwards.
    """

    layers: tuple[RoundedLayer, ...]
    before_db: float
    after_db: float

    def format_table(self) -> str:
        """SQNR before and after, then what was left alone and why."""
        done = [layer for layer in self.layers if not layer.reason]
        changed = sum(layer.changed for layer in done) / max(len(done), 1)
        lines = [
            f"weights of {len(done)} layers rounded for their outputs, {changed:.1%} of the codes not to the nearest: "
            f"SQNR {self.before_db:.2f} to {self.after_db:.2f} dB"
        ]
        return "\n".join(
            lines + [f"  {layer.layer}: {layer.reason}" for layer in self.layers if layer.reason]
        )


def round_weights(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 300,
    seed: int = 0,
    reference: nn.Module | None = None,
) -> Rounding:
    """Replace every weight by the value of its learned code, and its bias by the best for it; in place.

    Nearest rounding of the new weight gives the learned code, so that saving, restoring and exporting need to
    know nothing. No code differs from the nearest by more than 1, and the ranges stay. A layer without a bias gets one,
    which a swapped model takes from a state dict, a float one does not. Ctrl-C between two layers keeps those that are
    done.

    Args:
        model: A calibrated model.
        batches: As for `calibrate_model`; they must be in memory at once. 64 images or more: a classifier has one
            position an image, and few of those say little about many weights.
        steps: Of the search in each layer.
        seed: Of the choice of positions.
        reference: The float model, for instance a copy made before `correct_bias` changed it. None: the model itself
            with its quantizers off.

    Returns:
        What was done, with the SQNR before and after.

    Raises:
        ArgumentTypeError: One tensor or dictionary instead of batches.
        DataError: No batch, or batches that differ in shape.
        StateError: No layer is quantized, one has no range, or the outputs hold NaN or Inf; in `torch.inference_mode`.
    """
    require_model(model)
    if torch.is_inference_mode_enabled():
        raise StateError(
            "in torch.inference_mode there are no gradients.", "round the weights outside of it."
        )
    inputs = join_batches(batches)
    plan = plan_layers(model, inputs)
    before = run_flat(model, inputs)
    samples, expected = sample_outputs(reference or model, plan, inputs, seed=seed)
    done, after = _round_in_order(model, plan.layers, samples, inputs, steps)
    done += [RoundedLayer(name, 0.0, 1.0, reason) for name, reason in plan.left.items()]
    return Rounding(tuple(done), sqnr_db(expected, before), sqnr_db(expected, after))


def _round_in_order(
    model: nn.Module,
    layers: dict[str, QuantMixin],
    samples: dict[str, Sample],
    inputs: Any,
    steps: int,
) -> tuple[list[RoundedLayer], Array]:
    """One quantized forward in which each layer is rounded while it runs; also gives the outputs of the model."""
    done: list[RoundedLayer] = []
    with tqdm(total=len(layers), desc="round weights", unit="layer", disable=None) as progress:

        def learn(name: str, _: nn.Module, product: Product) -> torch.Tensor:
            layer = layers[name]
            changed, error = _round_layer(layer, product, samples.pop(name), steps)
            done.append(RoundedLayer(name, changed, error))
            progress.update()
            return product.compute(
                weight=layer.weight_quantizer(layer._parameters["weight"]), bias=layer.bias
            )

        try:
            return done, flatten_outputs(visit_products(model, layers, inputs, learn))
        except KeyboardInterrupt:
            logger.warning(
                "stopped: %d of %d layers are rounded and stay so", len(done), len(layers)
            )
            raise


@torch.no_grad()
def _round_layer(
    layer: QuantMixin, product: Product, sample: Sample, steps: int
) -> tuple[float, float]:
    """Round the weight of one layer and correct its bias; share of changed codes and relative error."""
    weight = layer._parameters["weight"]
    assert weight is not None  # noqa: S101
    problem = _Problem(weight, layer.weight_quantizer, product, sample)
    codes = problem.descend(problem.relax(steps) if steps else problem.nearest)
    error = problem.loss(codes) / problem.loss(problem.nearest).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    shift = problem.best_shift(codes)
    weight.copy_((codes * problem.scale).reshape(weight.shape))
    add_to_bias(layer, shift)
    return float((codes != problem.nearest).float().mean()), float(error)


class _Problem:
    """The quadratic loss of the codes of one layer; tensors are `[groups, filters of a group, K]` if not said.

    Args:
        weight: The float weight.
        quantizer: Its quantizer.
        product: The call, with the quantized input.
        sample: Outputs of the float model.
    """

    def __init__(
        self, weight: torch.Tensor, quantizer: TensorQuantizer, product: Product, sample: Sample
    ) -> None:
        output = product.compute(weight=weight)
        found = product.rows_of(output)[sample.positions].float()
        x = product.patches_at(sample.positions, output.shape).float()  # [groups, N, K]
        groups, count, size = x.shape
        rest, live = (
            _by_group(rows, groups) for rows in (sample.rows - found, sample.weigh(found))
        )
        self._mean_x, self._mean_rest = live @ x, (live * rest).sum(-1)
        # few positions say little about many weights: what lies beside the diagonal counts less then
        shrink = count / (count + size)
        covariance = _covariance(x, live)
        self._diagonal = covariance.diagonal(dim1=1, dim2=2)[:, None]
        self._gram = covariance * shrink + torch.diag_embed(self._diagonal[:, 0] * (1 - shrink))
        cross = (live * rest) @ x - self._mean_rest[..., None] * self._mean_x
        self.scale = quantizer.scale.reshape(-1, 1).expand(len(weight), 1).reshape(groups, -1, 1)
        self._cross = shrink * cross / self.scale
        self._rest = (live * rest.square()).sum(-1) - self._mean_rest.square()
        self._ideal = (
            weight.float().reshape(groups, -1, size) / self.scale
        )  # the codes before rounding
        ends = max(quantizer.format.qmin, -quantizer.format.qmax), quantizer.format.qmax
        self.nearest = self._ideal.round().clamp(*ends)
        fixed = (
            self._ideal - self.nearest
        ).abs() < _FIXED  # the largest keeps its code, and so the range its value
        low = self._ideal.floor()
        self._low, self._high = (
            torch.where(fixed, self.nearest, bound.clamp(*ends)) for bound in (low, low + 1)
        )

    def loss(self, codes: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the output behind its best bias, summed over the filters."""
        error = codes - self._ideal
        added = ((error @ self._gram - 2 * self._cross) * error).sum(-1) * self.scale[
            ..., 0
        ].square()
        return (added + self._rest).sum()

    def best_shift(self, codes: torch.Tensor) -> torch.Tensor:
        """What the bias must gain so that the mean of the output is the float one, float64 `[Cout]`."""
        moved = ((codes - self._ideal) * self.scale).double() * self._mean_x.double()
        return (self._mean_rest.double() - moved.sum(-1)).flatten()

    def relax(self, steps: int) -> torch.Tensor:
        """The codes that rectified sigmoids reach (their equations 23 and 24)."""
        share = ((self._ideal - self._low) / (self._high - self._low).clamp_min(1)).clamp(0, 1)
        logits = torch.logit((share - _GAMMA) / (_ZETA - _GAMMA)).requires_grad_()
        optimizer = torch.optim.Adam([logits], _LEARNING_RATE)
        unit = (self._diagonal.mean(-1, keepdim=True) / 6).clamp_min(
            torch.finfo(torch.float32).tiny
        )
        span = self._high - self._low
        for step in range(steps):
            with torch.enable_grad():
                up = (torch.sigmoid(logits) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
                objective = (
                    up * self._gradient(self._low + up.detach() * span) * span / unit
                ).sum()
                if step >= _WARM_UP * steps:
                    objective = (
                        objective + _WEIGHT * (1 - (2 * up - 1).abs() ** _anneal(step, steps)).sum()
                    )
                (logits.grad,) = torch.autograd.grad(objective, logits)
            optimizer.step()
        return torch.where(torch.sigmoid(logits.detach()) > 0.5, self._high, self._low)

    def descend(self, codes: torch.Tensor) -> torch.Tensor:
        """Flip, in every filter, the code that lowers its loss most, until none does."""
        codes, group = codes.clone(), torch.arange(len(codes), device=codes.device)[:, None]
        slope = self._gradient(codes)
        tolerance = 1e-6 * self._diagonal.mean(-1)
        for _ in range(4 * codes.shape[-1]):
            flip = self._low + self._high - 2 * codes
            gain, index = (flip * slope + flip.square() * self._diagonal).min(-1)
            if not bool((gain < -tolerance).any()):
                break
            move = torch.where(gain < -tolerance, flip.gather(-1, index[..., None])[..., 0], 0.0)[
                ..., None
            ]
            codes.scatter_add_(-1, index[..., None], move)
            slope += 2 * move * self._gram[group, index]
        return codes

    def _gradient(self, codes: torch.Tensor) -> torch.Tensor:
        """Of the loss in units of the squared scale."""
        return 2 * ((codes - self._ideal) @ self._gram - self._cross)


def _anneal(step: int, steps: int) -> float:
    """The exponent, from the first value to the second along half a cosine."""
    done = (step - _WARM_UP * steps) / (steps * (1 - _WARM_UP))
    first, last = _BETA
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def _by_group(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """`[N, Cout]` as `[groups, filters of a group, N]`."""
    return rows.t().reshape(groups, -1, len(rows))


def _covariance(x: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Of the patches of each group, `[groups, K, K]`; by weight where a group is one filter, else all alike."""
    weight = live if live.shape[1] == 1 else torch.full_like(live[:, :1], 1 / x.shape[1])
    centered = (x - weight @ x) * weight.sqrt().transpose(1, 2)
    return centered.transpose(1, 2) @ centered
