"""The mixins of quantized modules: class-wide default descriptors, and quantizers made from them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from qdq.compat.nn.modules.tensor_quantizer import TensorQuantizer
from qdq.compat.tensor_quant import QuantDescriptor
from qdq.errors import ArgumentError, ArgumentTypeError

logger = logging.getLogger(__name__)

_DESCRIPTORS = ("quant_desc_input", "quant_desc_weight")
_FACTORY = ("device", "dtype")


def pop_quant_desc_in_kwargs(quant_cls: type, input_only: bool = False, **kwargs: Any) -> Any:
    """The descriptors for a module of `quant_cls`, from the keywords or the defaults of the class.

    Args:
        quant_cls: A quantized class.
        input_only: Return only the descriptor of the input.
        **kwargs: `quant_desc_input`, `quant_desc_weight`.

    Returns:
        The input's descriptor, or the pair; a class without weights has None in second place (F34).

    Raises:
        TypeError: Other keywords ("Unused keys").
    """
    accepted = list(_DESCRIPTORS)
    if input_only:
        accepted = accepted[:1]
    unused = sorted(set(kwargs) - set(accepted))
    if unused:
        raise ArgumentTypeError(
            f"Unused keys: {unused}.", f"{quant_cls.__name__} takes {', '.join(accepted)}."
        )
    descriptors = []
    for key in accepted:
        default = getattr(quant_cls, f"default_{key}", None)
        descriptors.append(kwargs.get(key, default))
    if input_only:
        return descriptors[0]
    return tuple(descriptors)


def split_kwargs(quant_cls: type, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a constructor's `**kwargs` into `device`, `dtype` for the float module and the descriptors.

    Raises:
        TypeError: Other keywords ("Unused keys").
    """
    input_only = issubclass(quant_cls, QuantInputMixin)
    factory = {key: kwargs[key] for key in _FACTORY if key in kwargs}
    quant_kwargs = {key: value for key, value in kwargs.items() if key not in _FACTORY}
    descriptors = pop_quant_desc_in_kwargs(quant_cls, input_only=input_only, **quant_kwargs)
    if input_only:
        return factory, {_DESCRIPTORS[0]: descriptors}
    return factory, dict(zip(_DESCRIPTORS, descriptors, strict=True))


def _require_fake(quant_cls: type, **descriptors: Any) -> None:
    for key, desc in descriptors.items():
        if not isinstance(desc, QuantDescriptor):
            raise ArgumentTypeError(
                f"{key} of {quant_cls.__name__} must be a QuantDescriptor, not {type(desc).__name__}.",
                "build one with tensor_quant.QuantDescriptor(...), or leave the keyword out.",
            )
        if not desc.fake_quant:
            raise ArgumentError(
                f"Only fake quantization is supported in modules; {key} of {quant_cls.__name__} has fake_quant=False.",
                "use a TensorQuantizer of your own for real codes.",
            )


def _set_default(quant_cls: type, name: str, value: Any) -> None:
    if not isinstance(value, QuantDescriptor):
        raise ArgumentError(
            f"{value!r} is not an instance of QuantDescriptor but of {type(value).__name__}.",
            "build one with tensor_quant.QuantDescriptor(...).",
        )
    # On this class: subclasses inherit it, siblings do not.
    setattr(quant_cls, name, copy.deepcopy(value))


def _move_to_parameters(layer: object) -> None:
    """Move the quantizers of a layer to the device of its parameters, which may be an argument of the constructor."""
    if not isinstance(layer, nn.Module):
        return
    parameter = next(layer.parameters(recurse=False), None)
    if parameter is None:
        return
    for module in layer.modules():
        if isinstance(module, TensorQuantizer):
            module.to(parameter.device)


class _QuantizesInput:
    """The base of both mixins: the input's quantizer, and the class-wide default of its descriptor."""

    default_quant_desc_input: ClassVar[QuantDescriptor] = QuantDescriptor()
    _input_quantizer: TensorQuantizer

    @classmethod
    def set_default_quant_desc_input(cls, value: QuantDescriptor) -> None:
        """Set the input's default for modules of this class that are built from now on.

        Raises:
            ValueError: Not a `QuantDescriptor`.
        """
        _set_default(cls, "default_quant_desc_input", value)

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """The quantizer of the input."""
        return self._input_quantizer


class QuantInputMixin(_QuantizesInput):
    """For modules with only a quantized input; a plain mixin, so that it may be on either side of `nn.Module`."""

    def init_quantizer(self, quant_desc_input: QuantDescriptor) -> None:
        """Attach the quantizer; any caller may (F33).

        Raises:
            TypeError: Not a `QuantDescriptor`.
            ValueError: A descriptor without fake quantization.
        """
        _require_fake(type(self), quant_desc_input=quant_desc_input)
        self._input_quantizer = TensorQuantizer(quant_desc_input)
        _move_to_parameters(self)


class QuantMixin(_QuantizesInput):
    """For modules whose input and weight are quantized; not a `QuantInputMixin`: scripts tell the two apart."""

    default_quant_desc_weight: ClassVar[QuantDescriptor] = QuantDescriptor()
    _weight_quantizer: TensorQuantizer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if reason := _hides_weight(cls):
            logger.warning(
                "%s.%s overrides forward and %s: its weight stays float. Call super().forward(input), or use "
                "quant_input, quant_weight = self._quant(input); qdq.swap_modules keeps such a forward and quantizes.",
                cls.__module__,
                cls.__qualname__,
                reason,
            )

    @classmethod
    def set_default_quant_desc_weight(cls, value: QuantDescriptor) -> None:
        """Set the weight's default for modules of this class that are built from now on.

        Raises:
            ValueError: Not a `QuantDescriptor`.
        """
        _set_default(cls, "default_quant_desc_weight", value)

    def init_quantizer(
        self,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
        num_layers: int | None = None,
    ) -> None:
        """Attach the quantizers; any caller may (F33).

        Args:
            quant_desc_input: How the input is quantized.
            quant_desc_weight: How the weight is quantized.
            num_layers: Make this many of each instead, in `_input_quantizers` and `_weight_quantizers`.

        Raises:
            TypeError: Not a `QuantDescriptor`.
            ValueError: A descriptor without fake quantization.
        """
        _require_fake(
            type(self), quant_desc_input=quant_desc_input, quant_desc_weight=quant_desc_weight
        )
        if num_layers is None:
            self._input_quantizer = TensorQuantizer(quant_desc_input)
            self._weight_quantizer = TensorQuantizer(quant_desc_weight)
        else:
            self._input_quantizers = nn.ModuleList(
                TensorQuantizer(quant_desc_input) for _ in range(num_layers)
            )
            self._weight_quantizers = nn.ModuleList(
                TensorQuantizer(quant_desc_weight) for _ in range(num_layers)
            )
        _move_to_parameters(self)

    @property
    def weight_quantizer(self) -> TensorQuantizer:
        """The quantizer of the weight."""
        return self._weight_quantizer


_QUANTIZES = {
    "_quant",
    "_weight_quantizer",
    "weight_quantizer",
    "_weight_quantizers",
    "quantizers",
    "_quantized_weight",
}


def _hides_weight(cls: type) -> str:
    """How the forward that a class defines bypasses the weight's quantizer; "" if it does not.

    The answer comes from the names in its code: `self.weight` without any name that gives a quantized weight. A forward
    that calls another forward is trusted.
    """
    code = getattr(cls.__dict__.get("forward"), "__code__", None)
    if code is None or (not hasattr(cls, "weight") and "weight" not in code.co_names):
        return ""
    names = set(code.co_names)
    if names & _QUANTIZES or "forward" in names:
        return ""
    if "weight" in names:
        return "reads self.weight directly"
    return ""


def quantized_weights(module: nn.Module) -> Iterator[tuple[TensorQuantizer, list[torch.Tensor]]]:
    """Each weight quantizer of a module, with the stored weights that it quantizes, side by side on axis 1.

    The list is empty if they are not found, or are computed from others (pruning, parametrization).
    """
    for quantizer, names in _weight_names(module):
        weights = [_stored(module, name) for name in names]
        stored = [weight for weight in weights if weight is not None]
        if len(stored) < len(names):
            stored = []
        yield quantizer, stored


def _weight_names(module: nn.Module) -> Iterator[tuple[TensorQuantizer, list[str]]]:
    quantizers = getattr(module, "_weight_quantizers", None)
    if quantizers:  # first: an LSTM shows its first one as `_weight_quantizer` too
        steps = _steps(module)
        if len(steps) != len(quantizers):
            yield quantizers[0], []
            return
        for quantizer, step in zip(quantizers, steps, strict=True):
            yield quantizer, [f"weight_ih_{step}", f"weight_hh_{step}"]
    elif (quantizer := getattr(module, "_weight_quantizer", None)) is not None:
        is_cell = _stored(module, "weight") is None and _stored(module, "weight_ih") is not None
        yield quantizer, ["weight_ih", "weight_hh"] if is_cell else ["weight"]


def _steps(module: nn.Module) -> list[str]:
    """Layers and directions of an LSTM as its weights are named, in the order of its quantizers."""
    directions = ("", "_reverse") if getattr(module, "bidirectional", False) else ("",)
    return [
        f"l{layer}{direction}"
        for layer in range(getattr(module, "num_layers", 0))
        for direction in directions
    ]


def _stored(module: nn.Module, name: str) -> torch.Tensor | None:
    parameter = module._parameters.get(name)
    if parameter is None:
        return module._buffers.get(name)
    return parameter
