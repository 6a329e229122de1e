"""Is the exported file valid, is its Q/DQ as TensorRT wants it, does it compute what torch computed?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from qdq.check.parity import OnnxModel as OnnxModel
from qdq.check.parity import Parity as Parity
from qdq.check.parity import measure_parity, require_file
from qdq.check.rules import Finding as Finding
from qdq.check.rules import find_violations
from qdq.errors import CheckError
from qdq.graph.coverage import WeightedNode, count_qdq, list_weighted_nodes
from qdq.metrics import Array


@dataclass(frozen=True)
class CheckReport:
    """Result of `check_onnx`.

    Args:
        path: The file.
        opset: Its ONNX opset.
        file_bytes: Its size.
        quantize_nodes: Number of QuantizeLinear nodes.
        dequantize_nodes: Number of DequantizeLinear nodes.
        weighted: Every Conv, ConvTranspose, Gemm and MatMul.
        findings: Violations, empty if clean.
        parity: Against torch, None if no outputs were given.
    """

    path: Path
    opset: int
    file_bytes: int
    quantize_nodes: int
    dequantize_nodes: int
    weighted: tuple[WeightedNode, ...]
    findings: tuple[Finding, ...]
    parity: Parity | None

    def format_table(self) -> str:
        """A few lines for a person."""
        int8 = sum(node.expects_int8 for node in self.weighted)
        lines = [
            f"{self.path.name}: valid ONNX, opset {self.opset}, {self.file_bytes / 1e6:.2f} MB, "
            f"{self.quantize_nodes} Q and {self.dequantize_nodes} DQ nodes",
            f"{int8} of {len(self.weighted)} convolutions and matrix products have int8 operands",
        ]
        if not self.quantize_nodes + self.dequantize_nodes:
            lines.append("nothing is quantized: the file holds no QuantizeLinear and no DequantizeLinear")
        if self.parity:
            p = self.parity
            lines.append(
                f"against torch on {p.images} images: same top-1 {p.agreement:.1%}, SQNR {p.sqnr_db:.1f} dB, "
                f"cosine {p.cosine:.6f}, max abs {p.max_abs:.3g}, equal but for float rounding {p.exact:.1%}"
            )
            if p.tie_floor_db is not None and np.isfinite(p.tie_floor_db):
                lines.append(
                    f"torch against itself, quantizer inputs nudged by 2e-7: SQNR {p.tie_floor_db:.1f} dB; "
                    "so much is rounding ties"
                )
        lines += [f"{f.rule} {f.node}: {f.message}. Fix: {f.fix}" for f in self.findings]
        return "\n".join(lines)


def check_onnx(
    path: Path | str, *, expected: Array | None = None, found: Array | None = None, tie_floor_db: float | None = None
) -> CheckReport:
    """Check a QDQ ONNX file.

    Args:
        path: The file.
        expected: Outputs of the torch model `[N, ...]`.
        found: Outputs of the file on the same inputs (`evaluate.predict`).
        tie_floor_db: What ties alone leave (`evaluate.measure_tie_floor`), so that they are not taken for a fault.

    Returns:
        The report; it is clean if `findings` is empty.

    Raises:
        CheckError: The file cannot be read, or is no valid ONNX.
    """
    path = Path(path)
    model = load_onnx(path)
    findings = find_violations(model)
    parity = None if expected is None or found is None else measure_parity(expected, found, tie_floor_db)
    if parity and not parity.sqnr_db >= parity.required_sqnr_db:
        message = (
            f"ONNX Runtime and torch differ by more than rounding ties: SQNR {parity.sqnr_db:.1f} dB, "
            f"at least {parity.required_sqnr_db:.1f} was expected"
        )
        fix = "export again from the calibrated model; if it stays, report the model."
        findings.append(Finding("QDQ190", path.name, message, fix))
    quantize_nodes, dequantize_nodes = count_qdq(model)
    return CheckReport(
        path=path,
        opset=model.opset_imports.get("", 0),
        file_bytes=path.stat().st_size,
        quantize_nodes=quantize_nodes,
        dequantize_nodes=dequantize_nodes,
        weighted=tuple(list_weighted_nodes(model)),
        findings=tuple(findings),
        parity=parity,
    )


def load_onnx(path: Path) -> ir.Model:
    """Read a file and have `onnx.checker` look at all of it.

    Raises:
        CheckError: The file is missing, empty, truncated, or no valid ONNX.
    """
    require_file(path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx-ir each have their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckError(f"{path} is no valid ONNX file: {reason}", "export it again.") from error
    if not len(model.graph):
        raise CheckError(f"{path} holds no ONNX graph.", "export it again: the file may be empty or truncated.")
    return model
