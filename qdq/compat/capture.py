"""Whether a forward is being captured: no values can be read then, and what quantizes becomes Q/DQ."""

from __future__ import annotations

import torch
from torch.jit import is_tracing  # type: ignore[attr-defined]


def is_capturing() -> bool:
    """Whether torch.export, torch.compile or the TorchScript tracer is at work: no reading of values then (F35)."""
    return torch.compiler.is_compiling() or bool(is_tracing())  # type: ignore[no-untyped-call]


def is_exporting() -> bool:
    """Whether what runs becomes a file: values turn into Q/DQ then, by torch's own fake-quantize operators."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or bool(is_tracing())  # type: ignore[no-untyped-call]


def is_tracing_for_onnx() -> bool:
    """Whether the TorchScript exporter runs: what it sees of a range it writes as computed from the input."""
    return torch.onnx.is_in_onnx_export() and bool(is_tracing())  # type: ignore[no-untyped-call]
