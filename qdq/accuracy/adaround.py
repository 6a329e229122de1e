"""AdaRound: rounds weights up or down so that the output of each layer, not each weight, has the least error.

Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020
(arXiv 2004.10568), layer by layer. The target is the output of the float model, and the input comes from the quantized
layers before. With W the weights, x the quantized input of a patch and r = y - W x the residual on this input:

1. The target weights are W + m, with the least squares m = argmin E (r - m x)^2 + p g |m|^2, G = E[x x'] and g the
   mean of its diagonal. So a layer makes up for the noise in its input, and the weight of an input that hardly varies
   stays. The penalty p is the one with the least error on the last quarter of the samples; m is 0 if none helps, and
   for filters of many weights. No move of any layer is fitted to that quarter: else the noise of the layers before
   would be smaller there than on new samples, and each layer would follow residuals of the few images of a calibration.
2. With d the error of the codes of a filter against W + m, in steps of its scale s, the loss L(d) = s^2 d G d' needs no
   data. Single codes are flipped as long as that lowers L: greedy coordinate descent (CDQuant, Nair and Suggala, 2024,
   arXiv 2406.17542). It begins at the nearest codes, and again at those of mean field annealing (Bilbro et al., NIPS
   1988). For each filter, the codes with the lower loss count. The rectified sigmoids of the paper, 300 steps of Adam
   before the same descent, end no lower on EfficientNet-Lite0 and need several times the time.

The bias is float and has its best value for any codes, so G is a covariance, and the bias absorbs the means.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from qdq.accuracy.code_choice import Neighbors, clamp_codes
from qdq.accuracy.layerwise import (
    HELD_OUT,
    LayerPlan,
    Product,
    Sample,
    add_to_bias,
    flatten_outputs,
    format_change,
    measure_change,
    plan_layers,
    run_flat,
    sample_outputs,
    visit_products,
)
from qdq.batch import join_batches
from qdq.corrections import AccuracyPass, record_pass, redo_passes, undoing_passes
from qdq.device import read_numbers, without_tf32
from qdq.errors import StateError
from qdq.forward import require_model
from qdq.nn import QuantMixin
from qdq.nn.scaling import is_shifted, shift_of_mean
from qdq.outputs import Mask, OutputView, Selection
from qdq.quantizer import TensorQuantizer
from qdq.run import require_seed

logger = logging.getLogger(__name__)

_ANNEALING_STEPS = 100
_TEMPERATURES = (0.3, 0.05)  # first and last, relative to the mean energy of the input
_DAMPING = 0.15  # how far a probability moves to its new value in a step
_TOLERANCE = 1e-6  # smallest gain of a flip, relative to the mean energy of the input
_PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
_MOST_WEIGHTS = 256  # of a filter whose weights are moved; more would follow the few samples
_TINY = torch.finfo(torch.float32).tiny


# On a GPU, each check whether the flips have ended waits for it. So the first is after so many flips that most layers
# need fewer, and each further one after twice as many. Flips after the end change nothing.
_UNCHECKED_FLIPS = 64
_UNCHECKED_FRACTION = 0.5  # of the weights of a filter


@dataclass(frozen=True)
class RoundedLayer:
    """Result for the weight of one layer.

    Args:
        layer: Dotted name.
        changed: Fraction of the codes that are not the nearest, 0..1.
        error: Mean squared error of the output relative to nearest rounding, both with their best bias.
        reason: Why it was skipped; empty if it was rounded.
    """

    layer: str
    changed: float
    error: float
    reason: str = ""


@dataclass(frozen=True)
class Rounding:
    """Result of `round_weights`.

    Args:
        layers: The quantized layers with a weight, in the order in which they run; then the skipped ones.
        before_db: SQNR of the outputs against the float model on the same batches, before the rounding, in dB; of
            several outputs, that of the worst.
        after_db: The same after the rounding.
        outputs: Name -> SQNR before and after, if there are several outputs.
    """

    layers: tuple[RoundedLayer, ...]
    before_db: float
    after_db: float
    outputs: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def format_table(self) -> str:
        """SQNR before and after, then the skipped layers and the reasons."""
        rounded = [layer for layer in self.layers if not layer.reason]
        changed = sum(layer.changed for layer in rounded) / max(len(rounded), 1)
        lines = [
            f"weights of {len(rounded)} layers rounded for their outputs, "
            f"{changed:.1%} of the codes not to the nearest: "
            f"SQNR {self.before_db:.2f} to {self.after_db:.2f} dB"
        ]
        lines += format_change(self.outputs)
        for layer in self.layers:
            if layer.reason:
                lines.append(f"  {layer.layer}: {layer.reason}")
        return "\n".join(lines)


@without_tf32()
def round_weights(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    reference: nn.Module | None = None,
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> Rounding:
    """Replace every weight by the value of its learned code, and every bias by the best one for it; in place.

    Nearest rounding of the new weight gives the learned code, so saving and exporting work as before. The ranges
    do not change. A layer without a bias gets one, which a swapped
    model accepts in a state dict and a float model does not. On a GPU, everything runs without TF32.

    The layers keep their float weights and biases, and use them while they are not quantized. If ranges or the choice
    of float layers change later, the rounding is done again (`qdq.corrections`). If biases were corrected before, they
    are corrected again at the end. After Ctrl-C, the layers that are done stay rounded.

    Args:
        model: A calibrated model.
        batches: As for `calibrate_model`; they must fit in memory together. Use 64 images or more: the last layer of a
            classifier has one position per image, and a few positions do not determine many weights. The last quarter
            judges how much noise the weights may make up for. So samples of one origin (cuts of one photograph) must
            follow each other, and should not be in that quarter and before it.
        seed: Seed of the random positions.
        reference: The float model. None: the model itself with its quantizers off and its float weights.
        outputs: Parts of the outputs to report, as for `predictor.predict`; None for all.
        mask: What leaves padding out, as for `predictor.predict`: out of these figures, and out of the outputs of each
            layer that the mask fits.

    Returns:
        The rounded and the skipped layers, with the SQNR before and after.

    Raises:
        ArgumentError: A reference with other layers, an unknown output, or a seed out of range.
        ArgumentTypeError: One tensor or dictionary instead of batches, or a seed that is no integer.
        DataError: No batch, or batches that differ in shape.
        StateError: No layer is quantized, one has no range, or the outputs hold NaN or Inf.
    """
    require_model(model)
    require_seed(seed)
    inputs = join_batches(batches)
    view = OutputView(outputs, mask)
    again = partial(
        round_weights,
        batches=[inputs],
        seed=seed,
        reference=reference,
        outputs=outputs,
        mask=mask,
    )
    with undoing_passes(model, "round_weights") as later:
        plan = leave_out_fp8(plan_layers(model, inputs))
        outputs_before = run_flat(model, inputs, view)
        samples, expected = sample_outputs(reference or model, plan, inputs, view, seed=seed)
        for layer in plan.layers.values():
            layer.keep_float()
        record_pass(model, AccuracyPass("round_weights", again))
        layers, rounded_outputs = _round_in_order(model, plan.layers, samples, inputs)
        redo_passes(model, later)
    for name, reason in plan.skipped.items():
        layers.append(RoundedLayer(name, 0.0, 1.0, reason))
    outputs_after = flatten_outputs(rounded_outputs, inputs, view)
    change = measure_change(expected, outputs_before, outputs_after)
    return Rounding(layers=tuple(layers), **vars(change))


def _round_in_order(
    model: nn.Module,
    layers: dict[str, QuantMixin],
    samples: dict[str, Sample],
    inputs: Any,
) -> tuple[list[RoundedLayer], Any]:
    """Round each layer while it runs, in one quantized forward.

    Returns:
        The rounded layers, and the outputs of the model.
    """
    results: dict[str, _LayerResult] = {}
    with tqdm(total=len(layers), desc="round weights", unit="layer", disable=None) as progress:

        def learn(name: str, _: nn.Module, product: Product) -> torch.Tensor:
            layer = layers[name]
            results[name] = _round_layer(layer, product, samples.pop(name))
            progress.update()
            weight = layer.weight_quantizer(layer._parameters["weight"])
            return product.compute(weight=weight, bias=layer._parameters["bias"])

        try:
            outputs = visit_products(model, layers, inputs, learn)
        except KeyboardInterrupt:
            logger.warning(
                "stopped: %d of %d layers are rounded and stay so", len(results), len(layers)
            )
            raise
    changed = [result.changed for result in results.values()]
    errors = [result.error for result in results.values()]
    numbers = read_numbers(changed + errors)
    rounded = map(RoundedLayer, results, numbers[: len(results)], numbers[len(results) :])
    return list(rounded), outputs


class _LayerResult(NamedTuple):
    """Fraction of the changed codes of a layer, and its error relative to nearest rounding, on its device."""

    changed: torch.Tensor
    error: torch.Tensor


@torch.no_grad()
def _round_layer(layer: QuantMixin, product: Product, sample: Sample) -> _LayerResult:
    """Round the weight of one layer and correct its bias."""
    weight = layer._parameters["weight"]
    assert weight is not None  # noqa: S101
    problem = _Problem(weight, layer.weight_quantizer, product, sample)
    codes = problem.solve()
    error = problem.loss(codes) / problem.loss(problem.nearest).clamp_min(_TINY)
    shift = problem.best_shift(codes)
    # The bias followed the rounding of the former weight; the new one is not rounded further.
    if is_shifted(layer):
        shift = shift + shift_of_mean(layer, layer.weight_quantizer(weight))
    weight.copy_((codes * problem.scale).reshape(weight.shape))
    add_to_bias(layer, shift)
    changed = (codes != problem.nearest).float().mean()
    return _LayerResult(changed, error)


def leave_out_fp8(plan: LayerPlan) -> LayerPlan:
    """A plan whose layers have weights with integer codes; FP8 weights keep their nearest code.

    Raises:
        StateError: All weights are FP8.
    """
    layers = {}
    skipped = dict(plan.skipped)
    for name, layer in plan.layers.items():
        if layer.weight_quantizer.format.is_float:
            skipped[name] = "its weight is FP8: only codes with equal steps are learned"
        else:
            layers[name] = layer
    if plan.layers and not layers:
        raise StateError(
            "all weights are FP8, and only codes with equal steps are learned.",
            "leave this pass out; FP8 gains little from it.",
        )
    return replace(plan, layers=layers, skipped=skipped)


class _Problem:
    """The quadratic loss of the codes of one layer.

    Tensors are `[groups, filters of a group, K]` unless a comment says otherwise.

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
        all_rows = product.rows_of(output)
        rows = all_rows[sample.positions].float()
        patches = product.patches_at(sample.positions, output.shape)
        x = patches.float().contiguous()  # [groups, N, K]
        groups, count, size = x.shape
        residual = _by_group(sample.rows - rows, groups)
        live = _by_group(sample.weigh(rows), groups)
        self._mean_x = live @ x
        self._mean_residual = (live * residual).sum(-1)

        self.scale = quantizer.scale.reshape(-1, 1).expand(len(weight), 1).reshape(groups, -1, 1)
        self._weight = weight.float().reshape(groups, -1, size)

        # Several filters of a group share their covariance, so only the importance of the rows counts for them.
        counted = live
        if live.shape[1] > 1:
            counted = (sample.importance / sample.importance.sum()).expand_as(live[:, :1])
        move = torch.zeros_like(self._weight)
        if size <= _MOST_WEIGHTS:
            num_fitted = len(output) - len(output) // HELD_OUT
            positions_of_sample = len(all_rows) // len(output)
            is_held = sample.positions >= num_fitted * positions_of_sample
            # Weights of 0, not an index of rows: on a GPU that would wait.
            fitted = _Moments.of_rows(x, residual, counted * ~is_held)
            judged = _Moments.of_rows(x, residual, counted * is_held)
            move = _choose_move(_LeastSquares(fitted), _LeastSquares(judged))
            fit = _LeastSquares(fitted + judged)
        else:
            fit = _LeastSquares(_Moments.of_rows(x, residual, counted))
        self._residual_error = fit.error(move)

        # A few samples do not determine many weights: then the elements off the diagonal count less. Pixels of an image
        # are too much alike to count as samples, tokens are not.
        num_samples = count
        if product.function is not F.linear:
            num_samples = min(count, len(product.arguments["input"]))
        shrink = num_samples / (num_samples + size)
        self._diagonal = fit.covariance.diagonal(dim1=1, dim2=2)[:, None]
        self._gram = fit.covariance * shrink + torch.diag_embed(self._diagonal[:, 0] * (1 - shrink))

        self._ideal = (self._weight + move) / self.scale  # before rounding
        self._neighbors = Neighbors.of(self._ideal, quantizer.format)
        self.nearest = clamp_codes((self._weight / self.scale).round(), quantizer.format)

    def loss(self, codes: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the output with its best bias, summed over the filters."""
        added = self._rounding_loss(codes) * self.scale[..., 0].square()
        return (added + self._residual_error).sum()

    def best_shift(self, codes: torch.Tensor) -> torch.Tensor:
        """The change of the bias that gives the output the mean of the float output, float64 `[Cout]`."""
        change = codes * self.scale - self._weight
        moved = change.double() * self._mean_x.double()
        return (self._mean_residual.double() - moved.sum(-1)).flatten()

    def solve(self) -> torch.Tensor:
        """The codes that the descent ends at, for each filter the better ones of two starts."""
        nearest = self._neighbors.nearest
        # Annealing may end at worse codes than the nearest. The descent would be long if it started there.
        annealed = self._choose(nearest, self._anneal())
        # Both at once: on a GPU, each descent waits.
        from_nearest, from_annealed = self._descend(torch.stack([nearest, annealed]))
        return self._choose(from_nearest, from_annealed)

    def _choose(self, codes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """For each filter, the codes with the lower loss."""
        is_better = self._rounding_loss(others) < self._rounding_loss(codes)
        return torch.where(is_better[..., None], others, codes)

    def _anneal(self) -> torch.Tensor:
        """The codes of mean field annealing.

        Each code is the upper one with a probability, which follows from what a flip would cost if the others had the
        mean of their probabilities. With falling temperature the probabilities go to 0 or 1. If inputs are nearly the
        same, they may swing between both in spite of the damping. Then the codes are worse than the nearest ones.
        """
        low, span = self._neighbors.low, self._neighbors.span
        unit = self._diagonal.mean(-1, keepdim=True).clamp_min(_TINY)
        probability = ((self._ideal - low) / span.clamp_min(1)).clamp(0, 1)
        first, last = _TEMPERATURES
        for step in range(_ANNEALING_STEPS):
            temperature = first * (last / first) ** (step / (_ANNEALING_STEPS - 1))
            slope = self._gradient(low + probability * span)
            # The loss of the upper code minus that of the lower one; the span is 1 or 0.
            cost = span * (slope + self._diagonal * (1 - 2 * probability))
            wanted = torch.sigmoid(-cost / (temperature * unit))
            probability = probability.lerp(wanted, _DAMPING)
        return torch.where(probability > 0.5, self._neighbors.high, low)

    def _descend(self, codes: torch.Tensor) -> torch.Tensor:
        """In every filter, flip the code that lowers the loss most, until no flip lowers it.

        Args:
            codes: The starts, `[starts, groups, filters of a group, K]`.
        """
        codes = codes.clone()
        group = torch.arange(len(self._gram), device=codes.device)[:, None]
        slope = self._gradient(codes)
        tolerance = _TOLERANCE * self._diagonal.mean(-1)
        is_on_cpu = codes.device.type == "cpu"
        size = codes.shape[-1]
        next_check = 0
        if not is_on_cpu:
            next_check = max(_UNCHECKED_FLIPS, int(_UNCHECKED_FRACTION * size))
        for num_flips in range(4 * size):
            flip = self._neighbors.flip(codes)
            change, index = (flip * slope + flip.square() * self._diagonal).min(-1)
            is_better = change < -tolerance
            if num_flips == next_check:
                if not bool(is_better.any()):
                    break
                next_check = num_flips + 1 if is_on_cpu else 2 * num_flips
            best_flip = flip.gather(-1, index[..., None])[..., 0]
            move = torch.where(is_better, best_flip, 0.0)[..., None]
            codes.scatter_add_(-1, index[..., None], move)
            slope += 2 * move * self._gram[group, index]
        return codes

    def _rounding_loss(self, codes: torch.Tensor) -> torch.Tensor:
        """What the rounding adds to the loss of each filter, in units of the squared scale.

        Returns:
            `[groups, filters of a group]`. A scale of a weight near 0 has no square in float32.
        """
        error = codes - self._ideal
        return (error @ self._gram * error).sum(-1)

    def _gradient(self, codes: torch.Tensor) -> torch.Tensor:
        """Gradient of the loss in units of the squared scale."""
        return 2 * (codes - self._ideal) @ self._gram


@dataclass(frozen=True)
class _Moments:
    """Weighted means and central moments of some rows, from which those of more rows follow.

    Args:
        weight: Sum of the weights, `[groups, 1, 1]`.
        x: Mean of the inputs, `[groups, 1, K]`.
        residual: Mean of the residual, `[groups, filters of a group, 1]`.
        x_x: Sums of the products of two inputs, without their means, `[groups, K, K]`.
        residual_x: The same of residual and input, `[groups, filters of a group, K]`.
        residual_residual: The same of the squares of the residual, `[groups, filters of a group]`.
    """

    weight: torch.Tensor
    x: torch.Tensor
    residual: torch.Tensor
    x_x: torch.Tensor
    residual_x: torch.Tensor
    residual_residual: torch.Tensor

    @classmethod
    def of_rows(cls, x: torch.Tensor, residual: torch.Tensor, counted: torch.Tensor) -> _Moments:
        """The moments of rows.

        Args:
            x: Quantized inputs of the patches, `[groups, N, K]`.
            residual: What the float weights leave, `[groups, filters of a group, N]`.
            counted: Weight of each row, `[groups, 1, N]`.
        """
        weight = counted.sum(-1, keepdim=True)
        share = counted / weight.clamp_min(_TINY)
        mean_x = share @ x
        mean_residual = (share * residual).sum(-1, keepdim=True)
        root = counted.sqrt()
        rooted_x = (x - mean_x).mul_(root.transpose(1, 2))
        rooted_residual = (residual - mean_residual).mul_(root)
        return cls(
            weight=weight,
            x=mean_x,
            residual=mean_residual,
            x_x=rooted_x.transpose(1, 2) @ rooted_x,
            residual_x=rooted_residual @ rooted_x,
            residual_residual=rooted_residual.square().sum(-1),
        )

    def __add__(self, other: _Moments) -> _Moments:
        """The moments of both sets of rows (Chan, Golub, LeVeque, 1979: no sums that cancel)."""
        weight = self.weight + other.weight
        share = other.weight / weight.clamp_min(_TINY)
        distance_x = other.x - self.x
        distance_residual = other.residual - self.residual
        between = self.weight * share
        squared_distance = distance_residual[..., 0].square()
        return _Moments(
            weight=weight,
            x=self.x + share * distance_x,
            residual=self.residual + share * distance_residual,
            x_x=self.x_x + other.x_x + between * distance_x.transpose(1, 2) @ distance_x,
            residual_x=self.residual_x
            + other.residual_x
            + between * distance_residual @ distance_x,
            residual_residual=self.residual_residual
            + other.residual_residual
            + between[..., 0] * squared_distance,
        )


class _LeastSquares:
    """Moves of the weights that lower the residual, fitted to some rows.

    Args:
        moments: Of these rows.

    Attributes:
        covariance: Of the inputs, `[groups, K, K]`.
    """

    def __init__(self, moments: _Moments) -> None:
        weight = moments.weight.clamp_min(_TINY)
        self.covariance = moments.x_x / weight
        self._cross = moments.residual_x / weight
        self._variance = moments.residual_residual / weight[..., 0]

    def error(self, move: torch.Tensor) -> torch.Tensor:
        """Mean squared residual of each filter with its best bias, `[groups, filters of a group]`.

        Args:
            move: Change of the weights, `[groups, filters of a group, K]`.
        """
        return self._variance + ((move @ self.covariance - 2 * self._cross) * move).sum(-1)

    def solve(self, penalties: Sequence[float]) -> list[torch.Tensor]:
        """The best move for each penalty.

        Args:
            penalties: Relative to the mean variance of the inputs, so that the weight of an input that hardly varies
                stays where it is.
        """
        variance = self.covariance.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(_TINY)
        values, vectors = torch.linalg.eigh(self.covariance.double())
        rotated = self._cross.double() @ vectors
        moves = []
        for penalty in penalties:
            added = penalty * variance[:, None, None]
            shrunk = rotated / (values.clamp_min(0)[:, None] + added)
            moves.append((shrunk @ vectors.transpose(1, 2)).float())
        return moves


def _choose_move(fitted: _LeastSquares, judged: _LeastSquares) -> torch.Tensor:
    """The move with the penalty that has the least error on rows that it was not fitted to.

    Args:
        fitted: The rows that moves are fitted to.
        judged: The rows that judge.

    Returns:
        The move; 0 if no penalty lowers the error.
    """
    moves = fitted.solve(_PENALTIES)
    candidates = [torch.zeros_like(moves[0]), *moves]
    errors = torch.stack([judged.error(move).sum() for move in candidates])
    # Not indexed by a number: on a GPU that would wait.
    return torch.stack(candidates).index_select(0, errors.argmin()[None])[0]


def _by_group(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """`[N, Cout]` as `[groups, filters of a group, N]`."""
    return rows.t().reshape(groups, -1, len(rows))
