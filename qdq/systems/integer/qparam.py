"""`QParam`: the range of a tensor while a network is calibrated, with the scale and zero point that follow from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdq.errors import ArgumentError, ShapeError, StateError
from qdq.systems.affine import Scheme, find_codes, require_width, solve_affine
from qdq.systems.arithmetic import require_values
from qdq.systems.grid import Grid

_STATE = ("scale", "zero_point", "min", "max")


class QParam(nn.Module):
    """The running range of a tensor, with its scale and zero point.

    Args:
        num_bits: Width of the codes, 1 to 16; None: an entry of the state dict that is not used.
        scheme: As for `find_codes`.
        axis: The axis of a weight that has several ranges: 0 (output channels) or 1 (inputs); None: one range.
        groups: Number of ranges, of equally many indices each; None: one for each index.

    Attributes:
        scale: The scale S; empty before the first `update`.
        zero_point: The zero point Z.
        min: Lower end of the range, at most 0.
        max: Upper end of the range, at least 0.
        is_tracking: Whether `observe` widens the range.

    Raises:
        ArgumentError: A width, a scheme or groups that do not exist.
        ArgumentTypeError: A width that is not an integer.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    min: torch.Tensor
    max: torch.Tensor

    def __init__(
        self,
        num_bits: int | None = 8,
        *,
        scheme: Scheme = "unsigned",
        axis: int | None = None,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        if num_bits is not None:
            require_width(num_bits, scheme)
        if groups is not None and (axis is None or groups < 1):
            raise ArgumentError(
                f"QParam: groups is {groups}, axis is {axis}.", "give an axis and at least 1 group."
            )
        self.num_bits = num_bits
        self.scheme: Scheme = scheme
        self.axis = axis
        self.groups = groups
        self.is_tracking = True
        for name in _STATE:
            self.register_buffer(name, torch.empty(0))

    @property
    def is_calibrated(self) -> bool:
        """Whether it has a range."""
        return self.scale.numel() > 0

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code.

        Raises:
            StateError: It has no width.
        """
        if self.num_bits is None:
            raise StateError("QParam: it was made without num_bits.", "give num_bits to the layer.")
        return find_codes(self.num_bits, self.scheme)

    @torch.no_grad()
    def update(self, tensor: torch.Tensor, label: str = "QParam") -> None:
        """Widen the range to the values of a tensor, and compute scale and zero point anew.

        Args:
            tensor: Any shape.
            label: Name of the tensor, for messages.

        Raises:
            ArgumentError: An empty tensor, NaN or Inf; an axis that the groups do not divide.
            ArgumentTypeError: A tensor of integers.
            StateError: It has no width.
        """
        codes = self.codes
        require_values(tensor, label)
        low, high = self._find_ends(tensor.float(), label)
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.is_calibrated:
            low, high = torch.minimum(self.min, low), torch.maximum(self.max, high)
        self.min, self.max = low, high
        is_symmetric = self.scheme == "symmetric"
        self.scale, self.zero_point = solve_affine(low, high, *codes, is_symmetric=is_symmetric)

    def observe(self, tensor: torch.Tensor, label: str) -> None:
        """`update`, unless the range is held (`holding_ranges`)."""
        if self.is_tracking:
            self.update(tensor, label)

    def quantize_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The codes of a tensor, int32."""
        self.require_calibrated()
        lowest, highest = self.codes
        scaled = tensor.float() / self.spread(self.scale, tensor)
        codes = (scaled + self.spread(self.zero_point, tensor)).round()
        return codes.clamp(lowest, highest).to(torch.int32)

    def dequantize_tensor(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes, float32."""
        self.require_calibrated()
        return self.spread(self.scale, codes) * (codes - self.spread(self.zero_point, codes))

    def require_calibrated(self) -> None:
        """Refuse a range that has seen no values.

        Raises:
            StateError: It is not calibrated.
        """
        if not self.is_calibrated:
            raise StateError("QParam: it has no range yet.", "call update, or forward on data.")

    def spread(self, numbers: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """One number for each range in a shape that fits a tensor.

        Args:
            numbers: Scale or zero point.
            tensor: A tensor with the axis of the ranges.
        """
        if self.axis is None:
            return numbers.reshape(())
        shape = [1] * tensor.dim()
        shape[self.axis] = tensor.shape[self.axis]
        return numbers.repeat_interleave(shape[self.axis] // numbers.numel()).reshape(shape)

    def describe(self, system: str = "affine", channels: int = 1) -> Grid:
        """The grid of its values.

        Args:
            system: Name of the number system.
            channels: Number of output channels of a weight.

        Raises:
            StateError: Not calibrated.
        """
        self.require_calibrated()
        scale, zero_point = self.scale.reshape(-1), self.zero_point.reshape(-1)
        obstacle = ""
        if self.axis == 0:
            scale = scale.repeat_interleave(channels // scale.numel())
            zero_point = zero_point.repeat_interleave(channels // zero_point.numel())
        elif self.axis is not None and scale.numel() > 1:
            obstacle = f"{scale.numel()} scales along its inputs"
            scale, zero_point = scale.max().reshape(1), zero_point[:1]
        return Grid(system, scale, zero_point, *self.codes, obstacle=obstacle)

    def _find_ends(self, tensor: torch.Tensor, label: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest value of each range."""
        if self.axis is None:
            return tensor.aminmax()
        size = tensor.shape[self.axis]
        groups = size if self.groups is None else self.groups
        if size % groups:
            raise ShapeError(
                f"{label}: {groups} groups do not divide the {size} indices of axis {self.axis} of a tensor "
                f"of shape {tuple(tensor.shape)}.",
                "choose a divisor.",
            )
        return tensor.movedim(self.axis, 0).reshape(groups, -1).aminmax(dim=1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The buffers are empty before calibration, and have one number for each range after it.
        for name in _STATE:
            value = state_dict.get(f"{prefix}{name}")
            if value is not None:
                buffer = getattr(self, name)
                setattr(self, name, torch.empty(value.shape, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __str__(self) -> str:
        columns = [getattr(self, name).flatten().tolist() for name in _STATE]
        lines = []
        for scale, zero_point, low, high in zip(*columns, strict=True):
            numbers = f"zp: {int(zero_point)} min: {low:.6f} max: {high:.6f}"
            lines.append(f"scale: {scale:.10f} {numbers}")
        return "\n".join(lines)
