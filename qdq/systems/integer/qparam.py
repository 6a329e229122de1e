"""`QParam`: the range of a tensor while a network is calibrated, with the scale and zero point that follow from it."""

from __future__ import annotations

from typing import Any

import torch

from qdq.errors import ShapeError, StateError
from qdq.systems.affine import Scheme, find_codes, require_width, solve_affine
from qdq.systems.arithmetic import require_values
from qdq.systems.grid import Grid, name_width
from qdq.systems.integer.granularity import find_ends, require_granularity, spread
from qdq.systems.integer.state import require_finite_codes, require_fitting, require_sole
from qdq.systems.typed_state import TypedState

_STATE = ("scale", "zero_point", "min", "max")


class QParam(TypedState):
    """The running range of a tensor, with its scale and zero point.

    Args:
        num_bits: Width of the codes, 1 to 16; None: an entry of the state dict that is not used.
        scheme: As for `find_codes`.
        axis: The axis of a weight that has several ranges: 0 (output channels) or 1 (inputs); None: one range.
        groups: Number of ranges, of equally many indices each; None: one for each index.
        label: Name of the layer and the tensor, for messages.

    Attributes:
        scale: The scale S; empty before the first `update`.
        zero_point: The zero point Z.
        min: Lower end of the range, at most 0.
        max: Upper end of the range, at least 0.
        is_tracking: Whether `observe` widens the range.

    Raises:
        ArgumentError: A width, a scheme, an axis or groups that do not exist.
        NumberTypeError: A width, an axis or groups that are not integers.
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
        label: str = "QParam",
    ) -> None:
        super().__init__()
        require_width(num_bits, scheme, label)
        require_granularity(axis, groups, label)
        self.label = label
        self.num_bits = num_bits
        self.scheme: Scheme = scheme
        self.axis = axis
        self.groups = groups
        self.is_tracking = True
        for name in _STATE:
            self.register_buffer(name, torch.empty(0, dtype=torch.float32))

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
            raise StateError(
                f"{self.label}: it was made without num_bits.", "give num_bits to the layer."
            )
        return find_codes(self.num_bits, self.scheme)

    @torch.no_grad()
    def update(self, tensor: torch.Tensor) -> None:
        """Widen the range to the values of a tensor, and compute scale and zero point anew.

        Args:
            tensor: Any shape.

        Raises:
            ArgumentError: An empty tensor, NaN or Inf; an axis that the groups do not divide, or that has another
                number of ranges than before.
            NumberTypeError: A tensor of integers.
            StateError: It has no width, or calibrates in a replica or in several processes.
        """
        codes = self.codes
        require_sole(self, self.label)
        require_values(tensor, self.label)
        low, high = find_ends(tensor, self.axis, self.groups, self.label)
        if self.is_calibrated:
            self._require_as_many(low.numel(), tensor)
            low, high = torch.minimum(self.min, low), torch.maximum(self.max, high)
        self.min, self.max = low, high
        ends = solve_affine(low, high, *codes, is_symmetric=self.scheme == "symmetric")
        self.scale, self.zero_point = ends

    def observe(self, tensor: torch.Tensor) -> None:
        """`update`, unless the range is held (`holding_ranges`)."""
        if self.is_tracking:
            self.update(tensor)

    def quantize_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The codes of a tensor, int32.

        Raises:
            ArgumentError: An empty tensor, NaN or Inf, or a shape that the ranges do not fit.
            NumberTypeError: A tensor of integers.
            StateError: Not calibrated.
        """
        self.require_calibrated()
        require_values(tensor, self.label)
        lowest, highest = self.codes
        codes = tensor.float() / self.spread(self.scale, tensor)
        codes = (codes + self.spread(self.zero_point, tensor)).round()
        return codes.clamp(lowest, highest).to(torch.int32)

    def dequantize_tensor(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes, float32."""
        self.require_calibrated()
        require_finite_codes(codes, self.label)
        return self.spread(self.scale, codes) * (codes - self.spread(self.zero_point, codes))

    def require_calibrated(self) -> None:
        """Refuse a range that has seen no values.

        Raises:
            StateError: It is not calibrated.
        """
        if not self.is_calibrated:
            fix = "call update, or forward on data."
            raise StateError(f"{self.label}: it has no range yet.", fix)

    def spread(self, numbers: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """One number for each range in a shape that fits a tensor.

        Args:
            numbers: Scale or zero point.
            tensor: A tensor with the axis of the ranges.
        """
        return spread(numbers, tensor, self.axis, self.label)

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
        obstacle = name_width(self.num_bits or 0)
        if self.axis == 0:
            scale = scale.repeat_interleave(channels // scale.numel())
            zero_point = zero_point.repeat_interleave(channels // zero_point.numel())
        elif self.axis is not None and scale.numel() > 1:
            obstacle = f"{scale.numel()} scales along its inputs"
            scale, zero_point = scale.max().reshape(1), zero_point[:1]
        return Grid(system, scale, zero_point, *self.codes, obstacle=obstacle)

    def _require_as_many(self, num_ranges: int, tensor: torch.Tensor) -> None:
        if num_ranges != self.min.numel():
            raise ShapeError(
                f"{self.label}: a tensor of shape {tuple(tensor.shape)} has {num_ranges} ranges along axis "
                f"{self.axis}, and {self.min.numel()} are calibrated.",
                "give tensors of one shape.",
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The buffers are empty before calibration, and have one number for each range after it.
        for name in _STATE:
            value = state_dict.get(f"{prefix}{name}")
            if value is not None:
                setattr(self, name, getattr(self, name).new_empty(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.num_bits is not None and self.is_calibrated:
            require_fitting(self)

    def __str__(self) -> str:
        columns = [getattr(self, name).flatten().tolist() for name in _STATE]
        lines = []
        for scale, zero_point, low, high in zip(*columns, strict=True):
            numbers = f"zp: {int(zero_point)} min: {low:.6f} max: {high:.6f}"
            lines.append(f"scale: {scale:.10f} {numbers}")
        return "\n".join(lines)
