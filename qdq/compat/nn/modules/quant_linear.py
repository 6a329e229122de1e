"""`QuantLinear`, and `Linear` as its alias."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.nn.modules import linear as float_linear

from qdq.compat import tensor_quant
from qdq.compat.nn.modules import _utils
from qdq.nn import QuantMixin


class QuantLinear(_utils.QuantMixin, QuantMixin, float_linear.Linear):
    """`torch.nn.Linear` with quantized input and weight, a range for each output.

    Args:
        in_features: As `torch.nn.Linear`.
        out_features: As `torch.nn.Linear`.
        bias: As `torch.nn.Linear`.
        **kwargs: `device`, `dtype`, `quant_desc_input`, `quant_desc_weight`.

    Raises:
        TypeError: Other keywords.
        ValueError: A descriptor without fake quantization.
    """

    float_class: ClassVar[type] = float_linear.Linear
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any
    ) -> None:
        factory, descriptors = _utils.split_kwargs(type(self), kwargs)
        float_linear.Linear.__init__(self, in_features, out_features, bias, **factory)
        self.init_quantizer(**descriptors)


Linear = QuantLinear
