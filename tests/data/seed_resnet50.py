"""Every layer swapped by `initialize`, exported before any calibration, as tutorials do. Argument: the ONNX file."""

import sys

import torch
import torchvision
from pytorch_quantization import nn as quant_nn
from pytorch_quantization import quant_modules

quant_modules.initialize()
torch.manual_seed(0)
model = torchvision.models.resnet50()
model.eval()
inputs = torch.randn(1, 3, 224, 224)
quant_nn.TensorQuantizer.use_fb_fake_quant = True
torch.onnx.export(model, inputs, sys.argv[1], opset_version=13)
with torch.no_grad():
    torch.save({"inputs": inputs, "outputs": model(inputs)}, sys.argv[1] + ".pt")
