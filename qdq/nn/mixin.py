"""What makes a torch layer a quantized one, whatever its own forward does.

`class QuantConv2d(QuantMixin, nn.Conv2d)` is all a layer needs: the forward here quantizes the input, lets the
layer see the quantized weight under the name `weight`, and calls the layer's own forward. So a subclass with a
forward of its own (a same-padding convolution, say) is quantized without being rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from qdq.errors import StateError
from qdq.quantize import own_tensor
from qdq.quantizer import QuantDescriptor, TensorQuantizer


class QuantInputMixin(nn.Module):
    """A layer whose input is quantized.

    Args:
        *args: As the float layer.
        quant_desc_input: How the input is quantized; the class default if None.
        **kwargs: As the float layer.
    """

    default_quant_desc_input: ClassVar[QuantDescriptor] = QuantDescriptor()
    float_class: ClassVar[type[nn.Module]]  # set by `register_module`
    replaces_forward: ClassVar[bool] = False
    """Whether the forward is written anew; a subclass of the float class with one of its own is then not swapped."""
    called_children: ClassVar[tuple[str, ...]] = ()
    """Modules inside that this class calls; the float class only reads their weights."""
    _input_quantizer: TensorQuantizer

    def __init__(
        self, *args: Any, quant_desc_input: QuantDescriptor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.init_quantizer(quant_desc_input)

    def init_quantizer(self, quant_desc_input: QuantDescriptor | None = None) -> None:
        """Attach the quantizer; a swapped module gets it this way, its constructor having run long ago."""
        self._input_quantizer = TensorQuantizer(quant_desc_input or self.default_quant_desc_input)

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """The quantizer of the input."""
        return self._input_quantizer

    def quantizers(self) -> dict[str, TensorQuantizer]:
        """The quantizers of this layer by attribute name."""
        return {"_input_quantizer": self._input_quantizer}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take ModelOpt's checkpoints too: the same buffers, in quantizers without the leading underscore."""
        for name in self.quantizers():
            theirs = f"{prefix}{name.removeprefix('_')}."
            for key in [key for key in state_dict if key.startswith(theirs)]:
                state_dict[f"{prefix}{name}.{key.removeprefix(theirs)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward on the quantized input; a subclass may call that by another name."""
        if input is None and kwargs:
            name = next(iter(kwargs))
            return super().forward(**{**kwargs, name: self._input_quantizer(kwargs[name])})
        return super().forward(self._input_quantizer(input), *args, **kwargs)


class QuantMixin(QuantInputMixin):
    """A layer whose input and weight are quantized; never the bias, never the output (R-BIAS, section 2.1).

    Not for calls of the same layer from several threads at once: the weight is exchanged during the call.

    Args:
        *args: As the float layer.
        quant_desc_input: How the input is quantized; the class default if None.
        quant_desc_weight: How the weight is quantized; the class default if None.
        **kwargs: As the float layer.
    """

    default_quant_desc_weight: ClassVar[QuantDescriptor] = QuantDescriptor(axis=0)
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
        """Attribute of each weight quantizer -> parameter it quantizes; also of a module that is not swapped."""
        return {"_weight_quantizer": "weight"}

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
        """Take the bias too that `correct_bias` or `round_weights` has given to a layer without one."""
        bias, weight = state_dict.get(f"{prefix}bias"), self._parameters.get("weight")
        if bias is not None and weight is not None and self._parameters.get("bias", bias) is None:
            zeros = torch.zeros_like(bias, device=weight.device, dtype=weight.dtype)
            self._parameters["bias"] = nn.Parameter(own_tensor(zeros))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward on the quantized input and weight."""
        with self._quantized_weight():
            return super().forward(input, *args, **kwargs)

    @contextmanager
    def _quantized_weight(self) -> Iterator[None]:
        """Let `self.weight` be the quantized weight.

        Parameters live in `_parameters`, which is asked only when an instance has no such attribute: one in
        `__dict__` goes before, and no parameter is moved or renamed. Pruning has an attribute there itself.
        """
        if isinstance(getattr(type(self), "weight", None), property):
            raise StateError(
                f"the weight of this {type(self).__name__} is parametrized: it is computed at every access.",
                "call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first.",
            )
        former = {"weight": self.__dict__["weight"]} if "weight" in self.__dict__ else {}
        self.__dict__["weight"] = self._weight_quantizer(self.weight)
        try:
            yield
        finally:
            del self.__dict__["weight"]
            self.__dict__.update(former)
