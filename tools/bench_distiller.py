"""Distiller's modes on EfficientNet-Lite0: SQNR, agreement and accuracy for modes, clip modes and numbers of bits.

python tools/bench_distiller.py [--bits 8 6] [--eval-images 500] [--json FILE]

All rows are emulated after one calibration on 128 crops. Images are those of the demo.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import qdq
from qdq.cli.main import PositiveInt, UInt32, run_command
from qdq.distiller import (
    PostTrainLinearQuantizer,
    collect_quant_stats,
    modularize,
    override_layers,
)
from qdq.files import write_json
from qdq.run import describe_environment

_CALIBRATION_IMAGES = 128
_LAST_LAYER = "_fc"
_N_STDS = 3.0


@dataclass(frozen=True)
class Setting:
    """How a row is quantized.

    Args:
        mode: Mode of weights and activations.
        per_channel: Whether each output channel of a weight has a scale.
        clip: Clip mode of the activations.
        clips_last: Whether the outputs of the last layer are clipped, too.
    """

    mode: str
    per_channel: bool
    clip: str = "NONE"
    clips_last: bool = False

    def __str__(self) -> str:
        mode = {"SYMMETRIC": "sym", "ASYMMETRIC_UNSIGNED": "asym_u"}[self.mode]
        granularity = "channel" if self.per_channel else "tensor"
        clip = self.clip
        if clip != "NONE" and not self.clips_last:
            clip += " but last"
        return f"{mode}, per {granularity}, {clip}"


SETTINGS = (
    Setting("SYMMETRIC", False),
    Setting("ASYMMETRIC_UNSIGNED", False),
    Setting("SYMMETRIC", True),
    Setting("ASYMMETRIC_UNSIGNED", True),
    Setting("SYMMETRIC", True, "AVG", clips_last=True),
    Setting("SYMMETRIC", True, "AVG"),
    Setting("ASYMMETRIC_UNSIGNED", True, "AVG"),
    Setting("SYMMETRIC", True, "N_STD"),
    Setting("SYMMETRIC", True, "GAUSS"),
    Setting("SYMMETRIC", True, "LAPLACE"),
    Setting("ASYMMETRIC_UNSIGNED", True, "LAPLACE"),
)


def bench_distiller(
    *,
    bits: tuple[PositiveInt, ...] = (8, 6),
    eval_images: PositiveInt = 500,
    device: str | None = None,
    seed: UInt32 = 0,
    json: Path | None = None,
) -> int:
    """Print a row for the float model and for each mode, clip mode and number of bits.

    Args:
        bits: Bits of weights and activations.
        eval_images: Number of images to measure on.
        device: Where the model runs; by default a GPU if there is one.
        seed: Seed of the crops.
        json: Also write the figures to this file.
    """
    loaded = qdq.load_model("efficientnet_lite0")
    calibration, images = qdq.load_images(None, loaded, _CALIBRATION_IMAGES, eval_images, 32, seed)
    example = calibration.images[:2]
    net = modularize(loaded.module, example).to(qdq.choose_device(device))
    logits = {"float": qdq.predict(net, images)}
    statistics = collect_quant_stats(net, calibration)

    for width in bits:
        for setting in SETTINGS:
            start = time.perf_counter()
            quantizer = PostTrainLinearQuantizer(
                copy.deepcopy(net),
                width,
                width,
                overrides=override_layers([] if setting.clips_last else [_LAST_LAYER], []),
                mode=setting.mode,
                clip_acts=setting.clip,
                per_channel_wts=setting.per_channel,
                model_activation_stats=statistics,
                clip_n_stds=_N_STDS if setting.clip == "N_STD" else None,
            )
            quantizer.prepare_model(example)
            name = f"{width} bits, {setting}"
            logits[name] = qdq.predict(quantizer.model, images)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    evaluation = qdq.evaluate_outputs(logits, images.labels)
    print(evaluation.format_table())
    if json:
        rows = [asdict(candidate) for candidate in evaluation.candidates]
        write_json(json, {"rows": rows, "environment": describe_environment()})
    return 0


if __name__ == "__main__":
    run_command(bench_distiller)
