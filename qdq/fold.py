"""BatchNorm folded into the convolution or linear layer before it (R-BN-FOLD).

Folding comes before calibration: it changes the range of every output channel of the weight, and TensorRT folds anyway.
A BatchNorm that was live in fine-tuning is folded afterwards: the range of each output channel of the quantized weight
is then scaled with it, and the codes stay as they are.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import Linear
from torch.utils._pytree import tree_map_only

from qdq.forward import ForwardTrace, call_model, evaluating, require_model, trace_forward
from qdq.nn import QuantMixin
from qdq.quantize import own_tensor
from qdq.quantizer import disable_quantization
from qdq.text import group_names

logger = logging.getLogger(__name__)
_TOLERANCE = (
    1e-3  # relative to the largest output: rounding of float32, far below any change of meaning
)


@dataclass(frozen=True)
class FoldedPair:
    """What became of one BatchNorm.

    Args:
        batchnorm: Dotted name of the BatchNorm.
        layer: Dotted name of the layer before it, "" if none was found.
        folded: Whether it is now part of that layer.
        reason: Why, or why not.
    """

    batchnorm: str
    layer: str
    folded: bool
    reason: str


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> list[FoldedPair]:
    """Fold every BatchNorm whose input is the output of exactly one convolution or linear layer, in place.

    Pairs are found by running the model once (`trace_forward`); each fold is tried on the running data first and given
    up where the numbers change, for instance in layers that transform their weight before using it. A folded
    BatchNorm becomes `nn.Identity`; the layer gets a bias if it had none.

    Args:
        model: A model with trained running statistics: a float one, or one fine-tuned with live BatchNorm.
        example_inputs: One batch, as the model is called with (see `trace.call_model`).

    Returns:
        One entry for each BatchNorm of the model, in the order of its modules.
    """
    require_model(model)
    trace = trace_forward(model, example_inputs)
    modules = dict(model.named_modules())
    layer_before = {reader: name for name, reader in trace.only_reader.items()}
    pairs = []
    for name, module in modules.items():
        if _is_batchnorm(module):
            layer = layer_before.get(name, "")
            reason = _reason_against(
                module, modules.get(layer) if layer else None, trace.calls[name]
            )
            if not layer and trace.calls[name] == 1:
                reason = _describe_shared(name, modules, trace) or reason
            pairs.append(FoldedPair(name, layer, not reason, reason))

    candidates = {pair.batchnorm: pair.layer for pair in pairs if pair.folded}
    changed = _find_changed(model, example_inputs, candidates, modules)
    pairs = [
        FoldedPair(
            p.batchnorm,
            p.layer,
            False,
            "folding changes its output: the layer uses its weight in its own way",
        )
        if p.batchnorm in changed
        else FoldedPair(p.batchnorm, p.layer, p.folded, p.reason or f"folded into {p.layer}")
        for p in pairs
    ]
    rests: dict[nn.Module, nn.Module] = {}
    for pair in pairs:
        if pair.folded:
            batchnorm = modules[pair.batchnorm]
            _scale_range(modules[pair.layer], batchnorm)
            _fold(modules[pair.layer], batchnorm)
            rests[batchnorm] = _rest_of(batchnorm)
    _replace_everywhere(model, rests)
    for reason, names in group_names(
        (pair.reason, pair.batchnorm) for pair in pairs if not pair.folded
    ).items():
        logger.warning("%d BatchNorm stay (%s ...): %s", len(names), names[0], reason)
    return pairs


def _is_batchnorm(module: nn.Module) -> bool:
    """Torch's own, or one with the same buffers: torchvision's detectors have a frozen one of their own."""
    if isinstance(module, torch.jit.ScriptModule):
        return False  # nothing inside it can be changed
    is_frozen = module._buffers.keys() >= {
        "weight",
        "bias",
        "running_mean",
        "running_var",
    } and hasattr(module, "eps")
    return isinstance(module, _BatchNorm) or is_frozen


def _reason_against(batchnorm: Any, layer: nn.Module | None, calls: int) -> str:
    """Why this BatchNorm cannot be folded into this layer, or ""."""
    if calls == 0:
        return "it does not run on the example inputs"
    if calls > 1:
        return f"it runs {calls} times in one forward"
    if layer is None:
        return "its input is not the output of one layer that nothing else reads"
    if not isinstance(layer, _ConvNd | Linear):
        return f"it follows {type(layer).__name__}, not a convolution or linear layer"
    if isinstance(layer, QuantMixin) and not _has_range_per_output(layer):
        return "the layer is quantized, its weight without a range for each output: fold before swap_modules"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "the weight of the layer is computed from others, it is no parameter"
    if batchnorm.running_mean is None:
        return "it has no running statistics"
    if (channels := batchnorm.running_mean.numel()) != _output_channels(layer):
        return f"it normalises {channels} channels, the layer before has {_output_channels(layer)}"
    if layer._forward_hooks or batchnorm._forward_hooks or batchnorm._forward_pre_hooks:
        return "hooks are attached that would see other values"
    return ""


def _describe_shared(batchnorm: str, modules: dict[str, nn.Module], trace: ForwardTrace) -> str:
    """That the layer before a BatchNorm runs several times, as one head on several levels does; "" if it does not."""
    (read,) = (run.inputs[:1] for run in trace.runs if run.module == batchnorm)
    makers = {
        operation.module
        for operation in trace.operations
        if not set(read).isdisjoint(operation.outputs)
    }
    for name in makers:
        if isinstance(modules[name], _ConvNd | Linear) and trace.calls[name] > 1:
            return f"{name} before it runs {trace.calls[name]} times in one forward: a fold would change each of them"
    return ""


def _output_channels(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, Linear) else layer.out_channels)  # type: ignore[arg-type]


def _find_changed(
    model: nn.Module, example_inputs: Any, candidates: dict[str, str], modules: dict[str, nn.Module]
) -> set[str]:
    """The BatchNorms whose output the folded layer does not reproduce on noise of the shape of its real input."""
    changed: set[str] = set()
    with ExitStack() as hooks:
        for batchnorm, layer in candidates.items():

            def probe(
                module: nn.Module,
                args: Any,
                kwargs: Any,
                name: str = batchnorm,
                norm: nn.Module = modules[batchnorm],
            ) -> None:
                noise = tree_map_only(torch.Tensor, _noise_like, (args, kwargs))
                if not _folds_exactly(module, norm, *noise):
                    changed.add(name)

            hooks.callback(modules[layer].register_forward_pre_hook(probe, with_kwargs=True).remove)
        with evaluating(model):
            call_model(model, example_inputs)
    return changed


def _noise_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor).normal_(generator=torch.Generator(tensor.device).manual_seed(0))


def _folds_exactly(layer: nn.Module, batchnorm: nn.Module, args: Any, kwargs: Any) -> bool:
    rest = _rest_of(batchnorm)
    before = layer._parameters.copy()
    with disable_quantization(layer):  # a weight next to a tie may get another code
        expected = batchnorm.forward(layer.forward(*args, **kwargs))
        try:
            _fold(layer, batchnorm)
            found = rest(layer.forward(*args, **kwargs))
        finally:
            layer._parameters = before
    error = (found - expected).abs().max()
    return bool(error <= _TOLERANCE * expected.abs().max())


def _rest_of(batchnorm: nn.Module) -> nn.Module:
    """What a BatchNorm does besides: timm's have an activation, and a dropout before it, under these names.

    A guess, as any name is: `_folds_exactly` tries it.
    """
    rest = {
        name: child
        for name in ("drop", "act")
        if isinstance(child := getattr(batchnorm, name, None), nn.Module)
    }
    return nn.Sequential(OrderedDict(rest)) if rest else nn.Identity()


def _fold(layer: nn.Module, batchnorm: Any) -> None:
    """W' = w g / sqrt(var + eps), b' = (b - mean) g / sqrt(var + eps) + beta, per output channel, in float64."""
    assert isinstance(layer, _ConvNd | Linear)  # noqa: S101
    weight, bias = layer.weight, layer.bias
    gain = _gain_of(batchnorm)
    beta = 0.0 if batchnorm.bias is None else batchnorm.bias.double()
    old_bias = 0.0 if bias is None else bias.double()
    new_bias = (old_bias - batchnorm.running_mean.double()) * gain + beta
    new_weight = weight.double() * _per_output(layer, gain)
    layer.weight = nn.Parameter(own_tensor(new_weight.to(weight.dtype)), weight.requires_grad)
    layer.bias = nn.Parameter(own_tensor(new_bias.to(weight.dtype)), weight.requires_grad)


def _gain_of(batchnorm: Any) -> torch.Tensor:
    inverse_std: torch.Tensor = (batchnorm.running_var.double() + batchnorm.eps).rsqrt()
    return inverse_std if batchnorm.weight is None else batchnorm.weight.double() * inverse_std


def _has_range_per_output(layer: QuantMixin) -> bool:
    if isinstance(layer, _ConvTransposeNd):
        return layer.weight_quantizer.axis in (1, 1 - layer.weight.dim()) and layer.groups == 1
    weight = layer._parameters["weight"]
    return weight is not None and layer.weight_quantizer.axis in (0, -weight.dim())


def _scale_range(layer: nn.Module, batchnorm: Any) -> None:
    """The range of each output channel times what its weights are multiplied with."""
    if isinstance(layer, QuantMixin) and (amax := layer.weight_quantizer.amax) is not None:
        layer.weight_quantizer.amax = (
            amax.double() * _gain_of(batchnorm).abs().reshape(amax.shape)
        ).float()


def _per_output(layer: _ConvNd | Linear, gain: torch.Tensor) -> torch.Tensor:
    """The gain in a shape that multiplies each output channel of the weight."""
    rest = [1] * (layer.weight.dim() - 2)
    if not isinstance(layer, _ConvTransposeNd):
        return gain.reshape(-1, 1, *rest)
    # [in, out / groups, ...]: input channel i belongs to group i // (in / groups), whose outputs are a block of gain.
    blocks = gain.reshape(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
    return blocks.reshape(layer.in_channels, -1, *rest)


def _replace_everywhere(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever these stand."""
    for old, new in replacements.items():
        new.train(old.training)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
