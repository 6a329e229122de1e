"""The exported file, run by ONNX Runtime, against the torch model it came from."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from qdq.errors import ArgumentError, CheckError
from qdq.files import read_mode
from qdq.metrics import Array, agreement, cosine, max_abs_difference, sqnr_db
from qdq.text import printable

# A correct file of a shallow network lies far above the first figure; deep int8 networks amplify ties to about it.
MIN_SQNR_DB = 30.0
TIE_MARGIN_DB = 3.0
NEVER_BELOW_DB = 15.0


Session = Literal["plain", "default"]
SESSIONS: tuple[Session, ...] = ("plain", "default")

# Of ONNX Runtime 1.31. The first drops a ReLU6 in front of a quantizer of tiny range, the second makes one MaxPool of
# a zero Pad and a MaxPool, which pads with the smallest number: both change what the file computes.
_WRONG_OPTIMIZERS = ["ClipQuantRewrite", "Pad_Fusion"]


_OUT_OF_MEMORY = re.compile(
    r"bad[_ ]alloc|failed to allocate memory|not enough memory|can't allocate memory|out of memory",
    re.IGNORECASE,
)


class OnnxModel:
    """An ONNX file as a function of arrays.

    Args:
        path: The file.
        session: "plain": as the file is written, ONNX Runtime's int8 fusions off, because they change the arithmetic.
            "default": as ONNX Runtime optimizes it for its users. Only the kernels that saturate on x86 processors
            without VNNI are left out: what they lose is no property of the file.

    Raises:
        ArgumentError: Another session.
        CheckError: The file is missing, is not ONNX or cannot be run.
    """

    def __init__(self, path: Path, *, session: Session = "plain") -> None:
        if session not in SESSIONS:
            raise ArgumentError(
                f"session is {session!r}; known are 'plain' and 'default'.", "use 'plain'."
            )
        require_file(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if session == "plain":
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        else:
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_WRONG_OPTIMIZERS if session == "plain" else [],
            )
        except Exception as error:  # its own exception types share no base
            if is_out_of_memory(error):
                raise CheckError(
                    f"memory is too short to load {path} ({path.stat().st_size / 1e6:.0f} MB without external data).",
                    "close other programs, or use a machine with more memory; the file itself may be sound.",
                ) from error
            raise CheckError(
                f"ONNX Runtime cannot load {path}: {_first_line(error)}.", "export the model again."
            ) from error
        self.path = path

    @property
    def inputs(self) -> dict[str, list[int | str]]:
        """Shape of each input; a dynamic dimension is a name."""
        return {value.name: list(value.shape) for value in self._session.get_inputs()}

    def __call__(self, *inputs: Any) -> list[Array]:
        """Run once.

        Args:
            *inputs: Arrays in the order of the model's inputs.

        Raises:
            CheckError: The inputs do not fit, or an operator cannot run.
        """
        try:
            outputs: list[Array] = self._session.run(
                None, dict(zip(self.inputs, inputs, strict=True))
            )
        except Exception as error:
            given = ", ".join(
                f"{list(np.shape(array))} {np.asarray(array).dtype}" for array in inputs
            )
            if is_out_of_memory(error):
                raise CheckError(
                    f"memory is too short to run {self.path} on {given}.",
                    "give smaller batches, or free memory.",
                ) from error
            expected = ", ".join(f"{v.name} {v.shape} {v.type}" for v in self._session.get_inputs())
            raise CheckError(
                f"ONNX Runtime cannot run {self.path}: {_first_line(error)}; given {given}, its inputs are {expected}.",
                "give inputs of these shapes and types, or export with them.",
            ) from error
        return outputs


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of ONNX Runtime, torch or numpy says that memory is too short."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime's outputs lie from torch's, or those of its default session from those of a plain one.

    Args:
        images: How many samples were compared.
        max_abs: Largest absolute difference.
        cosine: Cosine of all outputs as one vector.
        sqnr_db: SQNR in dB of the second outputs against the first.
        agreement: Share of samples with the same largest output, 0..1.
        exact: Share of samples whose outputs differ by float rounding only (1e-4 of their largest value).
        tie_floor_db: SQNR in dB that rounding ties alone leave (`evaluate.measure_tie_floor`), None if not measured.
    """

    images: int
    max_abs: float
    cosine: float
    sqnr_db: float
    agreement: float
    exact: float
    tie_floor_db: float | None

    @property
    def required_sqnr_db(self) -> float:
        """The least SQNR in dB of a correct file: 30, or 3 below what ties alone leave, but never below 15."""
        if self.tie_floor_db is None:
            return MIN_SQNR_DB
        return max(NEVER_BELOW_DB, min(MIN_SQNR_DB, self.tie_floor_db - TIE_MARGIN_DB))


def measure_parity(expected: Array, found: Array, tie_floor_db: float | None = None) -> Parity:
    """Compare outputs `[N, ...]` of the same inputs, the reference first."""
    rows = np.asarray(expected, np.float64).reshape(len(expected), -1)
    others = np.asarray(found, np.float64).reshape(len(found), -1)
    near = np.abs(rows - others).max(1) <= 1e-4 * np.abs(rows).max(1)
    return Parity(
        images=len(rows),
        max_abs=max_abs_difference(rows, others),
        cosine=cosine(rows, others),
        sqnr_db=sqnr_db(rows, others),
        agreement=agreement(rows, others),
        exact=float(near.mean()),
        tie_floor_db=tie_floor_db,
    )


def require_file(path: Path) -> None:
    """Refuse what is no file with something in it: the parsers' own words for that do not help.

    Raises:
        CheckError: The path is a folder, a device, an empty file or nothing, or none that the parsers can be given.
    """
    try:
        mode, size = read_mode(path), path.stat().st_size
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckError(
            f"the name of {path} is not UTF-8, as ONNX needs it.", "rename the file or folder."
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        found = "does not exist"
    except OSError as error:
        found = f"cannot be read: {error.strerror}"
    else:
        if stat.S_ISREG(mode) and size:
            return
        found = "is empty" if stat.S_ISREG(mode) else "is a folder"
    raise CheckError(
        f"{printable(path)} {found}; expected an ONNX file.",
        "check the path, or export the model again.",
    )


def _first_line(error: Exception) -> str:
    """Its first line without ONNX Runtime's "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : "."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
