"""`SystemWrapper`: a module of another tool in the place of a float one, which `to_tensorrt` turns back.

A wrapper computes on codes and rounds its output, where TensorRT rounds the inputs of products. Each wrapper knows who
has rounded what arrives at it: the range of that output becomes the range of this input.
"""

from __future__ import annotations

from torch import nn

from qdq.systems.grid import Grid


class SystemWrapper(nn.Module):
    """A module around a float one.

    Args:
        wrapped_module: The float module; its parameters may hold codes.

    Attributes:
        sources: Position of an input -> the wrapper that has rounded what arrived there; None: this wrapper rounds it
            itself, or nobody does.
        has_several_sources: Whether an input has arrived from several wrappers.
    """

    is_foreign_quantizer = True
    """Tells `export_onnx` that this is no quantizer of its own."""

    def __init__(self, wrapped_module: nn.Module) -> None:
        super().__init__()
        self.wrapped_module = wrapped_module
        self.sources: dict[int, SystemWrapper | None] = {}
        self.has_several_sources = False

    def note_source(self, index: int, source: SystemWrapper | None) -> None:
        """Remember who has rounded an input.

        Args:
            index: Position of the input.
            source: As in `sources`.
        """
        if self.sources.setdefault(index, source) is not source:
            self.has_several_sources = True

    def describe_weight(self) -> Grid | None:
        """The grid of the weight; None: TensorRT computes the module in float."""
        return None

    def describe_inputs(self) -> dict[int, Grid]:
        """Position -> grid of each input that TensorRT rounds before this module.

        Raises:
            StateError: It has not run, so it is not known who rounds its inputs.
        """
        return {}

    def describe_output(self) -> Grid | None:
        """The grid of the output; None: it is not rounded."""
        return None

    def float_reason(self) -> str:
        """Why TensorRT rounds no input, or not each, before this module; "" if it rounds all."""
        return f"{type(self.wrapped_module).__name__} is computed in float"

    def list_differences(self) -> list[str]:
        """What this module does besides rounding its output and TensorRT does not, in words."""
        return []

    def list_dropped(self) -> list[str]:
        """What of the settings has no effect in TensorRT, in words; it is logged."""
        return []

    def restore(self) -> nn.Module:
        """The float module that takes the place of this one; its weight is quantized, but no codes."""
        return self.wrapped_module

    def rewrap(self) -> None:
        """Undo `restore`."""
