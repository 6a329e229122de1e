"""BatchNorm folded into the convolution or linear layer before it (R-BN-FOLD).

Fold before calibration: folding changes the range of every output channel of the weight, and TensorRT folds anyway. A
BatchNorm that was live in fine-tuning is folded afterwards: the range of each output channel of the quantized weight is
then scaled with it, and the codes do not change.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import Linear
from torch.utils._pytree import tree_map_only

from qdq.device import copy_to_host, without_tf32
from qdq.forward import ForwardTrace, call_model, evaluating, require_model, trace_forward
from qdq.nn import QuantMixin
from qdq.quantize import own_tensor
from qdq.quantizer import disable_quantization
from qdq.text import group_names

logger = logging.getLogger(__name__)
# Relative to the largest output: above the rounding of float32, far below any change of meaning.
_TOLERANCE = 1e-3
_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}
_DEFAULT_EPS = 1e-5  # of torch, and of frozen BatchNorms that do not say theirs; a fold is tested before it is done
_REMAINDERS = ("drop", "act")


@dataclass(frozen=True)
class FoldedPair:
    """One BatchNorm, and whether it was folded.

    Args:
        batchnorm: Dotted name of the BatchNorm.
        layer: Dotted name of the layer before it, "" if there is none.
        folded: Whether it is now part of that layer.
        reason: Why, or why not.
    """

    batchnorm: str
    layer: str
    folded: bool
    reason: str


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> list[FoldedPair]:
    """Fold every BatchNorm whose input is the output of exactly one convolution or linear layer, in place.

    The model runs once to find the pairs (`trace_forward`). Each fold is first tested on noise of the shape of the
    data, and is not done if the numbers change, for instance in layers that transform their weight before they use
    it. A folded BatchNorm becomes `nn.Identity`; the layer gets a bias if it had none.

    Args:
        model: A model with trained running statistics: a float one, or one fine-tuned with live BatchNorm.
        example_inputs: One batch, as the model is called with (see `forward.call_model`).

    Returns:
        One entry for each BatchNorm of the model, in the order of its modules.
    """
    require_model(model)
    trace = trace_forward(model, example_inputs)
    modules = dict(model.named_modules())
    pairs = _find_pairs(modules, trace)

    candidates = {pair.batchnorm: pair.layer for pair in pairs if pair.folded}
    changed = _find_changed(model, example_inputs, candidates, modules)
    reason = "folding changes its output: the layer uses its weight in its own way"
    for position, pair in enumerate(pairs):
        if pair.batchnorm in changed:
            pairs[position] = replace(pair, folded=False, reason=reason)

    folded = [(modules[pair.layer], modules[pair.batchnorm]) for pair in pairs if pair.folded]
    _scale_ranges(folded)
    remainders: dict[nn.Module, nn.Module] = {}
    for layer, batchnorm in folded:
        _fold(layer, batchnorm)
        remainders[batchnorm] = _remainder_of(batchnorm)
    _replace_everywhere(model, remainders)
    _warn_of_unfolded(pairs)
    return pairs


def _find_pairs(modules: dict[str, nn.Module], trace: ForwardTrace) -> list[FoldedPair]:
    """Each BatchNorm with the layer before it.

    Args:
        modules: The modules of the model, by dotted name.
        trace: One forward of it.

    Returns:
        One pair for each BatchNorm; `folded` says whether the structure of the model allows the fold.
    """
    layer_before = {reader: name for name, reader in trace.only_reader.items()}
    pairs = []
    for name, module in modules.items():
        if not _is_batchnorm(module):
            continue
        layer_name = layer_before.get(name, "")
        layer = modules[layer_name] if layer_name else None
        obstacle = _reason_against(module, layer, trace.calls[name])
        if layer is None and trace.calls[name] == 1:
            obstacle = _describe_shared(name, modules, trace) or obstacle
        reason = obstacle or f"folded into {layer_name}"
        pairs.append(FoldedPair(name, layer_name, not obstacle, reason))
    return pairs


def _warn_of_unfolded(pairs: list[FoldedPair]) -> None:
    """Log the BatchNorms that stay, those with the same reason together."""
    reasons = [(pair.reason, pair.batchnorm) for pair in pairs if not pair.folded]
    for reason, names in group_names(reasons).items():
        logger.warning("%d BatchNorm stay (%s ...): %s", len(names), names[0], reason)


def _is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is torch's BatchNorm or has the same buffers, like the frozen ones of detectors."""
    if isinstance(module, torch.jit.ScriptModule):
        return False  # nothing inside it can be changed
    if isinstance(module, _BatchNorm):
        return True
    return module._buffers.keys() >= _FROZEN_BUFFERS


def _reason_against(batchnorm: Any, layer: nn.Module | None, calls: int) -> str:
    """Why a BatchNorm cannot be folded into a layer, or "".

    Args:
        batchnorm: The BatchNorm.
        layer: The layer before it, if there is exactly one.
        calls: How often the BatchNorm runs in one forward.
    """
    if calls == 0:
        return "it does not run on the example inputs"
    if calls > 1:
        return f"it runs {calls} times in one forward"
    if layer is None:
        return "its input is not the output of one layer that nothing else reads"
    if not isinstance(layer, _ConvNd | Linear):
        return f"it follows {type(layer).__name__}, not a convolution or linear layer"
    return _reason_against_weight(layer) or _reason_against_batchnorm(batchnorm, layer)


def _reason_against_weight(layer: _ConvNd | Linear) -> str:
    """Why nothing can be folded into the weight of a layer; "" if something can."""
    if isinstance(layer, QuantMixin) and not _has_range_per_output(layer):
        return "the layer is quantized, and its weight has no range per output: fold before swap_modules"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "the weight of the layer is computed from others, it is not a parameter"
    return ""


def _reason_against_batchnorm(batchnorm: Any, layer: _ConvNd | Linear) -> str:
    """Why a BatchNorm cannot become part of a layer.

    Args:
        batchnorm: The BatchNorm.
        layer: The only layer before it.

    Returns:
        The reason; "" if it can.
    """
    if batchnorm.running_mean is None:
        return "it has no running statistics"
    num_channels = batchnorm.running_mean.numel()
    num_outputs = _count_outputs(layer)
    if num_channels != num_outputs:
        return f"it normalises {num_channels} channels, the layer before has {num_outputs}"
    if layer._forward_hooks or batchnorm._forward_hooks or batchnorm._forward_pre_hooks:
        return "hooks are attached that would see other values"
    return ""


def _describe_shared(batchnorm: str, modules: dict[str, nn.Module], trace: ForwardTrace) -> str:
    """Why a layer before a BatchNorm is shared: it runs several times, as one head on several levels does.

    Args:
        batchnorm: Dotted name of the BatchNorm.
        modules: The modules of the model, by dotted name.
        trace: One forward, in which the BatchNorm runs once.

    Returns:
        The reason; "" if no such layer is before it.
    """
    inputs: set[int] = set()
    for run in trace.runs:
        if run.module == batchnorm:
            inputs.update(run.inputs[:1])
    for operation in trace.operations:
        name = operation.module
        if inputs.isdisjoint(operation.outputs) or not isinstance(modules[name], _ConvNd | Linear):
            continue
        if trace.calls[name] > 1:
            return f"{name} before it runs {trace.calls[name]} times in one forward: a fold would change every run"
    return ""


def _count_outputs(layer: _ConvNd | Linear) -> int:
    """Number of output channels, or features, of a layer."""
    return layer.out_features if isinstance(layer, Linear) else layer.out_channels


def _find_changed(
    model: nn.Module, example_inputs: Any, candidates: dict[str, str], modules: dict[str, nn.Module]
) -> set[str]:
    """The BatchNorms whose output the folded layer does not reproduce on noise of the shape of its real input.

    Args:
        model: The model, which runs once.
        example_inputs: One batch.
        candidates: BatchNorm -> the layer before it, by dotted names.
        modules: The modules of the model, by dotted name.
    """
    probed: list[str] = []
    is_exact: list[torch.Tensor] = []  # read at the end: each read waits for a GPU

    def probe(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        noise_args, noise_kwargs = tree_map_only(torch.Tensor, _noise_like, (args, kwargs))
        probed.append(name)
        is_exact.append(_folds_exactly(layer, modules[name], noise_args, noise_kwargs))

    with ExitStack() as hooks:
        for batchnorm, layer_name in candidates.items():
            handle = modules[layer_name].register_forward_pre_hook(
                partial(probe, batchnorm), with_kwargs=True
            )
            hooks.callback(handle.remove)
        with evaluating(model), without_tf32():
            call_model(model, example_inputs)
    return {name for name, exact in zip(probed, copy_to_host(is_exact), strict=True) if not exact}


def _noise_like(tensor: torch.Tensor) -> torch.Tensor:
    """Normal noise of the shape of a tensor, the same in every call."""
    return torch.empty_like(tensor).normal_(generator=torch.Generator(tensor.device).manual_seed(0))


def _folds_exactly(layer: nn.Module, batchnorm: nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
    """Whether a layer with the BatchNorm folded into it gives the output of both, bool `[]` on their device.

    Args:
        layer: The layer; its parameters are put back.
        batchnorm: The BatchNorm after it.
        args: Positional arguments of the layer.
        kwargs: Keyword arguments of the layer.
    """
    remainder = _remainder_of(batchnorm)
    parameters = layer._parameters.copy()
    with disable_quantization(layer):  # a weight next to a tie may get another code
        expected = batchnorm.forward(layer.forward(*args, **kwargs))
        try:
            _fold(layer, batchnorm)
            folded = remainder(layer.forward(*args, **kwargs))
        finally:
            layer._parameters = parameters
    error = (folded - expected).abs().max()
    return torch.le(error, _TOLERANCE * expected.abs().max())


def _remainder_of(batchnorm: nn.Module) -> nn.Module:
    """The module that remains after a fold: `nn.Identity`, or the dropout and activation that a BatchNorm of timm has.

    They are recognized by their names. That is a guess, and `_folds_exactly` tests it.
    """
    remainder = nn.Sequential()
    for name in _REMAINDERS:
        child = getattr(batchnorm, name, None)
        if isinstance(child, nn.Module):
            remainder.add_module(name, child)
    return remainder if len(remainder) else nn.Identity()


def _fold(layer: nn.Module, batchnorm: Any) -> None:
    """W' = w g / sqrt(var + eps), b' = (b - mean) g / sqrt(var + eps) + beta, per output channel, in float64.

    The gain g and the offset beta are the weight and the bias of the BatchNorm.
    """
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
    """The factor g / sqrt(var + eps) of each channel `[C]`, in float64."""
    eps = getattr(batchnorm, "eps", _DEFAULT_EPS)
    inverse_std: torch.Tensor = (batchnorm.running_var.double() + eps).rsqrt()
    if batchnorm.weight is None:
        return inverse_std
    gain: torch.Tensor = batchnorm.weight.double() * inverse_std
    return gain


def _has_range_per_output(layer: QuantMixin) -> bool:
    """Whether the quantized weight has one range for each output channel."""
    axis = layer.weight_quantizer.axis
    weight = layer._parameters.get("weight")
    if weight is None:
        return False
    if isinstance(layer, _ConvTransposeNd):
        return axis in (1, 1 - weight.dim()) and layer.groups == 1
    return axis in (0, -weight.dim())


def _scale_ranges(folded: list[tuple[nn.Module, nn.Module]]) -> None:
    """Multiply the range of each output channel by the factor of its weights, which does not change the codes.

    Args:
        folded: Each layer, quantized or not, with the BatchNorm that is folded into it.
    """
    quantizers = []
    amaxes = []
    for layer, batchnorm in folded:
        if isinstance(layer, QuantMixin) and layer.weight_quantizer.amax is not None:
            amax = layer.weight_quantizer.amax
            gain = _gain_of(batchnorm).abs().reshape(amax.shape)
            quantizers.append(layer.weight_quantizer)
            amaxes.append((amax.double() * gain).float())
    for quantizer, amax in zip(quantizers, copy_to_host(amaxes), strict=True):
        quantizer.amax = amax


def _per_output(layer: _ConvNd | Linear, gain: torch.Tensor) -> torch.Tensor:
    """The gain in a shape that multiplies each output channel of the weight.

    Args:
        layer: The layer.
        gain: One factor for each output channel, `[C]`.
    """
    kernel = [1] * (layer.weight.dim() - 2)
    if not isinstance(layer, _ConvTransposeNd):
        return gain.reshape(-1, 1, *kernel)
    # [in, out / groups, ...]: input channel i belongs to group i // (in / groups), whose outputs are a block of gain.
    blocks = gain.reshape(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
    return blocks.reshape(layer.in_channels, -1, *kernel)


def _replace_everywhere(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Replace modules everywhere in the model.

    Args:
        model: The model.
        replacements: Module -> the module that takes its place, in the same training mode.
    """
    for module, replacement in replacements.items():
        replacement.train(module.training)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
