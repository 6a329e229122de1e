"""Compare the engines built from QDQ files of one model by qdq, ONNX Runtime and ModelOpt.

python tools/bench_engine.py [--model resnet50] [--size 224] [--batch 1] [--json FILE] [--modelopt-python PATH]

TensorRT-RTX builds every file, without a GPU. "activations MB" is what all kernels read and write, without constants.
"""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torchvision
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import qdq
from qdq.check.rules import SEVERITIES
from qdq.cli.main import PositiveInt, run_command
from qdq.errors import ArgumentError, DependencyError, QdqError
from qdq.files import write_json
from qdq.graph.coverage import list_work_nodes
from qdq.run import describe_environment
from qdq.trt.backend import Backend, find_backend
from qdq.trt.builder import build_plan
from qdq.trt.census import take_census
from qdq.trt.kernels import Kernel

_OPSET = 19
_BATCHES = 8
_FLOAT_FILE = "float.onnx"
# Options of quantize_static; TensorRT refuses the file that its defaults give.
_TENSORRT_OPTIONS = {
    "per_channel": True,
    "activation_type": QuantType.QInt8,
    "weight_type": QuantType.QInt8,
    "extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
}
_NOT_INSTALLED = 3
# These run in an interpreter that may have neither qdq nor its version of torch.
_MODELOPT_HEAD = f"""
import importlib.util, sys
if importlib.util.find_spec("modelopt") is None:
    sys.exit({_NOT_INSTALLED})
"""
_MODELOPT_TORCH = """
import numpy, torch, torchvision
import modelopt
import modelopt.torch.quantization as mtq
name, weights, batches, path, opset = sys.argv[1:]
model = torchvision.models.get_model(name, weights=None)
model.load_state_dict(torch.load(weights))
model.eval()
images = torch.from_numpy(numpy.load(batches))
with torch.inference_mode():
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda quantized: [quantized(batch) for batch in images])
for dynamo in (True, False):
    try:
        with torch.inference_mode():
            torch.onnx.export(model, (images[0],), path, dynamo=dynamo, opset_version=int(opset), external_data=False)
        break
    except Exception as error:
        if not dynamo:
            raise
        cause = error.__cause__ or error
        first = str(cause).splitlines()[0]
        print(f"NOTE dynamo=True fails ({type(cause).__name__}: {first}); exported with dynamo=False", flush=True)
print(f"NOTE version {modelopt.__version__}", flush=True)
"""
_MODELOPT_ONNX = """
import numpy
from modelopt.onnx.quantization import quantize
source, batches, path, precision = sys.argv[1:]
images = numpy.load(batches)
quantize(
    source, quantize_mode="int8", calibration_data=images.reshape(-1, *images.shape[2:]), calibration_method="max",
    calibration_eps=["cpu"], high_precision_dtype=precision, output_path=path,
)
"""


@dataclass
class Row:
    """The figures of one file.

    Args:
        name: The tool that wrote it, and its options.
        seconds: Time from the float model to the file.
        onnx_mb: Size of the file.
        quantize_nodes: Number of QuantizeLinear nodes.
        dequantize_nodes: Number of DequantizeLinear nodes.
        findings: Number of findings of the linter, by severity and by rule.
        int8: Convolutions and matrix products that run in int8.
        layers: All convolutions and matrix products.
        kernels: Number of kernels that write something.
        written_mb: Total that they write.
        activation_mb: Total that they read and write, without constants.
        engine_mb: Size of the engine.
        build_seconds: Time of parsing and building.
        refused: Reason why TensorRT-RTX does not build an engine; empty if it does.
        census: These kernels in order: name, type, types of the outputs, bytes read and written.
    """

    name: str
    seconds: float
    onnx_mb: float
    quantize_nodes: int = 0
    dequantize_nodes: int = 0
    findings: dict[str, dict[str, int]] = field(default_factory=dict)
    int8: int | None = None
    layers: int | None = None
    kernels: int | None = None
    written_mb: float | None = None
    activation_mb: float | None = None
    engine_mb: float | None = None
    build_seconds: float | None = None
    refused: str = ""
    census: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_peer(self) -> bool:
        """Whether another tool wrote the file."""
        return not self.name.startswith("qdq")


def bench_engine(
    *,
    model: str = "resnet50",
    size: PositiveInt = 224,
    batch: PositiveInt = 1,
    sm: PositiveInt = 89,
    json: Path | None = None,
    modelopt_python: Path | None = None,
    keep: Path | None = None,
) -> int:
    """Write QDQ files of one model with every installed tool, lint and build them, and compare the engines.

    Args:
        model: Name in torchvision; random weights, seed 0.
        size: Height and width of the images, which are noise.
        batch: Images per batch, in the calibration and in the engine.
        sm: Compute capability to build for.
        json: Also write the figures to this file, with every kernel and its outputs.
        modelopt_python: Interpreter that has ModelOpt and torchvision, if this one does not have them.
        keep: Keep the ONNX files in this folder.
    """
    warnings.simplefilter("ignore")
    for noisy in ("qdq", "torch.onnx", "onnxscript"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)  # quantize_static uses the root logger
    began = time.perf_counter()
    backend = find_backend("rtx", sm)
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = _Bench(model, size, batch, folder, notes)
        rows = []
        for name, path, seconds in bench.write_files(modelopt_python):
            rows.append(_measure(path, name, seconds, backend, sm))
    _print_table(rows)
    for note in notes:
        print(note)
    seconds = time.perf_counter() - began
    print(
        f"{model}, {batch}x3x{size}x{size}, tensorrt-rtx {backend.version} for SM {sm}, onnxruntime "
        f"{version('onnxruntime')}; {seconds:.0f} s"
    )
    if json:
        settings = {"model": model, "size": size, "batch": batch, "sm": sm}
        figures = {
            "rows": list(map(asdict, rows)),
            "notes": notes,
            "settings": settings,
            "seconds": seconds,
        }
        write_json(json, {**figures, "environment": describe_environment()})
    return 0


@dataclass(frozen=True)
class _ModelOptCase:
    """One file of ModelOpt: its name in the table, its path, and the script that writes it."""

    name: str
    path: Path
    script: str
    arguments: list[str]


def _run_script(interpreter: str, case: _ModelOptCase) -> subprocess.CompletedProcess[str]:
    command = [interpreter, "-c", _MODELOPT_HEAD + case.script, *case.arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ArgumentError(
            f"{interpreter} cannot be run: {error}.", "pass a Python interpreter."
        ) from error


class _Bench:
    """Writes the files; every tool starts from the same weights and sees the same batches."""

    def __init__(self, model: str, size: int, batch: int, folder: Path, notes: list[str]) -> None:
        try:
            torch.manual_seed(0)
            self._model = torchvision.models.get_model(model, weights=None).eval()
        except ValueError as error:
            raise ArgumentError(
                f"torchvision has no model {model!r}.", "see torchvision.models.list_models()."
            ) from error
        for module in self._model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # a new one would fold into a zero bias
                torch.nn.init.normal_(module.bias, std=0.1)
        self._name = model
        self._folder = folder
        self._notes = notes
        self._batches = torch.randn(_BATCHES, batch, 3, size, size)
        self._weights = folder / "float.pt"
        torch.save(self._model.state_dict(), self._weights)

    def write_files(self, modelopt_python: Path | None) -> Iterator[tuple[str, Path, float]]:
        """Name, path and seconds of each file, one after another; a yielded file is complete."""
        yield from self._write_onnxruntime()
        yield from self._write_modelopt(str(modelopt_python or sys.executable))
        yield from self._write_qdq()

    def _write_modelopt(self, interpreter: str) -> Iterator[tuple[str, Path, float]]:
        """Write the files of ModelOpt; it reads the float file that `_write_onnxruntime` leaves."""
        for case in self._list_modelopt_cases():
            began = time.perf_counter()
            process = _run_script(interpreter, case)
            if process.returncode == _NOT_INSTALLED:
                self._notes.append(
                    f"ModelOpt: left out, {interpreter} has no package modelopt; `pip install nvidia-modelopt[onnx]` "
                    "in a separate environment and pass its interpreter with --modelopt-python."
                )
                return
            if process.returncode != 0:
                last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
                self._notes.append(
                    f"{case.name}: left out, it fails with exit code {process.returncode}: {last_line}"
                )
                continue
            for line in process.stdout.splitlines():
                if line.startswith("NOTE "):
                    self._notes.append(f"{case.name}: {line.removeprefix('NOTE ')}")
            yield case.name, case.path, time.perf_counter() - began

    def _list_modelopt_cases(self) -> list[_ModelOptCase]:
        batches = self._folder / "batches.npy"
        np.save(batches, self._batches.numpy())
        path = self._folder / "modelopt_torch.onnx"
        arguments = [self._name, str(self._weights), str(batches), str(path), str(_OPSET)]
        cases = [_ModelOptCase("ModelOpt, torch export", path, _MODELOPT_TORCH, arguments)]
        for precision in ("fp32", "fp16"):
            path = self._folder / f"modelopt_onnx_{precision}.onnx"
            arguments = [str(self._folder / _FLOAT_FILE), str(batches), str(path), precision]
            name = f"ModelOpt, ONNX, {precision}"
            cases.append(_ModelOptCase(name, path, _MODELOPT_ONNX, arguments))
        return cases

    def _write_onnxruntime(self) -> Iterator[tuple[str, Path, float]]:
        float_file = self._folder / _FLOAT_FILE
        source = self._folder / "preprocessed.onnx"
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
            torch.onnx.export(
                self._model,
                (self._batches[0],),
                float_file,
                dynamo=True,
                opset_version=_OPSET,
                external_data=False,
                verbose=False,
            )
        quant_pre_process(float_file, source)  # folds BatchNorm, as its documentation recommends
        preparation_seconds = time.perf_counter() - began
        cases: list[tuple[str, str, dict[str, Any]]] = [
            ("ORT quantize_static, defaults", "ort_default", {}),
            ("ORT quantize_static, for TensorRT", "ort_tensorrt", _TENSORRT_OPTIONS),
            (
                "the same, Conv and Gemm only",
                "ort_layers",
                {**_TENSORRT_OPTIONS, "op_types_to_quantize": ["Conv", "Gemm", "MatMul"]},
            ),
        ]
        for name, file, options in cases:
            path = self._folder / f"{file}.onnx"
            began = time.perf_counter()
            quantize_static(source, path, _Reader(source, self._batches.numpy()), **options)
            yield name, path, preparation_seconds + time.perf_counter() - began

    def _write_qdq(self) -> Iterator[tuple[str, Path, float]]:
        began = time.perf_counter()
        example = self._batches[0]
        qdq.fold_batchnorm(self._model, example)
        plan = qdq.swap_modules(self._model, example)
        qdq.rewire_operations(self._model, example)
        ranges = qdq.calibrate_model(self._model, list(self._batches))
        preparation_seconds = time.perf_counter() - began
        for precision in ("fp32", "fp16"):
            path = self._folder / f"qdq_{precision}.onnx"
            began = time.perf_counter()
            qdq.export_onnx(
                self._model,
                example,
                path,
                opset=_OPSET,
                dynamic_batch=False,
                precision=precision,
                calibration=ranges,
                plan=plan,
            )
            yield f"qdq, {precision}", path, preparation_seconds + time.perf_counter() - began


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """The batches in the interface of quantize_static."""

    def __init__(self, path: Path, batches: np.ndarray) -> None:
        name = str(ir.load(path).graph.inputs[0].name)
        self._batches = iter([{name: batch} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _measure(path: Path, name: str, seconds: float, backend: Backend, sm: int) -> Row:
    """Lint a file and build it."""
    print(f"{name}: written in {seconds:.1f} s, building", file=sys.stderr)
    report = qdq.check_onnx(path)
    row = Row(
        name, seconds, path.stat().st_size / 1e6, report.quantize_nodes, report.dequantize_nodes
    )
    for severity in SEVERITIES:
        rules = [finding.rule for finding in report.findings if finding.severity == severity]
        row.findings[severity] = dict(sorted(Counter(rules).items()))
    began = time.perf_counter()
    try:
        plan = build_plan(backend, path, {}, sm)
    except QdqError as error:
        row.refused = error.message
        return row
    row.build_seconds = time.perf_counter() - began
    census = take_census(list_work_nodes(ir.load(path)), plan.kernels)
    row.int8 = sum(layer.int8 for layer in census)
    row.layers = len(census)
    row.engine_mb = len(plan.engine) / 1e6
    _measure_kernels(row, [kernel for kernel in plan.kernels if kernel.output_types])
    return row


def _measure_kernels(row: Row, kernels: list[Kernel]) -> None:
    """Add what the kernels read and write to the row.

    Raises:
        DependencyError: The builder's log does not contain it.
    """
    read_bytes = 0
    written_bytes = 0
    for kernel in kernels:
        if kernel.input_bytes is None or kernel.output_bytes is None:
            raise DependencyError(
                f"the builder's log does not show how much kernel {kernel.name!r} reads and writes.",
                "use tensorrt-rtx 1.7, whose log qdq can read.",
            )
        read_bytes += kernel.input_bytes
        written_bytes += kernel.output_bytes
        row.census.append(
            {
                "name": kernel.name,
                "layer_type": kernel.layer_type,
                "types": kernel.output_types,
                "read": kernel.input_bytes,
                "written": kernel.output_bytes,
            }
        )
    row.kernels = len(kernels)
    row.written_mb = written_bytes / 1e6
    row.activation_mb = (read_bytes + written_bytes) / 1e6


def _print_table(rows: list[Row]) -> None:
    """Print one line per file, the targets below, then the findings and the reasons for missing engines."""
    titles = (
        "file",
        "ONNX MB",
        "Q / DQ",
        "lint E/W/I",
        "int8",
        "kernels",
        "written MB",
        "activations MB",
        "engine MB",
        "build s",
        "write s",
    )
    lines = [titles, *map(_format_cells, rows), _format_targets(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *figures in lines:
        cells = map(str.rjust, figures, widths[1:])
        print("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    print()
    for row in rows:
        findings = []
        for severity, count_of_rule in row.findings.items():
            for rule, count in count_of_rule.items():
                findings.append(f"{rule} x{count} ({severity})")
        print(f"{row.name}: {', '.join(findings) or 'no findings'}")
        if row.refused:
            print(f"  refused by TensorRT-RTX: {row.refused[:300]}")


def _format_cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.onnx_mb:.1f}",
        f"{row.quantize_nodes} / {row.dequantize_nodes}",
        "/".join(str(sum(row.findings[severity].values())) for severity in SEVERITIES),
        "refused" if row.int8 is None else f"{row.int8} of {row.layers}",
        _format_number(row.kernels, "d"),
        _format_number(row.written_mb, ".2f"),
        _format_number(row.activation_mb, ".2f"),
        _format_number(row.engine_mb, ".1f"),
        _format_number(row.build_seconds, ".1f"),
        f"{row.seconds:.1f}",
    )


def _format_number(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def _format_targets(rows: list[Row]) -> tuple[str, ...]:
    """The targets for qdq's files: the best figures of the other tools in this run."""
    peers = [row for row in rows if row.is_peer and row.activation_mb is not None]
    if not peers:
        return ("target: no peer built", *[""] * 10)
    size = min(row.onnx_mb for row in peers)
    int8 = max(row.int8 or 0 for row in peers)
    written = min(row.written_mb or 0 for row in peers)
    activations = min(row.activation_mb or 0 for row in peers)
    return (
        "target: best peer",
        f"<= {size:.1f}",
        "",
        "0/0/-",
        f">= {int8}",
        "",
        f"<= {written:.2f}",
        f"<= {activations:.2f}",
        "",
        "",
        "",
    )


if __name__ == "__main__":
    run_command(bench_engine)
