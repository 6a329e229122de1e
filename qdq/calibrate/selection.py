"""`best`: for each range the method whose quantization costs the output of its layer least, on data held out."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from qdq.calibrate.collect import Collection
from qdq.distributed import failing_together, gather_bytes
from qdq.errors import CalibrationError
from qdq.forward import call_model, evaluating, floats_of
from qdq.nn import QuantInputMixin
from qdq.nn.functions import run_again
from qdq.quantize import fake_quantize
from qdq.quantizer import TensorQuantizer, disable_quantization, named_quantizers
from qdq.swap import quantized_layers

Candidates = Mapping[str, Mapping[str, float]]
"""Name of the quantizer that has the range -> method -> amax."""


def select_methods(
    model: nn.Module, collection: Collection, candidates: Candidates, held: list[Any]
) -> dict[str, str]:
    """Try every range on the layers that it is for, in one forward of the float model.

    The error of a layer is the squared difference of its output with this input and its weights quantized from its
    float output, divided by the square of that; of a quantizer that belongs to no layer, that of the tensor itself.
    Layers that share a range add up.

    Args:
        model: Its weight quantizers have their ranges.
        collection: What collects, and who shares a range.
        candidates: What to choose from; the first of equally good ones wins.
        held: Batches; in several processes each its own, the errors add up.

    Returns:
        Name -> method; without those that no batch reached.

    Raises:
        CalibrationError: NaN or Inf in an output.
    """
    trials = _Trials(collection, candidates)
    with failing_together(), disable_quantization(model), evaluating(model), trials.watching(model):
        for batch in held:
            call_model(model, batch)
    errors = _add_up(trials.errors)
    if broken := sorted({name for (name, _), error in errors.items() if not math.isfinite(error)}):
        raise CalibrationError(
            f"the batches held out give NaN or Inf behind {', '.join(broken[:3])}; no method can be chosen by them.",
            "run the float model on them: either the data or a layer before is broken.",
        )
    reached = [
        name
        for name, amaxes in candidates.items()
        if all((name, method) in errors for method in amaxes)
    ]
    methods = {}
    for name in reached:
        error_of_method = {method: errors[name, method] for method in candidates[name]}
        methods[name] = min(error_of_method, key=error_of_method.__getitem__)
    return methods


def _add_up(errors: Mapping[tuple[str, str], list[float]]) -> dict[tuple[str, str], float]:
    """The sums of the errors of all processes; the same in each."""
    own = json.dumps([[*key, found] for key, found in errors.items()])
    collected: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for part in gather_bytes(own.encode()):
        for name, method, found in json.loads(part):
            collected[name, method] += found
    return {key: math.fsum(found) for key, found in collected.items()}


class _Trials:
    """Hooks that quantize what passes by with every candidate, and go on with the float values."""

    def __init__(self, collection: Collection, candidates: Candidates) -> None:
        self._collection = collection
        self._candidates = candidates
        self.errors: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self._is_busy = (
            False  # a layer at trial may call layers inside it, whose hooks then have nothing to do
        )

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on all layers, and on the quantizers that belong to none."""
        collecting, leaders = self._collection.collecting, self._collection.leaders
        names = {id(q): name for name, q in collecting.items() if leaders[name] in self._candidates}
        weights = {id(q) for name, q in named_quantizers(model) if name in self._collection.weights}
        of_layers: set[int] = set()
        with ExitStack() as exits:
            for layer in quantized_layers(model).values():
                own = [(names[id(q)], q) for q in layer.quantizers().values() if id(q) in names]
                of_layers |= {id(quantizer) for _, quantizer in own}
                if own:
                    active = [
                        quantizer
                        for quantizer in layer.quantizers().values()
                        if id(quantizer) in weights
                    ]
                    hook = layer.register_forward_hook(
                        self._make_layer_hook(own, active), with_kwargs=True
                    )
                    exits.callback(hook.remove)
            for name, quantizer in collecting.items():
                if id(quantizer) in names and id(quantizer) not in of_layers:
                    exits.callback(
                        quantizer.register_forward_hook(self._make_tensor_hook(name)).remove
                    )
            yield

    def _make_layer_hook(
        self, own: list[tuple[str, TensorQuantizer]], weights: list[TensorQuantizer]
    ) -> Any:
        def hook(
            layer: QuantInputMixin, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if self._is_busy:
                return
            self._is_busy = True
            for name, quantizer in own:
                with ExitStack() as exits:
                    for weight in weights:
                        exits.enter_context(weight.restoring_state())
                        weight.enable()
                        weight.enable_quant()
                    for method, amax in self._candidates_of(name):
                        with quantizer.using_range(amax):
                            self._note(name, method, output, run_again(layer, args, kwargs))
            self._is_busy = False

        return hook

    def _make_tensor_hook(self, name: str) -> Any:
        def hook(quantizer: TensorQuantizer, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if not self._is_busy:
                for method, amax in self._candidates_of(name):
                    found = fake_quantize(
                        output, torch.tensor(amax, device=output.device), quantizer.format
                    )
                    self._note(name, method, output, found)

        return hook

    def _candidates_of(self, name: str) -> Iterable[tuple[str, float]]:
        return self._candidates[self._collection.leaders[name]].items()

    def _note(self, name: str, method: str, expected: Any, found: Any) -> None:
        pairs = list(zip(floats_of(expected), floats_of(found), strict=True))
        noise = math.fsum(float((one.double() - two.double()).square().sum()) for one, two in pairs)
        signal = math.fsum(float(one.double().square().sum()) for one, _ in pairs)
        self.errors[self._collection.leaders[name], method].append(
            noise / signal if signal else noise
        )
