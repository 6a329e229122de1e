"""`best`: for each range, the method with the smallest error of the layer's output on held-out data."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from qdq.batch import floats_of
from qdq.calibrate.collect import Collection
from qdq.device import copy_to_host, without_tf32
from qdq.distributed import failing_together, gather_bytes
from qdq.errors import CalibrationError
from qdq.forward import call_model, evaluating
from qdq.nn import QuantInputMixin
from qdq.nn.functions import run_again
from qdq.quantize import fake_quantize
from qdq.quantizer import TensorQuantizer, disable_until_exit

Candidates = Mapping[str, Mapping[str, float]]
"""Name of the quantizer that holds the range -> method -> amax."""

_Hook = Callable[..., None]


def select_methods(
    collection: Collection, candidates: Candidates, held_out: list[Any]
) -> dict[str, str]:
    """Try every candidate range on the layers that use it, in one forward of the float model.

    The error of a layer is the squared difference between its float output and its output with this input and its
    weights quantized, divided by the square of the float output. For a quantizer outside of any layer, it is the error
    of the tensor itself. The errors of layers that share a range are added.

    Args:
        collection: The quantizers of a model; the ranges of weights are set.
        candidates: The ranges to choose from; of equally good ones, the first is chosen.
        held_out: Batches; with several processes each gives its own, and the errors are added.

    Returns:
        Name -> method, without the ranges that no batch reached.

    Raises:
        CalibrationError: NaN or Inf in an output.
    """
    trials = _Trials(collection, candidates)
    with ExitStack() as exits:
        exits.enter_context(failing_together())
        disable_until_exit(collection.quantizers.values(), exits)
        exits.enter_context(evaluating(collection.model))
        exits.enter_context(without_tf32())
        exits.enter_context(trials.watching())
        for batch in held_out:
            call_model(collection.model, batch)
            trials.end_batch()
        errors_of_batches = trials.read_errors()
    errors = _sum_over_processes(errors_of_batches)
    _require_finite(errors)

    methods = {}
    for name, amaxes in candidates.items():
        if all((name, method) in errors for method in amaxes):
            error_of_method = {method: errors[name, method] for method in amaxes}
            methods[name] = min(error_of_method, key=error_of_method.__getitem__)
    return methods


def _sum_over_processes(
    errors: Mapping[tuple[str, str], list[float]],
) -> dict[tuple[str, str], float]:
    """The sums of the errors of all processes; the same result in each."""
    rows = [[*key, terms] for key, terms in errors.items()]
    collected: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for part in gather_bytes(json.dumps(rows).encode()):
        for name, method, terms in json.loads(part):
            collected[name, method] += terms
    return {key: math.fsum(terms) for key, terms in collected.items()}


def _require_finite(errors: Mapping[tuple[str, str], float]) -> None:
    """Refuse errors that are NaN or Inf, with which no method can be chosen."""
    broken = {name for (name, _), error in errors.items() if not math.isfinite(error)}
    if broken:
        raise CalibrationError(
            f"the held-out batches give NaN or Inf after {', '.join(sorted(broken)[:3])}, "
            "so no method can be chosen.",
            "run the float model on them: either the data or an earlier layer is broken.",
        )


class _Trials:
    """Hooks that quantize with every candidate range, while the model continues with the float values."""

    def __init__(self, collection: Collection, candidates: Candidates) -> None:
        self._collection = collection
        self._candidates = candidates
        # By device: the range and the method of each trial, and its sums, float64 `[T, 2]` in parts.
        self._keys: defaultdict[torch.device, list[tuple[str, str]]] = defaultdict(list)
        self._sums: defaultdict[torch.device, list[torch.Tensor]] = defaultdict(list)
        # A layer under trial may call layers inside it; their hooks must do nothing then.
        self._is_busy = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook all layers, and the quantizers outside of any layer, in the block."""
        remaining = {}
        for name, leader in self._collection.leaders.items():
            if leader in self._candidates:
                remaining[self._collection.collecting[name]] = name

        with ExitStack() as exits:
            for layer in self._collection.layers.values():
                inputs, weights = self._split_quantizers(layer)
                for quantizer in inputs.values():
                    remaining.pop(quantizer, None)
                if inputs:
                    layer_hook = self._make_layer_hook(inputs, weights)
                    handle = layer.register_forward_hook(layer_hook, with_kwargs=True)
                    exits.callback(handle.remove)
            for quantizer, name in remaining.items():
                handle = quantizer.register_forward_hook(self._make_tensor_hook(name))
                exits.callback(handle.remove)
            yield

    def _split_quantizers(
        self, layer: QuantInputMixin
    ) -> tuple[dict[str, TensorQuantizer], list[TensorQuantizer]]:
        """The quantizers of a layer that have candidates, by name, and its enabled weight quantizers."""
        inputs = {}
        weights = []
        for quantizer in layer.quantizers().values():
            name = self._collection.names[quantizer]
            if name in self._collection.weights:
                weights.append(quantizer)
            elif self._collection.leaders.get(name) in self._candidates:
                inputs[name] = quantizer
        return inputs, weights

    def _make_layer_hook(
        self, inputs: Mapping[str, TensorQuantizer], weights: list[TensorQuantizer]
    ) -> _Hook:
        """A hook that runs a layer again with every candidate range of its inputs.

        Args:
            inputs: Quantizers with candidates, by name.
            weights: Weight quantizers, which quantize in all trials.
        """

        def hook(
            layer: QuantInputMixin, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if self._is_busy:
                return
            self._is_busy = True
            with _quantizing(weights):
                for name, quantizer in inputs.items():
                    for method, amax in self._candidates_of(name).items():
                        with quantizer.using_range(amax):
                            trial_output = run_again(layer, args, kwargs)
                        self._add_error(name, method, output, trial_output)
            self._is_busy = False

        return hook

    def _make_tensor_hook(self, name: str) -> _Hook:
        """A hook that quantizes a tensor with every candidate range.

        Args:
            name: The quantizer, which does not belong to a layer.
        """

        def hook(quantizer: TensorQuantizer, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if self._is_busy:
                return
            for method, amax in self._candidates_of(name).items():
                amax_tensor = torch.full((), amax, device=output.device)
                quantized = fake_quantize(output, amax_tensor, quantizer.format)
                self._add_error(name, method, output, quantized)

        return hook

    def _candidates_of(self, name: str) -> Mapping[str, float]:
        """Method -> amax, for a quantizer that may share its range."""
        return self._candidates[self._collection.leaders[name]]

    def _add_error(self, name: str, method: str, expected: Any, quantized: Any) -> None:
        """Add the squared error and the square of the float output, which stay on their device."""
        pairs = []
        for reference, trial in zip(floats_of(expected), floats_of(quantized), strict=True):
            wide = reference.double()
            noise = (wide - trial.double()).square().sum()
            pairs.append(torch.stack([noise, wide.square().sum()]))
        sums = pairs[0] if pairs else torch.zeros(2, dtype=torch.float64)
        for pair in pairs[1:]:
            sums = sums + pair.to(sums.device)
        self._keys[sums.device].append((self._collection.leaders[name], method))
        self._sums[sums.device].append(sums[None])

    def end_batch(self) -> None:
        """Join the sums, so that they take little memory."""
        for device, parts in self._sums.items():
            self._sums[device] = [torch.cat(parts)]

    def read_errors(self) -> dict[tuple[str, str], list[float]]:
        """The errors of each range and method in each batch; each device is waited for once.

        An error is relative to the square of the float output, and absolute if that is 0.
        """
        on_host = copy_to_host([torch.cat(parts) for parts in self._sums.values()])
        errors: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for keys, sums in zip(self._keys.values(), on_host, strict=True):
            for key, (noise, signal) in zip(keys, sums.tolist(), strict=True):
                errors[key].append(noise / signal if signal else noise)
        return errors


@contextmanager
def _quantizing(weights: list[TensorQuantizer]) -> Iterator[None]:
    """Quantize the weights in the block."""
    with ExitStack() as exits:
        for quantizer in weights:
            exits.enter_context(quantizer.restoring_state())
            quantizer.enable()
            quantizer.enable_quant()
        yield
