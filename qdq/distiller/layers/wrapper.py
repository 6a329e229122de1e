"""`RangeLinearQuantWrapper`: a layer that reads codes, computes on integers, and rounds its output to codes again.

With multipliers s and zero points zp, x = (q + zp) / s. The layer computes on the integers q + zp. Its sums have a
scale, too, such as s_x * s_w, and the codes of the output y are

    q_y = clamp(round_half_even(sum * (s_y / s_sum) - zp_y))

A tensor carries its scale and zero point (`metadata`). One without them, from a function or from the user, is
quantized first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdq.distiller.layers.grids import describe_params
from qdq.distiller.layers.input_params import receive_input, solve_record, solve_values
from qdq.distiller.layers.integers import Integers, round_to_integers
from qdq.distiller.layers.metadata import attach
from qdq.distiller.ranges.linear_params import LinearParams
from qdq.distiller.ranges.scale_approximation import apply_approximation
from qdq.distiller.settings.input_settings import InputSettings
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.distiller.settings.positions import as_positional
from qdq.distiller.statistics.records import LayerStatistics
from qdq.errors import ArgumentTypeError, StateError
from qdq.systems.arithmetic import narrow
from qdq.systems.grid import Grid
from qdq.systems.wrapper import SystemWrapper


class RangeLinearQuantWrapper(SystemWrapper):
    """A quantized layer, for evaluation only.

    Args:
        wrapped_module: The float layer.
        settings: How it is quantized; `clip_half_range` applies a ReLU to its output.
        statistics: The ranges of its inputs and its output; None: those of each batch count (dynamic).
        bits_accum: Width of its sums.
        name: Its dotted name, for messages.

    Attributes:
        num_forwards: Number of calls.
        output_scale: Multiplier of the output, beside `output_zero_point`; they do not exist if the output is float, or
            in dynamic mode.
        input_params: Position -> scale and zero point of an input that comes without any, if static.
        constant_inputs: Positions of inputs that are parameters.
        state_inputs: Positions of inputs that were the start of a recurrence, see `mark_state`.
        reports_saturation: Whether the next sums beyond the accumulator are logged.
        force_readjust: Whether a scale or zero point was set by hand since the last forward.

    Raises:
        ArgumentError: Statistics or settings that give no range.
    """

    num_forwards: torch.Tensor
    output_scale: torch.Tensor
    output_zero_point: torch.Tensor

    def __init__(
        self,
        wrapped_module: nn.Module,
        settings: LayerSettings,
        statistics: LayerStatistics | None = None,
        *,
        bits_accum: int = 32,
        name: str = "",
    ) -> None:
        super().__init__(wrapped_module)
        self.settings = settings
        self.bits_accum = bits_accum
        self.label = name or type(wrapped_module).__name__
        self.is_static = statistics is not None
        self.force_readjust = False
        self.reports_saturation = True
        self.input_params: dict[int, LinearParams] = {}
        self.constant_inputs: set[int] = set()
        self.state_inputs: set[int] = set()
        self.register_buffer("num_forwards", torch.zeros(1, dtype=torch.long))
        if statistics is not None and settings.bits_activations is not None:
            self._solve_ranges(statistics)

    def _solve_ranges(self, statistics: LayerStatistics) -> None:
        half_range = self.settings.clip_half_range
        place = f"{self.label}, output"
        params = solve_record(statistics.output, self.output_settings, place, half_range)
        self.register_buffer("output_scale", params.scale)
        self.register_buffer("output_zero_point", params.zero_point)
        for index, record in statistics.inputs.items():
            settings = self.settings.input_overrides.get(index, self.output_settings)
            if settings.bits_activations is not None:
                place = f"{self.label}, input {index}"
                self.input_params[index] = solve_record(record, settings, place)

    @property
    def output_settings(self) -> InputSettings:
        """How the output is quantized, and an input without a scale that has no settings of its own."""
        settings = self.settings
        bits, mode = settings.bits_activations, settings.mode.activations
        return InputSettings(bits, mode, settings.clip_acts, settings.clip_n_stds)

    @property
    def output_params(self) -> LinearParams | None:
        """Scale and zero point of the output; None if it is float, or if they differ from batch to batch."""
        bits = self.settings.bits_activations
        if bits is None or not self.is_static:
            return None
        mode = self.settings.mode.activations
        return LinearParams(self.output_scale, self.output_zero_point, bits, mode)

    @torch.no_grad()
    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The quantized output, with its scale and zero point.

        Raises:
            ArgumentTypeError: Keywords that the float layer does not have, or an input that is no float tensor.
            StateError: In training mode; or an input has a scale and settings, too, or neither.
        """
        self.start_forward()
        inputs, keywords = as_positional(self.wrapped_module, self.label, inputs, keywords)
        if keywords:
            raise ArgumentTypeError(
                f"{self.label} is called with {', '.join(keywords)}, which is no input with a scale.",
                "leave the layer in float: bits_activations: null, bits_weights: null.",
            )
        if self.settings.bits_activations is None:
            return self.compute_float(*inputs)
        arrived = [receive_input(self, index, values) for index, values in enumerate(inputs)]
        with torch.autocast(inputs[0].device.type, enabled=False):  # half precision rounds integers
            sums = self.accumulate(*arrived)
        return self.round_output(sums, inputs[0])

    def start_forward(self) -> None:
        """Refuse training mode, and count the call.

        Raises:
            StateError: In training mode.
        """
        if self.training:
            raise StateError(
                f"{self.label} is quantized after training, and in training mode.",
                "call model.eval(); to train, use QuantAwareTrainRangeLinearQuantizer.",
            )
        self.num_forwards += 1
        if self.force_readjust:
            self.readjust()
        self.force_readjust = False

    def readjust(self) -> None:
        """Derive again what depends on what was set by hand."""

    def compute_float(self, *inputs: Any) -> Any:
        """The output of a layer whose output stays float."""
        return self.wrapped_module(*inputs)

    def accumulate(self, *inputs: Integers) -> Integers:
        """The sums of the layer, before they are rounded to codes.

        Args:
            inputs: The inputs.
        """
        raise NotImplementedError

    @torch.inference_mode(False)  # an inference tensor does not count its changes in place
    @torch.no_grad()
    def round_output(self, sums: Integers, sample: torch.Tensor) -> torch.Tensor:
        """The quantized output, with its scale and zero point.

        Args:
            sums: From `accumulate`.
            sample: A tensor of the type that the output has.
        """
        values = sums.integers.float()
        if self.settings.clip_half_range:
            values = values.relu()
        params = self.output_params
        if params is None:
            half_range = self.settings.clip_half_range
            place = f"{self.label}, output"
            params = solve_values(values / sums.scale, self.output_settings, place, half_range)
        factor = params.scale / sums.scale
        factor = apply_approximation(factor, self.settings.scale_approx_mult_bits)
        integers = round_to_integers(values * factor, params)
        output = narrow(integers.div_(params.scale), sample)
        return attach(output, params, self)

    def list_dropped(self) -> list[str]:
        """The approximation of scales, see `SystemWrapper`."""
        bits = self.settings.scale_approx_mult_bits
        if bits is None:
            return []
        return [f"TensorRT has exact scales, not approximations by integers of {bits} bits"]

    def describe_output(self) -> Grid | None:
        """The grid of the output, see `SystemWrapper`."""
        params = self.output_params
        return None if params is None else describe_params(params)
