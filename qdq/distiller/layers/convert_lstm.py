"""`convert_model_to_distiller_lstm`: LSTMs of layers in a model."""

from __future__ import annotations

import logging

from torch import nn

from qdq.distiller.layers.lstm import DistillerLSTM
from qdq.distiller.layers.lstm_cell import DistillerLSTMCell, find_obstacle
from qdq.distiller.layers.replace_modules import put_in
from qdq.text import printable

logger = logging.getLogger(__name__)


def convert_model_to_distiller_lstm(model: nn.Module) -> nn.Module:
    """Put LSTMs of layers in the place of all `nn.LSTM` and `nn.LSTMCell` of a model, in place, with their weights.

    One that cannot become layers stays, and a warning says why.

    Args:
        model: A float model, or an LSTM alone.

    Returns:
        The model, or the LSTM in its place.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.LSTM | nn.LSTMCell):
            continue
        obstacle = find_obstacle(module)
        if obstacle:
            label = printable(name) or type(module).__name__
            logger.warning("%s stays in float: %s", label, obstacle)
        elif isinstance(module, nn.LSTM):
            replacements[module] = DistillerLSTM.from_pytorch_impl(module)
        else:
            replacements[module] = DistillerLSTMCell.from_pytorch_impl(module)
    put_in(model, replacements)
    return replacements.get(model, model)
