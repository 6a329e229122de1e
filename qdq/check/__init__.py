"""Is the exported file valid, is its Q/DQ as TensorRT wants it, does it compute what torch computed?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdq.check.inspection import count_file_bytes, inspect_file
from qdq.check.load import load_onnx as load_onnx
from qdq.check.parity import OnnxModel as OnnxModel
from qdq.check.parity import Parity as Parity
from qdq.check.parity import Session as Session
from qdq.check.parity import is_out_of_memory as is_out_of_memory
from qdq.check.parity import measure_parity as measure_parity
from qdq.check.rules import FILE_RULES, SEVERITIES, choose_rules, find_violations
from qdq.check.rules import Finding as Finding
from qdq.files import as_path
from qdq.graph.coverage import Coverage, count_qdq, measure_coverage
from qdq.graph.shapes import complete_shapes
from qdq.metrics import Array
from qdq.text import group_names

_SHOWN_NODES = 5


@dataclass(frozen=True)
class Validity:
    """What was done to find out whether a file is valid ONNX.

    Args:
        is_valid: Whether onnx and ONNX Runtime both accept it, and no rule about files says otherwise.
        onnx_version: Of the onnx whose checker and inference were run.
        onnx_refusal: What they refuse, None if nothing.
        runtime_version: Of the ONNX Runtime that loaded the file, on one thread, without constant folding and
            prepacking.
        runtime_refusal: Why it did not, None if it did.
        onnx_limit: Why they came to no verdict, such as "it took longer than 60 s of processor time"; None if they did.
    """

    is_valid: bool
    onnx_version: str
    onnx_refusal: str | None
    runtime_version: str
    runtime_refusal: str | None
    onnx_limit: str | None = None

    def format_table(self) -> str:
        """One line for a person."""
        onnx_says = "accepts it (checker, types and shapes)"
        if self.onnx_refusal is not None:
            onnx_says = "refuses it (QDQ202, QDQ203)"
        elif self.onnx_limit is not None:
            onnx_says = "came to no verdict (QDQ202)"
        runtime_says = "loads it" if self.runtime_refusal is None else "does not load it (QDQ201)"
        return f"onnx {self.onnx_version} {onnx_says}; ONNX Runtime {self.runtime_version} {runtime_says}"


@dataclass(frozen=True)
class CheckReport:
    """Result of `check_onnx`.

    Args:
        path: The file.
        opset: Its ONNX opset.
        file_bytes: Its size, with that of the data beside it.
        quantize_nodes: Number of QuantizeLinear nodes.
        dequantize_nodes: Number of DequantizeLinear nodes.
        coverage: Every Conv, ConvTranspose, Gemm and MatMul: int8 or not, why, and its share of the work.
        findings: Violations, infos among them.
        parity: Against torch, None if no outputs were given.
        validity: Whether it is valid ONNX, and who says so.
        default_parity: Of ONNX Runtime's default session against the plain one, None if its outputs were not given.
    """

    path: Path
    opset: int
    file_bytes: int
    quantize_nodes: int
    dequantize_nodes: int
    coverage: Coverage
    findings: tuple[Finding, ...]
    parity: Parity | None
    validity: Validity
    default_parity: Parity | None = None

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are no infos; none if the file is clean."""
        return tuple(finding for finding in self.findings if finding.severity != "info")

    def format_table(self) -> str:
        """A few lines for a person."""
        valid = "valid ONNX, " if self.validity.is_valid else ""
        lines = [
            f"{self.path.name}: {valid}opset {self.opset}, {self.file_bytes / 1e6:.2f} MB, "
            f"{self.quantize_nodes} Q and {self.dequantize_nodes} DQ nodes",
            self.validity.format_table(),
            self.coverage.format_table(),
        ]
        if not self.quantize_nodes + self.dequantize_nodes:
            lines.append(
                "nothing is quantized: the file holds no QuantizeLinear and no DequantizeLinear"
            )
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
        if d := self.default_parity:
            lines.append(
                f"ONNX Runtime's default session against the plain one on {d.images} images: same top-1 "
                f"{d.agreement:.1%}, SQNR {d.sqnr_db:.1f} dB, max abs {d.max_abs:.3g}"
            )
        return "\n".join([*lines, *_format_findings(self.findings)])


def _format_findings(findings: tuple[Finding, ...]) -> Iterator[str]:
    """One line a finding, the worst first; of many equal ones the first few nodes and how many more there are."""
    groups = group_names(
        (
            (SEVERITIES.index(finding.severity), finding.rule, finding.message, finding.fix),
            finding.node,
        )
        for finding in findings
    )
    for (severity, rule, message, fix), nodes in sorted(groups.items(), key=lambda item: item[0]):
        for node in nodes[:_SHOWN_NODES]:
            yield f"{rule} {SEVERITIES[severity]} {node}: {message}. Fix: {fix}"
        if more := nodes[_SHOWN_NODES:]:
            yield f"{rule} {SEVERITIES[severity]} ... and {len(more)} more nodes, {len(nodes)} in all: {message}."
    if findings:
        counts = [f"{sum(f.severity == s for f in findings)} {s}s" for s in SEVERITIES]
        yield f"found {', '.join(counts)}; qdq check --explain {min(groups)[1]} says why"


def check_onnx(
    path: Path | str,
    *,
    expected: Array | None = None,
    found: Array | None = None,
    found_default: Array | None = None,
    tie_floor_db: float | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> CheckReport:
    """Check a QDQ ONNX file.

    onnx and ONNX Runtime look at it in a process of their own: a file that crashes them is a finding.

    Args:
        path: The file.
        expected: Outputs of the torch model `[N, ...]`.
        found: Outputs of the file on the same inputs (`evaluate.predict`).
        found_default: Likewise, in ONNX Runtime's default session (`evaluate.predict` with `session="default"`).
        tie_floor_db: What ties alone leave (`evaluate.measure_tie_floor`), so that they are not taken for a fault.
        select: Ids of the only rules to apply, such as "QDQ112"; all if empty.
        ignore: Ids of rules to leave out.

    Returns:
        The report; the file is clean if `problems` is empty.

    Raises:
        ArgumentError: `select` or `ignore` name a rule that does not exist.
        CheckError: The file cannot be read as ONNX at all.
    """
    path = as_path(path, "path")
    rules = choose_rules(select, ignore)
    loaded = load_onnx(path)
    model, facts = loaded.model, inspect_file(loaded)
    assert facts.runtime is not None  # noqa: S101  # it was asked
    if facts.checker.may_ask_again:
        complete_shapes(model, data_prop=facts.checker.can_propagate)
    if facts.has_cycle:  # nobody can follow its values
        rules = [rule for rule in rules if rule.id in FILE_RULES]
    findings = find_violations(model, rules, facts)
    flaws_of_file = find_violations(model, choose_rules(FILE_RULES), facts)
    parity = (
        None if expected is None or found is None else measure_parity(expected, found, tie_floor_db)
    )
    default_parity = (
        None
        if found is None or found_default is None
        else measure_parity(found, found_default, tie_floor_db)
    )
    measured = [_find_lost_parity(path, parity), _find_other_session(path, default_parity)]
    chosen = {rule.id for rule in rules}
    findings += [finding for finding in measured if finding is not None and finding.rule in chosen]
    has_flaw = any(flaw.severity != "info" or flaw.rule == "QDQ201" for flaw in flaws_of_file)
    quantize_nodes, dequantize_nodes = count_qdq(model)
    return CheckReport(
        path=path,
        opset=model.opset_imports.get("", 0),
        file_bytes=count_file_bytes(loaded),
        quantize_nodes=quantize_nodes,
        dequantize_nodes=dequantize_nodes,
        coverage=Coverage(()) if facts.has_cycle else measure_coverage(model, **facts.inference),
        findings=tuple(findings),
        parity=parity,
        default_parity=default_parity,
        validity=Validity(
            is_valid=facts.checker.limit is None and not has_flaw,
            onnx_version=facts.checker.version,
            onnx_refusal=facts.checker.structure or facts.checker.types,
            runtime_version=facts.runtime.version,
            runtime_refusal=facts.runtime.refusal,
            onnx_limit=facts.checker.limit,
        ),
    )


def _find_lost_parity(path: Path, parity: Parity | None) -> Finding | None:
    if parity is None or parity.sqnr_db >= parity.required_sqnr_db:
        return None
    message = (
        f"ONNX Runtime and torch differ by more than rounding ties: SQNR {parity.sqnr_db:.1f} dB, "
        f"at least {parity.required_sqnr_db:.1f} was expected"
    )
    fix = "export again from the calibrated model; if it stays, report the model."
    return Finding("QDQ190", path.name, message, fix)


def _find_other_session(path: Path, parity: Parity | None) -> Finding | None:
    if parity is None or parity.sqnr_db >= parity.required_sqnr_db:
        return None
    message = (
        f"ONNX Runtime's default session differs from the file as it is written by more than rounding ties: SQNR "
        f"{parity.sqnr_db:.1f} dB, at least {parity.required_sqnr_db:.1f} was expected"
    )
    fix = "where ONNX Runtime runs the file, set session.disable_quant_qdq=1; TensorRT is not concerned."
    return Finding("QDQ191", path.name, message, fix, "info")
