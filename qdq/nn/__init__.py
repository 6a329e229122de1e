"""Quantized counterparts of torch layers, and the registry that `_DEFAULT_QUANT_MAP` shows.

Importing a file of this package registers its layers; a new layer is a new file and a line here.
"""

from qdq.nn.attention import QuantMultiheadAttention as QuantMultiheadAttention
from qdq.nn.conv import QuantConv1d as QuantConv1d
from qdq.nn.conv import QuantConv2d as QuantConv2d
from qdq.nn.conv import QuantConv3d as QuantConv3d
from qdq.nn.conv_transpose import QuantConvTranspose1d as QuantConvTranspose1d
from qdq.nn.conv_transpose import QuantConvTranspose2d as QuantConvTranspose2d
from qdq.nn.conv_transpose import QuantConvTranspose3d as QuantConvTranspose3d
from qdq.nn.linear import QuantLinear as QuantLinear
from qdq.nn.mixin import QuantInputMixin as QuantInputMixin
from qdq.nn.mixin import QuantMixin as QuantMixin
from qdq.nn.pooling import QuantAdaptiveAvgPool1d as QuantAdaptiveAvgPool1d
from qdq.nn.pooling import QuantAdaptiveAvgPool2d as QuantAdaptiveAvgPool2d
from qdq.nn.pooling import QuantAdaptiveAvgPool3d as QuantAdaptiveAvgPool3d
from qdq.nn.pooling import QuantAvgPool1d as QuantAvgPool1d
from qdq.nn.pooling import QuantAvgPool2d as QuantAvgPool2d
from qdq.nn.pooling import QuantAvgPool3d as QuantAvgPool3d
from qdq.nn.registry import _DEFAULT_QUANT_MAP as _DEFAULT_QUANT_MAP
from qdq.nn.registry import register_module as register_module
