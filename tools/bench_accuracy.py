"""The gain of each pass after calibration on EfficientNet-Lite0, with all layers in int8.

python tools/bench_accuracy.py [--images 64] [--eval-images 500] [--json FILE]
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import qdq
from qdq.cli.main import run_command
from qdq.files import write_json
from qdq.metrics import agreement, sqnr_db
from qdq.run import describe_environment
from qdq.workloads.classification.batches import ImageBatches

FloatPass = Callable[..., Any]  # such as `qdq.split_channels`


def bench_accuracy(
    *,
    images: int = 64,
    eval_images: int = 500,
    calib_method: str = "mse",
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Print SQNR and agreement with the float model for each pass alone and for some together, on the demo's data.

    Args:
        images: Number of calibration images that the passes use; ranges come from all 128.
        eval_images: Number of images to measure on.
        calib_method: How ranges are computed.
        seed: Seed of the crops.
        json: Also write the figures to this file.
    """
    net = qdq.load_model("efficientnet_lite0", seed=seed)
    calib, evaluation = qdq.load_images(None, net, 128, eval_images, 16, seed)
    few = calib.subset(images).by_source()
    expected = qdq.predict(net.module, evaluation)
    qdq.fold_batchnorm(net.module, calib.images[:2])
    rows: list[dict[str, str | float]] = []

    def measure(name: str, model: nn.Module, act: Callable[[nn.Module], object]) -> None:
        began = time.perf_counter()
        act(model)
        seconds = time.perf_counter() - began
        actual = qdq.predict(model, evaluation)
        sqnr = sqnr_db(expected, actual)
        top1_agreement = agreement(expected, actual)
        rows.append(
            {"name": name, "sqnr_db": sqnr, "agreement": top1_agreement, "seconds": seconds}
        )
        print(f"{name:28} {sqnr:6.2f} dB  {top1_agreement:6.1%}  {seconds:6.1f} s", flush=True)

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
    both = change_first("+ centering and splitting", qdq.center_inputs, qdq.split_channels)
    for name, model in (("splitting", split), ("centering, splitting", both)):
        corrected = copy.deepcopy(model)
        measure(f"{name}, bias", corrected, lambda model: qdq.correct_bias(model, few))
        measure(f"{name}, AdaRound", model, lambda model: qdq.round_weights(model, few))
    if json:
        write_json(json, {"images": images, "rows": rows, "environment": describe_environment()})
    return 0


def _calibrate(model: nn.Module, calib: ImageBatches, method: str) -> None:
    example = calib.images[:2]
    qdq.swap_modules(model, example)
    qdq.rewire_operations(model, example)
    qdq.calibrate_model(model, calib, method=method)


if __name__ == "__main__":
    run_command(bench_accuracy)
