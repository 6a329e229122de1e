"""One model of the zoo from float module to engine; `zoo.py` starts a process with this file for each model.

python tools/zoo_one.py torchvision/resnet18 --folder /tmp/one [--precision fp32 fp16]

Writes float.onnx, fp32.onnx, fp16.onnx and row.json. The row is written again after every stage, so that after a crash
the results of the earlier stages remain.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import (
    MODELS,
    forward,
    is_degenerate,
    list_tensors,
    make_batches,
    revive,
    warm_batchnorm,
)

import qdq
from qdq.build import BuildReport
from qdq.check import CheckReport, OnnxModel
from qdq.check.parity import TIE_MARGIN_DB, measure_parity
from qdq.cli.main import run_command
from qdq.files import write_json
from qdq.forward import evaluating
from qdq.graph.coverage import compare_coverage
from qdq.quantizer import named_quantizers

PRODUCTS = (
    "conv1d",
    "conv2d",
    "linear",
    "matmul",
    "bmm",
    "baddbmm",
    "scaled_dot_product_attention",
)
SEED = 0
BATCHES = 2
BATCH_SIZE = 4
OPSET = 19
ROW_FILE = "row.json"


def zoo_one(
    name: str, /, *, folder: Path, precision: tuple[str, ...] = ("fp32",), build_float: bool = False
) -> int:
    """Take one model through all stages and write the results to FOLDER/row.json.

    Args:
        name: Name of the model as in `zoo.py`.
        folder: Folder for the files.
        precision: Types of the layers in float in the exported files: fp32, fp16.
        build_float: Only build an engine from the float model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    if build_float:
        if not (folder / "float.onnx").is_file():
            _Sweep(name, folder).export_float()
        qdq.build_engine(folder / "float.onnx", backend="rtx")
        return 0
    logging.getLogger("qdq").setLevel(logging.WARNING)
    _Sweep(name, folder).run(precision)
    return 0


class _Sweep:
    """The stages of one model; `row` has the results so far."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.row: dict[str, Any] = {
            "name": name,
            "code": hash_code(),
            "stage": "",
            "error": None,
            "seconds": {},
            "precisions": {},
        }

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.row["stage"] = name
        write_json(self.folder / ROW_FILE, self.row)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.row["seconds"][name] = round(time.perf_counter() - began, 1)

    def run(self, precisions: tuple[str, ...]) -> None:
        """Run all stages; an error ends them and is stored in the row."""
        try:
            self._run_stages(precisions)
        except Exception as error:
            failed_stage = self.row["stage"]
            logging.getLogger("zoo").exception("stage %s", failed_stage)
            self.row["error"] = describe_error(error)
            self.export_float()  # a model that cannot be exported in float does not count
            self.row["stage"] = failed_stage
        else:
            self.row["stage"] = "done"
        write_json(self.folder / ROW_FILE, self.row)

    def _build(self) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
        """The float model, its batches and its outputs."""
        entry = MODELS[self.name]
        batches = make_batches(entry.shape, BATCHES, BATCH_SIZE)
        torch.manual_seed(SEED)
        model = entry.build().eval()
        revive(model)
        outputs = forward(model, batches)
        self.row["batchnorm_warmed"] = is_degenerate(outputs)
        if self.row["batchnorm_warmed"]:
            warm_batchnorm(model, batches)
            outputs = forward(model, batches)
        self.row["degenerate"] = is_degenerate(outputs)
        return model, batches, outputs

    def _run_stages(self, precisions: tuple[str, ...]) -> None:
        row = self.row
        with self._stage("float model"):
            model, batches, outputs = self._build()
            row["input"] = list(batches[0].shape[1:])
            row["outputs"] = [list(output.shape[1:]) for output in outputs]
            nudged_batches = [batch * (1 + 2**-22) for batch in batches]
            row["float_floor_db"] = _lowest_sqnr(outputs, forward(model, nudged_batches))
        with self._stage("fold"):
            pairs = qdq.fold_batchnorm(model, batches[0])
            row["folded"] = sum(pair.folded for pair in pairs)
            row["batchnorms"] = len(pairs)
            row["fold_sqnr_db"] = _lowest_sqnr(outputs, forward(model, batches))
        with self._stage("swap"):
            plan = qdq.swap_modules(model, batches[0])
            row["swapped"] = len(plan.weighted)
        with self._stage("rewire"):
            rewired = qdq.rewire_operations(model, batches[0])
            actions = ("quantize", "share", "float")
            row["rewired"] = {action: len(rewired.of(action)) for action in actions}
            row["float"] = _list_float_products(plan, rewired)
        with self._stage("calibrate"):
            ranges = qdq.calibrate_model(model, batches)
            row["left_float"] = {entry.name: entry.note for entry in ranges if entry.note}
        with self._stage("fake-quantized"):
            expected = forward(model, batches)
            row["int8_sqnr_db"] = _lowest_sqnr(outputs, expected)
        for precision in precisions:
            row["precisions"][precision] = {}
            self._try_precision(precision, model, batches, expected)
        with self._stage("restore"):
            qdq.restore_modules(model)
            row["restored_sqnr_db"] = _lowest_sqnr(outputs, forward(model, batches))
        for result in row["precisions"].values():
            if result.get("parity_ok") is False:
                self.export_float()  # shows whether the exporter is to blame
                break

    def export_float(self) -> None:
        """Export the plain float model, with a dynamic batch or else a fixed one, and run the file in ONNX Runtime.

        Only a model that failed somewhere needs it: if `export_onnx` succeeds, so does the exporter of torch.
        """
        model, batches, outputs = self._build()
        with self._stage("float export"):
            self.row["float_export"] = self._try_float_exports(model, batches[0])
        if self.row["float_export"]:
            actual, self.row["float_ort_error"] = _run_onnx(self.folder / "float.onnx", batches)
            if actual:
                self.row["float_sqnr_db"] = _lowest_sqnr(outputs, actual)

    def _try_float_exports(self, model: nn.Module, batch: Tensor) -> str | None:
        """The kind of batch that torch can export, "dynamic" or "fixed"; None if it cannot export the model."""
        for kind in ("dynamic", "fixed"):
            try:
                with evaluating(model):
                    program = torch.onnx.export(
                        model,
                        (batch,),
                        dynamo=True,
                        opset_version=OPSET,
                        verbose=False,
                        dynamic_shapes=({0: "batch"},) if kind == "dynamic" else None,
                    )
                assert program is not None  # noqa: S101
                shape = program.model.graph.inputs[0].shape
                if kind == "dynamic" and (shape is None or isinstance(shape[0], int)):
                    self.row["dynamic_export_error"] = "torch fixed the batch"
                    continue
                program.save(str(self.folder / "float.onnx"))
            except Exception as error:
                self.row[f"{kind}_export_error"] = describe_error(error)
            else:
                return kind
        return None

    def _export(
        self, model: nn.Module, batches: list[Tensor], path: Path, precision: str
    ) -> qdq.ExportReport:
        """Export with a dynamic batch, or with a fixed one if the plain float export also needs it."""
        dynamic = self.row.get("float_export") != "fixed"
        try:
            return qdq.export_onnx(
                model, batches[0], path, opset=OPSET, dynamic_batch=dynamic, precision=precision
            )
        except qdq.ExportError as error:
            if "float_export" not in self.row:
                self.row["dynamic_qdq_error"] = describe_error(error)
                self.export_float()
            if not dynamic or self.row["float_export"] != "fixed":
                raise
        return qdq.export_onnx(
            model, batches[0], path, opset=OPSET, dynamic_batch=False, precision=precision
        )

    def _try_precision(
        self, precision: str, model: nn.Module, batches: list[Tensor], expected: list[Tensor]
    ) -> None:
        """Export, check, compare and build in one precision."""
        result = self.row["precisions"][precision]
        path = self.folder / f"{precision}.onnx"
        with self._stage(f"{precision} export"):
            report = self._export(model, batches, path, precision)
            result["int8_layers"] = sorted(report.layers)
            result["megabytes"] = round(report.file_bytes / 1e6, 2)
            conversion = report.precision
            if conversion:
                result["kept"] = list(map(str, conversion.kept[:20]))
                parity = conversion.parity
                result["against_fp32_db"] = parity.sqnr_db if parity else None
        with self._stage(f"{precision} check"):
            checked = qdq.check_onnx(path)
            _record_check(checked, result)
        with self._stage(f"{precision} parity"):
            actual, result["ort_error"] = _run_onnx(path, batches)
            if not result["ort_error"]:
                self._compare(precision, model, batches, expected, actual)
        with self._stage(f"{precision} build"):
            result["rtx_ok"] = False
            result["rtx_error"] = "the builder ended the process"
            write_json(self.folder / ROW_FILE, self.row)
            try:
                built = qdq.build_engine(path, backend="rtx")
            except qdq.BuildError as error:
                result["rtx_error"] = describe_error(error)
            else:
                _record_build(built, checked, result)

    def _compare(
        self,
        precision: str,
        model: nn.Module,
        batches: list[Tensor],
        expected: list[Tensor],
        actual: list[Tensor],
    ) -> None:
        """Compare the outputs of the file with those of the module, and with the limit for rounding ties."""
        result = self.row["precisions"][precision]
        result["sqnr_db"], worst = _find_worst(expected, actual)
        if precision == "fp32":
            floor = qdq.measure_tie_floor(_Output(model, worst), batches)
            assert isinstance(floor, float)  # noqa: S101  # of one output
            floor_db = floor
        else:
            floor_db = _measure_half_floor(model, batches, expected, worst)
        result["tie_floor_db"] = floor_db
        parity = measure_parity(expected[worst].numpy(), actual[worst].numpy(), floor_db)
        # The limit of `qdq check` is never below 15 dB; some random networks are measurably more chaotic.
        result["required_db"] = min(parity.required_sqnr_db, floor_db - TIE_MARGIN_DB)
        result["parity_ok"] = bool(parity.sqnr_db >= result["required_db"])


def _record_check(checked: CheckReport, result: dict[str, Any]) -> None:
    result["q"] = checked.quantize_nodes
    result["dq"] = checked.dequantize_nodes
    coverage = checked.coverage
    result["weighted"] = len(coverage.layers)
    result["int8"] = sum(layer.int8 for layer in coverage.layers)
    result["mac_share"] = None
    if coverage.int8_share is not None:
        result["mac_share"] = round(coverage.int8_share, 4)
    result["findings"] = list(map(_as_row, checked.findings))


def _as_row(finding: Any) -> dict[str, str]:
    return {
        "rule": finding.rule,
        "severity": str(getattr(finding, "severity", "error")),
        "node": finding.node,
        "message": finding.message,
    }


def _record_build(built: BuildReport, checked: CheckReport, result: dict[str, Any]) -> None:
    result["rtx_ok"] = True
    result["rtx_error"] = None
    result["rtx_int8"] = built.int8
    result["missing_int8"] = [f"{layer.node}: {layer.reason}" for layer in built.missing_int8]
    difference = compare_coverage(checked.coverage, built.layers)
    result["unpredicted"] = {"missing": difference.missing, "extra": difference.extra}
    result["rtx_warnings"] = built.warnings[:5]
    result["rtx_seconds"] = round(built.seconds, 1)


def _list_float_products(plan: qdq.SwapPlan, rewired: qdq.RewirePlan) -> dict[str, str]:
    """The reason for every layer with weights, and for every product called as a function, that stays in float."""
    reasons = {}
    callers = set()
    for call in rewired.operations:
        if call.function not in PRODUCTS:
            continue
        callers.add(call.name.rpartition(".")[0])
        if call.action == "float":
            reasons[call.name] = call.reason
    for module in plan.of("float") + plan.of("missed"):
        if not module.mapped or not module.weights or module.name in callers:
            continue
        if "reads its weight directly" not in module.reason:  # otherwise the call is in the list
            reasons[module.name] = module.reason
    return reasons


class _Output(nn.Module):
    """One output of a model."""

    def __init__(self, model: nn.Module, number: int) -> None:
        super().__init__()
        self.model = model
        self.number = number

    def forward(self, images: Tensor) -> Tensor:
        return list_tensors(self.model(images))[self.number]


def _measure_half_floor(
    model: nn.Module, batches: list[Tensor], expected: list[Tensor], number: int
) -> float:
    """Like `measure_tie_floor`, with quantizer inputs rounded to float16: the change that fp16 alone causes.

    Args:
        model: The fake-quantized model.
        batches: Its inputs.
        expected: Its outputs.
        number: The output to compare.
    """

    def round_to_half(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].half().float(), *inputs[1:])

    handles = []
    for name, quantizer in named_quantizers(model):
        if not name.endswith("_weight_quantizer"):
            handles.append(quantizer.register_forward_pre_hook(round_to_half))
    try:
        return _sqnr(expected[number], forward(model, batches)[number])
    finally:
        for handle in handles:
            handle.remove()


def _run_onnx(path: Path, batches: list[Tensor]) -> tuple[list[Tensor], str | None]:
    """Outputs of a file on all batches, or ONNX Runtime's error."""
    try:
        onnx_model = OnnxModel(path)
        outputs_of_batches = [onnx_model(batch.numpy()) for batch in batches]
    except qdq.CheckError as error:
        return [], describe_error(error)
    outputs = []
    for parts in zip(*outputs_of_batches, strict=True):
        outputs.append(torch.cat([torch.from_numpy(part).float() for part in parts]))
    return outputs, None


def _lowest_sqnr(expected: list[Tensor], actual: list[Tensor]) -> float:
    lowest, _ = _find_worst(expected, actual)
    return lowest


def _find_worst(expected: list[Tensor], actual: list[Tensor]) -> tuple[float, int]:
    """The lowest SQNR of any output in dB, and the number of that output."""
    ratios = [_sqnr(*pair) for pair in zip(expected, actual, strict=True)]
    lowest = min(ratios)
    return lowest, ratios.index(lowest)


def _sqnr(expected: Tensor, actual: Tensor) -> float:
    """SQNR in dB; 999 for equal tensors and -999 for NaN, because JSON can write neither infinity nor NaN."""
    if expected.shape != actual.shape:
        return -999.0
    decibels = measure_parity(expected.numpy(), actual.numpy()).sqnr_db
    if math.isnan(decibels):
        return -999.0
    return min(999.0, max(-999.0, round(decibels, 1)))


def describe_error(error: BaseException) -> str:
    """Class and beginning of the message; of the cause, if torch wraps it."""
    cause = error
    if error.__cause__ is not None and "Failed to" in str(error):
        cause = error.__cause__
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:500]}"


def hash_code() -> str:
    """A hash of qdq's code: rows from different code should not be in one table."""
    digest = hashlib.sha256()
    for path in sorted(Path(qdq.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    run_command(zoo_one)
