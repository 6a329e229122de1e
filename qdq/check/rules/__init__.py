"""The rules for Q/DQ in a graph before TensorRT sees it; one file per family.

Ids are those of the lint table: L01 is QDQ101.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from qdq.check.facts import FileFacts
from qdq.check.payoff import Payoff
from qdq.check.rules import (  # noqa: F401
    attention,
    formats,
    history,
    imports,
    layers,
    numerics,
    pairs,
    placement,
    sharing,
    speed,
    types,
)
from qdq.check.rules.file import FILE_RULES as FILE_RULES
from qdq.check.rules.history import UNCALIBRATED as UNCALIBRATED
from qdq.check.rules.registry import RULES as RULES
from qdq.check.rules.registry import SEVERITIES as SEVERITIES
from qdq.check.rules.registry import Finding as Finding
from qdq.check.rules.registry import Flaw as Flaw
from qdq.check.rules.registry import Rule as Rule
from qdq.check.rules.registry import Severity as Severity
from qdq.check.rules.registry import choose_rules as choose_rules
from qdq.check.rules.registry import get_rule as get_rule
from qdq.check.rules.registry import register_rule as register_rule
from qdq.check.rules.view import GraphView as GraphView


def find_violations(
    model: ir.Model,
    rules: Iterable[Rule] | None = None,
    file: FileFacts | None = None,
    *,
    payoff: Payoff | None = None,
    sm: int | None = None,
) -> list[Finding]:
    """All violations of a model, by rule and in graph order.

    If a rule fails on the graph, this is reported as a finding, and the next rule is applied.

    Args:
        model: Not changed. Rules that need shapes report nothing if it has none.
        rules: Those to apply, all if None.
        file: Facts about the file; rules about files report nothing without them.
        payoff: Predicted times on a GPU; the rule about them reports nothing without it.
        sm: Compute capability of the GPU, 89 for 8.9; the rule about GPUs reports nothing without it.
    """
    view = GraphView(model, file, payoff=payoff, sm=sm)
    findings: list[Finding] = []
    for rule in choose_rules() if rules is None else rules:
        try:
            for flaw in rule.find(view):
                findings.append(_to_finding(rule, flaw))
        except Exception as error:  # a damaged graph or a rule of a user can raise anything
            findings.append(_report_failure(rule, error, model.graph.name or "graph"))
    return findings


def _to_finding(rule: Rule, flaw: Flaw) -> Finding:
    return Finding(
        rule=rule.id,
        node=flaw.node,
        message=flaw.message,
        fix=flaw.fix,
        severity=flaw.severity or rule.severity,
    )


def _report_failure(rule: Rule, error: Exception, graph_name: str) -> Finding:
    return Finding(
        rule=rule.id,
        node=graph_name,
        message=f"this rule cannot be applied to the graph ({type(error).__name__}: {error})",
        fix="fix the other findings first; if it remains, report it with the file.",
        severity="warning",
    )
