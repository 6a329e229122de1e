"""The cost of `qdq.compat` on this CPU: medians of one run, each next to its reference.

python tools/bench_compat.py [--repeats 9] [--batch-size 8] [--json FILE]
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from qdq.cli.main import run_command
from qdq.compat import calib, quant_modules
from qdq.compat import nn as quant_nn
from qdq.compat.tensor_quant import EPS, QuantDescriptor
from qdq.files import write_json
from qdq.run import describe_environment

_LEVELS = 128  # the codes 0 to 127 of signed 8 bit
_START_BIN = 128
_PERCENTILE = 99.99
_METHODS = ("entropy", "mse", "percentile")
_TARGETS = {  # in the order of the rows
    "entropy": "<= 5 ms, same bin",
    "mse": "same bin",
    "percentile": "same bin",
    "fake-quantized forward": "<= 1.3x",
    "histogram calibration pass": "<= 1.5x",
}


def bench_compat(*, repeats: int = 9, batch_size: int = 8, json: Path | None = None) -> int:
    """Time ranges from one histogram, the collection of one activation, and ResNet-18 with quantizers; seed 0.

    Args:
        repeats: Runs of each work; the median is shown. The slow plain searches run twice.
        batch_size: Images per batch.
        json: Also write the figures to this file.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [
            *_bench_solvers(repeats),
            _bench_collect(batch_size, repeats),
            *_bench_network(batch_size, repeats),
        ]
    print(f"{'work':<28}{'ms':>10}  {'beside it':<24}{'ms':>10}{'ratio':>9}  {'bin':<7}target")
    for row in rows:
        print(
            f"{row['work']:<28}{row['ms']:>10.2f}  {row['beside']:<24}{row['beside_ms']:>10.2f}{row['ratio']:>9.4f}  "
            f"{row.get('bin', '-'):<7}{row['target']}"
        )
    if json:
        write_json(json, {"rows": rows, "environment": describe_environment()})
    return 0


def _make_row(work: str, reference: str, milliseconds: list[float]) -> dict[str, Any]:
    """The figures of one work and of its reference.

    Args:
        work: Name of the work.
        reference: Name of the reference.
        milliseconds: Times of both.
    """
    work_ms, reference_ms = milliseconds
    return {
        "work": work,
        "ms": work_ms,
        "beside": reference,
        "beside_ms": reference_ms,
        "ratio": work_ms / reference_ms,
        "target": _TARGETS.get(work, "-"),
    }


def _bench_solvers(repeats: int) -> list[dict[str, Any]]:
    """The three searches on a histogram of 2048 bins, and plain searches that follow their definitions."""
    calibrator = calib.HistogramCalibrator(8, None, False)
    calibrator.collect(torch.distributions.Laplace(0.0, 1.0).sample((1 << 20,)))
    counts = calibrator._calib_hist.double().numpy()
    edges = calibrator._calib_bin_edges.double().numpy()
    plain = {"entropy": _plain_entropy, "mse": _plain_mse, "percentile": _plain_percentile}
    rows = []
    for method in _METHODS:
        amax, search_ms = _time(functools.partial(calibrator.compute_amax, method), repeats)
        expected, plain_ms = _time(functools.partial(plain[method], counts, edges), 2)
        distance = abs(float(amax) - expected) / edges[1]  # in bins
        row = _make_row(method, "plain search", [search_ms, plain_ms])
        row["bin"] = "same" if distance < 0.01 else f"{distance:.1f} off"
        rows.append(row)
    return rows


def _plain_entropy(counts: np.ndarray, edges: np.ndarray) -> float:
    """The last cut-off with the smallest divergence from its 128-level version; zeros do not count."""
    hist = counts.copy()
    hist[0] = hist[1]
    smallest = math.inf
    best_cut = len(hist)
    for cut in range(_START_BIN, len(hist) + 1):
        divergence = _divergence(hist, cut)
        if divergence <= smallest:
            smallest = divergence
            best_cut = cut
    return float(edges[best_cut])


def _divergence(hist: np.ndarray, cut: int) -> float:
    """Kullback-Leibler divergence of a histogram, clipped at a bin, from its 128-level version."""
    level = np.arange(cut) * _LEVELS // cut
    inside = hist[:cut]
    filled = inside > 0
    mass = np.zeros(_LEVELS)
    members = np.zeros(_LEVELS)
    np.add.at(mass, level, inside)
    np.add.at(members, level, filled)
    q = np.where(filled, mass[level] / np.maximum(members[level], 1), 0)
    p = inside.copy()
    p[-1] += hist[cut:].sum()
    positive = p > 0
    if (q[positive] == 0).any():
        return math.inf
    p, q = p[positive] / p.sum(), q[positive] / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _plain_mse(counts: np.ndarray, edges: np.ndarray) -> float:
    """The first bin centre with the smallest squared error when all centres are quantized with it as amax."""
    centres = (edges[:-1] + edges[1:]) / 2
    errors = []
    for amax in centres[_START_BIN:]:
        scale = (_LEVELS - 1) / amax
        quantized = np.minimum(np.rint(centres * scale), _LEVELS - 1) / scale * (amax > EPS)
        errors.append(np.sum(counts * (quantized - centres) ** 2))
    return float(centres[_START_BIN + int(np.argmin(errors))])


def _plain_percentile(counts: np.ndarray, edges: np.ndarray) -> float:
    """The left edge of the first bin at which the percentile is reached."""
    total = counts.sum()
    cumulative = 0.0
    for index, count in enumerate(counts):
        cumulative += count
        if cumulative / total >= _PERCENTILE / 100:
            return float(edges[index])
    return float(edges[-1])


def _bench_collect(batch_size: int, repeats: int) -> dict[str, Any]:
    """Collect one activation in a histogram whose bins exist already."""
    activation = torch.randn(batch_size, 64, 56, 56).relu_()
    calibrator = calib.HistogramCalibrator(8, None, False)
    largest = float(activation.max())
    works = [
        lambda: calibrator.collect(activation),
        lambda: torch.histc(activation.abs(), bins=2048, min=0.0, max=largest),
    ]
    return _make_row("collect", "torch.histc", _time_side_by_side(works, repeats))


def _bench_network(batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """ResNet-18 of torchvision with random weights: quantized as in user scripts, against the float network.

    The targets are for ResNet-50.
    """
    images = torch.randn(batch_size, 3, 224, 224)
    plain = torchvision.models.resnet18(weights=None).eval()
    quantized = _build_quantized(plain)
    rows = []
    for work, calibrating in (
        ("histogram calibration pass", True),
        ("fake-quantized forward", False),
    ):
        for quantizer in _quantizers(quantized):
            quantizer._if_calib = calibrating
            quantizer._if_quant = not calibrating
        milliseconds = _time_side_by_side(
            [lambda: quantized(images), lambda: plain(images)], repeats
        )
        rows.append(_make_row(work, "float forward", milliseconds))
        if calibrating:
            for quantizer in _quantizers(quantized):
                quantizer.disable_calib()
            _load_ranges(quantized)
    return rows


def _build_quantized(plain: torch.nn.Module) -> torch.nn.Module:
    """The network built while `torch.nn` creates quantized layers, with histograms for inputs."""
    former = {entry.replace_mod: entry.replace_mod.default_quant_desc_input for entry in _entries()}
    for quant_class in former:
        quant_class.set_default_quant_desc_input(QuantDescriptor(calib_method="histogram"))
    quant_modules.initialize()
    try:
        quantized: torch.nn.Module = torchvision.models.resnet18(weights=None).eval()
    finally:
        quant_modules.deactivate()
        for quant_class, descriptor in former.items():
            quant_class.set_default_quant_desc_input(descriptor)
    quantized.load_state_dict(plain.state_dict())
    return quantized


def _entries() -> list[Any]:
    return quant_modules._DEFAULT_QUANT_MAP


def _quantizers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, quant_nn.TensorQuantizer)]


def _load_ranges(model: torch.nn.Module) -> None:
    for quantizer in _quantizers(model):
        if isinstance(quantizer._calibrator, calib.MaxCalibrator):
            quantizer.load_calib_amax()
        else:
            quantizer.load_calib_amax(method="mse")


def _time(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result and the median time in milliseconds."""
    result = run()
    return result, _time_side_by_side([run], repeats)[0]


def _time_side_by_side(works: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median times in milliseconds; the runs take turns, so that a slow moment of the machine affects all of them."""
    for run in works:
        run()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for run, times in zip(works, seconds, strict=True):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return [1e3 * statistics.median(times) for times in seconds]


if __name__ == "__main__":
    run_command(bench_compat)
