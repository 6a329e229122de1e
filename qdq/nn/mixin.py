"""Mixins that quantize the input and the weight of a torch layer and call its forward.

`class QuantConv2d(QuantMixin, nn.Conv2d)` is a complete quantized layer. The forward of the mixin quantizes the input,
puts the quantized weight in the place of `weight`, and calls the forward of the layer. A subclass of the layer with
another forward, like a convolution with same padding, is quantized without being rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from qdq.errors import StateError
from qdq.nn.scaling import is_shifted, shift_of_mean
from qdq.quantize import own_tensor
from qdq.quantizer import QuantDescriptor, TensorQuantizer

_FLOAT_PARAMETERS = ("weight", "bias")


class QuantInputMixin(nn.Module):
    """A layer whose input is quantized.

    Args:
        *args: Arguments of the float layer.
        quant_desc_input: How the input is quantized; the class default if None.
        **kwargs: Arguments of the float layer.
    """

    default_quant_desc_input: ClassVar[QuantDescriptor] = QuantDescriptor()
    float_class: ClassVar[type[nn.Module]]  # set by `register_module`
    replaces_forward: ClassVar[bool] = False
    """Whether this class has a new forward; subclasses of the float class with another forward are then not swapped."""
    called_children: ClassVar[tuple[str, ...]] = ()
    """Child modules that this class calls; the float class only reads their weights."""
    _input_quantizer: TensorQuantizer

    def __init__(
        self, *args: Any, quant_desc_input: QuantDescriptor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.init_quantizer(quant_desc_input)
        self._move_quantizers()

    def init_quantizer(self, quant_desc_input: QuantDescriptor | None = None) -> None:
        """Attach the quantizer; a swapped module gets it here, because its constructor does not run again."""
        self._input_quantizer = TensorQuantizer(quant_desc_input or self.default_quant_desc_input)

    def _move_quantizers(self) -> None:
        """Move the quantizers to the device of the parameters, which may be an argument of the constructor."""
        parameter = next(self.parameters(), None)
        if parameter is None:
            return
        for quantizer in self.quantizers().values():
            quantizer.to(parameter.device)

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """The quantizer of the input."""
        return self._input_quantizer

    def quantizers(self) -> dict[str, TensorQuantizer]:
        """The quantizers of this layer by attribute name."""
        return {"_input_quantizer": self._input_quantizer}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also load checkpoints of ModelOpt: the same buffers, in quantizers without the leading underscore."""
        for name in self.quantizers():
            modelopt_prefix = f"{prefix}{name.removeprefix('_')}."
            for key in list(state_dict):
                if key.startswith(modelopt_prefix):
                    buffer = key.removeprefix(modelopt_prefix)
                    state_dict[f"{prefix}{name}.{buffer}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The forward of the layer on the quantized input.

        Args:
            input: The input. A layer with another name for it may be called with that keyword, as its first one.
            *args: Further arguments of the layer.
            **kwargs: Likewise.
        """
        if input is None and kwargs:
            name = next(iter(kwargs))
            kwargs[name] = self._input_quantizer(kwargs[name])
            return super().forward(**kwargs)
        return super().forward(self._input_quantizer(input), *args, **kwargs)


class QuantMixin(QuantInputMixin):
    """A layer whose input and weight are quantized, but not its bias and its output (R-BIAS, section 2.1).

    A pass such as `correct_bias` changes weight or bias for int8 only. It calls `keep_float` first, and the layer
    computes with the kept ones whenever its weight is not quantized.

    Several threads must not call the same layer at once: its weight is replaced during a call.

    Args:
        *args: Arguments of the float layer.
        quant_desc_input: How the input is quantized; the class default if None.
        quant_desc_weight: How the weight is quantized; the class default if None.
        **kwargs: Arguments of the float layer.
    """

    default_quant_desc_weight: ClassVar[QuantDescriptor] = QuantDescriptor(axis=0)
    moves_bias: bool = True
    """Whether the bias follows the rounding of the weight if the input is shifted (`nn.scaling`); not where it has."""
    _weight_quantizer: TensorQuantizer

    def __init__(
        self,
        *args: Any,
        quant_desc_input: QuantDescriptor | None = None,
        quant_desc_weight: QuantDescriptor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.init_quantizer(quant_desc_input, quant_desc_weight)
        self._move_quantizers()

    def init_quantizer(
        self,
        quant_desc_input: QuantDescriptor | None = None,
        quant_desc_weight: QuantDescriptor | None = None,
    ) -> None:
        """Attach both quantizers."""
        super().init_quantizer(quant_desc_input)
        self._weight_quantizer = TensorQuantizer(
            quant_desc_weight or self.default_quant_desc_weight
        )

    @staticmethod
    def weights_of(module: nn.Module) -> dict[str, str]:
        """Attribute of each weight quantizer -> the parameter it quantizes; also for a module that is not swapped."""
        return {"_weight_quantizer": "weight"}

    def list_learnable(self) -> list[nn.Parameter]:
        """Weight and bias: what a pass may change, as `keep_float` keeps them for float."""
        parameters = [self._parameters.get(name) for name in _FLOAT_PARAMETERS]
        return [parameter for parameter in parameters if parameter is not None]

    @property
    def keeps_float(self) -> bool:
        """Whether weight and bias of the float layer are kept beside others for int8."""
        return "_float_weight" in self._buffers

    def keep_float(self) -> None:
        """Keep weight and bias as those of the float layer, before a pass changes them; only the first call counts.

        They move with the module and are not in its state dict.
        """
        if self.keeps_float:
            return
        for name in _FLOAT_PARAMETERS:
            parameter = self._parameters.get(name)
            values = None if parameter is None else own_tensor(parameter.detach().clone())
            self.register_buffer(f"_float_{name}", values, persistent=False)

    def read_float(self) -> dict[str, torch.Tensor | None]:
        """The kept weight and bias by name; None for a bias that the float layer does not have."""
        return {name: self._buffers[f"_float_{name}"] for name in _FLOAT_PARAMETERS}

    def replace_float(self, values: Mapping[str, torch.Tensor | None]) -> None:
        """Keep other values as weight and bias of the float layer; the present weight and bias do not change.

        Args:
            values: From `read_float`.
        """
        weight = self._parameters["weight"]
        for name, value in values.items():
            moved = None if value is None else value.to(weight)  # the layer may have moved since
            self.register_buffer(f"_float_{name}", moved, persistent=False)

    def restore_float(self) -> None:
        """Give the layer the kept weight and bias again; nothing if none are kept."""
        if not self.keeps_float:
            return
        for name in _FLOAT_PARAMETERS:
            values = self._buffers[f"_float_{name}"]
            parameter = self._parameters.get(name)
            if values is None and parameter is not None:
                self._parameters[name] = None
            elif values is not None and parameter is not None:
                with torch.no_grad():
                    parameter.copy_(values)
        self.forget_float()

    def forget_float(self) -> None:
        """Drop the kept weight and bias; the present ones are those of the float layer from now on."""
        if self.keeps_float:
            for name in _FLOAT_PARAMETERS:
                delattr(self, f"_float_{name}")

    @property
    def weight_quantizer(self) -> TensorQuantizer:
        """The quantizer of the weight."""
        return self._weight_quantizer

    def quantizers(self) -> dict[str, TensorQuantizer]:
        """The quantizers of this layer by attribute name."""
        return {
            "_input_quantizer": self._input_quantizer,
            "_weight_quantizer": self._weight_quantizer,
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also load a bias that an accuracy pass such as `correct_bias` has added to a layer without one."""
        bias = state_dict.get(f"{prefix}bias")
        weight = self._parameters.get("weight")
        has_no_bias = "bias" in self._parameters and self._parameters["bias"] is None
        if has_no_bias and bias is not None and weight is not None:
            zeros = torch.zeros_like(bias, device=weight.device, dtype=weight.dtype)
            self._parameters["bias"] = nn.Parameter(own_tensor(zeros))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The forward of the layer on the quantized input and weight.

        Args:
            input: As for `QuantInputMixin.forward`.
            *args: Likewise.
            **kwargs: Likewise.
        """
        quantizer = self._weight_quantizer
        is_float = not quantizer.is_enabled or not quantizer.is_quantizing
        if is_float and self.keeps_float:
            with self._float_parameters():
                return super().forward(input, *args, **kwargs)
        moves_bias = not is_float and self.moves_bias and is_shifted(self)
        with self._quantized_weight(moves_bias=moves_bias):
            return super().forward(input, *args, **kwargs)

    @contextmanager
    def _float_parameters(self) -> Iterator[None]:
        """Make weight and bias those of the float layer in the block."""
        attributes = self.__dict__
        former = {name: attributes[name] for name in _FLOAT_PARAMETERS if name in attributes}
        for name in _FLOAT_PARAMETERS:
            attributes[name] = self._buffers[f"_float_{name}"]
        try:
            yield
        finally:
            for name in _FLOAT_PARAMETERS:
                del attributes[name]
            attributes.update(former)

    @torch.no_grad()
    def find_moved_bias(self) -> torch.Tensor:
        """The bias that goes with the quantized weight of a layer whose input is shifted, `[Cout]`."""
        bias, weight = self._parameters["bias"], self._parameters["weight"]
        assert bias is not None and weight is not None  # noqa: S101  # center_inputs wants both
        if not self.moves_bias or not self._weight_quantizer.is_enabled:
            return bias.detach().clone()
        moved = bias.detach() + shift_of_mean(self, self._weight_quantizer(weight))
        return moved.to(bias.dtype)

    @contextmanager
    def _quantized_weight(self, *, moves_bias: bool = False) -> Iterator[None]:
        """Make `self.weight` the quantized weight in the block, and `self.bias` the one that goes with it.

        Python looks a parameter up in `_parameters` only if the instance has no such attribute. An attribute in
        `__dict__` takes precedence, so that no parameter is moved or renamed. Pruning also has an attribute there.
        """
        if isinstance(getattr(type(self), "weight", None), property):
            raise StateError(
                f"the weight of this {type(self).__name__} is parametrized: it is computed at every access.",
                "call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first.",
            )
        is_pruned = "weight" in self.__dict__
        has_other_bias = "bias" in self.__dict__
        weight = self.weight
        bias: Any = None
        self.__dict__["weight"] = self._weight_quantizer(weight)
        if moves_bias:  # other layers need not have a bias
            bias = self.bias
            self.__dict__["bias"] = bias + shift_of_mean(self, self.__dict__["weight"])
        try:
            yield
        finally:
            if is_pruned:
                self.__dict__["weight"] = weight
            else:
                del self.__dict__["weight"]
            if moves_bias and has_other_bias:
                self.__dict__["bias"] = bias
            elif moves_bias:
                del self.__dict__["bias"]


@contextmanager
def fixed_biases(model: nn.Module) -> Iterator[None]:
    """In the block, each bias that follows the rounding of its weight is a parameter, and not computed in the forward.

    Args:
        model: The model, which is captured in the block. A graph may read its parameters later, so a new one takes the
            place of each bias.
    """
    former: list[tuple[QuantMixin, nn.Parameter]] = []
    for layer in model.modules():
        if isinstance(layer, QuantMixin) and is_shifted(layer):
            former.append((layer, layer.get_parameter("bias")))
    try:
        for layer, bias in former:
            layer._parameters["bias"] = nn.Parameter(layer.find_moved_bias(), bias.requires_grad)
            layer.moves_bias = False
        yield
    finally:
        for layer, bias in former:
            layer._parameters["bias"] = bias
            vars(layer).pop("moves_bias", None)
