"""`quantize_parameters`: replaces the tensors of a state dict by quantized ones, in place."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from qdq.errors import StateError
from qdq.forward import require_model
from qdq.quantizer import TensorQuantizer
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
from qdq.systems.quantizer import SystemQuantizer
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
    network divides by its root. Integers such as `num_batches_tracked` and ranges of quantizers stay. `find_grid` knows
    the grid of each parameter afterwards.

    Args:
        model: The float model, which changes only if all entries can be quantized.
        param_bits: Width of the codes of parameters; 32: they stay.
        bn_bits: Width for entries with "running" in their name; 32: they stay.
        overflow_rate: Fraction of the elements of a tensor that may saturate ("linear").
        quant_method: "linear" (fixed point), "minmax", "log" or "tanh".

    Raises:
        ArgumentError: An unknown method, a number out of range, or an entry that is empty or not finite.
        ArgumentTypeError: Not a module.
        NumberTypeError: A number of the wrong type, or a tensor without values, such as one on "meta".
        StateError: The model has quantizers of qdq, or parameters that are not initialized.
    """
    require_model(model)
    require_choice(quant_method, get_args(QuantMethod), "quant_method", "quantize_parameters")
    require_bits(param_bits, "param_bits")
    require_bits(bn_bits, "bn_bits")
    require_rate(overflow_rate, "quantize_parameters")

    _require_float_model(model)
    state = model.state_dict()
    widths = _choose_widths(model, state, param_bits, bn_bits)
    quantized = {}
    for name, bits in widths.items():
        require_values(state[name], name)
        quantized[name] = _quantize(name, state[name], bits, overflow_rate, quant_method)

    for name, (values, grid) in quantized.items():
        state[name].copy_(values)
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if attribute in owner._parameters:
            note_grid(owner, attribute, grid)
    return ParameterReport(tuple(ParameterBits(name, widths.get(name)) for name in state))


def _choose_widths(
    model: nn.Module, state: dict[str, Any], param_bits: int, bn_bits: int
) -> dict[str, int]:
    """The entries to quantize, with their widths.

    Raises:
        StateError: An entry is not initialized.
    """
    quantizers = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, SystemQuantizer)
    )
    widths = {}
    for name, values in state.items():
        is_tensor = isinstance(values, torch.Tensor)  # otherwise `get_extra_state` has returned it
        if not is_tensor or name.startswith(quantizers):
            continue
        if is_lazy(values):
            raise StateError(f"{name} is not initialized yet.", "run the model once.")
        bits = bn_bits if "running" in name else param_bits
        if bits != FLOAT_BITS and values.is_floating_point():
            widths[name] = bits
    return widths


def _require_float_model(model: nn.Module) -> None:
    """Refuse quantizers of qdq, whose ranges are in the state dict, too."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            raise StateError(
                f"the model is one of qdq already: {name} is a {type(module).__name__}.",
                "give the float model; its parameters are quantized first.",
            )


def _quantize(
    name: str, values: torch.Tensor, bits: int, overflow_rate: float, method: QuantMethod
) -> tuple[torch.Tensor, Grid]:
    """The quantized values of an entry, and their grid."""
    sf = bits - 1 - compute_integral_part(values, overflow_rate)
    step = 2.0**-sf
    if method != "linear":
        quantize, describe = FUNCTIONS[method]
        result, grid = quantize(values, bits), describe(values, bits)
        step = _find_step(values, result, bits, method) or step
    else:
        result = linear_quantize(values, sf, bits)
        grid = describe_linear(sf, bits, values.device)
        if bits == 1:
            grid = describe_sign(values, "fixed point")
    if name.endswith("running_var"):
        result = _raise_zeros(name, result, step)
    return result, grid


def _find_step(
    values: torch.Tensor, quantized: torch.Tensor, bits: int, method: QuantMethod
) -> float:
    """The difference of two codes in "minmax", otherwise the smallest value above 0; 0 if there is none."""
    if method == "minmax":
        low, high = (float(end) for end in values.double().aminmax())
        return (high - low) / (2.0**bits - 1)
    positive = quantized[quantized > 0]
    return float(positive.min()) if positive.numel() else 0.0


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
