"""Tells whether a forward is being captured: no values can be read then, and quantizers become Q/DQ."""

from __future__ import annotations

import torch
from torch.jit import is_tracing  # type: ignore[attr-defined]


def is_capturing() -> bool:
    """Whether torch.export, torch.compile or the TorchScript tracer is running: no values can be read then (F35)."""
    return torch.compiler.is_compiling() or bool(is_tracing())  # type: ignore[no-untyped-call]


def is_exporting() -> bool:
    """Whether the captured forward becomes a file: torch's fake-quantize operators then become Q/DQ."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or bool(is_tracing())  # type: ignore[no-untyped-call]


def is_tracing_for_onnx() -> bool:
    """Whether the TorchScript exporter is running: it writes any range that it sees as computed from the input."""
    return torch.onnx.is_in_onnx_export() and bool(is_tracing())  # type: ignore[no-untyped-call]
