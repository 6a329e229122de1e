"""Scales, zero points and clip values of a quantized model by name, to read and to set.

    <layer>.output_scale, .output_zero_point      of the output
    <layer>.w_scale, .w_zero_point                of the weight, if the float weight is kept
    <layer>.output_clipping, .weight_clipping     the same as a range

A range is the largest absolute value of a symmetric mode, or both ends of an asymmetric one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from qdq.distiller.layers.weighted import QuantWeightWrapper
from qdq.distiller.layers.wrapper import RangeLinearQuantWrapper
from qdq.distiller.ranges.linear_params import LinearParams, solve_params
from qdq.distiller.ranges.number_tensors import Numbers, read_numbers
from qdq.errors import ArgumentError
from qdq.text import list_names

_SHOWN_NAMES = 8


class _Tensor(NamedTuple):
    """An output or a weight whose scale one may set.

    Args:
        prefix: Of the names of its scale and zero point.
        clipping: Name of its range.
        params: Its scale and zero point, which are buffers.
    """

    prefix: str
    clipping: str
    params: LinearParams


def _list_tensors(layer: RangeLinearQuantWrapper) -> Iterator[_Tensor]:
    if hasattr(layer, "output_scale") and layer.output_params is not None:
        yield _Tensor("output", "output_clipping", layer.output_params)
    if isinstance(layer, QuantWeightWrapper) and layer.read_float_weight() is not None:
        params = layer.weight_params
        if params is not None:
            yield _Tensor("w", "weight_clipping", params)


def list_params(layers: Mapping[str, RangeLinearQuantWrapper]) -> dict[str, torch.Tensor]:
    """Name -> scale or zero point; these are the tensors that the layers use.

    Args:
        layers: The layers by name.
    """
    params = {}
    for name, layer in layers.items():
        for tensor in _list_tensors(layer):
            params[f"{name}.{tensor.prefix}_scale"] = tensor.params.scale
            params[f"{name}.{tensor.prefix}_zero_point"] = tensor.params.zero_point
    return params


def list_clipping(layers: Mapping[str, RangeLinearQuantWrapper]) -> dict[str, torch.Tensor]:
    """Name -> range that gets codes, by the present scales and zero points.

    Args:
        layers: The layers by name.
    """
    ranges = {}
    for name, layer in layers.items():
        for tensor in _list_tensors(layer):
            ranges[f"{name}.{tensor.clipping}"] = find_clipping(tensor.params)
    return ranges


def find_clipping(params: LinearParams) -> torch.Tensor:
    """The range of a scale and zero point, the inverse of `solve_params`.

    Args:
        params: Scale and zero point.

    Returns:
        The largest absolute value, in the shape of the scale; for an asymmetric mode both ends along a new first axis.
    """
    if params.mode.is_symmetric:
        half_steps = 0.0 if params.mode.is_restricted else 0.5
        return (params.highest + half_steps) / params.scale
    low = (params.lowest + params.zero_point) / params.scale
    high = (params.highest + params.zero_point) / params.scale
    return torch.stack([low, high])


@torch.no_grad()
def set_param(
    layers: Mapping[str, RangeLinearQuantWrapper], name: str, value: Numbers
) -> RangeLinearQuantWrapper:
    """Set a scale, a zero point or a range.

    Args:
        layers: The layers by name.
        name: One of the names of `list_params` or `list_clipping`.
        value: Of the shape that they have there, or a number for all channels.

    Returns:
        The layer.

    Raises:
        ArgumentError: An unknown name, a value that is not finite or has another shape, or a scale that is not above 0.
        NumberTypeError: The value is no number.
    """
    known = list_params(layers)
    layer_name, _, attribute = str(name).rpartition(".")
    layer = layers.get(layer_name)
    tensors = [] if layer is None else list(_list_tensors(layer))
    for tensor in tensors:
        assert layer is not None  # noqa: S101  # it has tensors
        if attribute == tensor.clipping:
            params = _solve_range(tensor.params, name, value)
            tensor.params.scale.copy_(params.scale)
            tensor.params.zero_point.copy_(params.zero_point)
            return layer
        if name in known and attribute.startswith(f"{tensor.prefix}_"):
            known[name].copy_(_read_value(name, value, known[name].shape))
            return layer
    names = list_names([*known, *list_clipping(layers)], _SHOWN_NAMES)
    raise ArgumentError(
        f"{name!r} is no parameter of the model; it has {names}.",
        "take one of linear_quant_params; weights have them with save_fp_weights=True.",
    )


def _read_value(name: str, value: Numbers, shape: torch.Size) -> torch.Tensor:
    """A valid scale, zero point or range."""
    numbers = read_numbers(value, name)
    if numbers.dim() and numbers.shape != shape:
        raise ArgumentError(
            f"{name} has the shape {list(shape)}, and the value {list(numbers.shape)}.",
            "give a value of that shape, or one number.",
        )
    is_scale = name.endswith("_scale")
    is_valid = numbers.isfinite() & ((numbers > 0) | torch.tensor(not is_scale))
    if not bool(is_valid.all()):
        expected = "finite and above 0" if is_scale else "finite"
        raise ArgumentError(f"{name} is {value}; it must be {expected}.", "give another value.")
    return numbers


def _solve_range(params: LinearParams, name: str, value: Numbers) -> LinearParams:
    """Scale and zero point of a range."""
    former = find_clipping(params)
    ends = _read_value(name, value, former.shape).to(former.device)
    if params.mode.is_symmetric:
        if bool((ends < 0).any()):
            raise ArgumentError(
                f"{name} is {value}; it must be at least 0.", "give the largest absolute value."
            )
        low, high = -ends.expand(former.shape), ends.expand(former.shape)
    else:
        low, high = ends.expand(former.shape)
    return solve_params(low, high, params.num_bits, params.mode)
