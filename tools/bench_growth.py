"""How the time of planning and calibration grows with the layers, and how often calibration walks the modules.

python tools/bench_growth.py [--repeats 5] [--json FILE]

(a) `plan_swap`, `rewire_operations` and `calibrate_model` on one batch, for a chain of 100 and of 300 small layers,
medians; the longer chain may take 3.5 times as long as the shorter one. (b) `export_onnx` against torch's export of the
float model, CPU times, for chains of small linear layers and for ResNets. (c) One `calibrate_model` call on
torchvision's ResNet-18 and ResNet-50 with random weights: how many times it walks all modules of the model with
`named_modules`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import qdq
from qdq.cli.main import PositiveInt, run_command
from qdq.files import write_json
from qdq.run import describe_environment

_LENGTHS = (100, 300)
_MAX_RATIO = 3.5
_STAGES = ("plan_swap", "rewire_operations", "calibrate_model")
_RESNETS = ("resnet18", "resnet50")
_EXPORTED = ("100 linear layers", "500 linear layers", "resnet50", "resnet152")


@dataclass
class Traversals:
    """Walks over the modules of a model.

    Args:
        modules: Number of modules in the model.
        whole: Walks that start at the model.
        partial: Walks that start at a module inside it.
        visits: Modules visited by all walks together, divided by `modules`.
    """

    modules: int
    whole: int = 0
    partial: int = 0
    visits: float = 0.0


def bench_growth(*, repeats: PositiveInt = 5, json: Path | None = None) -> int:
    """Time the stages on both chains, time the export, and count the walks of calibration.

    Args:
        repeats: Runs of each chain; the medians are shown.
        json: Also write the figures to this file.

    Returns:
        0, or 1 if the ratio of the times is above its limit.
    """
    seconds = {length: _time_chain(length, repeats) for length in _LENGTHS}
    short, long = (sum(seconds[length].values()) for length in _LENGTHS)
    ratio = long / short
    for stage in _STAGES:
        times = "  ".join(f"{1e3 * seconds[length][stage]:8.1f} ms" for length in _LENGTHS)
        print(f"{stage:18} {times}")
    print(f"{'together':18} {1e3 * short:8.1f} ms  {1e3 * long:8.1f} ms  ratio {ratio:.2f}")

    torch.onnx.export(
        nn.Linear(2, 2), (torch.randn(1, 2),), dynamo=True, verbose=False
    )  # loads modules
    _time_export("1 linear layers")  # loads modules
    exports = {name: _time_export(name) for name in _EXPORTED}
    for name, (plain, quantized) in exports.items():
        print(
            f"export of {name:18} float {plain:6.2f} s  int8 {quantized:6.2f} s  ratio {quantized / plain:.2f}"
        )

    walks = {name: _count_traversals(name) for name in _RESNETS}
    for name, count in walks.items():
        print(
            f"{name}: {count.modules} modules, {count.whole} walks over all of them and {count.partial} over parts, "
            f"{count.visits:.1f} visits of each module"
        )
    if json:
        _write(json, seconds, ratio, exports, walks)
    return int(ratio > _MAX_RATIO)


def _write(
    path: Path,
    seconds: dict[int, dict[str, float]],
    ratio: float,
    exports: dict[str, tuple[float, float]],
    walks: dict[str, Traversals],
) -> None:
    figures = {
        "seconds": {str(length): stages for length, stages in seconds.items()},
        "ratio": ratio,
        "max_ratio": _MAX_RATIO,
        "export_seconds": exports,
        "traversals": {name: asdict(count) for name, count in walks.items()},
        "environment": describe_environment(),
    }
    write_json(path, figures)


def _time_chain(length: int, repeats: int) -> dict[str, float]:
    """Stage -> median seconds, after one run that warms up."""
    _run_chain(length)
    runs = [_run_chain(length) for _ in range(repeats)]
    return {stage: statistics.median(run[stage] for run in runs) for stage in _STAGES}


def _run_chain(length: int) -> dict[str, float]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()) for _ in range(length)]
    model = nn.Sequential(*layers).eval()
    batch = torch.randn(1, 16, 4, 4)
    began = time.perf_counter()
    qdq.plan_swap(model, batch)
    planning = time.perf_counter() - began

    qdq.swap_modules(model, batch)  # plans once more; not timed
    began = time.perf_counter()
    qdq.rewire_operations(model, batch)
    rewiring = time.perf_counter() - began

    began = time.perf_counter()
    qdq.calibrate_model(model, [batch])
    calibrating = time.perf_counter() - began
    return dict(zip(_STAGES, (planning, rewiring, calibrating), strict=True))


def _time_export(name: str) -> tuple[float, float]:
    """CPU seconds of torch's export of the folded float model and of `export_onnx` of the quantized one.

    Both have a dynamic batch.
    """
    model, batch = _build(name)
    qdq.fold_batchnorm(model, batch)
    began = time.process_time()
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (batch,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    plain = time.process_time() - began
    qdq.swap_modules(model, batch)
    qdq.rewire_operations(model, batch)
    qdq.calibrate_model(model, [batch], method="max")
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        qdq.export_onnx(model, batch, Path(folder) / "model.onnx")
        return plain, time.process_time() - began


def _build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name.startswith("resnet"):
        return torchvision.models.get_model(name).eval(), torch.randn(2, 3, 64, 64)
    length = int(name.split()[0])
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(length)]
    return nn.Sequential(*layers).eval(), torch.randn(4, 16)


def _count_traversals(name: str) -> Traversals:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    batch = torch.randn(1, 3, 64, 64)
    qdq.swap_modules(model, batch)
    qdq.rewire_operations(model, batch)
    with _counting(model) as count:
        qdq.calibrate_model(model, [batch])
    return count


@contextmanager
def _counting(model: nn.Module) -> Iterator[Traversals]:
    """Count the calls of `named_modules`, which `modules`, `parameters` and the like use, too."""
    count = Traversals(sum(1 for _ in model.modules()))
    walk = nn.Module.named_modules
    visits = 0

    def named_modules(
        self: nn.Module, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        nonlocal visits
        if memo is None:  # torch passes one to the walks inside a walk
            count.whole += self is model
            count.partial += self is not model
        for item in walk(self, memo, prefix, remove_duplicate):
            visits += memo is None
            yield item

    nn.Module.named_modules = named_modules  # type: ignore[method-assign]
    try:
        yield count
    finally:
        nn.Module.named_modules = walk  # type: ignore[method-assign]
        count.visits = visits / count.modules


if __name__ == "__main__":
    run_command(bench_growth)
