"""Quantized LSTM: `[x, h]` is quantized at every time step, `[w_ih, w_hh]` once in a forward."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import rnn as float_rnn
from torch.nn.utils.rnn import PackedSequence

from qdq.compat import tensor_quant
from qdq.compat.nn.modules import _utils
from qdq.compat.nn.modules.tensor_quantizer import TensorQuantizer
from qdq.compat.tensor_quant import QuantDescriptor
from qdq.errors import ArgumentError, ArgumentTypeError, ShapeError

State = tuple[torch.Tensor, torch.Tensor]
"""h and c."""
Step = Callable[[torch.Tensor, State], State]


class QuantLSTM(_utils.QuantMixin, float_rnn.LSTM):
    """`torch.nn.LSTM` with quantized inputs, states and weights; biases and cell states stay float.

    Each layer and direction has one quantizer for `[x, h]`, used at every time step, and one for `[w_ih, w_hh]`, used
    once in a forward, with a range for each row. The loop over time is unrolled by exporters, for a fixed length.

    Args:
        input_size: As `torch.nn.LSTM`.
        hidden_size: As `torch.nn.LSTM`.
        num_layers: As `torch.nn.LSTM`.
        bias: As `torch.nn.LSTM`.
        batch_first: As `torch.nn.LSTM`.
        dropout: As `torch.nn.LSTM`.
        bidirectional: As `torch.nn.LSTM`.
        proj_size: 0; projections are not quantized.
        **kwargs: `device`, `dtype`, `quant_desc_input`, `quant_desc_weight`.

    Raises:
        TypeError: Other keywords.
        ValueError: A projection, dropout outside 0..1, or a descriptor without fake quantization.
    """

    float_class: ClassVar[type] = float_rnn.LSTM
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    _input_quantizers: nn.ModuleList
    _weight_quantizers: nn.ModuleList
    weight_ih_l0: torch.Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0,
        bidirectional: bool = False,
        proj_size: int = 0,
        **kwargs: Any,
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        _require_no_projection(proj_size)
        _require_probability(dropout)
        float_rnn.LSTM.__init__(
            self,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            **factory,
        )
        self.init_quantizer(**descriptors)

    def init_quantizer(
        self,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
        num_layers: int | None = None,
    ) -> None:
        """Attach the quantizers, one of each for every layer and direction; any caller may (F33).

        Args:
            quant_desc_input: How `[x, h]` is quantized.
            quant_desc_weight: How `[w_ih, w_hh]` is quantized.
            num_layers: Layers times directions, which is also the default.

        Raises:
            ValueError: A different number, or a projection.
        """
        _require_no_projection(self.proj_size)
        expected = self.num_layers * self._num_directions
        if num_layers not in (None, expected):
            raise ArgumentError(
                f"num_layers is {num_layers}; {self.num_layers} layers in {self._num_directions} directions need "
                f"{expected} quantizers of each kind.",
                "leave num_layers out.",
            )
        super().init_quantizer(quant_desc_input, quant_desc_weight, expected)

    @property
    def _num_directions(self) -> int:
        if self.bidirectional:
            return 2
        return 1

    @property
    def _input_quantizer(self) -> TensorQuantizer:  # type: ignore[override]
        """The first of `_input_quantizers`: scripts that convert any module read its calibrator."""
        return cast("TensorQuantizer", self._input_quantizers[0])

    @property
    def _weight_quantizer(self) -> TensorQuantizer:  # type: ignore[override]
        """The first of `_weight_quantizers`, for the same scripts."""
        return cast("TensorQuantizer", self._weight_quantizers[0])

    def forward(  # type: ignore[override]
        self, input: torch.Tensor | PackedSequence, hx: State | None = None
    ) -> tuple[torch.Tensor | PackedSequence, State]:
        """Run all layers over a sequence, as `torch.nn.LSTM`.

        Args:
            input: Three dimensions, two without a batch, or packed.
            hx: h and c to start from; zeros by default.

        Returns:
            The outputs in the form of the input, and the last h and c.

        Raises:
            ValueError: An input or a state that does not fit (also a RuntimeError, if torch raises that).
            TypeError: `hx` is not a pair of tensors.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        _require_input(input, self.input_size, self.weight_ih_l0, dims=(2, 3))
        is_batched = input.dim() == 3
        steps = input if is_batched else input.unsqueeze(1)
        if is_batched and self.batch_first:
            steps = steps.transpose(0, 1)
        if not _is_tracing() and steps.shape[0] == 0:
            raise ShapeError(
                "The sequence has length 0; expected one step at least.",
                "leave empty sequences out.",
            )
        outputs, (h, c) = self._forward_layers(
            steps, self._initial_state(hx, steps[0], is_batched), None
        )
        if not is_batched:
            return outputs.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return outputs.transpose(0, 1) if self.batch_first else outputs, (h, c)

    def _forward_packed(
        self, packed: PackedSequence, hx: State | None
    ) -> tuple[PackedSequence, State]:
        """`forward` on rows sorted by length; states are taken and returned in the caller's order."""
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        _require_input(data, self.input_size, self.weight_ih_l0, dims=(2,))
        sizes = batch_sizes.tolist()
        state = self.permute_hidden(self._initial_state(hx, data[: sizes[0]], True), sorted_indices)
        outputs, state = self._forward_layers(data, state, sizes)
        return (
            PackedSequence(outputs, batch_sizes, sorted_indices, unsorted_indices),
            self.permute_hidden(state, unsorted_indices),
        )

    def _initial_state(self, hx: State | None, first_step: torch.Tensor, is_batched: bool) -> State:
        """State as [layers * directions, batch, hidden_size]."""
        count, batch = self.num_layers * self._num_directions, first_step.shape[0]
        if hx is None:
            zeros = first_step.new_zeros(count, batch, self.hidden_size)
            return zeros, zeros
        if is_batched:
            return _checked_state(
                hx, "layers * directions, batch, hidden_size", (count, batch, self.hidden_size)
            )
        h, c = _checked_state(hx, "layers * directions, hidden_size", (count, self.hidden_size))
        return h.unsqueeze(1), c.unsqueeze(1)

    def _forward_layers(
        self, data: torch.Tensor, state: State, sizes: list[int] | None
    ) -> tuple[torch.Tensor, State]:
        """Run all layers over the steps along dim 0; `sizes` are the rows of each step if `data` is packed."""
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.training and self.dropout > 0:
                data = F.dropout(data, self.dropout)
            steps = data.unbind(0) if sizes is None else torch.split(data, sizes)
            outputs = []
            for is_reverse in range(self._num_directions):
                start = state[0][len(last)], state[1][len(last)]
                step = self._make_step(len(last))
                ordered = steps[::-1] if is_reverse else steps
                hidden, end = _run(step, ordered, start, is_ragged=sizes is not None)
                if is_reverse:
                    hidden = hidden[::-1]
                outputs.append(torch.stack(hidden) if sizes is None else torch.cat(hidden))
                last.append(end)
            data = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
        h, c = zip(*last, strict=True)
        return data, (torch.stack(h), torch.stack(c))

    def _make_step(self, index: int) -> Step:
        """The step of one layer and direction, with its weights quantized at once."""
        w_ih, w_hh, *biases = self.all_weights[index]
        weight = self._weight_quantizers[index](torch.cat([w_ih, w_hh], dim=1))
        bias = biases[0] + biases[1] if biases else None
        return _Step(self._input_quantizers[index], weight, bias, self.hidden_size)


class QuantLSTMCell(_utils.QuantMixin, float_rnn.LSTMCell):
    """`torch.nn.LSTMCell` with one quantizer for `[x, h]` and one, with a range for each row, for `[w_ih, w_hh]`.

    Args:
        input_size: As `torch.nn.LSTMCell`.
        hidden_size: As `torch.nn.LSTMCell`.
        bias: As `torch.nn.LSTMCell`.
        **kwargs: `device`, `dtype`, `quant_desc_input`, `quant_desc_weight`.

    Raises:
        TypeError: Other keywords.
        ValueError: A descriptor without fake quantization.
    """

    float_class: ClassVar[type] = float_rnn.LSTMCell
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **kwargs: Any) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_rnn.LSTMCell.__init__(self, input_size, hidden_size, bias, **factory)
        self.init_quantizer(**descriptors)

    def forward(self, input: torch.Tensor, hx: State | None = None) -> State:
        """One step.

        Args:
            input: Two dimensions, or one without a batch.
            hx: h and c to start from; zeros by default.

        Returns:
            The next h and c.

        Raises:
            ValueError: An input or a state that does not fit (also a RuntimeError, if torch raises that).
            TypeError: `hx` is not a pair of tensors.
        """
        _require_input(input, self.input_size, self.weight_ih, dims=(1, 2))
        batch = input.shape[:-1]
        if hx is None:
            zeros = input.new_zeros(*batch, self.hidden_size)
            hx = zeros, zeros
        else:
            hx = _checked_state(
                hx, "batch, hidden_size" if batch else "hidden_size", (*batch, self.hidden_size)
            )
        weight = self._weight_quantizer(torch.cat([self.weight_ih, self.weight_hh], dim=1))
        bias = self.bias_ih + self.bias_hh if self.bias else None
        return _Step(self._input_quantizer, weight, bias, self.hidden_size)(input, hx)


LSTM = QuantLSTM
LSTMCell = QuantLSTMCell


class _Step:
    """One time step of one layer and direction.

    Args:
        quantizer: The quantizer of `[x, h]`.
        weight: `[w_ih, w_hh]`, quantized; its rows are the four gates input, forget, cell and output.
        bias: The sum of both biases, or None.
        hidden_size: Rows of a gate; when traced, the shape of the weight does not give it as a constant.
    """

    def __init__(
        self,
        quantizer: nn.Module,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        hidden_size: int,
    ) -> None:
        self.quantizer = quantizer
        self.weight = weight
        self.bias = bias
        self.hidden_size = hidden_size

    def __call__(self, x: torch.Tensor, state: State) -> State:
        h, c = state
        gates = F.linear(self.quantizer(torch.cat([x, h], dim=-1)), self.weight, self.bias)
        i, f, g, o = torch.split(gates, self.hidden_size, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


def _run(
    step: Step, inputs: Iterable[torch.Tensor], state: State, is_ragged: bool
) -> tuple[list[torch.Tensor], State]:
    """The h of every step, and the state after the last.

    A ragged step has fewer rows than the state if sequences have ended or, backwards, have not begun. The other rows
    keep their state, so that one rule gives the last state in both directions.
    """
    outputs = []
    for x in inputs:
        if is_ragged:
            rows = x.shape[0]
            new = step(x, (state[0][:rows], state[1][:rows]))
            state = torch.cat([new[0], state[0][rows:]]), torch.cat([new[1], state[1][rows:]])
        else:
            new = state = step(x, state)
        outputs.append(new[0])
    return outputs, state


def _is_tracing() -> bool:
    """Whether the TorchScript tracer is running: sizes are tensors then, and comparing them gives warnings."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _require_no_projection(proj_size: int) -> None:
    if proj_size != 0:
        raise ArgumentError(
            f"proj_size is {proj_size}; a quantized LSTM has no projection.",
            "use proj_size=0, or keep this LSTM float.",
        )


def _require_probability(dropout: float) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout <= 1:
        raise ArgumentError(
            f"dropout is {dropout!r}; expected a number from 0 to 1.",
            "give the probability that a value becomes 0.",
        )


def _require_input(x: torch.Tensor, size: int, weight: torch.Tensor, dims: tuple[int, ...]) -> None:
    """Refuse a wrong number of dimensions or features, or a wrong type of numbers."""
    if _is_tracing():
        return
    if x.dim() not in dims:
        expected = " or ".join(str(dim) for dim in dims)
        raise ShapeError(
            f"The input has {x.dim()} dimensions, {tuple(x.shape)}; expected {expected}.",
            "reshape it.",
        )
    if x.shape[-1] != size:
        raise ShapeError(
            f"The input has {x.shape[-1]} features, {tuple(x.shape)}; expected input_size, {size}.",
            "put the features last.",
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ArgumentError(
            f"The input is {x.dtype}, the weights are {weight.dtype}.",
            "convert one with .to(), or use autocast.",
        )


def _checked_state(hx: Any, axes: str, shape: tuple[int, ...]) -> State:
    if (
        not isinstance(hx, tuple | list)
        or len(hx) != 2
        or not all(isinstance(x, torch.Tensor) for x in hx)
    ):
        raise ArgumentTypeError(
            f"hx is {type(hx).__name__}; expected the pair of tensors (h, c).",
            "pass hx=(h, c), or leave it out to start from zeros.",
        )
    h, c = hx
    for name, state in (("h", h), ("c", c)):
        if not _is_tracing() and tuple(state.shape) != shape:
            raise ShapeError(
                f"hx: {name} has shape {tuple(state.shape)}; expected {shape}, that is ({axes}).",
                "give h and c that shape, or leave hx out to start from zeros.",
            )
    return h, c
