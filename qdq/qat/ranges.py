"""How ranges change during fine-tuning: not at all, as averages, or learned (gradient: `quantize.fake_quantize`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from qdq.calibrate.collect import Collection, WeightSite
from qdq.distributed import max_over_ranks
from qdq.errors import ArgumentError, StateError
from qdq.observers.max import reduce_amax
from qdq.quantize import RANGE_RULES, find_range_axis
from qdq.quantizer import TensorQuantizer, named_quantizers
from qdq.text import list_names

RANGE_METHODS = ("frozen", *RANGE_RULES, "ema", "none")
_DECAY = 0.99  # of the moving average, as in torch.ao's observer for training


class RangeTuning:
    """The ranges of a model while they are tuned, until `stop`.

    "lsq" learns the ranges of inputs and weights (Esser et al., arXiv 1902.08153). "pact" learns those of inputs, from
    the clipped values (Choi et al., arXiv 1805.06085). The quantizers hold learned ranges as parameters. With "ema" the
    range of an input is the moving average of the largest value of each batch, and the range of a weight is its largest
    value (Jacob et al., CVPR 2018, arXiv 1712.05877). "frozen" changes no range. "none" is for models
    without ranges: those of another number system, see `qdq.systems`.

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
        collection = Collection(model, may_be_empty=method == "none")
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

    def find_largest(self, device: torch.device) -> torch.Tensor:
        """With "ema", the largest value of the step in this process, 0-D; NaN or Inf if a range would become so.

        Args:
            device: Where the result is 0 if there is no value.
        """
        maxima = [largest.flatten() for largest in self._largest.values()]
        if not maxima:
            return torch.zeros((), device=device)
        return torch.cat(maxima).max()

    def explain_nonfinite(self) -> StateError:
        """The error of a step with NaN or Inf among the values that ranges follow; it names the quantizer."""
        nonfinite = []
        for name, quantizer in self._quantizers.items():
            largest = self._largest.get(quantizer)
            if largest is not None and not bool(torch.isfinite(largest).all()):
                nonfinite.append(name)
        return StateError(
            f"{nonfinite[0]} received NaN or Inf, and its range follows the values.",
            "check the batch and the layer.",
        )

    def begin_step(self) -> None:
        """Forget the values of a step that was not finished."""
        self._largest.clear()

    @torch.no_grad()
    def after_step(self) -> None:
        """With "ema", update the ranges from the values of the step."""
        if not self._follows_maxima:
            return
        self._follow_inputs()
        for quantizer, site in self._weights.items():
            _replace_range(quantizer, reduce_amax(site.weight, quantizer.axis))

    def _follow_inputs(self) -> None:
        """Move the ranges of inputs towards the largest values of the step over all processes."""
        if not self._inputs:
            return
        ranges = []
        maxima = []
        for quantizer in self._inputs:
            assert quantizer.amax is not None  # noqa: S101  # `require_ranges` has checked
            largest = self._largest.get(quantizer, torch.zeros_like(quantizer.amax))
            ranges.append(quantizer.amax.flatten())
            maxima.append(largest.flatten())
        sizes = [len(largest) for largest in maxima]
        former = torch.cat(ranges)
        largest = max_over_ranks(torch.cat(maxima))
        moved = _DECAY * former + (1 - _DECAY) * largest
        moved = torch.where(_is_any(largest, sizes), moved, former)
        for quantizer, amax in zip(self._inputs, torch.split(moved, sizes), strict=True):
            assert quantizer.amax is not None  # noqa: S101
            _replace_range(quantizer, amax.reshape(quantizer.amax.shape))

    def stop(self) -> None:
        """Keep the current ranges, as buffers again; may be called more than once."""
        self._exits.close()
        self.parameters = {}
        self.of_inputs = set()
        self._follows_maxima = False


def _is_any(values: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Whether any value of a part is not 0, for each value of the part: a step that reached its range has some.

    Args:
        values: The values of all parts, 1-D.
        sizes: Their lengths.
    """
    is_any = values != 0
    if len(sizes) == len(values):
        return is_any
    return torch.cat([part.any().expand_as(part) for part in torch.split(is_any, sizes)])


def _replace_range(quantizer: TensorQuantizer, amax: torch.Tensor) -> None:
    """Change a range in its buffer if it fits; the setter also checks the values, and so waits for a GPU."""
    former = quantizer.amax
    assert former is not None  # noqa: S101  # `require_ranges` has checked
    has_same_axis = find_range_axis(amax, quantizer.axis) == quantizer.range_axis
    if has_same_axis and former.numel() == amax.numel() and not former.is_inference():
        former.copy_(amax.reshape(former.shape))
    else:
        quantizer.amax = amax


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
    names = []
    ranges = []
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled and quantizer.amax is not None:
            names.append(name)
            ranges.append(quantizer.amax.detach().max())
    if not names:
        return {}
    return dict(zip(names, torch.stack(ranges).tolist(), strict=True))
