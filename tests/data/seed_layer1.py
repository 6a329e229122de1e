"""One part of a network swapped by the replacer that recipes carry with them, then exported. Argument: ONNX file."""

import re
import sys

import torch
import torchvision
from pytorch_quantization import nn as quant_nn
from pytorch_quantization import quant_modules
from pytorch_quantization.nn.modules import _utils as quant_nn_utils


def transfer_torch_to_quantization(module, quant_class):
    quantized = quant_class.__new__(quant_class)
    for name, value in vars(module).items():
        setattr(quantized, name, value)

    def __init__(self):
        if isinstance(self, quant_nn_utils.QuantInputMixin):
            self.init_quantizer(
                quant_nn_utils.pop_quant_desc_in_kwargs(self.__class__, input_only=True)
            )
        else:
            self.init_quantizer(*quant_nn_utils.pop_quant_desc_in_kwargs(self.__class__))

    __init__(quantized)
    return quantized


def replace_to_quantization_module(model, ignore_policy=None):
    table = {
        id(getattr(e.orig_mod, e.mod_name)): e.replace_mod for e in quant_modules._DEFAULT_QUANT_MAP
    }

    def walk(module, prefix=""):
        for name, child in module._modules.items():
            path = f"{prefix}.{name}" if prefix else name
            walk(child, path)
            if id(type(child)) in table and not (ignore_policy and re.match(ignore_policy, path)):
                module._modules[name] = transfer_torch_to_quantization(
                    child, table[id(type(child))]
                )

    walk(model)


torch.manual_seed(0)
model = torchvision.models.resnet18().eval()
replace_to_quantization_module(model.layer1)
inputs = torch.randn(1, 3, 64, 64)
quant_nn.TensorQuantizer.use_fb_fake_quant = True
torch.onnx.export(model, inputs, sys.argv[1], opset_version=13)
with torch.no_grad():
    torch.save({"inputs": inputs, "outputs": model(inputs)}, sys.argv[1] + ".pt")
