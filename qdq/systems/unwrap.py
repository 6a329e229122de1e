"""The way back from wrappers to float modules, which remember the grids of their tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from qdq.systems.grid import Grid, forget_grids, note_grid
from qdq.systems.records import MovedRounding
from qdq.systems.wrapper import SystemWrapper
from qdq.text import group_names, list_names

logger = logging.getLogger(__name__)

_SHOWN_NAMES = 5


@dataclass(frozen=True)
class Unwrapped:
    """A model whose wrappers were replaced by their float modules.

    Args:
        model: The model.
        wrappers: Its wrappers by name.
        inputs: Name of a module without a weight -> grids of the inputs that are rounded before it.
        float_reasons: Name of a layer -> why it is float.
        moved: Where the wrappers round and TensorRT does not.
    """

    model: nn.Module
    wrappers: dict[str, SystemWrapper]
    inputs: dict[str, dict[int, Grid]]
    float_reasons: dict[str, str]
    moved: tuple[MovedRounding, ...]

    def undo(self) -> None:
        """Put the wrappers back."""
        for wrapper in self.wrappers.values():
            forget_grids(wrapper.wrapped_module)
            wrapper.rewrap()
        _replace(
            self.model,
            {wrapper.wrapped_module: wrapper for wrapper in self.wrappers.values()},
        )


def unwrap(model: nn.Module) -> Unwrapped:
    """Replace the wrappers of a model by their float modules, in place.

    Args:
        model: A model, with or without wrappers.

    Raises:
        StateError: It has wrappers, and has not run.
    """
    wrappers = {}
    for name, module in model.named_modules():
        if isinstance(module, SystemWrapper):
            wrappers[name] = module
    inputs = {name: wrapper.describe_inputs() for name, wrapper in wrappers.items()}
    weights = {name: wrapper.describe_weight() for name, wrapper in wrappers.items()}
    moved = tuple(_list_moved(wrappers, inputs))
    _warn_of_dropped(wrappers)
    float_reasons = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, wrapper in wrappers.items():
        replacements[wrapper] = wrapper.restore()
        weight = weights[name]
        if weight is None:
            float_reasons[name] = wrapper.float_reason()
            continue
        note_grid(wrapper.wrapped_module, "weight", weight)
        note_grid(wrapper.wrapped_module, "input", inputs.pop(name)[0])
    _replace(model, replacements)
    rounded = {name: grids for name, grids in inputs.items() if grids}
    return Unwrapped(model, wrappers, rounded, float_reasons, moved)


def _warn_of_dropped(wrappers: Mapping[str, SystemWrapper]) -> None:
    """Log what TensorRT drops, the layers with the same reason together."""
    dropped = []
    for name, wrapper in wrappers.items():
        dropped += [(reason, name) for reason in wrapper.list_dropped()]
    for reason, names in group_names(dropped).items():
        logger.warning("%s: %s", list_names(names, _SHOWN_NAMES), reason)


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules at all their names."""
    for parent in list(model.modules()):
        if parent in replacements:
            continue
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]


def _list_moved(
    wrappers: Mapping[str, SystemWrapper], inputs: Mapping[str, Mapping[int, Grid]]
) -> Iterator[MovedRounding]:
    """The outputs that the wrappers round, and TensorRT rounds elsewhere or not at all."""
    readers: dict[SystemWrapper, list[tuple[str, int]]] = {}
    for name, wrapper in wrappers.items():
        for index, source in wrapper.sources.items():
            if source is not None:
                readers.setdefault(source, []).append((name, index))
    for name, wrapper in wrappers.items():
        for difference in (*wrapper.list_differences(), *wrapper.list_dropped()):
            yield MovedRounding(name, difference)
        if wrapper.describe_output() is None:
            continue
        if wrapper not in readers:
            reason = "its output is not rounded, as no int8 layer reads it directly"
            yield MovedRounding(name, reason)
        for reader, index in readers.get(wrapper, []):
            if index not in inputs[reader]:
                reason = f"its output is not rounded, as {wrappers[reader].float_reason()}"
                yield MovedRounding(name, reason)
