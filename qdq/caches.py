"""What a model keeps from call to call outside its parameters and buffers, such as the anchors of a detector.

Such a model compares the shape of its input with that of the call before. If it is captured with that shape, the graph
is valid for that shape only; and it would keep tensors of the capture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qdq.batch import list_leaves
from qdq.forward import evaluating, join_name

logger = logging.getLogger(__name__)

_KEPT = torch.Tensor | torch.Size | int

_REGISTRIES = frozenset(vars(nn.Module()))


@contextmanager
def forgetting_calls(
    model: nn.Module, runs: Sequence[Callable[[], Any]]
) -> Iterator[Callable[[], list[str]]]:
    """Make a model forget its earlier calls by one with other sizes; everything it keeps is restored after the block.

    Args:
        model: Any module.
        runs: Calls of the model with other sizes, the first that succeeds counts. If none does, nothing is forgotten.

    Yields:
        A function that lists the attributes in which the model keeps tensors or shapes of its last call.
    """
    state = _State(model)
    try:
        with evaluating(model):
            for run in runs:
                if _succeeds(run):
                    break
        yield state.list_changed
    finally:
        state.restore()


def _succeeds(run: Callable[[], Any]) -> bool:
    """Call a function; any error says that it cannot run."""
    try:
        run()
    except Exception as error:  # of the model, on sizes that nobody asked for
        logger.debug("the model does not run with other sizes: %s", error)
        return False
    return True


class _State:
    """What the modules of a model hold, without a copy of any parameter.

    Args:
        model: Any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []  # lists and dictionaries, and copies of them
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, module in model.named_modules():
            attributes = vars(module)
            self._attributes.append((name, attributes, dict(attributes)))
            for value in attributes.values():
                if isinstance(value, list | dict):
                    copied = list(value) if isinstance(value, list) else dict(value)
                    self._contents.append((value, copied))
            for buffer in module._buffers.values():
                if buffer is not None:
                    self._buffers.append((buffer, buffer.clone()))

    def list_changed(self) -> list[str]:
        """Dotted names of the attributes that now hold other tensors or shapes than before."""
        contents = {id(value): copied for value, copied in self._contents}
        names = []
        for module, attributes, before in self._attributes:
            for attribute, value in attributes.items():
                old = before.get(attribute)
                old = contents.get(id(old), old)  # its content may have changed
                if attribute not in _REGISTRIES and _holds_others(value, old):
                    names.append(join_name(module, attribute))
        return names

    def restore(self) -> None:
        """Put everything back."""
        for _, attributes, before in self._attributes:
            for attribute in attributes.keys() - before.keys():
                del attributes[attribute]
            attributes.update(before)
        for value, copied in self._contents:
            value.clear()
            if isinstance(value, list):
                value.extend(copied)
            else:
                value.update(copied)
        for buffer, copied in self._buffers:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if not torch.equal(buffer, copied):
                    buffer.copy_(copied)


def _holds_others(value: Any, old: Any) -> bool:
    """Whether a value holds tensors or sizes, and not those of an older value."""
    leaves = [leaf for leaf in list_leaves(value) if isinstance(leaf, _KEPT)]
    return bool(leaves) and list(map(id, leaves)) != list(map(id, list_leaves(old)))
