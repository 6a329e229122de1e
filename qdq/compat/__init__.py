"""The public API of pytorch-quantization 2.1 and 2.2: `import qdq.compat as pytorch_quantization`.

Nothing is compiled and no GPU is needed. One thing happens on import: `torch.onnx.export` learns to write calibrated
ranges as constants (`onnx_export.py`); models without quantizers are exported as before.
"""

from qdq.compat import calib as calib
from qdq.compat import cuda_ext as cuda_ext
from qdq.compat import nn as nn
from qdq.compat import onnx_export
from qdq.compat import optim as optim
from qdq.compat import quant_modules as quant_modules
from qdq.compat import tensor_quant as tensor_quant
from qdq.compat import utils as utils
from qdq.compat import version as version
from qdq.compat.quant_modules import deactivate as deactivate
from qdq.compat.quant_modules import enable_onnx_export as enable_onnx_export
from qdq.compat.quant_modules import initialize as initialize
from qdq.compat.version import __version__ as __version__

onnx_export.install()
