"""Which wrapper a layer gets, or why it stays float."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qdq.distiller.layers.modules import BatchMatmul, Concat, EltwiseAdd, EltwiseMult, Matmul
from qdq.distiller.settings.layer_settings import LayerSettings
from qdq.forward import ForwardTrace

Kind = Literal["weighted", "embedding", "several inputs", "fake", "float type", "identity", "float"]

_WEIGHTED = (_ConvNd, nn.Linear)
_SEVERAL_INPUTS = (Concat, EltwiseAdd, EltwiseMult, Matmul, BatchMatmul)
_LSTM_REASON = "an LSTM is one function; convert_model_to_distiller_lstm makes layers of it, which are quantized"
_ROUNDING: tuple[Kind, ...] = ("weighted", "several inputs", "fake")


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer.

    Args:
        kind: The wrapper, or "float".
        reason: Why it is float, or partly; "" for a quantized layer.
    """

    kind: Kind
    reason: str = ""


def choose_wrapper(
    name: str,
    module: nn.Module,
    settings: LayerSettings,
    trace: ForwardTrace,
    statistics: Collection[str] | None,
) -> Choice:
    """What becomes of a layer.

    Args:
        name: Its name.
        module: The layer.
        settings: How it is quantized.
        trace: One forward of the model.
        statistics: Names of the layers with statistics; None: dynamic.
    """
    if settings.make_identity:
        return Choice("identity")
    if trace.calls[name] == 0:
        return Choice("float", "it does not run on the example inputs")
    if settings.fpq_module is not None and not settings.fake:
        return Choice("float type", f"fpq_module: it runs in float{settings.fpq_module}")
    if not settings.fake and isinstance(module, (*_WEIGHTED, nn.Embedding)):
        return _choose_weighted(module, settings)
    is_lstm = isinstance(module, nn.LSTM | nn.LSTMCell) and not settings.fake
    if is_lstm and settings.bits_activations is not None:
        return Choice("float", _LSTM_REASON)
    if statistics is None:
        kinds = "convolutions, linear layers and embeddings"
        return Choice("float", f"without statistics (dynamic), {kinds} alone are quantized")
    if settings.bits_activations is None:
        return Choice("float", "bits_activations is null")
    if not settings.fake and isinstance(module, _SEVERAL_INPUTS):
        return Choice("several inputs")
    if name not in statistics:
        return Choice("float", "it has no statistics, as its output is no float tensor")
    return Choice("fake")


def _choose_weighted(module: nn.Module, settings: LayerSettings) -> Choice:
    """What becomes of a layer with a weight."""
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return Choice("float", "its weight is computed from others, it is not a parameter")
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return Choice("float", "max_norm changes its table in the forward")
        is_float = settings.bits_weights is None
        return Choice("float", "bits_weights is null") if is_float else Choice("embedding")
    if settings.bits_activations is not None:
        is_float = settings.bits_weights is None
        return Choice("weighted", "its weight alone: bits_weights is null" if is_float else "")
    if settings.bits_weights is not None:
        return Choice("weighted", "its input and output: bits_activations is null")
    return Choice("float", "bits_activations and bits_weights are null")


def rounds_output(choice: Choice, settings: LayerSettings) -> bool:
    """Whether a layer rounds its output to a range from statistics.

    Args:
        choice: What becomes of it.
        settings: How it is quantized.
    """
    return choice.kind in _ROUNDING and settings.bits_activations is not None
