"""As scripts in the field begin: quantize a vector, print it. Runs under `python -m qdq.compat`."""

import torch
from pytorch_quantization import tensor_quant

torch.manual_seed(12345)
x = torch.rand(10)
print(x)
print(tensor_quant.fake_tensor_quant(x, x.abs().max()))
codes, scale = tensor_quant.tensor_quant(x, x.abs().max())
print(codes, scale)
