"""`DistillerLSTM`: an LSTM of layers in the place of `nn.LSTM`, which is a single function and stays in float."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from qdq.distiller.layers.lstm_cell import (
    DistillerLSTMCell,
    States,
    require_plain,
    start_states,
)
from qdq.errors import ArgumentError, UnsupportedError

_OPTIONS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")


class _Sequence(NamedTuple):
    """The time steps of a layer, and the states after the last one."""

    steps: list[torch.Tensor]
    states: States


class DistillerLSTM(nn.Module):
    """`nn.LSTM` of layers: `cells`, and `cells_reverse` if it is bidirectional, one for each layer of the LSTM.

    Args:
        input_size: Features of an input.
        hidden_size: Features of a state.
        num_layers: Number of layers.
        bias: Whether the gates have biases.
        batch_first: Whether the batch is the first axis of inputs and outputs.
        dropout: Probability of the dropout between layers, in training.
        bidirectional: Whether each layer also reads the time steps backwards.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.dropout = nn.Dropout(dropout)
        self.cells = self._make_cells()
        if bidirectional:
            self.cells_reverse = self._make_cells()

    def _make_cells(self) -> nn.ModuleList:
        num_directions = 2 if self.bidirectional else 1
        cells = nn.ModuleList()
        for layer in range(self.num_layers):
            input_size = num_directions * self.hidden_size if layer else self.input_size
            cells.append(DistillerLSTMCell(input_size, self.hidden_size, self.bias))
        return cells

    def list_cells(self) -> dict[str, DistillerLSTMCell]:
        """The cells by the suffix of their parameters in `nn.LSTM`, in the order of its states."""
        cells: dict[str, Any] = {}
        for layer, cell in enumerate(self.cells):
            cells[f"_l{layer}"] = cell
            if self.bidirectional:
                cells[f"_l{layer}_reverse"] = self.cells_reverse[layer]
        return cells

    def flatten_parameters(self) -> None:
        """Nothing: networks call it on `nn.LSTM`, whose kernel wants its weights in one piece of memory."""

    def forward(
        self, inputs: torch.Tensor, states: States | None = None
    ) -> tuple[torch.Tensor, States]:
        """The hidden states of the last layer, and the last states of all layers.

        Args:
            inputs: `[T, B, input_size]`, with `batch_first` `[B, T, input_size]`, for a single sequence
                `[T, input_size]`.
            states: Hidden and cell states before the first time step, each `[num_layers * directions, B, hidden_size]`,
                for a single sequence without B; None: zeros.

        Returns:
            `[T, B, directions * hidden_size]` in the order of axes that the inputs have, and states as above.

        Raises:
            ArgumentError: There is no time step.
            UnsupportedError: A packed sequence.
        """
        if isinstance(inputs, PackedSequence):
            raise UnsupportedError(
                "DistillerLSTM got a packed sequence, whose time steps have batches of different sizes; an engine has "
                "one size for all.",
                "pass a padded tensor, or sequences of one length together.",
            )
        is_single = inputs.dim() == 2
        if is_single:
            inputs = inputs.unsqueeze(1)
            states = None if states is None else (states[0].unsqueeze(1), states[1].unsqueeze(1))
        time_axis = 1 if self.batch_first and not is_single else 0
        steps = list(inputs.unbind(time_axis))
        if not steps:
            raise ArgumentError("DistillerLSTM got no time step.", "pass at least one.")
        steps, last_states = self._run_layers(steps, self._split_states(steps[0], states))
        hidden = torch.stack([state[0] for state in last_states])
        cell = torch.stack([state[1] for state in last_states])
        outputs = torch.stack(steps, time_axis)
        if is_single:
            return outputs.squeeze(1), (hidden.squeeze(1), cell.squeeze(1))
        return outputs, (hidden, cell)

    def _split_states(self, sample: torch.Tensor, states: States | None) -> list[States]:
        """The initial states of each cell.

        Args:
            sample: A time step, `[B, input_size]`.
            states: Those of all cells.
        """
        num_cells = len(self.list_cells())
        if states is None:
            shape = num_cells, sample.shape[0], self.hidden_size
            zeros = torch.zeros(shape, dtype=sample.dtype, device=sample.device)
            states = zeros, zeros
        hidden, cell = (values.unbind(0) for values in states)
        pairs = zip(hidden, cell, strict=True)
        return [start_states(*pair) for pair in pairs]

    def _run_layers(
        self, steps: list[torch.Tensor], initial: list[States]
    ) -> tuple[list[torch.Tensor], list[States]]:
        """The time steps of the last layer, and the last states of all cells."""
        last_states = []
        remaining = iter(initial)
        for layer, cell in enumerate(self.cells):
            if layer:
                steps = [self.dropout(step) for step in steps]
            forward = _run_cell(cell, steps, next(remaining))
            last_states.append(forward.states)
            if not self.bidirectional:
                steps = forward.steps
                continue
            backward = _run_cell(self.cells_reverse[layer], reversed(steps), next(remaining))
            last_states.append(backward.states)
            both = zip(forward.steps, reversed(backward.steps), strict=True)
            steps = [torch.cat(pair, 1) for pair in both]
        return steps, last_states

    @classmethod
    def from_pytorch_impl(cls, lstm: nn.LSTM) -> DistillerLSTM:
        """The same LSTM of layers.

        Args:
            lstm: An LSTM of torch.

        Raises:
            UnsupportedError: A subclass, which may compute something else, projections (`proj_size`), or weights that
                are no parameters.
        """
        require_plain(lstm)
        copied = cls(**_read_options(lstm), dropout=lstm.dropout)
        copied.to(next(lstm.parameters())).train(lstm.training)
        for suffix, cell in copied.list_cells().items():
            cell.copy_weights(lstm, suffix)
        return copied

    def to_pytorch_impl(self) -> nn.LSTM:
        """The same LSTM of torch."""
        lstm = nn.LSTM(**_read_options(self), dropout=self.dropout.p)
        lstm.to(next(self.parameters())).train(self.training)
        for suffix, cell in self.list_cells().items():
            cell.give_weights(lstm, suffix)
        return lstm


def _read_options(lstm: nn.Module) -> dict[str, Any]:
    """The options that both kinds of LSTM have as attributes."""
    return {name: getattr(lstm, name) for name in _OPTIONS}


def _run_cell(cell: nn.Module, steps: Iterable[torch.Tensor], states: States) -> _Sequence:
    """The hidden states of a cell after each time step."""
    outputs = []
    for step in steps:
        states = cell(step, states)
        outputs.append(states[0])
    return _Sequence(outputs, states)
