"""`SystemQuantizer`: what the quantizers of all number systems have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from qdq.distributed import find_rank
from qdq.errors import StateError
from qdq.systems.grid import Grid, describe_moving
from qdq.systems.typed_state import TypedState

UNCALIBRATED = "not calibrated"
"""How the obstacle of a quantizer begins that has no state yet."""


class SystemQuantizer(TypedState):
    """Quantizes one tensor by the rule of a system; its state, if it has any, is in buffers that keep their types.

    Args:
        name: For messages.

    Attributes:
        path: Dotted name in the model, for messages; "" if it is not known.
    """

    is_foreign_quantizer = True
    """Tells `export_onnx` that this is no quantizer of its own."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.path = ""
        self._numbers: dict[str, tuple[torch.Tensor, int, float]] = {}

    @property
    def label(self) -> str:
        """The quantizer, for messages."""
        return self.path or self.name or type(self).__name__

    @abstractmethod
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The quantized values, in shape, type and device of the values, with a gradient."""

    def transform(self, values: torch.Tensor) -> torch.Tensor:
        """The float values that are rounded, in systems that do more with a weight than to round it.

        Args:
            values: The float weight.
        """
        return values

    @abstractmethod
    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid of the quantized values.

        Args:
            values: The float weight; None for an input, whose grid is in the state of the quantizer.

        Raises:
            StateError: Not calibrated.
        """

    def read_number(self, buffer_name: str) -> float:
        """The number in a buffer. A GPU is waited for once, until the buffer changes.

        Args:
            buffer_name: Its attribute.
        """
        buffer: torch.Tensor = getattr(self, buffer_name)
        if buffer.is_cpu or buffer.is_inference():  # such a tensor does not count its changes
            return float(buffer)
        known = self._numbers.get(buffer_name)
        if known is None or known[0] is not buffer or known[1] != buffer._version:
            known = buffer, buffer._version, float(buffer)
            self._numbers[buffer_name] = known
        return known[2]

    def write_number(self, buffer_name: str, number: float) -> None:
        """Replace the number in a buffer, without a wait now or when it is read.

        Args:
            buffer_name: Its attribute.
            number: The new number.
        """
        with torch.inference_mode(False):  # outside of it, such a tensor could not be changed
            buffer = torch.full_like(getattr(self, buffer_name), number)
        setattr(self, buffer_name, buffer)
        self._numbers[buffer_name] = (buffer, buffer._version, number)

    def require_single(self, action: str) -> None:
        """Refuse to change the state where it would be lost, or would differ from that of others.

        Args:
            action: What the quantizer does, such as "calibrates".

        Raises:
            StateError: It is in a replica of `nn.DataParallel`, or in one of several processes.
        """
        refuse_replica(self, self.label, action)
        _, num_processes = find_rank()
        if num_processes > 1:
            raise StateError(
                f"{self.label} {action} in {num_processes} processes, each of which would get another range.",
                "do that in one process, and load its state dict in the others.",
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy has buffers of its own, which count their changes anew.
        return {**vars(self), "_numbers": {}}


def describe_or_refuse(quantizer: SystemQuantizer, values: torch.Tensor | None = None) -> Grid:
    """The grid of a quantizer, with an obstacle if it is not calibrated, so that one error can name all of them.

    Args:
        quantizer: The quantizer.
        values: As for `SystemQuantizer.describe`.
    """
    try:
        return quantizer.describe(values)
    except StateError as error:
        reason = error.message.removeprefix(quantizer.label).strip(" :.")
        return describe_moving(type(quantizer).__name__, 8, f"{UNCALIBRATED} ({reason})")


def refuse_replica(module: nn.Module, label: str, action: str) -> None:
    """Refuse what a replica of `nn.DataParallel`, which ends with the forward, cannot do.

    Args:
        module: A module, or a replica of it.
        label: Its name, for the message.
        action: What it does, such as "calibrates".

    Raises:
        StateError: It is a replica.
    """
    if getattr(module, "_is_replica", False):
        raise StateError(
            f"{label} {action} in a replica of nn.DataParallel, whose counts and ranges are lost.",
            "run the model itself, or wrap it in DistributedDataParallel.",
        )
