"""The gain of each pass after calibration on EfficientNet-Lite0, with all layers in int8.

python tools/bench_accuracy.py [--images 64] [--eval-images 500] [--json FILE]
    [--modelopt-python PATH] [--torchao-python PATH]

Other tools get the same images in the same run.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_peers import PeerOutputs, run_onnxruntime, run_peer
from torch import nn

import qdq
from qdq.cli.main import run_command
from qdq.files import write_json
from qdq.metrics import agreement, sqnr_db
from qdq.run import describe_environment
from qdq.swap import quantized_layers
from qdq.workloads.classification.batches import ImageBatches

FloatPass = Callable[..., Any]  # such as `qdq.split_channels`


def bench_accuracy(
    *,
    images: int = 64,
    eval_images: int = 500,
    calib_method: str = "mse",
    seed: int = 0,
    json: Path | None = None,
    modelopt_python: Path | None = None,
    torchao_python: Path | None = None,
) -> int:
    """Print SQNR and agreement with the float model for each pass alone and for some together, on the demo's data.

    Args:
        images: Number of calibration images that the passes use; ranges come from all 128.
        eval_images: Number of images to measure on.
        calib_method: How ranges are computed.
        seed: Seed of the crops.
        json: Also write the figures to this file.
        modelopt_python: Interpreter that has ModelOpt and the packages of the model.
        torchao_python: Interpreter that has torchao and the packages of the model.
    """
    net = qdq.load_model("efficientnet_lite0", seed=seed)
    calib, evaluation = qdq.load_images(None, net, 128, eval_images, 16, seed)
    few = calib.subset(images).by_source()
    expected = qdq.predict(net.module, evaluation)
    qdq.fold_batchnorm(net.module, calib.images[:2])
    rows: list[dict[str, str | float]] = []

    def compare(name: str, actual: np.ndarray, layers: int, seconds: float) -> None:
        sqnr = sqnr_db(expected, actual)
        top1_agreement = agreement(expected, actual)
        rows.append(
            {
                "name": name,
                "layers": layers,
                "sqnr_db": sqnr,
                "agreement": top1_agreement,
                "seconds": seconds,
            }
        )
        print(
            f"{name:42} {layers:2} of 50  {sqnr:6.2f} dB  {top1_agreement:6.1%}  {seconds:6.1f} s",
            flush=True,
        )

    def measure(name: str, model: nn.Module, act: Callable[[nn.Module], object]) -> None:
        began = time.perf_counter()
        act(model)
        seconds = time.perf_counter() - began
        compare(name, qdq.predict(model, evaluation), len(quantized_layers(model)), seconds)

    def change_first(name: str, *changes: FloatPass) -> nn.Module:
        """Measure the model that some passes have changed before it was swapped."""
        model = copy.deepcopy(net.module)
        for change in changes:
            print(change(model, few).format_table())
        measure(name, model, lambda model: _calibrate(model, calib, calib_method))
        return model

    calibrated = copy.deepcopy(net.module)
    measure("plain", calibrated, lambda model: _calibrate(model, calib, calib_method))
    measure(
        "+ bias correction, analytic",
        copy.deepcopy(calibrated),
        lambda model: qdq.correct_bias(model, few, method="analytic"),
    )
    measure(
        "+ bias correction, empirical",
        copy.deepcopy(calibrated),
        lambda model: qdq.correct_bias(model, few),
    )
    measure("+ AdaRound", copy.deepcopy(calibrated), lambda model: qdq.round_weights(model, few))
    measure(
        "+ block reconstruction",
        copy.deepcopy(calibrated),
        lambda model: qdq.reconstruct_blocks(model, few),
    )
    measure(
        "+ fine-tuning",
        copy.deepcopy(calibrated),
        lambda model: qdq.tune_weights(model, few),
    )
    change_first("+ equalization", qdq.equalize_layers)
    split = change_first("+ splitting", qdq.split_channels)
    widen = partial(qdq.split_channels, extra_macs=0.05)
    wide = change_first("+ splitting, wider layers", widen)
    centered = change_first("+ centering, wider layers", qdq.center_inputs, widen)
    starts = {"splitting": split, "wider layers": wide, "centering, wider layers": centered}
    for name, model in starts.items():
        corrected = copy.deepcopy(model)
        measure(f"{name}, bias", corrected, lambda model: qdq.correct_bias(model, few))
        measure(f"{name}, AdaRound", model, lambda model: qdq.round_weights(model, few))
    interpreters = {"ModelOpt": modelopt_python, "torchao": torchao_python}
    for peer in _run_peers(net.module, calib, evaluation, interpreters):
        compare(peer.name, peer.logits, peer.layers, peer.seconds)
    if json:
        write_json(json, {"images": images, "rows": rows, "environment": describe_environment()})
    return 0


def _run_peers(
    model: nn.Module,
    calib: ImageBatches,
    evaluation: ImageBatches,
    interpreters: Mapping[str, Path | None],
) -> Iterator[PeerOutputs]:
    """What other tools make of the model; a tool without an interpreter is left out."""
    calibration = calib.images[: calib.num_images].numpy()
    images = evaluation.images[: evaluation.num_images].numpy()
    with tempfile.TemporaryDirectory() as folder:
        yield from run_onnxruntime(model, calibration, images, Path(folder))
        for tool, interpreter in interpreters.items():
            if interpreter is not None:
                yield run_peer(tool, interpreter, calibration, images, Path(folder))


def _calibrate(model: nn.Module, calib: ImageBatches, method: str) -> None:
    example = calib.images[:2]
    qdq.swap_modules(model, example)
    qdq.rewire_operations(model, example)
    qdq.calibrate_model(model, calib, method=method)


if __name__ == "__main__":
    run_command(bench_accuracy)
