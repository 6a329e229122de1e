"""Fixed point on EfficientNet-Lite0: accuracy and SQNR for several numbers of bits, beside qdq's own int8.

python tools/bench_fixed_point.py [--bits 12 10 8 6] [--bn-bits 10] [--eval-images 500] [--json FILE]

Parameters and activations have the bits of a row. Images are those of the demo.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path

import qdq
from qdq.cli.main import PositiveInt, UInt32, run_command
from qdq.cli.recipes import load_recipe
from qdq.files import write_json
from qdq.run import describe_environment
from qdq.systems import duplicate_model_with_quant, quantize_parameters

_BATCHES = 20  # of 10 images, to calibrate fixed point on
_INT8_IMAGES = 128  # that the demo calibrates on


def bench_fixed_point(
    *,
    bits: tuple[PositiveInt, ...] = (12, 10, 8, 6),
    bn_bits: PositiveInt = 10,
    eval_images: PositiveInt = 500,
    seed: UInt32 = 0,
    json: Path | None = None,
) -> int:
    """Print a row for the float model, for each number of bits, and for int8 with a scale for each tensor and channel.

    Args:
        bits: Bits of parameters and activations.
        bn_bits: Bits of the running statistics of BatchNorm; 32 leaves them in float.
        eval_images: Number of images to measure on.
        seed: Seed of the crops.
        json: Also write the figures to this file.
    """
    recipe = load_recipe("fixed_point")
    num_calibration = _BATCHES * recipe.CALIBRATION_BATCH
    loaded = qdq.load_model("efficientnet_lite0")
    calibration, images = qdq.load_images(None, loaded, num_calibration, eval_images, 16, seed)
    logits = {"float": qdq.predict(loaded.module, images)}

    for width in bits:
        net = recipe.make_sequential(copy.deepcopy(loaded.module))
        quantize_parameters(net, width, bn_bits)
        net = duplicate_model_with_quant(net, width, counter=_BATCHES)
        qdq.predict(net, replace(calibration, batch_size=recipe.CALIBRATION_BATCH))
        logits[f"fixed point, {width} bits"] = qdq.predict(net, images)

    example = calibration.images[:2]
    qdq.fold_batchnorm(loaded.module, example)
    qdq.swap_modules(loaded.module, example)
    qdq.rewire_operations(loaded.module, example)
    qdq.calibrate_model(loaded.module, calibration.subset(_INT8_IMAGES))
    logits["int8 of qdq"] = qdq.predict(loaded.module, images)

    evaluation = qdq.evaluate_outputs(logits, images.labels)
    print(evaluation.format_table())
    if json:
        rows = [asdict(candidate) for candidate in evaluation.candidates]
        write_json(json, {"rows": rows, "environment": describe_environment()})
    return 0


if __name__ == "__main__":
    run_command(bench_fixed_point)
