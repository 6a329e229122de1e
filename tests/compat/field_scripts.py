"""The calibration loop that recipes of the field copy from one another, in their shape."""

import torch

from qdq.compat import calib
from qdq.compat.nn.modules.tensor_quantizer import TensorQuantizer


def collect_stats(model, loader, num_batches):
    model.eval()
    for _, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            if module._calibrator is not None:
                module.disable_quant()
                module.enable_calib()
            else:
                module.disable()
    with torch.no_grad():
        for i, images in enumerate(loader):
            model(images)
            if i >= num_batches:
                break
    for _, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            if module._calibrator is not None:
                module.enable_quant()
                module.disable_calib()
            else:
                module.enable()


def compute_amax(model, device="cpu", **kwargs):
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            if module._calibrator is not None:
                if isinstance(module._calibrator, calib.MaxCalibrator):
                    module.load_calib_amax()
                else:
                    module.load_calib_amax(**kwargs)
                module._amax = module._amax.to(device)
            print(f"{name:40}: {module}")
