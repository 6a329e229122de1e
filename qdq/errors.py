"""Everything that qdq raises on purpose.

QdqError
├── ArgumentError      (ValueError)    a value that cannot be meant: unknown name, out of range, wrong shape
│   └── ShapeError     (RuntimeError)  a size that does not fit, where torch raises RuntimeError
├── ArgumentTypeError  (TypeError)     a value of the wrong kind
├── StateError         (RuntimeError)  calls in the wrong order, or a state that cannot be quantized
├── UnsupportedError   (NotImplementedError)  a combination that qdq does not have
├── DependencyError    (ImportError)   a package that an extra would have installed
├── ModelError         (RuntimeError)  a model or checkpoint that cannot be loaded
├── DataError                          images, folders or files of qdq that cannot be used
├── CalibrationError   (ValueError)    no data, or data that gives no range
├── ExportError        (RuntimeError)  a model that cannot become the ONNX file asked for
├── CheckError                         an ONNX file that cannot be read or run
└── BuildError                         an ONNX file that TensorRT refuses

Each says what was found and what was expected, and carries the next step in `fix`. Where a builtin type is
named, scripts may catch that instead.
"""

from __future__ import annotations


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
    """A value that cannot be meant: an unknown name, out of range, of the wrong shape."""


class ShapeError(ArgumentError, RuntimeError):
    """A size that does not fit; torch raises RuntimeError for it, scripts may catch either."""


class ArgumentTypeError(QdqError, TypeError):
    """A value of the wrong kind."""


class StateError(QdqError, RuntimeError):
    """Calls in the wrong order, or a state that cannot be quantized."""


class UnsupportedError(QdqError, NotImplementedError):
    """A combination that qdq does not have."""


class DependencyError(QdqError, ImportError):
    """A package that one of the extras would have installed."""


class ModelError(QdqError, RuntimeError):
    """A model or a checkpoint that cannot be loaded."""


class DataError(QdqError):
    """Images, folders or files of qdq that cannot be used."""


class CalibrationError(QdqError, ValueError):
    """No data to calibrate on, or data that gives no range."""


class ExportError(QdqError, RuntimeError):
    """A model that cannot become the ONNX file asked for."""


class CheckError(QdqError):
    """An ONNX file that cannot be read or run."""


class BuildError(QdqError):
    """An ONNX file that TensorRT refuses, or an engine that cannot be built."""
