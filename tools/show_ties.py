"""Compare ONNX Runtime with itself on one file, with and without its optimizations: only rounding ties differ.

python tools/show_ties.py runs/demo/model.onnx [--images 128] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

import qdq
from qdq.check.parity import measure_parity
from qdq.cli.main import run_command
from qdq.files import write_json
from qdq.metrics import Array


def show_ties(onnx: Path, /, *, images: int = 128, json: Path | None = None) -> int:
    """Run the demo's file twice on the demo's images and compare the outputs.

    Args:
        onnx: A file made from EfficientNet-Lite0.
        images: Number of evaluation crops.
        json: Also write the figures to this file.
    """
    _, batches = qdq.load_images(None, qdq.load_model(), evaluation=images, batch_size=16)
    levels = onnxruntime.GraphOptimizationLevel
    arrays = [batch.numpy() for batch, _ in batches]
    parity = measure_parity(
        _run(onnx, arrays, levels.ORT_DISABLE_ALL), _run(onnx, arrays, levels.ORT_ENABLE_ALL)
    )
    print(
        f"ONNX Runtime against itself, {images} images: SQNR {parity.sqnr_db:.1f} dB, top-1 {parity.agreement:.1%}"
    )
    if json:
        write_json(json, parity)
    return 0


def _run(onnx: Path, arrays: list[Array], level: onnxruntime.GraphOptimizationLevel) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: array})[0] for array in arrays])


if __name__ == "__main__":
    run_command(show_ties)
