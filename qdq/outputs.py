"""Outputs of models by name, parts of them, and which of them decide.

The same names are used everywhere: in predictions, in the exported file, in figures and in limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves

from qdq.batch import split_inputs
from qdq.errors import ArgumentError, ArgumentTypeError, DataError
from qdq.text import list_names

Selection = Mapping[str, str | Callable[[dict[str, torch.Tensor]], torch.Tensor]]
"""Name of a part -> name of an output, or a function of all named outputs that computes the part."""
Mask = str | Callable[[Any], torch.Tensor]
"""Name of an input of the model, or a function of the batch; the mask is 0 where outputs do not count."""

_SINGLE = "output"


def name_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors that a model returns, each with a name; anything else is left out.

    A single tensor is "output". Names come from the keys of dictionaries and the fields of dataclasses and named
    tuples. In lists and other tuples they are positions, at the top "output_0", "output_1". Nested names are joined by
    dots: "hidden_states.0".

    Args:
        outputs: What a model returns.
    """
    named: dict[str, torch.Tensor] = {}
    for name, leaf in _list_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            named[_make_unique(name, named)] = leaf
    return named


def name_other_outputs(outputs: Any) -> dict[str, str]:
    """What a model returns besides tensors and None: name -> type.

    Args:
        outputs: What a model returns.
    """
    types: dict[str, str] = {}
    for name, leaf in _list_leaves(outputs):
        if leaf is not None and not isinstance(leaf, torch.Tensor):
            types[_make_unique(name, types)] = type(leaf).__name__
    return types


def _list_leaves(outputs: Any) -> Iterator[tuple[str, Any]]:
    """Every part of some outputs that has no parts itself, with its name."""
    parts = _list_parts(outputs)
    if parts is None:
        yield _SINGLE, outputs
        return
    for key, part in parts:
        name = key if isinstance(key, str) else f"{_SINGLE}_{key}"
        yield from _list_nested(name, part)


def _list_nested(name: str, part: Any) -> Iterator[tuple[str, Any]]:
    parts = _list_parts(part)
    if parts is None:
        yield name, part
        return
    for key, child in parts:
        yield from _list_nested(f"{name}.{key}", child)


def _list_parts(value: Any) -> list[tuple[str | int, Any]] | None:
    """The parts of a container by their keys or positions; None if it is no container."""
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    _, structure = tree_flatten(value)
    if structure.is_leaf():
        return None
    return list(enumerate(tree_leaves(value)))  # a container that another library has registered


def _make_unique(name: str, taken: Mapping[str, Any]) -> str:
    """A name that is not taken: two keys may have the same text."""
    while name in taken:
        name += "_"
    return name


@dataclass(frozen=True)
class OutputView:
    """Which outputs of a model count, where, and how much.

    Args:
        outputs: The parts to look at; None for all outputs.
        mask: What leaves padding out of the outputs that have its sizes first.
        weights: Weight of each output where one figure decides; outputs without one do not count. None: the worst
            output decides.

    Raises:
        ArgumentError: Nothing selected, or weights that are not numbers of 0 or more with one above 0.
        ArgumentTypeError: An argument of another kind.
    """

    outputs: Selection | None = None
    mask: Mask | None = None
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.outputs is not None:
            _require_selection(self.outputs)
        if self.mask is not None and not isinstance(self.mask, str) and not callable(self.mask):
            raise ArgumentTypeError(
                f"mask is of type {type(self.mask).__name__}.",
                "pass the name of an input, or a function of the batch.",
            )
        if self.weights is not None:
            require_weights(self.weights)

    def select(self, outputs: Any) -> dict[str, torch.Tensor]:
        """The parts of some outputs, by name; all named outputs without a selection.

        Args:
            outputs: What a model returned.

        Raises:
            ArgumentError: A name that the outputs do not have.
            ArgumentTypeError: A function that does not return a tensor.
        """
        return select_outputs(outputs, self.outputs)

    def select_floats(self, outputs: Any) -> dict[str, torch.Tensor]:
        """The floating-point tensors among the parts: only these have an SQNR."""
        selected = self.select(outputs)
        return {name: part for name, part in selected.items() if part.is_floating_point()}

    def find_mask(self, batch: Any) -> torch.Tensor | None:
        """The mask of a batch as bool; None if there is none.

        Args:
            batch: As for `forward.call_model`.

        Raises:
            ArgumentError: The batch has no such input.
            ArgumentTypeError: The function does not return a tensor.
        """
        if self.mask is None:
            return None
        if not isinstance(self.mask, str):
            mask: Any = self.mask(batch)
        else:
            _, named = split_inputs(batch)
            if self.mask not in named:
                names = list_names(list(named), 5) or "no named inputs"
                raise ArgumentError(
                    f"the mask is {self.mask!r}, and the batch has {names}.",
                    "name another input, or pass a function of the batch.",
                )
            mask = named[self.mask]
        if not isinstance(mask, torch.Tensor):
            raise ArgumentTypeError(
                f"the mask is of type {type(mask).__name__}; expected a tensor.",
                "have it be 1 where outputs count and 0 elsewhere, with the first sizes of the outputs.",
            )
        return mask != 0

    def select_rows(self, outputs: Any, batch: Any) -> dict[str, torch.Tensor]:
        """The parts, those that the mask fits without padding: `[positions, ...]` instead of `[N, T, ...]`.

        Args:
            outputs: What a model returned.
            batch: Its batch.

        Raises:
            DataError: The mask fits no part.
        """
        selected = self.select(outputs)
        mask = self.find_mask(batch)
        if mask is None:
            return selected
        require_fitting(mask, selected)
        return {name: keep_rows(part, mask) for name, part in selected.items()}

    def weigh(self, names: Sequence[str]) -> list[float] | None:
        """The weight of each output; None if the worst decides.

        Args:
            names: The outputs.

        Raises:
            ArgumentError: A weight for an output that does not exist.
        """
        if self.weights is None:
            return None
        unknown = [name for name in self.weights if name not in names]
        if unknown:
            raise _lacks_outputs(unknown, names, "weights names")
        return [float(self.weights.get(name, 0.0)) for name in names]

    def describe(self) -> str:
        """The view as text for a fingerprint; functions by name. Empty if it is the default."""
        if self.outputs is None and self.mask is None:
            return ""
        parts = [f"{name}={_name(source)}" for name, source in sorted((self.outputs or {}).items())]
        return f" outputs {parts} mask {_name(self.mask)}"


ALL_OUTPUTS = OutputView()


def select_outputs(outputs: Any, selection: Selection | None = None) -> dict[str, torch.Tensor]:
    """Parts of the outputs of a model by name.

    Args:
        outputs: What a model returned, or its named outputs.
        selection: Name of each part -> the name of an output, or a function that is called with all named outputs and
            returns the part. None gives all named outputs.

    Raises:
        ArgumentError: A name that the outputs do not have.
        ArgumentTypeError: A function that does not return a tensor.
    """
    named = name_outputs(outputs)
    if selection is None:
        return named
    unknown = [name for name in selection.values() if isinstance(name, str) and name not in named]
    if unknown:
        raise _lacks_outputs(unknown, list(named), "outputs names")
    parts = {}
    for name, source in selection.items():
        part = named[source] if isinstance(source, str) else source(named)
        if not isinstance(part, torch.Tensor):
            raise ArgumentTypeError(
                f"the function of the output {name!r} returns a {type(part).__name__}.",
                "return one tensor, and give each part a function of its own.",
            )
        parts[name] = part
    return parts


def require_fitting(mask: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> None:
    """Refuse a mask without an effect.

    Args:
        mask: bool.
        outputs: All outputs that are looked at.

    Raises:
        DataError: It fits none of them.
    """
    if any(is_masked(output, mask) for output in outputs.values()):
        return
    shapes = ", ".join(f"{name} {list(output.shape)}" for name, output in outputs.items())
    raise DataError(
        f"the mask {list(mask.shape)} fits no output: {shapes}.",
        "give a mask with the first sizes of an output, or leave it out.",
    )


def is_masked(output: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a mask applies to an output: the output has the sizes of the mask first."""
    return output.shape[: mask.dim()] == mask.shape


def clear_padding(output: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """An output that is 0 at padding, where it may be anything, also NaN; as it is if the mask does not fit it.

    Args:
        output: Any output.
        mask: bool; None for no padding.
    """
    if mask is None or not is_masked(output, mask):
        return output
    return output.masked_fill(~expand_mask(mask, output), 0.0)


def expand_mask(mask: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A mask that fits an output on its device, `[N, T, 1 ...]`.

    Args:
        mask: bool `[N, T]`.
        output: `[N, T, ...]`.
    """
    return mask.to(output.device).reshape(*mask.shape, *[1] * (output.dim() - mask.dim()))


def keep_rows(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The rows of an output that count, `[positions, ...]`; an output that the mask does not fit as it is.

    Args:
        output: Any output.
        mask: bool.
    """
    if not is_masked(output, mask):
        return output
    return output[mask.to(output.device)]


def _require_selection(selection: Any) -> None:
    if not isinstance(selection, Mapping):
        raise ArgumentTypeError(
            f"outputs is of type {type(selection).__name__}.",
            "pass {'scores': 'logits'}, or a function of the named outputs instead of 'logits'.",
        )
    if not selection:
        raise ArgumentError("outputs selects nothing.", "name a part, or leave it out for all.")
    for name, source in selection.items():
        if not isinstance(name, str) or not (isinstance(source, str) or callable(source)):
            raise ArgumentTypeError(
                f"outputs has {name!r}: {source!r}.",
                "give a name, and for it the name of an output or a function of the named outputs.",
            )


def require_weights(weights: Any) -> None:
    """Refuse weights of outputs that are not numbers of 0 or more with one above 0.

    Args:
        weights: Name -> weight.

    Raises:
        ArgumentError: A weight is out of range, or none is above 0.
        ArgumentTypeError: They have no names.
    """
    if not isinstance(weights, Mapping):
        raise ArgumentTypeError(
            f"weights is of type {type(weights).__name__}.", "pass {'scores': 1.0, 'boxes': 0.5}."
        )
    for name, weight in weights.items():
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < math.inf:
            raise ArgumentError(
                f"the weight of {name!r} is {weight!r}; a weight is a number of 0 or more.",
                "correct it, or leave weights out: then the worst output decides.",
            )
    if not any(weights.values()):
        raise ArgumentError("no output has a weight above 0.", "give one of them a weight.")


def _lacks_outputs(unknown: Sequence[str], names: Sequence[str], subject: str) -> ArgumentError:
    return ArgumentError(
        f"{subject} {list_names(unknown, 3)}; the outputs are {list_names(names, 10) or 'none'}.",
        "use these names.",
    )


def _name(function: Any) -> str:
    """A text, or the name of a function; its code is not compared."""
    if function is None or isinstance(function, str):
        return str(function)
    return str(getattr(function, "__qualname__", type(function).__qualname__))
