"""`quantize_parameters`: replaces the tensors of a state dict by quantized ones, in place."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from qdq.forward import require_model
from qdq.systems.arithmetic import require_values
from qdq.systems.fixed_point import (
    compute_integral_part,
    describe_linear,
    describe_sign,
    linear_quantize,
)
from qdq.systems.grid import Grid, note_grid
from qdq.systems.hyperbolic import describe_tanh, tanh_quantize
from qdq.systems.logarithmic import describe_log, log_minmax_quantize
from qdq.systems.min_max import describe_min_max, min_max_quantize
from qdq.systems.settings import FLOAT_BITS, require_bits, require_choice, require_rate

logger = logging.getLogger(__name__)

QuantMethod = Literal["linear", "minmax", "log", "tanh"]

FUNCTIONS = {
    "minmax": (min_max_quantize, describe_min_max),
    "log": (log_minmax_quantize, describe_log),
    "tanh": (tanh_quantize, describe_tanh),
}
"""The function of values and bits of each method but "linear", and the function that describes its grid."""


@dataclass(frozen=True)
class ParameterBits:
    """One entry of the state dict.

    Args:
        name: Its key.
        bits: Width of its codes; None: it was not changed.
    """

    name: str
    bits: int | None


@dataclass(frozen=True)
class ParameterReport:
    """Result of `quantize_parameters`.

    Args:
        entries: All entries of the state dict.
    """

    entries: tuple[ParameterBits, ...]

    def format_table(self) -> str:
        """A line for each entry: `conv1.weight 8`, or `Ignoring bn1.running_mean`."""
        lines = []
        for entry in self.entries:
            line = f"Ignoring {entry.name}" if entry.bits is None else f"{entry.name} {entry.bits}"
            lines.append(line)
        return "\n".join(lines)


def quantize_parameters(
    model: nn.Module,
    param_bits: int = 8,
    bn_bits: int = FLOAT_BITS,
    overflow_rate: float = 0.0,
    quant_method: QuantMethod = "linear",
) -> ParameterReport:
    """Replace all floating entries of the state dict by quantized ones, in place.

    Each tensor has its own range. A running variance whose code is 0 is raised to one step, with a warning: the
    network divides by its root. Integers such as `num_batches_tracked` stay. `find_grid` knows the grid of each
    parameter afterwards.

    Args:
        model: The float model, which changes only if all entries can be quantized.
        param_bits: Width of the codes of parameters; 32: they stay.
        bn_bits: Width for entries with "running" in their name; 32: they stay.
        overflow_rate: Fraction of the elements of a tensor that may saturate ("linear").
        quant_method: "linear" (fixed point), "minmax", "log" or "tanh".

    Raises:
        ArgumentError: An unknown method, a number out of range, or an entry that is empty or not finite.
        ArgumentTypeError: Not a module.
        NumberTypeError: A number of the wrong type.
    """
    require_model(model)
    require_choice(quant_method, get_args(QuantMethod), "quant_method", "quantize_parameters")
    require_bits(param_bits, "param_bits")
    require_bits(bn_bits, "bn_bits")
    require_rate(overflow_rate, "quantize_parameters")

    state = model.state_dict()
    entries = []
    quantized: dict[str, tuple[torch.Tensor, Grid]] = {}
    for name, values in state.items():
        bits = bn_bits if "running" in name else param_bits
        if bits == FLOAT_BITS or not values.is_floating_point():
            entries.append(ParameterBits(name, None))
            continue
        require_values(values, name)
        quantized[name] = _quantize(name, values, bits, overflow_rate, quant_method)
        entries.append(ParameterBits(name, bits))

    for name, (values, grid) in quantized.items():
        state[name].copy_(values)
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if attribute in owner._parameters:
            note_grid(owner, attribute, grid)
    return ParameterReport(tuple(entries))


def _quantize(
    name: str, values: torch.Tensor, bits: int, overflow_rate: float, method: QuantMethod
) -> tuple[torch.Tensor, Grid]:
    """The quantized values of an entry, and their grid."""
    if method != "linear":
        quantize, describe = FUNCTIONS[method]
        return quantize(values, bits), describe(values, bits)
    sf = bits - 1 - compute_integral_part(values, overflow_rate)
    if bits == 1:
        return linear_quantize(values, sf, bits), describe_sign(values, "fixed point")
    result = linear_quantize(values, sf, bits)
    if name.endswith("running_var"):
        result = _raise_zeros(name, result, 2.0**-sf)
    return result, describe_linear(sf, bits, values.device)


def _raise_zeros(name: str, variances: torch.Tensor, step: float) -> torch.Tensor:
    is_zero = variances == 0
    count = int(is_zero.sum())
    if count:
        logger.warning(
            "%s: %d of %d variances have code 0 and are raised to one step, %g; more bits represent them",
            name,
            count,
            variances.numel(),
            step,
        )
    return torch.where(is_zero, step, variances).to(variances.dtype)
