"""Integer-only inference (Jacob et al., CVPR 2018, arXiv 1712.05877): layers that are calibrated, frozen, run on codes.

`module` has the phases and the formula, `qparam` the range of a tensor, `network` a chain of layers.
"""

from qdq.systems.integer.functions import QMaxPool2d, QMaxPooling2d, QReLU, QSigmoid
from qdq.systems.integer.layers import QConv2d, QConvBNReLU, QLinear
from qdq.systems.integer.module import QModule
from qdq.systems.integer.network import IntegerNetwork, holding_ranges
from qdq.systems.integer.qparam import QParam
from qdq.systems.integer.restore import restore_float

__all__ = [
    "IntegerNetwork",
    "QConv2d",
    "QConvBNReLU",
    "QLinear",
    "QMaxPool2d",
    "QMaxPooling2d",
    "QModule",
    "QParam",
    "QReLU",
    "QSigmoid",
    "holding_ranges",
    "restore_float",
]
