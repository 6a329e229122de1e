"""The state of integer layers: in a model that is no replica, and loaded as ranges and codes that fit them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdq.distributed import find_rank
from qdq.errors import NumberTypeError, StateError
from qdq.systems.affine import solve_affine
from qdq.systems.arithmetic import require_values

_SCALE_TOLERANCE = 1e-3  # other widths differ by a factor of 2; other tools round otherwise


def require_original(module: nn.Module, label: str) -> None:
    """Refuse to change the state of a replica, which is thrown away after one forward.

    Args:
        module: The module whose state is about to change.
        label: Name of the layer, for the message.

    Raises:
        StateError: It is a replica of nn.DataParallel.
    """
    if getattr(module, "_is_replica", False):
        raise StateError(
            f"{label}: a replica of nn.DataParallel calibrates, and its ranges would be lost.",
            "calibrate and freeze the model itself, before it is wrapped.",
        )


def require_sole(module: nn.Module, label: str) -> None:
    """Refuse to calibrate where ranges would be lost, or would differ from those of others.

    Args:
        module: The module that calibrates.
        label: Name of the layer, for the message.

    Raises:
        StateError: It is a replica, or there are several processes.
    """
    require_original(module, label)
    _, num_processes = find_rank()
    if num_processes > 1:
        raise StateError(
            f"{label}: {num_processes} processes calibrate, each of which would get its own range.",
            "calibrate in one process and load its state dict in the others.",
        )


def require_fitting(qparam: Any) -> None:
    """Refuse a loaded scale and zero point that are those of another width or scheme.

    Args:
        qparam: The `QParam` that was loaded.

    Raises:
        StateError: They differ from those of its range by more than roundings.
    """
    scale, zero_point = solve_affine(
        qparam.min, qparam.max, *qparam.codes, is_symmetric=qparam.scheme == "symmetric"
    )
    is_scale_near = torch.isclose(qparam.scale, scale, _SCALE_TOLERANCE, 0)
    is_fitting = is_scale_near & ((qparam.zero_point - zero_point).abs() <= 1)
    if bool(is_fitting.all()):
        return
    first = int((~is_fitting).flatten().to(torch.uint8).argmax())
    loaded = [float(numbers.flatten()[first]) for numbers in (qparam.scale, qparam.zero_point)]
    expected = [float(numbers.flatten()[first]) for numbers in (scale, zero_point)]
    raise StateError(
        f"{qparam.label}: the loaded scale is {loaded[0]:g} and the zero point {loaded[1]:g}, where "
        f"{qparam.num_bits} bits, {qparam.scheme}, give its range {expected[0]:g} and {expected[1]:g}.",
        "make the layers with the width and the scheme of the state, then load it.",
    )


def require_finite_codes(codes: Any, label: str) -> None:
    """Refuse what has no values as codes: no tensor, or NaN or Inf in it.

    Raises:
        ArgumentError: NaN or Inf.
        NumberTypeError: Not a tensor.
    """
    if not isinstance(codes, torch.Tensor):
        raise NumberTypeError(
            f"{label}: the codes are a {type(codes).__name__}.", "give a tensor of codes."
        )
    if codes.is_floating_point() and codes.numel():
        require_values(codes, f"{label}, codes")


def fit_parameters(layer: Any, state_dict: Any, prefix: str, is_frozen: bool) -> None:
    """Give a float layer parameters of the kind in a state dict, codes or floats, before they are loaded.

    Args:
        layer: The layer, with weight and bias.
        state_dict: The state to load.
        prefix: Of the names of the layer in it.
        is_frozen: Whether they are codes.
    """
    dtype = torch.int32 if is_frozen else torch.float32
    device = layer.weight.device
    for name in ("weight", "bias"):
        value = state_dict.get(f"{prefix}{name}")
        former = getattr(layer, name)
        is_other = former is None or former.is_floating_point() == is_frozen
        if value is not None and is_other:
            empty = torch.empty(value.shape, dtype=dtype, device=device)
            setattr(layer, name, nn.Parameter(empty, requires_grad=not is_frozen))
