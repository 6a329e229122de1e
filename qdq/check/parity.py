"""Compare the exported file in ONNX Runtime with the torch model that it came from."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime

from qdq.errors import ArgumentError, CheckError, is_out_of_memory
from qdq.files import read_mode
from qdq.graph.pairs import QDQ_OPS, code_type_of, is_op
from qdq.metrics import (
    Array,
    Batches,
    Outputs,
    agreement,
    cosine,
    count_rows,
    has_classes,
    list_batches,
    max_abs_difference,
    pair_arrays,
    sqnr_db,
)
from qdq.text import printable

# A correct file of a shallow network is far above the first figure; ties that a deep int8 network amplifies reach it.
MIN_SQNR_DB = 30.0
TIE_MARGIN_DB = 3.0
NEVER_BELOW_DB = 15.0
FLOAT_ROUNDING = 1e-4  # of the largest output of a sample

Session = Literal["plain", "default"]
SESSIONS: tuple[Session, ...] = ("plain", "default")

# In ONNX Runtime 1.31 the first drops a ReLU6 before a quantizer of tiny range, and the second merges a zero Pad into a
# MaxPool, which pads with the smallest number: both change the results of the file.
_WRONG_OPTIMIZERS = ["ClipQuantRewrite", "Pad_Fusion"]

# ONNX Runtime 1.32 moves a Transpose between a Q and a DQ, and then refuses the graph: it has no Transpose of FP8.
_OPTIMIZER_OF_TRANSPOSES = "TransposeOptimizer"

# ONNX Runtime 1.32 copies the DQ of a weight for each layer that reads it. Then this optimizer, which is part of
# session.x64quantprecision, writes the weight once for each copy under the same name, and the file is not loaded.
_OPTIMIZER_OF_WEIGHTS = "QDQS8ToU8Transformer"
_SAME_NAME = "Attempt to replace the existing tensor"


class OnnxModel:
    """An ONNX file as a function of arrays.

    Args:
        path: The file.
        session: "plain": as the file is written, ONNX Runtime's int8 fusions off, because they change the arithmetic.
            "default": as ONNX Runtime optimizes it for its users. Only kernels that saturate on x86 processors without
            VNNI are disabled, because their error is not a property of the file. For a file with FP8 Q/DQ both are the
            plain one with basic optimizations: the others change its results. They remove a Relu before a Q to FP8, and
            write a bias as int32 in units that float16 cannot hold.

    Raises:
        ArgumentError: Another session.
        CheckError: The file is missing, is not ONNX or cannot be run.
    """

    def __init__(self, path: Path, *, session: Session = "plain") -> None:
        if session not in SESSIONS:
            raise ArgumentError(
                f"session is {session!r}; expected 'plain' or 'default'.",
                "use 'plain'.",
            )
        require_file(path)
        try:
            self._session = _start_session(path, session)
        except Exception as error:  # the exception types of ONNX Runtime have no common base
            raise _describe_load_error(path, error) from error
        self.path = path

    @property
    def inputs(self) -> dict[str, list[int | str]]:
        """Shape of each input; a dynamic dimension is a name."""
        return {value.name: list(value.shape) for value in self._session.get_inputs()}

    @property
    def outputs(self) -> list[str]:
        """Name of each output."""
        return [value.name for value in self._session.get_outputs()]

    @property
    def types(self) -> dict[str, str]:
        """Type of each input, as ONNX Runtime writes it: "tensor(float)"."""
        return {value.name: value.type for value in self._session.get_inputs()}

    def __call__(self, *inputs: Any) -> list[Array]:
        """Run once.

        Args:
            *inputs: Arrays in the order of the model's inputs.

        Raises:
            CheckError: The inputs do not fit, or an operator cannot run.
        """
        try:
            feeds = dict(zip(self.inputs, inputs, strict=True))
            outputs: list[Array] = self._session.run(None, feeds)
        except Exception as error:
            raise self._describe_run_error(error, inputs) from error
        return outputs

    def _describe_run_error(self, error: Exception, inputs: tuple[Any, ...]) -> CheckError:
        passed = ", ".join(map(_describe_array, inputs))
        if is_out_of_memory(error):
            return CheckError(
                f"there is not enough memory to run {self.path} on {passed}.",
                "give smaller batches, or free memory.",
            )

        values = self._session.get_inputs()
        expected = ", ".join(f"{value.name} {value.shape} {value.type}" for value in values)
        return CheckError(
            f"ONNX Runtime cannot run {self.path}: {_first_line(error)}; "
            f"given {passed}, its inputs are {expected}.",
            "give inputs of these shapes and types, or export with them.",
        )


def _start_session(path: Path, session: Session) -> onnxruntime.InferenceSession:
    """Load a file in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    disabled_optimizers: list[str] = []
    if has_fp8(path):
        session = "plain"
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        disabled_optimizers.append(_OPTIMIZER_OF_TRANSPOSES)
    if session == "plain":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        disabled_optimizers += _WRONG_OPTIMIZERS
    else:
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return _load(path, options, disabled_optimizers)
    except Exception as error:  # the exception types of ONNX Runtime have no common base
        if session == "plain" or _SAME_NAME not in str(error):
            raise
    return _load(path, options, [_OPTIMIZER_OF_WEIGHTS])


def has_fp8(path: Path) -> bool:
    """Whether a file has Q or DQ of FP8.

    Args:
        path: An ONNX file; False for one that cannot be read.
    """
    try:
        model = ir.load(path)
    except Exception:  # the message of ONNX Runtime says more
        return False
    return uses_fp8(model)


def uses_fp8(model: ir.Model) -> bool:
    """Whether a graph, a body in it or a function of the file has Q or DQ of FP8.

    Args:
        model: The type of the codes may be that of a constant that is an argument of a function.
    """
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT8E4M3FN:
            return True
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            if is_op(node, *QDQ_OPS) and code_type_of(node) == ir.DataType.FLOAT8E4M3FN:
                return True
    return False


def _load(
    path: Path, options: onnxruntime.SessionOptions, disabled_optimizers: list[str]
) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=disabled_optimizers,
    )


def _describe_load_error(path: Path, error: Exception) -> CheckError:
    if is_out_of_memory(error):
        megabytes = path.stat().st_size / 1e6
        return CheckError(
            f"there is not enough memory to load {path} ({megabytes:.0f} MB without external data).",
            "close other programs, or use a machine with more memory; the file itself may be valid.",
        )
    return CheckError(
        f"ONNX Runtime cannot load {path}: {_first_line(error)}.",
        "export the model again.",
    )


def _describe_array(array: Any) -> str:
    return f"{list(np.shape(array))} {np.asarray(array).dtype}"


@dataclass(frozen=True)
class Parity:
    """The difference of ONNX Runtime's outputs from torch's, or of its default session's from a plain session's.

    Of several outputs, the figures are those of the output that is closest to failing, or fails most.

    Args:
        images: Number of rows that were compared: samples, or with a mask, tokens that are no padding.
        max_abs: Largest absolute difference.
        cosine: Cosine of all outputs as one vector.
        sqnr_db: SQNR in dB of the second outputs against the first.
        agreement: Fraction of rows with the same largest output, 0..1; None if the output is not `[N, classes]`.
        exact: Fraction of rows whose outputs differ by float rounding only (1e-4 of their largest value).
        tie_floor_db: SQNR in dB with an error from rounding ties only (`evaluate.measure_tie_floor`), None if not
            measured.
        outputs: Name -> the same for each output, if there are several.
    """

    images: int
    max_abs: float
    cosine: float
    sqnr_db: float
    agreement: float | None
    exact: float
    tie_floor_db: float | None
    outputs: Mapping[str, Parity] = field(default_factory=dict)

    @property
    def required_sqnr_db(self) -> float:
        """The lowest SQNR in dB of a correct file: 30, or 3 below the tie floor, but never below 15."""
        if self.tie_floor_db is None:
            return MIN_SQNR_DB
        return max(NEVER_BELOW_DB, min(MIN_SQNR_DB, self.tie_floor_db - TIE_MARGIN_DB))

    @property
    def is_sufficient(self) -> bool:
        """Whether the SQNR of every output is high enough for a correct file; False if one is NaN."""
        if self.outputs:
            return all(parity.is_sufficient for parity in self.outputs.values())
        return self.sqnr_db >= self.required_sqnr_db

    @property
    def failures(self) -> dict[str, Parity]:
        """The outputs that are not sufficient; a single output has no name."""
        entries = self.outputs or {"": self}
        return {name: entry for name, entry in entries.items() if not entry.is_sufficient}


def measure_parity(
    expected: Outputs,
    actual: Outputs,
    tie_floor_db: float | Mapping[str, float] | None = None,
) -> Parity:
    """Compare outputs on the same inputs.

    Args:
        expected: Outputs of the reference `[N, ...]`, or several by name.
        actual: Outputs that are compared with them, of the same shapes.
        tie_floor_db: See `Parity`; for several outputs also by name.

    Raises:
        ArgumentError: Other outputs, other shapes, or a floor that lacks an output.
    """
    if isinstance(tie_floor_db, Mapping) and not isinstance(expected, Mapping):
        raise ArgumentError(
            f"tie_floor_db is of the outputs {list(tie_floor_db)}, and one output is compared.",
            "measure it with the same outputs= as in predict.",
        )
    pairs = pair_arrays(expected, actual)
    parities = {}
    for name, pair in pairs.items():
        floor = tie_floor_db
        if isinstance(floor, Mapping):
            floor = _find_floor(floor, name)
        parities[name] = _measure_output(*pair, floor)
    worst = min(parities.values(), key=_margin_of)
    if not isinstance(expected, Mapping):
        return worst
    return replace(worst, outputs=parities)


def _find_floor(floors: Mapping[str, float], name: str) -> float:
    if name not in floors:
        raise ArgumentError(
            f"tie_floor_db has no output {name!r}; it has {list(floors)}.",
            "measure it with the same outputs= as in predict.",
        )
    return floors[name]


def _margin_of(parity: Parity) -> float:
    """How far an SQNR is above the required one, in dB; NaN is below all."""
    margin = parity.sqnr_db - parity.required_sqnr_db
    return -math.inf if math.isnan(margin) else margin


def _measure_output(expected: Batches, actual: Batches, tie_floor_db: float | None) -> Parity:
    """The parity of one output."""
    reference = [_flatten_samples(batch) for batch in list_batches(expected)]
    outputs = [_flatten_samples(batch) for batch in list_batches(actual)]
    decibels = sqnr_db(reference, outputs)  # refuses other shapes
    is_exact = []
    for one, other in zip(reference, outputs, strict=True):
        differences = np.abs(one - other).max(1, initial=0.0)
        is_exact.append(differences <= FLOAT_ROUNDING * np.abs(one).max(1, initial=0.0))
    return Parity(
        images=count_rows(expected),
        max_abs=max_abs_difference(reference, outputs),
        cosine=cosine(reference, outputs),
        sqnr_db=decibels,
        agreement=agreement(reference, outputs) if has_classes(expected) else None,
        exact=float(np.concatenate(is_exact).mean()),
        tie_floor_db=tie_floor_db,
    )


def _flatten_samples(outputs: Array) -> Array:
    """`[N, ...]` as float64 `[N, values]`."""
    return np.asarray(outputs, np.float64).reshape(len(outputs), -1)


def require_file(path: Path) -> None:
    """Refuse a path that is not a file with content, because the messages of the parsers do not help.

    Raises:
        CheckError: The path is a folder, a device, an empty file, does not exist, or is not UTF-8.
    """
    try:
        fault = _find_path_fault(path)
    except UnicodeEncodeError:
        raise CheckError(
            f"the name of {path} is not UTF-8, as ONNX needs it.",
            "rename the file or folder.",
        ) from None
    if fault:
        raise CheckError(
            f"{printable(path)} {fault}; expected an ONNX file.",
            "check the path, or export the model again.",
        )


def _find_path_fault(path: Path) -> str:
    """Why a path is not a file with content; empty if it is.

    Raises:
        UnicodeEncodeError: Its name is not UTF-8.
    """
    try:
        mode, size = read_mode(path), path.stat().st_size
        str(path).encode()
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(mode):
        return "is a folder"
    return "" if size else "is empty"


def _first_line(error: Exception) -> str:
    """The first line of an error, without ONNX Runtime's "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : "."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    if not text:
        return type(error).__name__
    return text.splitlines()[0].rstrip(".")
