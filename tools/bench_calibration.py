"""The cost and the accuracy of calibration, side by side in one run, medians.

python tools/bench_calibration.py [--json FILE] [--modelopt-python PATH] [--images 500]

(a) entropy of one tensor, 2048 bins, against ModelOpt on the same histogram; (b) all methods for all activations of
ResNet-50; (c) the collecting pass and the fake-quantized forward against the float forward, and the additional memory
of the pass; (d) EfficientNet-Lite0 with every method, all layers in int8.
"""

from __future__ import annotations

import copy
import json as json_format
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

import qdq
from qdq.calibrate import CALIB_METHODS
from qdq.calibrate.collect import Collection
from qdq.cli.main import PositiveInt, run_command
from qdq.files import write_json
from qdq.observers.entropy import solve_entropy
from qdq.observers.solve import SOLVERS
from qdq.run import describe_environment

_BINS = 2048
# Runs in an interpreter that may have neither qdq nor its version of torch.
_MODELOPT = """
import json, statistics, sys, time
import numpy, torch
from modelopt.torch.quantization.calib import HistogramCalibrator
path, repeats = sys.argv[1], int(sys.argv[2])
counts = numpy.load(path)
calibrator = HistogramCalibrator(8, None, False, num_bins=len(counts))
calibrator._calib_hist = torch.from_numpy(counts)
calibrator._calib_bin_edges = torch.arange(len(counts) + 1, dtype=torch.float32)
seconds = []
for _ in range(repeats):
    began = time.perf_counter()
    amax = float(calibrator.compute_amax("entropy"))
    seconds.append(time.perf_counter() - began)
print(json.dumps({"bin": amax, "seconds": statistics.median(seconds)}))
"""


def bench_calibration(
    *,
    repeats: PositiveInt = 5,
    images: PositiveInt = 500,
    json: Path | None = None,
    modelopt_python: Path | None = None,
) -> int:
    """Measure all of it and print it with the targets.

    Args:
        repeats: Runs of each timed piece; the median is shown.
        images: Crops to evaluate EfficientNet-Lite0 on.
        json: Also write the figures to this file.
        modelopt_python: Interpreter that has ModelOpt.
    """
    torch.manual_seed(0)
    figures: dict[str, Any] = {"entropy": _bench_entropy(repeats, modelopt_python)}
    figures["resnet50"] = _bench_resnet(repeats)
    figures["efficientnet_lite0"] = _compare_methods(images)
    if json:
        write_json(
            json,
            {**figures, "threads": torch.get_num_threads(), "environment": describe_environment()},
        )
    return 0


# -- (a) ---------------------------------------------------------------------------------------------------------------


def _bench_entropy(repeats: int, modelopt_python: Path | None) -> dict[str, Any]:
    magnitudes = np.abs(np.random.default_rng(0).laplace(0, 1, 1_000_000))
    counts = np.histogram(magnitudes, _BINS)[0]
    seconds = _median(lambda: solve_entropy(counts, 1.0, qdq.Format()), 4 * repeats)
    figures: dict[str, Any] = {"bin": solve_entropy(counts, 1.0, qdq.Format()), "ms": 1e3 * seconds}
    print(f"entropy, {_BINS} bins: {figures['ms']:.2f} ms (target 5)")
    if modelopt_python:
        peer = _run_modelopt(modelopt_python, counts, repeats)
        figures |= {"modelopt_bin": peer["bin"], "modelopt_ms": 1e3 * peer["seconds"]}
        figures["times_faster"] = peer["seconds"] / seconds
        print(
            f"  ModelOpt: {figures['modelopt_ms']:.0f} ms, {figures['times_faster']:.0f} times as long (target 200), "
            f"bins {figures['bin']:.0f} and {peer['bin']:.0f}"
        )
    return figures


def _run_modelopt(interpreter: Path, counts: np.ndarray, repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "counts.npy")
        np.save(path, counts)
        process = subprocess.run(
            [str(interpreter), "-c", _MODELOPT, str(path), str(repeats)],
            capture_output=True,
            text=True,
        )
    if process.returncode:
        sys.exit(f"{interpreter} fails: {process.stderr.strip().splitlines()[-1]}")
    answer: dict[str, float] = json_format.loads(process.stdout.splitlines()[-1])
    return answer


# -- (b), (c) ----------------------------------------------------------------------------------------------------------


def _bench_resnet(repeats: int) -> dict[str, Any]:
    model = torchvision.models.resnet50(weights=None).eval()
    batch = torch.randn(8, 3, 224, 224)
    qdq.fold_batchnorm(model, batch[:1])
    qdq.swap_modules(model, batch[:1])
    figures = _time_collecting(model, batch, repeats)
    statistics_of_model = qdq.collect_statistics(model, [batch])

    def solve_all() -> None:
        for name in statistics_of_model.tensors:
            for method in SOLVERS:
                statistics_of_model.solve(name, method)

    figures["activations"] = len(statistics_of_model.tensors)
    figures["all_methods_s"] = _median(solve_all, repeats)
    qdq.solve_ranges(model, statistics_of_model)
    figures |= _time_forward(model, batch, repeats)
    print(
        f"ResNet-50, batch 8, {torch.get_num_threads()} threads\n"
        f"  pass that collects / float forward: {figures['collect_ratio']:.2f} (target 1.55 on 1 thread, 1.8 on 2)\n"
        f"  memory above the float pass: {figures['memory_mb']:.0f} MB (target 64)\n"
        f"  fake-quantized / float forward: {figures['fake_quantized_ratio']:.2f} (target 1.3)\n"
        f"  {figures['activations']} activations, {len(SOLVERS)} methods: {figures['all_methods_s']:.2f} s (target 1)"
    )
    return figures


def _time_collecting(model: nn.Module, batch: torch.Tensor, repeats: int) -> dict[str, float]:
    """Float and collecting passes in turn, so that other load on the machine affects both."""
    collection = Collection(model)

    def run_twice() -> None:
        model(batch)
        model(batch)

    seconds: dict[str, list[float]] = {"float": [], "collect": []}
    with torch.no_grad():
        with qdq.disable_quantization(model):
            float_peak = _peak_memory(run_twice)  # before anything has been collected
        with collection:
            collect_peak = _peak_memory(run_twice)
        for _ in range(repeats):
            with qdq.disable_quantization(model):
                seconds["float"].append(_time(lambda: model(batch)))
            with collection:
                seconds["collect"].append(_time(lambda: model(batch)))
    plain, collecting = map(statistics.median, seconds.values())
    return {
        "float_s": plain,
        "collect_s": collecting,
        "collect_ratio": collecting / plain,
        "memory_mb": collect_peak - float_peak,
    }


def _time_forward(model: nn.Module, batch: torch.Tensor, repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"float": [], "fake": []}
    with torch.no_grad():
        for _ in range(repeats + 1):
            with qdq.disable_quantization(model):
                seconds["float"].append(_time(lambda: model(batch)))
            seconds["fake"].append(_time(lambda: model(batch)))
    plain, fake = (statistics.median(runs[1:]) for runs in seconds.values())
    return {"fake_quantized_s": fake, "fake_quantized_ratio": fake / plain}


def _peak_memory(run: Callable[[], object]) -> float:
    """The largest resident memory of this process during a run, in MB."""
    has_ended = threading.Event()
    samples = [0]

    def watch() -> None:
        while not has_ended.wait(0.002):
            samples.append(int(Path("/proc/self/statm").read_text().split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        has_ended.set()
        watcher.join()
    return max(samples) * os.sysconf("SC_PAGE_SIZE") / 2**20


# -- (d) ---------------------------------------------------------------------------------------------------------------


def _compare_methods(images: int) -> dict[str, dict[str, float | None]]:
    """Measure SQNR and agreement with the float model for every method."""
    net = qdq.load_model()
    calib, evaluation = qdq.load_images(None, net, 128, images, 16)
    outputs = {"float": qdq.predict(net.module, evaluation)}
    qdq.fold_batchnorm(net.module, calib.images[:2])
    qdq.swap_modules(net.module, calib.images[:2])
    batches = [batch for batch, _ in calib]
    held_out = [batches[-1]]
    qdq.rewire_operations(net.module, batches[0][:2])
    everything = qdq.collect_statistics(net.module, batches)
    layers_of_method: Counter[str] = Counter()
    for weights in ("max", "mse"):
        for method in CALIB_METHODS:
            model = copy.deepcopy(net.module)
            ranges = qdq.solve_ranges(
                model, everything, method=method, weight_method=weights, held=held_out
            )
            outputs[f"{method}, weights {weights}"] = qdq.predict(model, evaluation)
            if method == "best" and weights == "max":
                activations = [entry for entry in ranges if "weight" not in entry.name]
                layers_of_method.update(entry.method for entry in activations)
    table = qdq.evaluate_outputs(outputs, evaluation.labels)
    print(f"EfficientNet-Lite0, all layers int8; best selected {dict(layers_of_method)}")
    print(table.format_table())
    figures = {}
    for candidate in table.candidates:
        figures[candidate.name] = {
            "sqnr_db": candidate.sqnr_db,
            "agreement": candidate.agreement,
        }
    return figures


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    return statistics.median(_time(run) for _ in range(repeats))


def _time(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    run_command(bench_calibration)
