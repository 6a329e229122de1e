"""What the accuracy passes changed in a model, so that it can be taken back and done again.

The passes fit weights and biases to the ranges, and to the layers that are in int8; `reconstruct_blocks` also changes
ranges. A call that changes ranges or layers afterwards therefore takes these changes back, does its own work on the
weights of the float model, and does the passes again, in the order of `_ORDER`. So every order of the calls gives the
same model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdq.nn import QuantMixin
from qdq.quantize import own_tensor
from qdq.quantizer import TensorQuantizer

logger = logging.getLogger(__name__)

_ORDER = ("round_weights", "reconstruct_blocks", "correct_bias", "tune_weights")
_ATTRIBUTE = "_accuracy_passes"  # of a model
_RANGES = "_calibrated_ranges"  # of a model
_RANGE = "amax"  # of a quantizer, in the names of a snapshot

_Range = tuple[TensorQuantizer, torch.Tensor]


@dataclass(frozen=True, eq=False)
class AccuracyPass:
    """A pass that has changed a model.

    Args:
        name: The public function, one of `_ORDER`.
        run: Does it again on a model, with the same options and data.
    """

    name: str
    run: Callable[..., object]

    @property
    def rank(self) -> int:
        """Passes run in the order of their ranks."""
        return _ORDER.index(self.name)

    def __deepcopy__(self, _: dict[int, Any]) -> AccuracyPass:
        return self  # a copy of the model shares the data of the pass


def list_passes(model: nn.Module) -> list[AccuracyPass]:
    """The passes that have changed a model, in the order of their ranks.

    Args:
        model: Any model; what is none has no passes, and the call that got it refuses it.
    """
    passes: list[AccuracyPass] = getattr(model, "__dict__", {}).get(_ATTRIBUTE, [])
    return list(passes)


def record_pass(model: nn.Module, accuracy_pass: AccuracyPass) -> None:
    """Remember that a pass has changed a model; an earlier one of the same name is forgotten.

    Args:
        model: The model.
        accuracy_pass: The pass.
    """
    passes = [former for former in list_passes(model) if former.name != accuracy_pass.name]
    passes.append(accuracy_pass)
    vars(model)[_ATTRIBUTE] = sorted(passes, key=lambda entry: entry.rank)


def copy_ranges(quantizers: Iterable[TensorQuantizer]) -> list[_Range]:
    """Copies of the present ranges.

    Args:
        quantizers: Quantizers that have a range.
    """
    ranges = []
    for quantizer in quantizers:
        amax = quantizer.amax
        assert amax is not None  # noqa: S101
        ranges.append((quantizer, own_tensor(amax)))
    return ranges


def keep_ranges(model: nn.Module, quantizers: Iterable[TensorQuantizer]) -> None:
    """Keep ranges as those of the calibration, before a pass changes them; only the first call counts.

    Args:
        model: The model.
        quantizers: Quantizers of it that hold a range.
    """
    ranges = _list_ranges(model)
    known = {quantizer for quantizer, _ in ranges}
    ranges += copy_ranges(quantizer for quantizer in quantizers if quantizer not in known)
    vars(model)[_RANGES] = ranges


def forget_passes(model: nn.Module) -> None:
    """Forget the passes and what was kept: what the passes changed is part of the model from now on.

    Args:
        model: The model.
    """
    vars(model).pop(_ATTRIBUTE, None)
    vars(model).pop(_RANGES, None)
    for layer in _list_layers(model):
        layer.forget_float()


def undo_passes(model: nn.Module) -> list[AccuracyPass]:
    """Give all layers the weights and biases of the float model and the ranges of the calibration; forget the passes.

    Args:
        model: The model.

    Returns:
        The passes, for `redo_passes`.
    """
    passes = list_passes(model)
    for layer in _list_layers(model):
        layer.restore_float()
    for quantizer, amax in _list_ranges(model):
        quantizer.amax = amax
    forget_passes(model)
    return passes


def redo_passes(model: nn.Module, passes: list[AccuracyPass]) -> None:
    """Do passes again, each with the data that it was called with.

    Args:
        model: The model.
        passes: From `undo_passes`.
    """
    for accuracy_pass in passes:
        logger.info("%s is done again", accuracy_pass.name)
        accuracy_pass.run(model)


@contextmanager
def redoing_passes(model: nn.Module) -> Iterator[None]:
    """In the block the model has the weights of the float model; after it, the passes are done again.

    If the block or a pass fails, weights, biases, ranges and passes are those of before.

    Args:
        model: The model.
    """
    if not list_passes(model):
        yield
        return
    former = Snapshot(model)
    passes = undo_passes(model)
    try:
        yield
        redo_passes(model, passes)
    except BaseException:
        former.restore(model)
        raise


@contextmanager
def undoing_passes(
    model: nn.Module, name: str, *, adds_up: bool = False
) -> Iterator[list[AccuracyPass]]:
    """In the block a pass can be done: what it did before and the passes after it are taken back.

    Passes before it stay done. The block gets those after it, and does them again itself. If it fails, weights,
    biases, ranges and passes are those of before. After Ctrl-C, what the block did stays if the pass was recorded; the
    passes after it are not done again then.

    Args:
        model: The model.
        name: The pass, one of `_ORDER`.
        adds_up: The pass may be done on top of what it did before, which stays if no pass after it was done.
    """
    former = Snapshot(model)
    passes = list_passes(model)
    rank = _ORDER.index(name)
    first_undone = rank + 1 if adds_up else rank
    try:
        if not passes or passes[-1].rank >= first_undone:
            undo_passes(model)
            redo_passes(model, [entry for entry in passes if entry.rank < rank])
        yield [entry for entry in passes if entry.rank > rank]
    except BaseException as error:
        is_recorded = any(entry.name == name for entry in list_passes(model))
        if isinstance(error, Exception) or not is_recorded:
            former.restore(model)
        raise


class Snapshot:
    """The weights, biases and ranges that passes gave a model, these passes, and what they keep of the float model.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._passes = list_passes(model)
        layers = _list_layers(model)
        self._layers = [(layer, _copy_parameters(layer)) for layer in layers]
        self._float_parameters = {layer: layer.read_float() for layer in layers}
        self._calibrated_ranges = _list_ranges(model)
        self._ranges = copy_ranges(quantizer for quantizer, _ in self._calibrated_ranges)

    def restore(self, model: nn.Module) -> None:
        """Give the layers that the passes changed these weights, biases and ranges again, and the model the passes.

        It may have forgotten its passes since.
        """
        undo_passes(model)
        for layer, parameters in self._layers:
            _put_back(layer, parameters)
            if layer in self._float_parameters:
                layer.replace_float(self._float_parameters[layer])
        for quantizer, amax in self._calibrated_ranges:
            quantizer.amax = amax
        keep_ranges(model, [quantizer for quantizer, _ in self._ranges])
        for quantizer, amax in self._ranges:
            quantizer.amax = amax
        for accuracy_pass in self._passes:
            record_pass(model, accuracy_pass)

    def name_tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The weights, biases and ranges by dotted name, on the CPU, for a file; the passes are not among them.

        Args:
            model: The model that this was taken of.
        """
        names = {module: name for name, module in model.named_modules()}
        tensors = {}
        for layer, parameters in self._layers:
            for parameter, values in parameters.items():
                tensors[f"{names[layer]}.{parameter}"] = values.cpu().contiguous()
        for quantizer, amax in self._ranges:
            tensors[f"{names[quantizer]}.{_RANGE}"] = amax.cpu().contiguous()
        return tensors

    @classmethod
    def from_tensors(
        cls, model: nn.Module, tensors: Mapping[str, torch.Tensor], passes: list[AccuracyPass]
    ) -> Snapshot:
        """What `name_tensors` described, of a model in the state before the passes.

        Args:
            model: The model.
            tensors: From `name_tensors`.
            passes: The passes that made it.
        """
        snapshot = cls(model)
        snapshot._passes = passes
        layers: dict[str, dict[str, torch.Tensor]] = {}
        snapshot._ranges = []
        modules = dict(model.named_modules())
        for key, values in tensors.items():
            name, _, attribute = key.rpartition(".")
            module = modules[name]
            if isinstance(module, TensorQuantizer):
                snapshot._ranges.append((module, values))
            else:
                layers.setdefault(name, {})[attribute] = values
        snapshot._layers = []
        for name, parameters in layers.items():
            layer = modules[name]
            assert isinstance(layer, QuantMixin)  # noqa: S101
            snapshot._layers.append((layer, parameters))
        return snapshot


def _list_layers(model: nn.Module) -> list[QuantMixin]:
    """The layers whose weight or bias a pass has changed."""
    layers = []
    for module in model.modules():
        if isinstance(module, QuantMixin) and module.keeps_float:
            layers.append(module)
    return layers


def _list_ranges(model: nn.Module) -> list[_Range]:
    """The quantizers whose range a pass has changed, with the range of the calibration."""
    return list(vars(model).get(_RANGES, []))


def _copy_parameters(layer: QuantMixin) -> dict[str, torch.Tensor]:
    parameters = layer.named_parameters(recurse=False)
    return {name: parameter.detach().clone() for name, parameter in parameters}


def _put_back(layer: QuantMixin, parameters: dict[str, torch.Tensor]) -> None:
    """Give a layer the parameters that a pass gave it; those of the float layer are kept beside them."""
    layer.keep_float()
    with torch.no_grad():
        for name, values in parameters.items():
            if layer._parameters.get(name) is None:
                values = values.to(layer._parameters["weight"].device)  # type: ignore[union-attr]
                layer._parameters[name] = nn.Parameter(values, bool(layer.weight.requires_grad))
            else:
                layer._parameters[name].copy_(values)  # type: ignore[union-attr]
