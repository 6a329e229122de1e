"""A module of the script's own: one quantizer, called on each of three operands. Argument: the ONNX file."""

import sys

import torch
from pytorch_quantization import nn as quant_nn
from pytorch_quantization import tensor_quant
from pytorch_quantization.nn.modules import _utils as quant_nn_utils


class QuantMultiAdd(torch.nn.Module, quant_nn_utils.QuantMixin):
    def __init__(self):
        super().__init__()
        self._input_quantizer = quant_nn.TensorQuantizer(tensor_quant.QuantDescriptor(num_bits=8))

    def forward(self, x, y, z):
        return self._input_quantizer(x) + self._input_quantizer(y) + self._input_quantizer(z)


torch.manual_seed(0)
model = QuantMultiAdd().eval()
inputs = tuple(torch.randn(1, 4, 8, 8) * scale for scale in (1, 2, 3))
quant_nn.TensorQuantizer.use_fb_fake_quant = True
torch.onnx.export(model, inputs, sys.argv[1], opset_version=13)
with torch.no_grad():
    torch.save({"inputs": inputs, "outputs": model(*inputs)}, sys.argv[1] + ".pt")
