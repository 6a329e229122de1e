"""`DistillerLSTMCell`: a time step of an LSTM, each operation of which is a layer with statistics and a scale.

i, f, g, o = act_i, act_f, act_g, act_o of the four parts of fc_gate_x(x) + fc_gate_h(h)
c' = f * c + i * g
h' = o * tanh(c')
"""

from __future__ import annotations

import torch
from torch import nn

from qdq.distiller.layers.metadata import mark_state
from qdq.distiller.layers.modules import EltwiseAdd, EltwiseMult
from qdq.errors import UnsupportedError

States = tuple[torch.Tensor, torch.Tensor]
"""The hidden and the cell state."""

_GATES = 4


class DistillerLSTMCell(nn.Module):
    """`nn.LSTMCell` of layers.

    Args:
        input_size: Features of an input.
        hidden_size: Features of a state.
        bias: Whether the gates have biases.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.fc_gate_x = nn.Linear(input_size, _GATES * hidden_size, bias)
        self.fc_gate_h = nn.Linear(hidden_size, _GATES * hidden_size, bias)
        self.eltwiseadd_gate = EltwiseAdd()
        self.act_f, self.act_i, self.act_o = nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid()
        self.act_g = nn.Tanh()
        self.eltwisemult_cell_forget = EltwiseMult()
        self.eltwisemult_cell_input = EltwiseMult()
        self.eltwiseadd_cell = EltwiseAdd()
        for addition in (self.eltwiseadd_gate, self.eltwiseadd_cell):
            addition.feeds_float = True
        self.act_h = nn.Tanh()
        self.eltwisemult_hidden = EltwiseMult()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters from the range of `nn.LSTM`, 1 / sqrt(hidden_size)."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, inputs: torch.Tensor, states: States | None = None) -> States:
        """The states after one time step.

        Args:
            inputs: `[B, input_size]`.
            states: Hidden and cell state before it, each `[B, hidden_size]`; None: zeros.
        """
        if states is None:
            shape = inputs.shape[0], self.hidden_size
            zeros = torch.zeros(shape, dtype=inputs.dtype, device=inputs.device)
            states = start_states(zeros, zeros)
        hidden, cell = states
        gates = self.eltwiseadd_gate(self.fc_gate_x(inputs), self.fc_gate_h(hidden))
        input_gate, forget_gate, candidate, output_gate = gates.chunk(_GATES, dim=1)
        remembered = self.eltwisemult_cell_forget(self.act_f(forget_gate), cell)
        added = self.eltwisemult_cell_input(self.act_i(input_gate), self.act_g(candidate))
        cell = self.eltwiseadd_cell(remembered, added)
        hidden = self.eltwisemult_hidden(self.act_o(output_gate), self.act_h(cell))
        return hidden, cell

    @torch.no_grad()
    def copy_weights(self, source: nn.Module, suffix: str = "") -> None:
        """Take the weights of a module of torch.

        Args:
            source: An `nn.LSTMCell` or `nn.LSTM`.
            suffix: Behind the names of its parameters, such as "_l0_reverse".
        """
        for name, parameter in self._pair_names(suffix):
            parameter.copy_(getattr(source, name))

    @torch.no_grad()
    def give_weights(self, target: nn.Module, suffix: str = "") -> None:
        """Give the weights to a module of torch, the way back of `copy_weights`."""
        for name, parameter in self._pair_names(suffix):
            getattr(target, name).copy_(parameter)

    def _pair_names(self, suffix: str) -> list[tuple[str, torch.Tensor]]:
        """Each parameter with the name that torch has for it."""
        pairs: list[tuple[str, torch.Tensor]] = []
        for side, linear in (("ih", self.fc_gate_x), ("hh", self.fc_gate_h)):
            for kind, parameter in linear.named_parameters():
                pairs.append((f"{kind}_{side}{suffix}", parameter))
        return pairs

    @classmethod
    def from_pytorch_impl(cls, lstm_cell: nn.LSTMCell) -> DistillerLSTMCell:
        """The same cell of layers.

        Args:
            lstm_cell: A cell of torch.

        Raises:
            UnsupportedError: A subclass, which may compute something else, or weights that are no parameters.
        """
        require_plain(lstm_cell)
        cell = cls(lstm_cell.input_size, lstm_cell.hidden_size, lstm_cell.bias)
        cell.to(lstm_cell.weight_ih).train(lstm_cell.training)
        cell.copy_weights(lstm_cell)
        return cell

    def to_pytorch_impl(self) -> nn.LSTMCell:
        """The same cell of torch."""
        lstm_cell = nn.LSTMCell(self.input_size, self.hidden_size, self.bias)
        lstm_cell.to(self.fc_gate_x.weight).train(self.training)
        self.give_weights(lstm_cell)
        return lstm_cell


def start_states(hidden: torch.Tensor, cell: torch.Tensor) -> States:
    """Initial states, which in a quantized model take the scales of the later ones.

    Args:
        hidden: The hidden state, `[B, hidden_size]`.
        cell: The cell state, likewise.
    """
    return mark_state(hidden), mark_state(cell)


def require_plain(module: nn.Module) -> None:
    """Refuse what layers would compute otherwise.

    Args:
        module: An `nn.LSTM` or `nn.LSTMCell`.

    Raises:
        UnsupportedError: See `find_obstacle`.
    """
    obstacle = find_obstacle(module)
    if obstacle:
        raise UnsupportedError(
            f"a {type(module).__name__} cannot be an LSTM of layers: {obstacle}.",
            "leave it as it is; it stays in float.",
        )


def find_obstacle(module: nn.Module) -> str:
    """Why a module of torch cannot become layers; "" if it can.

    Args:
        module: An `nn.LSTM` or `nn.LSTMCell`.
    """
    if type(module) not in (nn.LSTM, nn.LSTMCell):
        return "it is a subclass, which may compute something else"
    if getattr(module, "proj_size", 0):
        return "it projects its hidden state (proj_size)"
    if any(name.startswith("weight_") for name in vars(module)):  # parameters are elsewhere
        return "its weights are computed from others"
    return ""
