"""The layers that `to_tensorrt` leaves as they are: those that became int8 before, and those that no system has."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from qdq.nn import QuantMixin, QuantMultiheadAttention
from qdq.systems.records import LayerVerdict
from qdq.systems.selection import list_weighted
from qdq.systems.tracing import WEIGHTED

NO_RANGE = "its input has no range yet: call qdq.systems.calibrate_inputs(model, batches)"


def list_others(model: nn.Module) -> list[LayerVerdict]:
    """The verdicts on the layers with matrices that stay as they are, in the order of `named_modules`.

    Args:
        model: A model of any number system.
    """
    unread = _list_unread(model)
    verdicts = []
    for name, layer in list_weighted(model).items():
        if isinstance(layer, QuantMixin) and layer._weight_quantizer.amax is not None:
            verdicts.append(_judge_quantized(name, layer))
            continue
        reason = unread.get(layer, "") or _reason_against(layer)
        if reason:
            verdicts.append(LayerVerdict(name, "float", (), reason))
    return verdicts


def _list_unread(model: nn.Module) -> dict[nn.Module, str]:
    """The linear layers that attention reads the weight of and never calls, with the reason."""
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        is_float = isinstance(module, nn.MultiheadAttention)
        if is_float and not isinstance(module, QuantMultiheadAttention):
            reasons[module.get_submodule("out_proj")] = (
                f"{type(module).__name__} reads its weight and does not call it"
            )
    return reasons


def _judge_quantized(name: str, layer: QuantMixin) -> LayerVerdict:
    """A layer of qdq with a range for its weight: it was converted before, or calibrated without a number system."""
    quantizers = layer.quantizers().values()
    if not all(quantizer.is_enabled for quantizer in quantizers):
        return LayerVerdict(name, "float", (), "its quantizers are disabled")
    has_ranges = all(quantizer.amax is not None for quantizer in quantizers)
    return LayerVerdict(name, "int8", (), "" if has_ranges else NO_RANGE)


def _reason_against(layer: nn.Module) -> str:
    """Why no number system reaches a layer; "" if one may."""
    if isinstance(layer, _ConvTransposeNd):
        return "transposed convolutions are not taken"
    if not isinstance(layer, WEIGHTED):
        return f"no number system has a {type(layer).__name__}"
    if any(map(is_lazy, layer.parameters(recurse=False))):
        return "its weight is not initialized yet: run the model once"
    return ""
