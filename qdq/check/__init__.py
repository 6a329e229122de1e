"""Check an exported file: is it valid ONNX, do its Q/DQ suit TensorRT, does it compute what torch computed?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qdq.check.facts import FileFacts
from qdq.check.inspection import count_file_bytes, inspect_file
from qdq.check.load import load_onnx as load_onnx
from qdq.check.parity import OnnxModel as OnnxModel
from qdq.check.parity import Parity as Parity
from qdq.check.parity import Session as Session
from qdq.check.parity import measure_parity as measure_parity
from qdq.check.parity import uses_fp8
from qdq.check.payoff import LayerTime as LayerTime
from qdq.check.payoff import Payoff as Payoff
from qdq.check.payoff import predict_payoff
from qdq.check.rules import FILE_RULES, SEVERITIES, Rule, choose_rules, find_violations
from qdq.check.rules import Finding as Finding
from qdq.check.rules import Severity as Severity
from qdq.files import as_path
from qdq.graph.coverage import Coverage, count_qdq, measure_coverage
from qdq.graph.shapes import complete_shapes
from qdq.metrics import Outputs
from qdq.roofline import choose_sm
from qdq.text import group_names, printable

CHECKED_SAMPLES = 128
"""On so many samples the recipes compare a file with torch and between sessions: six runs, too slow for all samples."""

_SHOWN_NODES = 5
_TORCH_PARITY = "QDQ190"
_SESSION_PARITY = "QDQ191"
_PARITY_FIXES = {
    _TORCH_PARITY: "export again from the calibrated model; if it remains, report the model.",
    _SESSION_PARITY: "if ONNX Runtime runs the file, set session.disable_quant_qdq=1; TensorRT is not affected.",
}


@dataclass(frozen=True)
class Validity:
    """The verdicts of onnx and ONNX Runtime on a file.

    Args:
        is_valid: Whether onnx and ONNX Runtime both accept it, and no rule about files finds a fault.
        onnx_version: Version of onnx, whose checker and inference were run.
        onnx_refusal: Why they refuse the file, None if they do not.
        runtime_version: Version of the ONNX Runtime that loaded the file, on one thread, without constant folding and
            prepacking.
        runtime_refusal: Why it did not load the file, None if it did.
        onnx_limit: Why onnx gave no verdict, such as "it took longer than 60 s of processor time"; None if it did.
    """

    is_valid: bool
    onnx_version: str
    onnx_refusal: str | None
    runtime_version: str
    runtime_refusal: str | None
    onnx_limit: str | None = None

    def format_table(self) -> str:
        """One line for a person."""
        runtime = "loads it" if self.runtime_refusal is None else "does not load it (QDQ201)"
        return (
            f"onnx {self.onnx_version} {self._describe_onnx()}; "
            f"ONNX Runtime {self.runtime_version} {runtime}"
        )

    def _describe_onnx(self) -> str:
        if self.onnx_refusal is not None:
            return "refuses it (QDQ202, QDQ203)"
        if self.onnx_limit is not None:
            return "gave no verdict (QDQ202)"
        return "accepts it (checker, types and shapes)"


@dataclass(frozen=True)
class CheckReport:
    """Result of `check_onnx`.

    Args:
        path: The file.
        opset: Its ONNX opset.
        file_bytes: Its size, including its external data.
        quantize_nodes: Number of QuantizeLinear nodes.
        dequantize_nodes: Number of DequantizeLinear nodes.
        coverage: Every node that multiplies: its promised and its expected type, why, and its fraction of the work.
        findings: Violations, infos among them.
        parity: Against torch, None if no outputs were given.
        validity: Whether it is valid ONNX, with the verdicts of onnx and ONNX Runtime.
        default_parity: Of ONNX Runtime's default session against the plain one, None if its outputs were not given, and
            for a file with FP8 Q/DQ, for which both sessions are one.
        payoff: Predicted times of the file and in fp16, None if no GPU was given or the file does not show its sizes.
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
    payoff: Payoff | None = None

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The errors and warnings among the findings; none if the file is clean."""
        return tuple(finding for finding in self.findings if finding.severity != "info")

    def format_table(self) -> str:
        """A few lines for a person."""
        validity = "valid ONNX, " if self.validity.is_valid else ""
        lines = [
            f"{self.path.name}: {validity}opset {self.opset}, {self.file_bytes / 1e6:.2f} MB, "
            f"{self.quantize_nodes} Q and {self.dequantize_nodes} DQ nodes",
            self.validity.format_table(),
            self.coverage.format_table(),
        ]
        if self.quantize_nodes + self.dequantize_nodes == 0:
            lines.append(
                "nothing is quantized: the file has no QuantizeLinear and no DequantizeLinear"
            )
        if self.parity is not None:
            lines += _format_parity(self.parity)
        if self.default_parity is not None:
            lines += _format_default_parity(self.default_parity)
        if self.payoff is not None:
            lines.append(self.payoff.format_table())
        lines += _format_findings(self.findings)
        return "\n".join(lines)


def _format_parity(parity: Parity) -> Iterator[str]:
    """The comparison with torch, and the tie floor if it was measured; of several outputs, lines for each."""
    for name, output in _list_outputs(parity):
        yield (
            f"{name}against torch on {output.images} rows: {_format_answers(name, output)}"
            f"SQNR {output.sqnr_db:.1f} dB, cosine {output.cosine:.6f}, max abs {output.max_abs:.3g}, "
            f"equal except for float rounding {output.exact:.1%}"
        )
        if output.tie_floor_db is not None and np.isfinite(output.tie_floor_db):
            yield (
                f"{name}torch against itself, quantizer inputs nudged by a rounding: "
                f"SQNR {output.tie_floor_db:.1f} dB; this much comes from rounding ties"
            )


def _format_default_parity(parity: Parity) -> Iterator[str]:
    for name, output in _list_outputs(parity):
        yield (
            f"{name}ONNX Runtime's default session against the plain one on {output.images} rows: "
            f"{_format_answers(name, output)}SQNR {output.sqnr_db:.1f} dB, max abs {output.max_abs:.3g}"
        )


def _format_answers(name: str, parity: Parity) -> str:
    """The agreement of a single output of classes; of several, the largest element need not be an answer."""
    if name or parity.agreement is None:
        return ""
    return f"same top-1 {parity.agreement:.1%}, "


def _list_outputs(parity: Parity) -> list[tuple[str, Parity]]:
    """Each output with the beginning of its lines, which is empty for a single output."""
    if not parity.outputs:
        return [("", parity)]
    return [(f"{printable(name)}: ", output) for name, output in parity.outputs.items()]


def _format_findings(findings: tuple[Finding, ...]) -> Iterator[str]:
    """One line per finding, the worst first; for many equal ones, the first few nodes and the total."""
    if not findings:
        return

    groups = group_names((_sort_key(finding), finding.node) for finding in findings)
    for key, nodes in sorted(groups.items()):
        severity, rule, message, fix = key
        prefix = f"{rule} {SEVERITIES[severity]}"
        for node in nodes[:_SHOWN_NODES]:
            yield f"{prefix} {node}: {message}. Fix: {fix}"
        more = len(nodes) - _SHOWN_NODES
        if more > 0:
            yield f"{prefix} ... and {more} more nodes, {len(nodes)} in all: {message}."

    counts = ", ".join(_format_count(findings, severity) for severity in SEVERITIES)
    _, first_rule, _, _ = min(groups)
    yield f"found {counts}; qdq check --explain {first_rule} says why"


def _sort_key(finding: Finding) -> tuple[int, str, str, str]:
    """Severity, rule and texts: equal for findings that differ in the node only."""
    severity = SEVERITIES.index(finding.severity)
    return severity, finding.rule, finding.message, finding.fix


def _format_count(findings: tuple[Finding, ...], severity: Severity) -> str:
    severities = [finding.severity for finding in findings]
    return f"{severities.count(severity)} {severity}s"


def check_onnx(
    path: Path | str,
    *,
    expected: Outputs | None = None,
    found: Outputs | None = None,
    found_default: Outputs | None = None,
    tie_floor_db: float | Mapping[str, float] | None = None,
    gpu: str | None = None,
    sm: int | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> CheckReport:
    """Check a QDQ ONNX file.

    onnx and ONNX Runtime look at it in a separate process: a file that crashes them is a finding.

    Args:
        path: The file.
        expected: Outputs of the torch model `[N, ...]` (`predictor.predict`); several by name.
        found: Outputs of the file for the same inputs (`predictor.predict`).
        found_default: Likewise, in ONNX Runtime's default session (`predictor.predict` with `session="default"`).
        tie_floor_db: SQNR with an error from ties only (`evaluate.measure_tie_floor`), so that ties do not count as a
            fault; for several outputs by name.
        gpu: Also predict whether int8 or FP8 pays on this GPU ("l4", "orin" ...; `qdq.roofline.GPUS`). A file without
            Q/DQ has nothing to predict.
        sm: Compute capability of the GPU that the file is for, 89 for 8.9; by default that of `gpu`. With it, types of
            codes that the GPU lacks are findings.
        select: Ids of the only rules to apply, such as "QDQ112"; all if empty.
        ignore: Ids of rules to leave out.

    Returns:
        The report; the file is clean if `problems` is empty.

    Raises:
        ArgumentError: `select` or `ignore` name a rule that does not exist, an unknown GPU or one of another `sm`, or
            outputs that cannot be compared.
        CheckError: The file cannot be read as ONNX at all.
    """
    path = as_path(path, "path")
    rules = choose_rules(select, ignore)
    sm = choose_sm(gpu, sm)
    loaded = load_onnx(path)
    facts = inspect_file(loaded)
    model = loaded.model
    if facts.checker.may_ask_again:
        complete_shapes(model, data_prop=facts.checker.can_propagate)
    if facts.has_cycle:  # the values of such a graph cannot be followed
        rules = [rule for rule in rules if rule.id in FILE_RULES]
    parities = {
        _TORCH_PARITY: _compare(expected, found, tie_floor_db),
        # The sessions of qdq run such a file with the same options.
        _SESSION_PARITY: None if uses_fp8(model) else _compare(found, found_default, tie_floor_db),
    }
    quantize_nodes, dequantize_nodes = count_qdq(model)
    payoff = None
    if gpu is not None and dequantize_nodes:
        payoff = _predict(model, gpu, facts)
    findings = [
        *find_violations(model, rules, facts, payoff=payoff, sm=sm),
        *_check_parities(path, rules, parities),
    ]
    return CheckReport(
        path=path,
        opset=model.opset_imports.get("", 0),
        file_bytes=count_file_bytes(loaded),
        quantize_nodes=quantize_nodes,
        dequantize_nodes=dequantize_nodes,
        coverage=Coverage(()) if facts.has_cycle else measure_coverage(model, **facts.inference),
        findings=tuple(findings),
        parity=parities[_TORCH_PARITY],
        default_parity=parities[_SESSION_PARITY],
        payoff=payoff,
        validity=_assess_validity(model, facts),
    )


def _predict(model: ir.Model, gpu: str, facts: FileFacts) -> Payoff | None:
    """Predict times; None if the graph cannot be followed."""
    if facts.has_cycle:
        return None
    try:
        return predict_payoff(model, gpu, **facts.inference)
    except Exception:  # a damaged graph can raise anything; its faults are findings
        return None


def _compare(
    expected: Outputs | None,
    actual: Outputs | None,
    tie_floor_db: float | Mapping[str, float] | None,
) -> Parity | None:
    """Measure parity if both outputs were given.

    Args:
        expected: Outputs of the reference `[N, ...]`.
        actual: Outputs that are compared with them.
        tie_floor_db: See `Parity`.
    """
    if expected is None or actual is None:
        return None
    return measure_parity(expected, actual, tie_floor_db)


def _check_parities(
    path: Path, rules: Iterable[Rule], parities: Mapping[str, Parity | None]
) -> Iterator[Finding]:
    """The findings of the rules about outputs, whose titles are the messages.

    Args:
        path: The file.
        rules: The rules to apply.
        parities: Id of such a rule -> the measurement, None if outputs were not given.
    """
    for rule in rules:
        parity = parities.get(rule.id)
        if parity is None or parity.is_sufficient:
            continue
        for name, output in parity.failures.items():
            subject = f"SQNR of {printable(name)}" if name else "SQNR"
            yield Finding(
                rule=rule.id,
                node=path.name,
                message=f"{rule.title.rstrip('.')}: {subject} {output.sqnr_db:.1f} dB, "
                f"at least {output.required_sqnr_db:.1f} was expected",
                fix=_PARITY_FIXES[rule.id],
                severity=rule.severity,
            )


def _assess_validity(model: ir.Model, facts: FileFacts) -> Validity:
    """Whether a file is valid, whatever rules were chosen for its findings."""
    assert facts.runtime is not None  # noqa: S101 - it was asked
    findings = find_violations(model, choose_rules(FILE_RULES), facts)
    is_refuted = any(map(_refutes_validity, findings))
    onnx_refusal = facts.checker.structure
    if onnx_refusal is None:
        onnx_refusal = facts.checker.types
    return Validity(
        is_valid=facts.checker.limit is None and not is_refuted,
        onnx_version=facts.checker.version,
        onnx_refusal=onnx_refusal,
        runtime_version=facts.runtime.version,
        runtime_refusal=facts.runtime.refusal,
        onnx_limit=facts.checker.limit,
    )


def _refutes_validity(finding: Finding) -> bool:
    """Whether a finding of a rule about files means that the file cannot be called valid."""
    if finding.rule == "QDQ201":  # also as an info, because ONNX Runtime has not loaded the file
        return True
    return finding.severity != "info"
