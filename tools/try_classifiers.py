"""Run the recipe on torchvision classifiers with random weights and two batches of random images.

python tools/try_classifiers.py [--models resnet50 mobilenet_v3_large vit_b_16] [--json FILE]
"""

from __future__ import annotations

import tempfile
import time
from json import loads
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qdq.cli.main import run_command
from qdq.cli.recipes import load_recipe
from qdq.files import write_json


def try_classifiers(
    *,
    models: tuple[str, ...] = ("resnet50", "mobilenet_v3_large", "vit_b_16"),
    max_float_layers: int = 0,
    json: Path | None = None,
) -> int:
    """Run the recipe on each model and print one line for it; exit code 1 if one of them had findings.

    Args:
        models: Names of torchvision classifiers.
        max_float_layers: Layers to leave in float; 0 skips the search.
        json: Also write the lines to this file.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = _make_images(Path(folder) / "images", 16)
        for model in models:
            rows.append(_try(model, images, Path(folder) / model, max_float_layers))
    for row in rows:
        print(row)
    if json:
        write_json(json, rows)
    return 1 if any(row["findings"] for row in rows) else 0


def _make_images(folder: Path, count: int) -> Path:
    """Images of noise at several scales, so that they have edges and flat parts; seed 0."""
    random = np.random.default_rng(0)
    (folder / "noise").mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(
            random.integers(0, 256, (2 ** (2 + number % 6),) * 2 + (3,), dtype=np.uint8)
        )
        coarse.resize((256, 256)).save(folder / "noise" / f"{number:02}.png")
    return folder


def _try(model: str, images: Path, output: Path, max_float_layers: int) -> dict[str, Any]:
    recipe = load_recipe("ptq").ptq
    began = time.perf_counter()
    code = recipe(
        model=model,
        weights="random",
        data=images,
        output=output,
        calib_batches=2,
        eval_images=8,
        analysis_images=2,
        batch_size=4,
        max_float_layers=max_float_layers,
    )
    report = loads((output / "report.json").read_text())
    summary = report["summary"]
    return {
        "model": model,
        "exit_code": code,
        "findings": report["findings"],
        "swapped": summary["weighted_layers_swapped"],
        "missed": len(summary["missed_modules"]),
        "parity_sqnr_db": summary["parity"]["sqnr_db"],
        "parity_agreement": summary["parity"]["agreement"],
        "int8_expected": summary["census_expected_int8"],
        "int8_missing": len(summary["census_missing_int8"]),
        "seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    run_command(try_classifiers)
