"""Every order of four stages after the first calibration of EfficientNet-Lite0: does each give the same accuracy?

python tools/try_orders.py [--images 64] [--eval-images 64] [--image-size 224] [--json FILE]

The stages are: calibrate again, analyze, correct biases, round weights. Exit status 1: an order ends more than 0.3 dB
below the best one, or `restore_modules` does not give the float model back.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import nn

import qdq
from qdq.cli.main import run_command
from qdq.files import write_json
from qdq.metrics import sqnr_db
from qdq.run import describe_environment

_MOST_APART_DB = 0.3

Stage = Callable[[nn.Module], object]


def try_orders(
    *,
    images: int = 64,
    eval_images: int = 64,
    analysis_images: int = 8,
    image_size: int | None = None,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Print the SQNR of each of the 24 orders, on crops of other photographs.

    Args:
        images: Number of calibration images for all stages but the analysis.
        eval_images: Number of images to measure on.
        analysis_images: Number of calibration images for the analysis.
        image_size: Side of the images in pixels; smaller ones take less time.
        seed: Seed of the crops.
        json: Also write the figures to this file.
    """
    loaded = qdq.load_model("efficientnet_lite0", seed=seed, image_size=image_size)
    calibration, evaluation = qdq.load_images(None, loaded, images, eval_images, 16, seed)
    example = calibration.images[:2]
    net = loaded.module
    qdq.fold_batchnorm(net, example)
    expected = qdq.predict(net, evaluation)
    qdq.swap_modules(net, example)
    qdq.rewire_operations(net, example)
    qdq.calibrate_model(net, calibration)

    stages: dict[str, Stage] = {
        "calibrate": lambda model: qdq.calibrate_model(model, calibration),
        "analyze": lambda model: qdq.analyze_layers(model, calibration.subset(analysis_images)),
        "correct": lambda model: qdq.correct_bias(model, calibration),
        "round": lambda model: qdq.round_weights(model, calibration),
    }
    rows: list[dict[str, str | float]] = []
    began = time.perf_counter()
    for order, model in _run_orders(net, stages):
        decibels = sqnr_db(expected, qdq.predict(model, evaluation))
        qdq.restore_modules(model)
        restored_db = sqnr_db(expected, qdq.predict(model, evaluation))
        rows.append({"order": order, "sqnr_db": decibels, "restored_db": restored_db})
        seconds = time.perf_counter() - began
        print(
            f"{order:36} {decibels:6.2f} dB, restored {restored_db} dB, {seconds:6.0f} s",
            flush=True,
        )
    best_db = max(float(row["sqnr_db"]) for row in rows)
    worst_db = min(float(row["sqnr_db"]) for row in rows)
    print(f"{len(rows)} orders end between {worst_db:.2f} and {best_db:.2f} dB")
    if json:
        write_json(json, {"images": images, "rows": rows, "environment": describe_environment()})
    is_restored = all(row["restored_db"] == math.inf for row in rows)
    return 0 if is_restored and best_db - worst_db <= _MOST_APART_DB else 1


def _run_orders(
    model: nn.Module, stages: Mapping[str, Stage], former: tuple[str, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """The model after each order of some stages; orders with the same beginning share it.

    Args:
        model: The model after the former stages, which does not change.
        stages: Those that are left, by name.
        former: Names of those that are done.
    """
    if not stages:
        yield ", ".join(former), model
    for name, stage in stages.items():
        changed = copy.deepcopy(model)
        stage(changed)
        rest = {other: stages[other] for other in stages if other != name}
        yield from _run_orders(changed, rest, (*former, name))


if __name__ == "__main__":
    run_command(try_orders)
