"""One model of the zoo from float module to engine; `zoo.py` starts this once for each, in a process of its own.

python tools/zoo_one.py torchvision/resnet18 --folder /tmp/one [--precision fp32 fp16]

Writes float.onnx, fp32.onnx, fp16.onnx and row.json, which is written again after every stage, so that a crash leaves
what was found before it.
"""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import MODELS, forward, is_degenerate, make_batches, revive, warm_batchnorm

import qdq
from qdq.check import OnnxModel
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
SEED, BATCHES, BATCH_SIZE, OPSET = 0, 2, 4, 19
ROW_FILE = "row.json"


def zoo_one(
    name: str, /, *, folder: Path, precision: tuple[str, ...] = ("fp32",), build_float: bool = False
) -> int:
    """Take one model through everything and write what was found to FOLDER/row.json.

    Args:
        name: As in `zoo.py`.
        folder: Where the files go.
        precision: fp32, fp16.
        build_float: Instead, only build an engine from the float model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    if build_float:
        if not (folder / "float.onnx").is_file():
            _Sweep(name, folder)._export_float()
        qdq.build_engine(folder / "float.onnx", backend="rtx")
        return 0
    logging.getLogger("qdq").setLevel(logging.WARNING)
    _Sweep(name, folder).run(precision)
    return 0


class _Sweep:
    """The stages of one model; `row` is what is known so far."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.row: dict[str, Any] = {
            "name": name,
            "code": hash_code(),
            "stage": "",
            "error": None,
            "seconds": {},
        }
        self.row |= {"precisions": {}}

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
        try:
            self._run(precisions)
        except Exception as error:
            logging.getLogger("zoo").exception("stage %s", self.row["stage"])
            self.row["error"], failed = describe_error(error), self.row["stage"]
            self._export_float()  # is it a model that counts?
            self.row["stage"] = failed
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

    def _run(self, precisions: tuple[str, ...]) -> None:
        row = self.row
        with self._stage("float model"):
            model, batches, outputs = self._build()
            row["input"], row["outputs"] = (
                list(batches[0].shape[1:]),
                [list(output.shape[1:]) for output in outputs],
            )
            nudged = forward(model, [batch * (1 + 2**-22) for batch in batches])
            row["float_floor_db"] = _worst(outputs, nudged)[0]
        with self._stage("fold"):
            pairs = qdq.fold_batchnorm(model, batches[0])
            row["folded"], row["batchnorms"] = sum(pair.folded for pair in pairs), len(pairs)
            row["fold_sqnr_db"] = _worst(outputs, forward(model, batches))[0]
        with self._stage("swap"):
            plan = qdq.swap_modules(model, batches[0])
            row["swapped"] = len(plan.weighted)
        with self._stage("rewire"):
            rewired = qdq.rewire_operations(model, batches[0])
            row["rewired"] = {
                action: len(rewired.of(action)) for action in ("quantize", "share", "float")
            }
            row["float"] = _list_float_products(plan, rewired)
        with self._stage("calibrate"):
            ranges = qdq.calibrate_model(model, batches)
            row["left_float"] = {r.name: r.note for r in ranges if r.note}
        with self._stage("fake-quantized"):
            expected = forward(model, batches)
            row["int8_sqnr_db"] = _worst(outputs, expected)[0]
        for precision in precisions:
            result: dict[str, Any] = {}
            row["precisions"][precision] = result
            self._try_precision(precision, model, batches, expected, result)
        with self._stage("restore"):
            qdq.restore_modules(model)
            row["restored_sqnr_db"] = _worst(outputs, forward(model, batches))[0]
        if any(result.get("parity_ok") is False for result in row["precisions"].values()):
            self._export_float()  # is it the exporter?

    def _export_float(self) -> None:
        """Plain float export, with a dynamic batch or, if torch cannot, a fixed one; and what ONNX Runtime makes of it.

        Only for a model that failed somewhere: where `export_onnx` succeeds, so has the same exporter.
        """
        model, batches, outputs = self._build()
        with self._stage("float export"):
            self.row["float_export"] = self._try_float_exports(model, batches[0])
        if self.row["float_export"]:
            found, self.row["float_ort_error"] = _run_onnx(self.folder / "float.onnx", batches)
            if found:
                self.row["float_sqnr_db"] = _worst(outputs, found)[0]

    def _try_float_exports(self, model: nn.Module, batch: Tensor) -> str | None:
        """The kind of batch that works, "dynamic" or "fixed"; None if torch does not export the model at all."""
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
        """Export with a dynamic batch, or a fixed one where plain float export cannot do better either."""
        dynamic = self.row.get("float_export") != "fixed"
        try:
            return qdq.export_onnx(
                model, batches[0], path, opset=OPSET, dynamic_batch=dynamic, precision=precision
            )
        except qdq.ExportError as error:
            if "float_export" not in self.row:
                self.row["dynamic_qdq_error"] = describe_error(error)
                self._export_float()
            if not dynamic or self.row["float_export"] != "fixed":
                raise
        return qdq.export_onnx(
            model, batches[0], path, opset=OPSET, dynamic_batch=False, precision=precision
        )

    def _try_precision(
        self,
        precision: str,
        model: nn.Module,
        batches: list[Tensor],
        expected: list[Tensor],
        result: dict[str, Any],
    ) -> None:
        path = self.folder / f"{precision}.onnx"
        with self._stage(f"{precision} export"):
            report = self._export(model, batches, path, precision)
            result["int8_layers"] = sorted(report.layers)
            result["megabytes"] = round(report.file_bytes / 1e6, 2)
            if converted := report.precision:
                result["kept"] = [str(kept) for kept in converted.kept][:20]
                result["against_fp32_db"] = converted.parity.sqnr_db if converted.parity else None
        with self._stage(f"{precision} check"):
            checked = qdq.check_onnx(path)
            result["q"], result["dq"] = checked.quantize_nodes, checked.dequantize_nodes
            coverage = checked.coverage
            result["weighted"] = len(coverage.layers)
            result["int8"] = sum(layer.int8 for layer in coverage.layers)
            result["mac_share"] = (
                None if coverage.int8_share is None else round(coverage.int8_share, 4)
            )
            result["findings"] = [
                {
                    "rule": f.rule,
                    "severity": str(getattr(f, "severity", "error")),
                    "node": f.node,
                    "message": f.message,
                }
                for f in checked.findings
            ]
        with self._stage(f"{precision} parity"):
            found, result["ort_error"] = _run_onnx(path, batches)
            if not result["ort_error"]:
                self._compare(precision, model, batches, expected, found, result)
        with self._stage(f"{precision} build"):
            result["rtx_ok"], result["rtx_error"] = False, "the builder ended the process"
            write_json(self.folder / ROW_FILE, self.row)
            try:
                built = qdq.build_engine(path, backend="rtx")
            except qdq.BuildError as error:
                result["rtx_error"] = describe_error(error)
            else:
                result["rtx_ok"], result["rtx_error"] = True, None
                result["rtx_int8"] = built.int8
                result["missing_int8"] = [
                    f"{layer.node}: {layer.reason}" for layer in built.missing_int8
                ]
                difference = compare_coverage(coverage, built.layers)
                result["unpredicted"] = {"missing": difference.missing, "extra": difference.extra}
                result["rtx_warnings"] = built.warnings[:5]
                result["rtx_seconds"] = round(built.seconds, 1)

    def _compare(
        self,
        precision: str,
        model: nn.Module,
        batches: list[Tensor],
        expected: list[Tensor],
        found: list[Tensor],
        result: dict[str, Any],
    ) -> None:
        result["sqnr_db"], worst = _worst(expected, found)
        if precision == "fp32":
            result["tie_floor_db"] = qdq.measure_tie_floor(_Output(model, worst), batches)
        else:
            result["tie_floor_db"] = _measure_half_floor(model, batches, expected, worst)
        parity = measure_parity(
            expected[worst].numpy(), found[worst].numpy(), result["tie_floor_db"]
        )
        # The product's limit is never below 15 dB; some random networks are more chaotic than that, as measured.
        result["required_db"] = min(parity.required_sqnr_db, result["tie_floor_db"] - TIE_MARGIN_DB)
        result["parity_ok"] = bool(parity.sqnr_db >= result["required_db"])


def _list_float_products(plan: qdq.SwapPlan, rewired: qdq.RewirePlan) -> dict[str, str]:
    """Name -> reason of every layer with weights, and of every product called as a function, that stays in float."""
    calls = {call.name: call for call in rewired.operations if call.function in PRODUCTS}
    found = {name: call.reason for name, call in calls.items() if call.action == "float"}
    callers = {name.rpartition(".")[0] for name in calls}
    layers = [
        module
        for module in plan.of("float") + plan.of("missed")
        if module.mapped and module.weights
    ]
    return found | {
        module.name: module.reason
        for module in layers
        if module.name not in callers
        and "reads its weight directly" not in module.reason  # else the call is there
    }


class _Output(nn.Module):
    """One output of a model."""

    def __init__(self, model: nn.Module, number: int) -> None:
        super().__init__()
        self.model = model
        self.number = number

    def forward(self, images: Tensor) -> Tensor:
        leaves = [
            leaf
            for leaf in torch.utils._pytree.tree_leaves(self.model(images))
            if isinstance(leaf, Tensor)
        ]
        return leaves[self.number]


def _measure_half_floor(
    model: nn.Module, batches: list[Tensor], expected: list[Tensor], worst: int
) -> float:
    """As `measure_tie_floor`, with quantizer inputs rounded to float16: what a remainder in fp16 alone changes."""
    handles = [
        quantizer.register_forward_pre_hook(
            lambda _, inputs: (inputs[0].half().float(), *inputs[1:])
        )
        for name, quantizer in named_quantizers(model)
        if not name.endswith("_weight_quantizer")
    ]
    try:
        return _sqnr(expected[worst], forward(model, batches)[worst])
    finally:
        for handle in handles:
            handle.remove()


def _run_onnx(path: Path, batches: list[Tensor]) -> tuple[list[Tensor], str | None]:
    """Outputs of a file on all batches, or ONNX Runtime's error."""
    try:
        onnx_model = OnnxModel(path)
        found = [onnx_model(batch.numpy()) for batch in batches]
    except qdq.CheckError as error:
        return [], describe_error(error)
    return [
        torch.cat([torch.from_numpy(part).float() for part in parts])
        for parts in zip(*found, strict=True)
    ], None


def _worst(expected: list[Tensor], found: list[Tensor]) -> tuple[float, int]:
    """The lowest SQNR of any output, and which one that is."""
    ratios = [_sqnr(one, other) for one, other in zip(expected, found, strict=True)]
    worst = min(range(len(ratios)), key=lambda number: ratios[number])
    return ratios[worst], worst


def _sqnr(expected: Tensor, found: Tensor) -> float:
    """SQNR in dB, 999 for equal ones, -999 where one holds NaN: JSON has no word for either."""
    if expected.shape != found.shape:
        return -999.0
    ratio = measure_parity(expected.numpy(), found.numpy()).sqnr_db
    return -999.0 if ratio != ratio else min(999.0, max(-999.0, round(ratio, 1)))


def describe_error(error: BaseException) -> str:
    """Class and beginning of the message, the cause's where torch wraps it."""
    cause = error.__cause__ if error.__cause__ is not None and "Failed to" in str(error) else error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:500]}"


def hash_code() -> str:
    """Which qdq made a row: rows of different code should not stand in one table."""
    digest = hashlib.sha256()
    for path in sorted(Path(qdq.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    run_command(zoo_one)
