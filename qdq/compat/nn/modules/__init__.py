"""One module per family of layers, under the names that scripts import."""

from qdq.compat.nn.modules import _utils as _utils
from qdq.compat.nn.modules import clip as clip
from qdq.compat.nn.modules import quant_conv as quant_conv
from qdq.compat.nn.modules import quant_instancenorm as quant_instancenorm
from qdq.compat.nn.modules import quant_linear as quant_linear
from qdq.compat.nn.modules import quant_pooling as quant_pooling
from qdq.compat.nn.modules import quant_rnn as quant_rnn
from qdq.compat.nn.modules import tensor_quantizer as tensor_quantizer
