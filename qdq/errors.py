"""Everything that qdq raises on purpose.

QdqError
├── ArgumentError      (ValueError)    an invalid value: unknown name, out of range, wrong shape
│   ├── ShapeError     (RuntimeError)  a size that does not fit, where torch raises RuntimeError
│   └── NumberTypeError  (TypeError)   numbers of the wrong type, such as a tensor of integers; an ArgumentTypeError too
├── ArgumentTypeError  (TypeError)     a value of the wrong type
├── StateError         (RuntimeError)  calls in the wrong order, or a state that cannot be quantized
│   └── MissingRangeError (AttributeError)  a range that a layer has after another call only
├── UnsupportedError   (NotImplementedError)  a combination that qdq does not support
├── DependencyError    (ImportError)   a missing package that an extra installs
├── ModelError         (RuntimeError)  a model or checkpoint that cannot be loaded
├── DataError                          images, folders or files of qdq that cannot be used
├── CalibrationError   (ValueError)    no data, or data that gives no range
├── ExportError        (RuntimeError)  a model that cannot be exported as requested
├── CheckError                         an ONNX file that cannot be read or run
└── BuildError                         an ONNX file that TensorRT refuses

Each message says what was found and what was expected; `fix` says what to do next. Where a builtin type is
named, scripts may catch that type instead.
"""

from __future__ import annotations

import re

_OUT_OF_MEMORY = re.compile(
    r"bad[_ ]alloc|failed to allocate|not enough memory|can't allocate memory|out of memory",
    re.IGNORECASE,
)


class QdqError(Exception):
    """Base of all errors of qdq.

    Args:
        message: What was found and what was expected.
        fix: What to do next.
    """

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} Fix: {self.fix}"


class ArgumentError(QdqError, ValueError):
    """An invalid value: an unknown name, a number out of range, or a wrong shape."""


class ShapeError(ArgumentError, RuntimeError):
    """A size that does not fit. torch raises RuntimeError for it; scripts may catch either type."""


class ArgumentTypeError(QdqError, TypeError):
    """A value of the wrong type."""


class NumberTypeError(ArgumentError, ArgumentTypeError):
    """Numbers of the wrong type, such as a tensor of integers. Scripts may catch ValueError or TypeError."""


class StateError(QdqError, RuntimeError):
    """Calls in the wrong order, or a state that cannot be quantized."""


class MissingRangeError(StateError, AttributeError):
    """A range that a layer has after another call only; `hasattr` says that it has none."""


class UnsupportedError(QdqError, NotImplementedError):
    """A combination that qdq does not support."""


class DependencyError(QdqError, ImportError):
    """A missing package that one of the extras installs."""


class ModelError(QdqError, RuntimeError):
    """A model or a checkpoint that cannot be loaded."""


class DataError(QdqError):
    """Images, folders or files of qdq that cannot be used."""


class CalibrationError(QdqError, ValueError):
    """No data to calibrate on, or data that gives no range."""


class ExportError(QdqError, RuntimeError):
    """A model that cannot be exported as requested."""


class CheckError(QdqError):
    """An ONNX file that cannot be read or run."""


class BuildError(QdqError):
    """An ONNX file that TensorRT refuses, or an engine that cannot be built."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of ONNX Runtime, torch or numpy reports that there is not enough memory."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None
