"""What it costs to find the layers that should stay in float, and how good the choice is.

python tools/bench_sensitivity.py [--model efficientnet_lite0] [--json FILE] [--modelopt-python PATH]

Side by side on the same model and images: the naive loop of full evaluations, qdq's replay, its screen, and ModelOpt's
`auto_quantize`. Times are CPU times of the process, in evaluations too: forwards of the int8 model over all images. The
SQNR is that of other images, with the first layers of each ranking in float.
"""

from __future__ import annotations

import json as json_module
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qdq
from qdq.analyze.replay import Replay
from qdq.analyze.screen import screen_units
from qdq.analyze.sensitivity import SQNR, collect, reduce_rows
from qdq.cli.main import PositiveInt, run_command
from qdq.files import write_json
from qdq.forward import call_model, evaluating
from qdq.metrics import sqnr_db
from qdq.quantizer import disable_quantization, toggling
from qdq.run import describe_environment
from qdq.units import find_units

MODES = ("one-at-a-time", "leave-one-out")
# Runs in an interpreter that may have neither qdq nor its version of torch.
_MODELOPT = """
import json, sys, time
import numpy, torch, torchvision
import modelopt.torch.quantization as mtq
name, weights, batches, path = sys.argv[1:]
model = torchvision.models.get_model(name, weights=None)
model.load_state_dict(torch.load(weights))
model.eval()
images = torch.from_numpy(numpy.load(batches))
with torch.no_grad():
    data = [(batch, model(batch).argmax(1)) for batch in images]
began = time.process_time()
_, state = mtq.auto_quantize(
    model, constraints={"effective_bits": 9.0}, quantization_formats=[mtq.INT8_DEFAULT_CFG], data_loader=data,
    forward_step=lambda model, pair: model(pair[0]),
    loss_func=lambda output, pair: torch.nn.functional.cross_entropy(output, pair[1]),
    num_calib_steps=len(data), num_score_steps=len(data), verbose=False,
)
seconds = time.process_time() - began
scores = {layer.removesuffix(".quant_recipe"): max(map(float, each["scores"])) for layer, each in
          state["candidate_stats"].items()}
json.dump({"seconds": seconds, "scores": scores}, open(path, "w"))
"""


@dataclass
class Row:
    """What came of one way.

    Args:
        name: The way.
        seconds: CPU time.
        evaluations: The same in forwards of the int8 model over all images.
        ranking: Layers, most sensitive first.
        differs: Largest difference in dB from the naive loop in the SQNR of a layer; None where there is none.
        overlap: How many of its first ten are among the first ten of the naive loop.
        sqnr_db: SQNR on other images with the first layers in float, in dB.
    """

    name: str
    seconds: float
    evaluations: float
    ranking: list[str]
    differs: float | None
    overlap: int
    sqnr_db: float


def bench_sensitivity(
    *,
    model: str = "resnet50",
    images: PositiveInt = 32,
    batch_size: PositiveInt = 16,
    float_layers: PositiveInt = 4,
    json: Path | None = None,
    modelopt_python: Path | None = None,
) -> int:
    """Rank the layers in every way, and compare cost and quality.

    Args:
        model: efficientnet_lite0 with its packaged weights, or a torchvision classifier with random ones.
        images: Photographs to analyze on; as many others judge the choice.
        batch_size: Images a batch.
        float_layers: How many layers of each ranking are left in float for the SQNR.
        json: Also write the figures there.
        modelopt_python: Interpreter that has ModelOpt and torchvision; without, and for efficientnet_lite0, ModelOpt
            is left out.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("qdq").setLevel(logging.ERROR)
    is_demo = model == "efficientnet_lite0"
    loaded = qdq.load_model(model, "DEFAULT" if is_demo else "random", 0)
    calibration, others = qdq.load_images(None, loaded, max(128, images), images, batch_size, 0)
    bench = _Bench(loaded.module, list(calibration.subset(images)), list(others), float_layers)
    weights = {name: tensor.clone() for name, tensor in loaded.module.state_dict().items()}
    bench.prepare(calibration)
    rows = [row for mode in MODES for row in bench.run(mode)]
    if modelopt_python and not is_demo:
        rows.append(bench.run_modelopt(model, weights, modelopt_python, rows[0]))
    for row in rows:
        differs = "-" if row.differs is None else f"{row.differs:.1e}"
        print(
            f"{row.name:28} {row.seconds:8.1f} s {row.evaluations:7.1f} evaluations  differs {differs:>8} dB  "
            f"{row.overlap:2} of the exact top 10  {row.sqnr_db:6.2f} dB with {float_layers} in float"
        )
    print(
        f"{model}, {len(bench.units)} layers, {images} images; all in int8: {bench.judge([]):.2f} dB"
    )
    if json:
        write_json(
            json,
            {
                "model": model,
                "images": images,
                "rows": [asdict(row) for row in rows],
                "environment": describe_environment(),
            },
        )
    return 0


class _Bench:
    """One model, its images and the ways."""

    def __init__(
        self, model: nn.Module, batches: list[Any], others: list[Any], float_layers: int
    ) -> None:
        self._model = model
        self._batches = batches
        self._others = others
        self._count = float_layers
        self._expected = qdq.predict(model, others)

    def prepare(self, calibration: Any) -> None:
        """Fold, swap, rewire, calibrate; the float outputs and the time of one evaluation."""
        example = self._batches[0][0][:2]
        qdq.fold_batchnorm(self._model, example)
        qdq.swap_modules(self._model, example)
        qdq.rewire_operations(self._model, example)
        qdq.calibrate_model(self._model, calibration, method="mse")
        self.units = find_units(self._model, example)
        with disable_quantization(self._model), evaluating(self._model):
            self._references = [call_model(self._model, batch) for batch in self._batches]
        self._evaluation = min(_timed(self._evaluate)[0] for _ in range(3))

    def _evaluate(self) -> list[Any]:
        with evaluating(self._model):
            return [call_model(self._model, batch) for batch in self._batches]

    def judge(self, layers: Sequence[str]) -> float:
        """SQNR on the other images with some layers in float."""
        chosen = [
            quantizer
            for unit in self.units
            if unit.name in set(layers)
            for quantizer in unit.quantizers
        ]
        with toggling(chosen):
            return sqnr_db(self._expected, qdq.predict(self._model, self._others))

    def run(self, mode: str) -> list[Row]:
        """The naive loop, the replay and the screen."""
        is_alone = mode == "one-at-a-time"
        naive_seconds, naive = _timed(lambda: self._measure(is_alone, self._evaluate_naively))
        replay_seconds, replayed = _timed(
            lambda: self._measure(is_alone, Replay(self._model).evaluate)
        )
        screen_seconds, energies = _timed(
            lambda: screen_units(self._model, self._batches, self._references, self.units, mode)
        )
        ranking = sorted(naive, key=lambda name: naive[name], reverse=not is_alone)
        differs = max(abs(naive[name] - replayed[name]) for name in naive)
        screened = sorted(energies, key=lambda name: -energies[name])
        again = sorted(replayed, key=lambda name: replayed[name], reverse=not is_alone)
        return [
            self._row(f"{mode}: naive loop", naive_seconds, ranking, ranking, None),
            self._row(f"{mode}: replay", replay_seconds, again, ranking, differs),
            self._row(f"{mode}: screen", screen_seconds, screened, ranking, None),
        ]

    def _row(
        self, name: str, seconds: float, found: list[str], exact: list[str], differs: float | None
    ) -> Row:
        overlap = len(set(found[:10]) & set(exact[:10]))
        judged = self.judge(found[: self._count])
        return Row(name, seconds, seconds / self._evaluation, found, differs, overlap, judged)

    def _measure(self, is_alone: bool, evaluate: Callable[..., None]) -> dict[str, float]:
        """SQNR of each layer alone, the same statistics whatever evaluates."""
        rows: dict[str | None, list[Any]] = {}
        variants = {unit.name: unit.quantizers for unit in self.units}
        with toggling(
            [quantizer for unit in self.units for quantizer in unit.quantizers] if is_alone else ()
        ):
            for batch, reference in zip(self._batches, self._references, strict=True):

                def keep(
                    name: str | None, outputs: Any, batch: Any = batch, reference: Any = reference
                ) -> None:
                    rows.setdefault(name, []).append(collect(SQNR, batch, reference, outputs))

                evaluate(batch, variants, keep)
        return {
            str(name): reduce_rows(SQNR, np.concatenate(parts))[0]
            for name, parts in rows.items()
            if name
        }

    def _evaluate_naively(
        self, batch: Any, variants: dict[str, Any], measure: Callable[..., None]
    ) -> None:
        for name in (None, *variants):
            with evaluating(self._model), toggling(variants[name] if name else ()):
                measure(name, call_model(self._model, batch))

    def run_modelopt(self, name: str, weights: dict[str, Any], python: Path, exact: Row) -> Row:
        """ModelOpt's ranking of the same model, judged in qdq's."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            torch.save(weights, folder / "weights.pt")
            np.save(
                folder / "batches.npy", torch.stack([batch[0] for batch in self._batches]).numpy()
            )
            files = [str(folder / file) for file in ("weights.pt", "batches.npy", "scores.json")]
            subprocess.run(
                [str(python), "-c", _MODELOPT, name, *files], check=True, stdout=sys.stderr
            )
            found = json_module.loads((folder / "scores.json").read_text())
        known = {unit.name for unit in self.units}
        ranking = [
            layer
            for layer in sorted(found["scores"], key=lambda layer: -found["scores"][layer])
            if layer in known
        ]
        return self._row("ModelOpt auto_quantize", found["seconds"], ranking, exact.ranking, None)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


if __name__ == "__main__":
    run_command(bench_sensitivity)
