"""How ranges change during fine-tuning: not at all, as averages, or learned (gradient: `quantize.fake_quantize`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from qdq.calibrate.collect import Collection, WeightSite
from qdq.calibrate.weights import solve_weight
from qdq.distributed import max_over_ranks
from qdq.errors import ArgumentError, StateError
from qdq.observers.max import reduce_amax
from qdq.quantize import RANGE_RULES
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.text import list_names

RANGE_METHODS = ("frozen", *RANGE_RULES, "ema")
_DECAY = 0.99  # of the moving average, as in torch.ao's observer for training


class RangeTuning:
    """The ranges of a model while they are tuned, until `stop`.

    "lsq" learns the ranges of inputs and weights (Esser et al., arXiv 1902.08153). "pact" learns those of inputs, from
    the clipped values (Choi et al., arXiv 1805.06085). The quantizers hold learned ranges as parameters. With "ema" the
    range of an input is the moving average of the largest value of each batch, and the range of a weight is its largest
    value (Jacob et al., CVPR 2018, arXiv 1712.05877). "frozen" changes no range.

    Args:
        model: A calibrated model.
        method: One of `RANGE_METHODS`.
        within: The modules whose quantizers are tuned; None: all. A shared range belongs to its first quantizer.

    Attributes:
        parameters: Parameters for the optimizer, by dotted name; empty after `stop`.
        of_inputs: The subset of `parameters` that are ranges of inputs; empty after `stop`.

    Raises:
        ArgumentError: An unknown method, or no quantizer is enabled.
        StateError: An enabled quantizer has no range.
    """

    def __init__(self, model: nn.Module, method: str, within: set[nn.Module] | None = None) -> None:
        require_range_method(method)
        require_ranges(model)
        if within is None:
            within = set(model.modules())
        self.parameters: dict[str, nn.Parameter] = {}
        self.of_inputs: set[nn.Parameter] = set()
        self._exits = ExitStack()
        self._largest: dict[TensorQuantizer, torch.Tensor] = {}
        self._quantizers = dict(named_quantizers(model))
        collection = Collection(model)
        self._weights = self._select_weights(collection, within)
        leaders = {
            name: leader
            for name, leader in collection.leaders.items()
            if self._quantizers[leader] in within
        }
        self._inputs = [self._quantizers[name] for name in dict.fromkeys(leaders.values())]
        self._follows_maxima = method == "ema"
        if method == "lsq":
            self._learn([*self._inputs, *self._weights], method)
        elif method in RANGE_RULES:
            self._learn(self._inputs, method)
        elif self._follows_maxima:
            for name, leader in leaders.items():
                self._watch(self._quantizers[name], self._quantizers[leader])

    def _select_weights(
        self, collection: Collection, within: set[nn.Module]
    ) -> dict[TensorQuantizer, WeightSite]:
        weights = {}
        for name, site in collection.weights.items():
            quantizer = self._quantizers[name]
            if quantizer in within:
                weights[quantizer] = site
        return weights

    def _learn(self, quantizers: Sequence[TensorQuantizer], method: str) -> None:
        """Turn ranges into parameters until `stop`."""
        names = {quantizer: name for name, quantizer in self._quantizers.items()}
        for quantizer in quantizers:
            parameter = quantizer.learn_range(method)
            self._exits.callback(quantizer.keep_range)
            self.parameters[f"{names[quantizer]}._log2_amax"] = parameter
            if quantizer not in self._weights:
                self.of_inputs.add(parameter)

    def _watch(self, quantizer: TensorQuantizer, leader: TensorQuantizer) -> None:
        """Remember the largest input of a quantizer in a step, for the quantizer that holds its range."""

        def remember(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if not torch.is_grad_enabled():  # the metric is being measured
                return
            largest = reduce_amax(inputs[0], leader.axis)
            if leader in self._largest:
                largest = torch.maximum(self._largest[leader], largest)
            self._largest[leader] = largest

        self._exits.callback(quantizer.register_forward_pre_hook(remember).remove)

    def require_finite(self) -> None:
        """Refuse maxima that are not finite, before anything is changed.

        Raises:
            StateError: A value of the step was NaN or Inf; the message names the quantizer.
        """
        for name, quantizer in self._quantizers.items():
            largest = self._largest.get(quantizer)
            if largest is not None and not bool(torch.isfinite(largest).all()):
                self._largest.clear()
                raise StateError(
                    f"{name} received NaN or Inf, and its range follows the values.",
                    "check the batch and the layer.",
                )

    def after_step(self) -> None:
        """With "ema", update the ranges from the values of the step."""
        if not self._follows_maxima:
            return
        maxima = self._gather_maxima()
        for quantizer, largest in zip(self._inputs, maxima, strict=True):
            amax = quantizer.amax
            assert amax is not None  # noqa: S101  # `require_ranges` has checked
            if largest.any():  # 0 if the step did not reach it
                quantizer.amax = _DECAY * amax + (1 - _DECAY) * largest.reshape(amax.shape)
        self._largest.clear()
        for quantizer, site in self._weights.items():
            quantizer.amax = solve_weight(site.label, site.weight, quantizer, "max")

    def _gather_maxima(self) -> Sequence[torch.Tensor]:
        """The largest values of the step over all processes, in one collective; 0 for ranges that it did not reach."""
        maxima = []
        for quantizer in self._inputs:
            assert quantizer.amax is not None  # noqa: S101
            largest = self._largest.get(quantizer, torch.zeros_like(quantizer.amax))
            maxima.append(largest.flatten())
        if not maxima:
            return ()
        sizes = [len(largest) for largest in maxima]
        return torch.split(max_over_ranks(torch.cat(maxima)), sizes)

    def stop(self) -> None:
        """Keep the current ranges, as buffers again; may be called more than once."""
        self._exits.close()
        self.parameters = {}
        self.of_inputs = set()
        self._follows_maxima = False


def require_range_method(method: str) -> None:
    """Refuse an unknown method.

    Raises:
        ArgumentError: The message names the known methods.
    """
    if method not in RANGE_METHODS:
        raise ArgumentError(
            f"unknown range method {method!r}; known are {', '.join(RANGE_METHODS)}.",
            "use 'frozen'.",
        )


def require_ranges(model: nn.Module) -> None:
    """Refuse a model with an enabled quantizer that has no range.

    Raises:
        StateError: The message names some of the quantizers.
    """
    missing = []
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled and quantizer.amax is None:
            missing.append(name)
    if missing:
        raise StateError(
            f"{len(missing)} quantizers have no range: {list_names(missing, 3)}.",
            "call calibrate_model first.",
        )


def describe_ranges(model: nn.Module) -> dict[str, float]:
    """The largest range of each enabled quantizer, by name."""
    ranges = {}
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled and quantizer.amax is not None:
            ranges[name] = float(quantizer.amax.max())
    return ranges
