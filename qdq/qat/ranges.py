"""Which ranges change during fine-tuning, and how: none, learned by gradient, or followed by a moving average."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from qdq.calibrate.collect import Collection
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

    "lsq" learns the ranges of inputs and weights (Esser et al., arXiv 1902.08153), "pact" those of inputs, by what they
    clip (Choi et al., arXiv 1805.06085); the quantizers hold them as parameters meanwhile. With "ema" the range of an
    input is the moving average of the largest value of each batch, and that of a weight its largest value (Jacob et
    al., CVPR 2018, arXiv 1712.05877). "frozen" changes none.

    Args:
        model: A calibrated model.
        method: One of `RANGE_METHODS`.
        within: The modules whose quantizers are tuned; None: all. A range that is shared belongs to the first of them.

    Attributes:
        parameters: What an optimizer has to learn, by dotted name; empty after `stop`.
        of_inputs: Those of them that are ranges of inputs; empty after `stop`.

    Raises:
        ArgumentError: Another method, or no quantizer is on.
        StateError: A quantizer that is on has no range.
    """

    def __init__(self, model: nn.Module, method: str, within: set[nn.Module] | None = None) -> None:
        require_range_method(method)
        require_ranges(model)
        within = set(model.modules()) if within is None else within
        self._names = quantizers = dict(named_quantizers(model))
        collection = Collection(model)
        self._weights = {
            quantizers[name]: (f"{layer}.{parameter}", module, parameter)
            for name, (layer, module, parameter) in collection.weights.items()
            if quantizers[name] in within
        }
        leaders = {
            name: leader
            for name, leader in collection.leaders.items()
            if quantizers[leader] in within
        }
        self._inputs = [quantizers[name] for name in dict.fromkeys(leaders.values())]
        self._exits = ExitStack()
        self.parameters: dict[str, nn.Parameter] = {}
        self.of_inputs: set[nn.Parameter] = set()
        self._largest: dict[TensorQuantizer, torch.Tensor] = {}
        self._follows = method == "ema"
        if method in RANGE_RULES:
            learned = [*self._inputs, *(self._weights if method == "lsq" else ())]
            names = {quantizer: name for name, quantizer in quantizers.items()}
            for quantizer in learned:
                self.parameters[f"{names[quantizer]}._log2_amax"] = parameter = (
                    quantizer.learn_range(method)
                )
                self._exits.callback(quantizer.keep_range)
                if quantizer not in self._weights:
                    self.of_inputs.add(parameter)
        elif self._follows:
            for name, leader in leaders.items():
                self._watch(quantizers[name], quantizers[leader])

    def _watch(self, quantizer: TensorQuantizer, leader: TensorQuantizer) -> None:
        """Keep the largest value that a step shows to a quantizer, for the one that has its range."""

        def see(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if torch.is_grad_enabled():  # not while the metric is measured
                largest = reduce_amax(inputs[0], leader.axis)
                known = self._largest.get(leader)
                self._largest[leader] = largest if known is None else torch.maximum(known, largest)

        self._exits.callback(quantizer.register_forward_pre_hook(see).remove)

    def require_finite(self) -> None:
        """Refuse what no range can follow, before anything is changed.

        Raises:
            StateError: A value of the step was NaN or Inf, with the quantizer.
        """
        bad = {q for q, largest in self._largest.items() if not bool(torch.isfinite(largest).all())}
        if bad:
            self._largest.clear()
            name = next(name for name, quantizer in self._names.items() if quantizer in bad)
            raise StateError(
                f"{name} was given NaN or Inf, and its range follows.",
                "look at the batch and the layer.",
            )

    def after_step(self) -> None:
        """Have ranges follow what the step has shown, where they do."""
        if not self._follows:
            return
        ranges = [amax for quantizer in self._inputs if (amax := quantizer.amax) is not None]
        for quantizer, amax, largest in zip(
            self._inputs, ranges, self._share_largest(ranges), strict=True
        ):
            if largest.any():  # else the step did not reach it
                quantizer.amax = _DECAY * amax + (1 - _DECAY) * largest.reshape(amax.shape)
        self._largest.clear()
        for quantizer, (label, layer, parameter) in self._weights.items():
            weight = layer._parameters[parameter]
            assert weight is not None  # noqa: S101
            quantizer.amax = solve_weight(label, weight, quantizer, "max")

    def _share_largest(self, ranges: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The largest values of the step over all processes, 0 where it did not reach; one collective for all."""
        own = [
            self._largest.get(q, torch.zeros_like(a)).flatten()
            for q, a in zip(self._inputs, ranges, strict=True)
        ]
        return (
            torch.split(max_over_ranks(torch.cat(own)), [len(each) for each in own]) if own else ()
        )

    def stop(self) -> None:
        """Leave every range as it is now, a buffer as before; may be called again."""
        self._exits.close()
        self.parameters, self.of_inputs, self._follows = {}, set(), False


def require_range_method(method: str) -> None:
    """Refuse an unknown method.

    Raises:
        ArgumentError: With the known ones.
    """
    if method not in RANGE_METHODS:
        raise ArgumentError(
            f"unknown range method {method!r}; known are {', '.join(RANGE_METHODS)}.",
            "use 'frozen'.",
        )


def require_ranges(model: nn.Module) -> None:
    """Refuse a model of which a quantizer that is on has no range.

    Raises:
        StateError: With the names of some.
    """
    without = [name for name, q in named_quantizers(model) if q.is_enabled and q.amax is None]
    if without:
        found = f"{len(without)} quantizers have no range: {list_names(without, 3)}."
        raise StateError(found, "call calibrate_model first.")


def describe_ranges(model: nn.Module) -> dict[str, Any]:
    """Largest range of each quantizer that is on, by its name."""
    return {
        name: float(quantizer.amax.max())
        for name, quantizer in named_quantizers(model)
        if quantizer.is_enabled and quantizer.amax is not None
    }
