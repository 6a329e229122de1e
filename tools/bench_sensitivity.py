"""The cost of finding the layers that should stay in float, and the quality of the choice.

python tools/bench_sensitivity.py [--model efficientnet_lite0] [--json FILE] [--modelopt-python PATH]

It compares four methods on the same model and images: the naive loop of full evaluations, qdq's replay, its screen, and
ModelOpt's `auto_quantize`. Times are CPU times of the process, also given in evaluations: forwards of the int8 model
over all images. The SQNR is measured on held-out images, with the first layers of each ranking in float.
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
_TOP = 10  # layers of a ranking that are compared with the exact one
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
    """The result of one method.

    Args:
        name: The method.
        seconds: CPU time.
        evaluations: CPU time in forwards of the int8 model over all images.
        ranking: Layers, most sensitive first.
        differs: Largest difference in dB from the naive loop in the SQNR of a layer; None if it gives no SQNR.
        overlap: Number of its first ten layers that are among the first ten of the naive loop.
        sqnr_db: SQNR on held-out images with the first layers in float, in dB.
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
    """Rank the layers by every method, and compare cost and quality.

    Args:
        model: efficientnet_lite0 with its packaged weights, or a torchvision classifier with random ones.
        images: Number of photographs to analyze on, and of held-out ones to measure the choice on.
        batch_size: Images per batch.
        float_layers: Number of layers of each ranking that are left in float for the SQNR.
        json: Also write the figures to this file.
        modelopt_python: Interpreter that has ModelOpt and torchvision. Without it, and for efficientnet_lite0, ModelOpt
            is left out.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("qdq").setLevel(logging.ERROR)
    is_demo = model == "efficientnet_lite0"
    loaded = qdq.load_model(model, "DEFAULT" if is_demo else "random", 0)
    calibration, held_out = qdq.load_images(None, loaded, max(128, images), images, batch_size, 0)
    bench = _Bench(loaded.module, list(calibration.subset(images)), list(held_out), float_layers)
    weights = {name: tensor.clone() for name, tensor in loaded.module.state_dict().items()}
    bench.prepare(calibration)
    rows: list[Row] = []
    for mode in MODES:
        rows += bench.run(mode)
    if modelopt_python and not is_demo:
        rows.append(bench.run_modelopt(model, weights, modelopt_python, rows[0]))
    for row in rows:
        print(_format_row(row, float_layers))
    all_int8_db = bench.measure_sqnr([])
    print(f"{model}, {len(bench.units)} layers, {images} images; all in int8: {all_int8_db:.2f} dB")
    if json:
        content = {
            "model": model,
            "images": images,
            "rows": list(map(asdict, rows)),
            "environment": describe_environment(),
        }
        write_json(json, content)
    return 0


def _format_row(row: Row, float_layers: int) -> str:
    differs = "-" if row.differs is None else f"{row.differs:.1e}"
    return (
        f"{row.name:28} {row.seconds:8.1f} s {row.evaluations:7.1f} evaluations  differs {differs:>8} dB  "
        f"{row.overlap:2} of the exact top {_TOP}  {row.sqnr_db:6.2f} dB with {float_layers} in float"
    )


class _Bench:
    """One model, its images and the methods."""

    def __init__(
        self, model: nn.Module, batches: list[Any], held_out: list[Any], float_layers: int
    ) -> None:
        self._model = model
        self._batches = batches
        self._held_out = held_out
        self._float_layers = float_layers
        self._expected = qdq.predict(model, held_out)

    def prepare(self, calibration: Any) -> None:
        """Fold, swap, rewire and calibrate; compute the float outputs and the time of one evaluation."""
        example = self._batches[0][0][:2]
        qdq.fold_batchnorm(self._model, example)
        qdq.swap_modules(self._model, example)
        qdq.rewire_operations(self._model, example)
        qdq.calibrate_model(self._model, calibration, method="mse")
        self.units = find_units(self._model, example)
        with disable_quantization(self._model), evaluating(self._model):
            self._references = [call_model(self._model, batch) for batch in self._batches]
        self._evaluation_seconds = min(_timed(self._evaluate)[0] for _ in range(3))

    def _evaluate(self) -> list[Any]:
        with evaluating(self._model):
            return [call_model(self._model, batch) for batch in self._batches]

    def measure_sqnr(self, layers: Sequence[str]) -> float:
        """SQNR on the held-out images with some layers in float."""
        with toggling(self._list_quantizers(layers)):
            return sqnr_db(self._expected, qdq.predict(self._model, self._held_out))

    def _list_quantizers(self, layers: Sequence[str]) -> list[Any]:
        quantizers: list[Any] = []
        for unit in self.units:
            if unit.name in layers:
                quantizers += unit.quantizers
        return quantizers

    def run(self, mode: str) -> list[Row]:
        """Rank the layers by the naive loop, the replay and the screen."""
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
        replay_ranking = sorted(replayed, key=lambda name: replayed[name], reverse=not is_alone)
        return [
            self._make_row(f"{mode}: naive loop", naive_seconds, ranking, ranking, None),
            self._make_row(f"{mode}: replay", replay_seconds, replay_ranking, ranking, differs),
            self._make_row(f"{mode}: screen", screen_seconds, screened, ranking, None),
        ]

    def _make_row(
        self, name: str, seconds: float, ranking: list[str], exact: list[str], differs: float | None
    ) -> Row:
        return Row(
            name=name,
            seconds=seconds,
            evaluations=seconds / self._evaluation_seconds,
            ranking=ranking,
            differs=differs,
            overlap=len(set(ranking[:_TOP]) & set(exact[:_TOP])),
            sqnr_db=self.measure_sqnr(ranking[: self._float_layers]),
        )

    def _measure(self, is_alone: bool, evaluate: Callable[..., None]) -> dict[str, float]:
        """SQNR of each layer, from the same statistics for every way to evaluate the variants."""
        rows: dict[str | None, list[Any]] = {}
        variants = {unit.name: unit.quantizers for unit in self.units}
        toggled = self._list_quantizers(list(variants)) if is_alone else []
        with toggling(toggled):
            for batch, reference in zip(self._batches, self._references, strict=True):

                def keep(
                    name: str | None, outputs: Any, batch: Any = batch, reference: Any = reference
                ) -> None:
                    rows.setdefault(name, []).append(collect(SQNR, batch, reference, outputs))

                evaluate(batch, variants, keep)
        decibels = {}
        for name, parts in rows.items():
            if name is not None:
                decibels[name] = reduce_rows(SQNR, np.concatenate(parts))[0]
        return decibels

    def _evaluate_naively(
        self, batch: Any, variants: dict[str, Any], measure: Callable[..., None]
    ) -> None:
        for name in (None, *variants):
            with evaluating(self._model), toggling(variants[name] if name else ()):
                measure(name, call_model(self._model, batch))

    def run_modelopt(self, name: str, weights: dict[str, Any], python: Path, exact: Row) -> Row:
        """ModelOpt's ranking of the same model, measured with qdq's quantizers."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            torch.save(weights, folder / "weights.pt")
            images = torch.stack([batch[0] for batch in self._batches])
            np.save(folder / "batches.npy", images.numpy())
            command = [str(python), "-c", _MODELOPT, name, str(folder / "weights.pt")]
            command += [str(folder / "batches.npy"), str(folder / "scores.json")]
            subprocess.run(command, check=True, stdout=sys.stderr)
            answer = json_module.loads((folder / "scores.json").read_text())
        scores = answer["scores"]
        layers = [unit.name for unit in self.units if unit.name in scores]
        ranking = sorted(layers, key=lambda layer: -scores[layer])
        return self._make_row(
            "ModelOpt auto_quantize", answer["seconds"], ranking, exact.ranking, None
        )


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


if __name__ == "__main__":
    run_command(bench_sensitivity)
